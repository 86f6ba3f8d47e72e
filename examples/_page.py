"""Cards of the example pages: one for a search hit, one for a generated image."""

from __future__ import annotations

from unidiff_sdk import Generated, Hit
from unidiff_sdk._internal.pages.html import Card, CardRow, Page, Section

__all__ = ["Card", "CardRow", "Page", "Section", "generated_card", "hit_card"]


def hit_card(hit: Hit) -> Card:
    """A search hit: its score, its price if it has one, and its caption."""
    badge = "generated" if hit.payload.get("generated") else ""
    price = f"{hit.payload['price']:.2f}" if "price" in hit.payload else ""
    return Card(hit.load_image(), hit.text or "", f"{hit.score:.3f}", price, badge=badge)


def generated_card(generated: Generated) -> Card:
    """A generated image: its cosine to the prompt, its seed, its prompt, and the nearest item of the catalog."""
    near = (generated.nearest.load_image(), f"nearest: {generated.nearest.text}") if generated.nearest else None
    return Card(generated.image, generated.prompt, f"{generated.score:.3f}", f"seed {generated.seed}", near=near)
