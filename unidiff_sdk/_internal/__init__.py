"""Helpers without a domain of their own. Not part of the public API."""
