"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.errors import FilterError, OptionError

if TYPE_CHECKING:
    from unidiff_sdk.catalog.catalog import Catalog

    from .locations.served_catalog import ServedCatalog

__all__ = [
    "json_option",
    "parse_pairs",
    "parse_where",
    "references_option",
    "refuse_options",
    "stored_id",
    "trusted_key_option",
    "where_option",
]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
where_option = click.option("--where", metavar="JSON", help='Filter on columns: \'{"brand": "Acme"}\'.')
references_option = click.option(
    "--references",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder of the images that were indexed with --reference.",
)

trusted_key_option = click.option(
    "--trusted-key",
    "trusted_keys",
    metavar="PEM",
    multiple=True,
    callback=lambda context, option, files: files or None,
    help="Public key that must have signed the bundle (unidiff-export --sign). Repeatable: any of them.",
)


def refuse_options(reason: str, *names: str) -> None:
    """Raise OptionError if any of these parameters was given on the command line, where it has no effect."""
    ctx = click.get_current_context()
    given = [
        parameter.opts[-1]
        for parameter in ctx.command.params
        if parameter.name in names and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        have = "has" if len(given) == 1 else "have"
        raise OptionError(f"{', '.join(given)} {have} no effect {reason}.")


def parse_where(where: str | None) -> Any:
    """The filter in a `--where` option. Raises FilterError if it is not JSON."""
    if where is None:
        return None
    try:
        return parse_json(where, "--where", error=FilterError, kind=object)
    except FilterError as error:
        raise FilterError(f'{error}. Example: \'{{"price": {{"lt": 80}}}}\'') from None


def parse_pairs(ctx: click.Context, option: click.Parameter, pairs: str | None) -> dict[str, str | None] | None:
    """The value of an option such as "image=photo,text=title"; a name without a value is None."""
    if pairs is None:
        return None
    parsed: dict[str, str | None] = {}
    example = f"{option.opts[-1]} {'price=number,size=string' if option.name == 'kinds' else 'image=photo,text=title'}"
    for pair in pairs.split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals):
            raise click.BadParameter(f"{pair!r:.60} is not NAME=VALUE. Example: {example}")
        parsed[name] = value or None
    return parsed


def stored_id(catalog: Catalog | ServedCatalog, id: str, *, unambiguous: bool = False) -> str | int:
    """The id of an item as it is stored: 7 is the string "7", or else the integer 7. An unknown id is returned as is.

    Raises OptionError with `unambiguous` if there are both.
    """
    from unidiff_sdk.store.ids import possible_ids

    from .locations.served_catalog import ServedCatalog

    if isinstance(catalog, ServedCatalog):
        return id  # the server does the same
    found = [candidate for candidate in possible_ids(id) if catalog.get(candidate)]
    if unambiguous and len(found) > 1:
        raise OptionError(
            f'Two items have the id {id}: the string "{id}" and the integer. Name one of them in Python, as in '
            f"catalog.delete({id})."
        )
    return found[0] if found else id
