"""The shortest useful program: fill a catalog, search it, draw a new product. Needs `pip install .[cpu]` only."""

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.synthetic import products, render

shop = products("fashion-woman", n=100)  # synthetic; your own folder: catalog.add_folder("products/")

with Catalog() as catalog:
    rows = [{"price": p.price, "catalog": p.catalog} for p in shop]
    catalog.add([render(p) for p in shop], texts=[p.caption for p in shop], payloads=rows)
    for hit in catalog.search("red striped dress", limit=3, where={"price": {"lt": 120}}):
        print(f"{hit.score:.3f}  {hit.payload['price']:>7.2f}  {hit.text}")
    best = catalog.generate("purple dotted boots", n=4, seed=7)[0]
    best.image.save("boots.png")
    print(f"{best.score:.3f}  boots.png, nearest: {best.nearest.text if best.nearest else None}")
