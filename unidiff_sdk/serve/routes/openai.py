"""Routes that clients of OpenAI's API can use: images and embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from unidiff_sdk._internal.images import decoded_image, load_image
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.serve.context import Context, form_parts, until_disconnected, validated
from unidiff_sdk.serve.limits import checked_route
from unidiff_sdk.serve.problems import ANY_ROUTE, ProblemError, problem_responses
from unidiff_sdk.serve.schemas import Embedding, EmbeddingsResponse, ImagesResponse, OpenAiImage

from .generation import answered, check_images

__all__ = ["openai_routes"]

MAX_INPUTS = 256
FILES = ("image", "image[]", "mask")  # of images/edits; OpenAI's clients send a list of images in "image[]"


class ImagesRequest(BaseModel):
    """The body of images/generations. Other members of OpenAI's API are refused: they would have no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = Field(None, description="Ignored: a server has one model.")
    n: int = 1
    size: str | None = Field(None, description='"512x512"; default: the size that the model was trained at.')
    response_format: Literal["b64_json"] = "b64_json"
    user: str | None = Field(None, description="Ignored.")
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `Catalog.generate`. Raises ProblemError."""
        width, height = _size(self.size)
        ignored = {"prompt", "model", "size", "response_format", "user"}
        return self.model_dump(exclude=ignored) | {"width": width, "height": height}


class EditsRequest(ImagesRequest):
    """The text fields of images/edits."""

    model_config = ConfigDict(strict=False)  # a form has numbers as texts

    strength: float | None = None


class ImageInput(BaseModel):
    """An image to embed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str = Field(description="An image file in base64, or a data: URL.")


class EmbeddingsRequest(BaseModel):
    """The body of embeddings: texts, and images as {"image": BASE64}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | ImageInput | list[str | ImageInput]
    model: str | None = Field(None, description="Ignored: a server has one model.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = Field(None, description="Ignored.")


def openai_routes(context: Context) -> APIRouter:
    """The routes of OpenAI's API that a catalog has an answer for."""
    router = APIRouter(
        prefix="/v1",
        route_class=checked_route(context.limits.read),
        tags=["OpenAI-compatible"],
        responses=problem_responses(*ANY_ROUTE, 501),
    )
    encoding = asyncio.Lock()  # an encoder uses all cores
    encoder_of = lru_cache(maxsize=1)(Encoder)  # loads a tokenizer; a new bundle after a reindexing has another one

    @router.post("/images/generations")
    async def generations(request: Request, body: ImagesRequest) -> ImagesResponse:
        """Generate images."""
        return await _generate(context, request, body.prompt, body.arguments())

    @router.post("/images/edits", openapi_extra=_edits_schema())
    async def edits(request: Request) -> ImagesResponse:
        """Change an image, or repaint what a mask marks: where it is transparent, as OpenAI's API defines it."""
        async with request.form(max_files=8, max_fields=32) as form:
            parts = form_parts(form, dict.fromkeys(FILES, UploadFile) | dict.fromkeys(EditsRequest.model_fields, str))
            images, masks = parts["image"] + parts["image[]"], parts["mask"]
            if len(images) != 1 or len(masks) > 1:
                raise ProblemError(
                    422,
                    "The request has another form",
                    f"The form has {len(images)} images and {len(masks)} masks; give one image, and at most one mask.",
                )
            fields = {name: parts[name][-1] for name in EditsRequest.model_fields if parts[name]}
            source = await images[0].read()
            repaint = await masks[0].read() if masks else None
        body = validated(lambda: EditsRequest.model_validate(fields), "form")
        arguments = body.arguments() | {"like": source}
        if repaint is not None:
            arguments["mask"] = await in_thread(lambda: _bright_where_transparent(repaint))
        return await _generate(context, request, body.prompt, arguments)

    @router.post("/embeddings")
    async def embeddings(request: Request, body: EmbeddingsRequest) -> EmbeddingsResponse:
        """Embed texts and images with the model of the catalog: unit vectors."""
        inputs = body.input if isinstance(body.input, list) else [body.input]
        if not 1 <= len(inputs) <= MAX_INPUTS:
            raise ProblemError(422, "An argument is invalid", f"input holds {len(inputs)}; give 1 to {MAX_INPUTS}.")
        bundle = await in_thread(lambda: context.catalog.bundle)
        if body.dimensions not in (None, bundle.dim):
            raise ProblemError(
                422, "An argument is invalid", f"dimensions is {body.dimensions}; this model has {bundle.dim}."
            )
        files = {
            n: decoded_image(f"input.{n}.image", each.image)
            for n, each in enumerate(inputs)
            if isinstance(each, ImageInput)
        }
        async with context.searches.entered(context.settings.timeout), encoding:
            vectors = await until_disconnected(request, in_thread(lambda: _embed(encoder_of(bundle), inputs, files)))
        data = [
            Embedding(index=n, embedding=_encoded(vector, body.encoding_format)) for n, vector in enumerate(vectors)
        ]
        return EmbeddingsResponse(model=bundle.name, data=data)

    return router


def _edits_schema() -> dict[str, Any]:
    """The OpenAPI description of the form that images/edits reads."""
    schema = EditsRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": file, "mask": file}
    schema["required"].append("image")
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def _generate(context: Context, request: Request, prompt: str, arguments: dict[str, Any]) -> ImagesResponse:
    context.log(request, prompt=prompt)
    await context.require_generator()
    check_images(context, GenerationOptions(**arguments))
    async with context.generations.entered(context.settings.timeout):
        generation = await until_disconnected(request, context.catalog.agenerate(prompt, **arguments))
        response = await answered(context, generation)
    data = [OpenAiImage(b64_json=each.image, seed=each.seed) for each in response.images]
    return ImagesResponse(created=int(time.time()), data=data)


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    width, x, height = size.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(size) < 16):
        raise ProblemError(422, "An argument is invalid", f'size is {size!r:.40}; give it as "512x512".')
    return int(width), int(height)


def _bright_where_transparent(mask: bytes) -> np.ndarray[Any, Any]:
    """The mask of `Catalog.generate` from OpenAI's, whose transparent pixels are to be repainted: uint8[h, w, 3]."""
    white, black = (np.asarray(load_image(mask, background=color)).astype(np.int16) for color in ("white", "black"))
    bright: np.ndarray[Any, Any] = np.clip(white - black, 0, 255).astype(np.uint8)
    return bright


def _embed(
    encoder: Encoder, inputs: list[str | ImageInput], files: dict[int, bytes | None]
) -> list[np.ndarray[Any, Any]]:
    texts = {n: each for n, each in enumerate(inputs) if isinstance(each, str)}
    vectors: dict[int, np.ndarray[Any, Any]] = {}
    if texts:
        vectors |= zip(texts, encoder.encode_texts(list(texts.values())), strict=True)
    if files:
        images = [load_image(data or b"") for data in files.values()]
        vectors |= zip(files, encoder.encode_images(images), strict=True)
    return [vectors[n] for n in range(len(inputs))]


def _encoded(vector: np.ndarray[Any, Any], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
