"""Loading: which files of a base are read, and what is added to it."""
