"""Generating images: as one answer, or as a stream of events with previews."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from PIL import Image

from unidiff_sdk._internal.images import decoded_image
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.catalog.results import Generated, Generation
from unidiff_sdk.generation.generator import Preview
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.generation.provenance import encode
from unidiff_sdk.serve.context import Context, hit_response, json_line, until_disconnected
from unidiff_sdk.serve.limits import checked_route
from unidiff_sdk.serve.problems import ANY_ROUTE, ProblemError, logged_problem, problem_responses
from unidiff_sdk.serve.schemas import GeneratedImage, GenerateRequest, GenerationResponse

__all__ = ["answered", "check_images", "generation_routes"]

PREVIEW_SECONDS = 0.25  # at least, between two previews: each costs a call of the decoder
EVENTS = "text/event-stream"


def generation_routes(context: Context) -> APIRouter:
    """The routes that generate images."""
    router = APIRouter(
        prefix="/v1",
        route_class=checked_route(context.limits.read),
        tags=["generation"],
        responses=problem_responses(*ANY_ROUTE, 501),
    )

    @router.post(
        "/generate",
        response_model=GenerationResponse,
        responses={200: {"content": {EVENTS: {"schema": {"type": "string"}}}}, **problem_responses(404)},
    )
    async def generate(request: Request, body: GenerateRequest) -> Any:
        """Generate images and rank them by their cosine with the prompt.

        With `Accept: text/event-stream`, the answer is a stream of events: `progress` (done, total), `preview` (images
        in base64 as WebP), and at the end `result` or `error`.
        """
        context.log(request, prompt=body.prompt)
        await context.require_generator()
        arguments = await _arguments(context, body)
        if EVENTS not in request.headers.get("accept", ""):
            async with context.generations.entered(context.settings.timeout):
                call = context.catalog.agenerate(body.prompt, **arguments)
                return await answered(context, await until_disconnected(request, call))
        context.generations.require_room()  # while the status can still say so
        events = _events(context, request.state.request_id, body.prompt, arguments)
        return StreamingResponse(events, media_type=EVENTS, headers={"Cache-Control": "no-store"})

    return router


async def _arguments(context: Context, body: GenerateRequest) -> dict[str, Any]:
    """The keyword arguments of `Catalog.generate`. Raises OptionError, ProblemError."""
    if body.like is not None and body.image is not None:
        raise ProblemError(422, "An argument is invalid", "like and image exclude each other: give one.")
    arguments = body.model_dump(exclude={"prompt", "image"})
    arguments["mask"] = decoded_image("mask", body.mask)
    arguments["like"] = decoded_image("image", body.image)
    if body.like is not None:
        arguments["like"] = await context.item(body.like)
    check_images(context, GenerationOptions(**arguments))
    return arguments


def check_images(context: Context, options: GenerationOptions) -> None:
    """Raise ProblemError if a request may generate more or larger images than the server allows."""
    for name, pixels in (("width", options.width), ("height", options.height)):
        if pixels is not None and pixels > context.settings.max_size:
            raise ProblemError(
                422,
                "An argument is invalid",
                f"{name} is {pixels:,}; this server allows up to {context.settings.max_size:,} pixels.",
            )
    if options.max_candidates > context.settings.max_images:
        raise ProblemError(
            422,
            "An argument is invalid",
            f"This request may generate {options.max_candidates} images, with those that replace rejected ones; this "
            f"server allows {context.settings.max_images}. Lower n, best_of or budget.",
        )


async def _events(context: Context, request_id: str, prompt: str, arguments: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a generation. Closing the iterator, as a client that is gone does, cancels it."""
    queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
    loop, last = asyncio.get_running_loop(), 0.0

    def post(event: str, content: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (event, content))

    def on_preview(preview: Preview) -> None:  # in the thread that generates
        nonlocal last
        state: dict[str, Any] = {"done": preview.done, "total": preview.total}
        post("progress", state)
        if time.monotonic() - last >= PREVIEW_SECONDS and preview.done < preview.total:
            last = time.monotonic()
            post("preview", state | {"images": [_webp(image) for image in preview.images()]})

    async def run() -> None:
        try:
            async with context.generations.entered(context.settings.timeout):
                generation = await context.catalog.agenerate(prompt, **arguments, preview=on_preview)
                response = await answered(context, generation)
            post("result", response.model_dump())
        except Exception as error:
            post("error", logged_problem(error, request_id).content(request_id))

    task = asyncio.create_task(run())
    try:
        while True:
            event, content = await queue.get()
            yield f"event: {event}\ndata: {json_line(content)}\n\n"
            if event in ("result", "error"):
                return
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def answered(context: Context, generation: Generation) -> GenerationResponse:
    """Generated images as the API returns them. Compressing them can take longer than other requests may wait."""
    context.metrics.add_images(generation.generated)
    return await in_thread(lambda: _generation_response(generation))


def _generation_response(generation: Generation) -> GenerationResponse:
    return GenerationResponse(
        images=[_generated(each) for each in generation],
        took_ms=round(generation.took_ms, 2),
        generated=generation.generated,
        rejected=dict(generation.rejected),
    )


def _generated(each: Generated) -> GeneratedImage:
    return GeneratedImage(
        image=base64.b64encode(encode(each.image, each.recipe)).decode(),
        score=each.score,
        seed=each.seed,
        nearest=None if each.nearest is None else hit_response(each.nearest),
        recipe=each.recipe,
    )


def _webp(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
