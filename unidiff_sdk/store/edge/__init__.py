"""Qdrant Edge: the Qdrant engine inside this process."""
