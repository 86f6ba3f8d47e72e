"""The `unidiff` command line, and the command classes that all console scripts share."""
