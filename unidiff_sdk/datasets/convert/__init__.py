"""Convert public product datasets to folders that `reader` reads, with reproducible splits.

Each function documents the layout that it expects and its source. The datasets have their own terms of use, and some
require the consent of their owners. The layouts were reconstructed from their documentation and from programs that read
them.
"""

from .abo import abo
from .deepfashion_inshop import deepfashion_inshop
from .deepfashion_multimodal import deepfashion_multimodal
from .fashion200k import fashion200k
from .fashion_iq import fashion_iq
from .hm import hm
from .m5product import m5product
from .marqo import marqo
from .pairs import SEED, SHARES, Converted, Pair, convert, split_of

__all__ = [
    "SEED",
    "SHARES",
    "Converted",
    "Pair",
    "abo",
    "convert",
    "deepfashion_inshop",
    "deepfashion_multimodal",
    "fashion200k",
    "fashion_iq",
    "hm",
    "m5product",
    "marqo",
    "split_of",
]
