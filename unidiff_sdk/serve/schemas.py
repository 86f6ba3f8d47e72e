"""What requests and responses contain. Ranges are checked by the SDK, which names the accepted values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ColumnsChange",
    "DeleteRequest",
    "DeleteResponse",
    "EmbeddingsResponse",
    "FacetsResponse",
    "GenerateRequest",
    "GeneratedImage",
    "GenerationResponse",
    "GroupsResponse",
    "HitResponse",
    "IdsResponse",
    "ImagesResponse",
    "InfoResponse",
    "ItemInput",
    "ItemsRequest",
    "PageResponse",
    "SearchRequest",
]

Id = str | int
Ids = Annotated[list[Id], Field(max_length=256)]
ImageData = Annotated[
    str, Field(description="An image file in base64 (also URL-safe), or a data: URL.", examples=["iVBORw0KGgo…"])
]


class Request(BaseModel):
    """A body whose members are known. An unknown one is an error: it would be ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SearchRequest(Request):
    """The arguments of `Catalog.search`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"text": "red striped dress", "limit": 12, "where": {"price": {"lt": 80}}},
                {"text": "but in blue", "like": "D-17", "weights": {"text": 0.6, "like": 0.4}},
            ]
        },
    )

    text: str | None = None
    image: ImageData | None = None
    like: Id | Ids | None = Field(None, description="Ids of items to approach. They are excluded from the hits.")
    unlike: Id | Ids | None = Field(None, description="Ids of items to avoid.")
    without: str | Annotated[list[str], Field(max_length=256)] | None = Field(None, description="Texts to avoid.")
    vector: list[float] | None = Field(None, description="An embedding by the model of this catalog.")
    weights: dict[str, float] | None = Field(None, description='By name, as in {"text": 2, "image": 1}.')
    imagine: int = Field(0, description="Also search with this number of generated images, up to 16.")
    limit: int = Field(10, description="The maximum number of hits.")
    offset: int = 0
    cursor: str | None = Field(None, description="The cursor of the previous page, instead of offset.")
    where: dict[str, Any] | None = Field(None, description='A filter on the columns: {"price": {"lt": 80}}.')
    min_score: float | None = None
    diversity: float | None = Field(None, description="0 to 1, the weight of variety against similarity.")
    group_by: str | None = Field(None, description="Only the best item of each value of this column.")
    hybrid: bool | float = Field(False, description="Also rank by the words of the captions.")
    rerank: bool | int = Field(False, description="Re-rank this number of best hits with the generator.")
    ef: int | None = Field(None, description="The number of candidates that the search index considers.")
    exact: bool = Field(False, description="Compare with every item instead of searching the index.")


class GenerateRequest(Request):
    """The arguments of `Catalog.generate`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"prompt": "purple dotted boots", "n": 4, "seed": 7}]},
    )

    prompt: str
    negative_prompt: str = ""
    n: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | None = None
    width: int | None = None
    height: int | None = None
    lora: dict[str, float] | None = Field(
        None, description='Switchable LoRAs of the model and their weights: {"studio-light": 0.6}.'
    )
    long_prompts: str = "truncate"
    like: Id | None = Field(None, description="The id of an item to start from.")
    image: ImageData | None = Field(None, description="An image to start from, instead of an item.")
    strength: float | None = None
    mask: ImageData | None = Field(None, description="With like or image: bright where to repaint.")
    best_of: int | None = None
    min_score: float | None = None
    max_similarity: float | None = None
    budget: int | None = None


class ItemInput(Request):
    """One item to add."""

    image: ImageData
    id: Id | None = Field(None, description="Default: a hash of image and caption.")
    text: str | None = Field(None, description="The caption.")
    columns: dict[str, Any] = Field(default_factory=dict)


class ItemsRequest(Request):
    """Items to add. Those with the id of a stored item replace it."""

    items: list[ItemInput] = Field(min_length=1, max_length=256)


class DeleteRequest(Request):
    """Items to delete."""

    ids: list[Id] = Field(min_length=1, max_length=10_000)


class ColumnsChange(Request):
    """Columns to change. null removes a column."""

    columns: dict[str, Any]


class HitResponse(BaseModel):
    """One item."""

    id: Id
    score: float
    text: str | None
    columns: dict[str, Any]
    image: str = Field(description="The path of the image on this server. ?size=128 returns a thumbnail.")
    rerank_score: float | None = None
    gain: float | None = None


class PageResponse(BaseModel):
    """A page of hits, best first."""

    hits: list[HitResponse]
    offset: int
    limit: int
    took_ms: float
    cursor: str | None = Field(description="For the next page; null on the last one.")


class FacetValue(BaseModel):
    """A value of a column, and the number of items with it."""

    value: str | bool | int | float
    count: int


class FacetsResponse(BaseModel):
    """The values of a column, the most frequent first."""

    column: str
    values: list[FacetValue]


class GroupsResponse(BaseModel):
    """Groups of items with almost the same image."""

    groups: list[list[HitResponse]]


class IdsResponse(BaseModel):
    """The ids of the items that were stored, in the order of the request."""

    ids: list[Id]


class DeleteResponse(BaseModel):
    """The number of items that were deleted."""

    deleted: int


class BundleInfo(BaseModel):
    """The model of a catalog."""

    name: str
    fingerprint: str
    precision: str


class InfoResponse(BaseModel):
    """What a server holds and allows."""

    items: int
    columns: dict[str, str] = Field(description="Columns with their kinds.")
    bundle: BundleInfo
    generates: bool = Field(description="Whether the model generates images.")
    writes: bool = Field(description="Whether requests may change the catalog.")
    max_images: int = Field(description="Images that one request may generate.")


class GeneratedImage(BaseModel):
    """One generated image, and what reproduces it."""

    image: str = Field(description="A PNG in base64, with its recipe in the metadata.")
    score: float
    seed: int
    nearest: HitResponse | None
    recipe: dict[str, Any]


class GenerationResponse(BaseModel):
    """Generated images, the best first."""

    images: list[GeneratedImage]
    took_ms: float
    generated: int
    rejected: dict[str, int]


class OpenAiImage(BaseModel):
    """A generated image as OpenAI's API returns it."""

    b64_json: str = Field(description="A PNG in base64.")
    seed: int


class ImagesResponse(BaseModel):
    """Generated images as OpenAI's API returns them."""

    created: int = Field(description="Seconds since 1970.")
    data: list[OpenAiImage]


class Embedding(BaseModel):
    """The embedding of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or little-endian float32 in base64.")


class Usage(BaseModel):
    """Zeros: nothing is billed."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsResponse(BaseModel):
    """Embeddings as OpenAI's API returns them."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage = Usage()
