"""Printing results: tables, hits with their images, and contact sheets."""
