"""Bundles and the sessions that run their graphs."""
