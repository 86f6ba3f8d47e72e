"""What the examples' pages show of a catalog: a card for a search hit, a card for a generated picture."""

from __future__ import annotations

from unidiff_sdk import Generated, Hit
from unidiff_sdk._internal.pages.html import Card, Page, Row, Section

__all__ = ["Card", "Page", "Row", "Section", "drawn_card", "hit_card"]


def hit_card(hit: Hit) -> Card:
    """A search hit: its score, its price if it has one, its caption."""
    badge = "generated" if hit.payload.get("generated") else ""
    price = f"{hit.payload['price']:.2f}" if "price" in hit.payload else ""
    return Card(hit.load_image(), hit.text or "", f"{hit.score:.3f}", price, badge=badge)


def drawn_card(picture: Generated) -> Card:
    """A generated picture: how well it agrees with its prompt, how to make it again, what is nearest to it."""
    near = (picture.nearest.load_image(), f"nearest: {picture.nearest.text}") if picture.nearest else None
    return Card(picture.image, picture.prompt, f"{picture.score:.3f}", f"seed {picture.seed}", near=near)
