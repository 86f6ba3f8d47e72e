"""The `unidiff` command line."""
