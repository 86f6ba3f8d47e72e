"""`unidiff serve` under load and under attack, with a server written by hand as its peer."""
