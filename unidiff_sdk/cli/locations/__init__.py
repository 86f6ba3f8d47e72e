"""The catalog that a command works on: a folder, a Qdrant server, or a folder that `unidiff serve` has open."""
