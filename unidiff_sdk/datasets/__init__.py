"""Product data on disk: reading it, converting public datasets, and rendering synthetic catalogs."""
