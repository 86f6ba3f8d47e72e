"""Recipes that train the models of this package from scratch: the tiny base and the frozen judge."""
