"""The folder of a bundle: its files, its signature, the interfaces of its graphs, and folders of other exporters."""
