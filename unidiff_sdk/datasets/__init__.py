"""Catalogs on disk: reading anyone's (`reader`), and drawing the synthetic ones (`synthetic`)."""
