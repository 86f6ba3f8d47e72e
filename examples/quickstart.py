"""The shortest useful program: fill a catalog, search it, generate a new product. Needs `pip install .[cpu]` only.

The products are synthetic. The split "test-unseen" holds combinations of type, color and pattern, such as red striped
dresses, that the training of the built-in model never showed.
"""

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.synthetic import products, render

shop = products("fashion-woman", n=300, split="test-unseen")  # your own folder: catalog.add_folder("products/")

with Catalog() as catalog:
    payloads = [p.attributes | {"price": p.price, "catalog": p.catalog} for p in shop]
    catalog.add([render(p) for p in shop], texts=[p.caption for p in shop], payloads=payloads)
    for hit in catalog.search("red striped dress", limit=3, where={"price": {"lt": 80}}):
        print(f"{hit.score:.3f}  {hit.payload['price']:>7.2f}  {hit.text}")
    best = catalog.generate("purple dotted boots", n=4, seed=7)[0]
    best.image.save("boots.png")
    print(f"{best.score:.3f}  boots.png, nearest: {best.nearest.text if best.nearest else None}")
