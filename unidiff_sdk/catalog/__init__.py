"""The catalog: a Qdrant store, an image store and a bundle behind one object."""
