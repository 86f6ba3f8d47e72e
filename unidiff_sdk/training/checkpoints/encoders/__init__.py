"""Encoders of texts and images: loading and conversion, with or without a generator."""
