"""Qdrant Edge: the Qdrant engine inside this process, with its data in a folder."""
