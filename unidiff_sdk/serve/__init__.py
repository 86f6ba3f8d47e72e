"""`unidiff serve`: a catalog over HTTP, with a storefront. Needs the extra `serve`.

from unidiff_sdk import Catalog
from unidiff_sdk.serve import ServerSettings, create_app

app = create_app(Catalog("shop.catalog"), ServerSettings())     # an ASGI application, for uvicorn or another server
"""

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
