"""Reorder the hits of a search: by the generator, which knows what a text explains, or for variety."""
