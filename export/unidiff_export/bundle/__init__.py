"""Write a bundle: its files, graphs, manifest and model card."""
