"""The options of a search: which part of a ranking to return, and how to rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from unidiff_sdk._internal.json_values import is_finite_number, plain_number, shown_integer
from unidiff_sdk.errors import OptionError
from unidiff_sdk.store.filters import Clause, parse
from unidiff_sdk.store.protocol import CANDIDATES

__all__ = ["MAX_LIMIT", "MAX_RERANKED", "SearchOptions", "call_with", "check_page"]

T = TypeVar("T")

MAX_LIMIT = 10_000
MAX_OFFSET = 10**12  # more than any store has items; the engine's own limit is 64 bits
MAX_EF = 10_000
MAX_RERANKED = 64  # each item costs calls of the UNet; beyond the first few, the right item is rarely among them
_DEFAULT_HYBRID = 0.5  # the share of the caption ranking for hybrid=True


@dataclass(frozen=True)
class SearchOptions:
    """Everything about a search except the query. `Catalog.search` and `search_batch` build it from their arguments.

    Attributes:
        limit: the maximum number of hits, 1 to 10,000.
        offset: the number of best hits to skip.
        cursor: instead of `offset`: `Page.cursor` of the previous page. Items added or deleted between two pages then
            neither repeat nor hide a hit. All other arguments of the search except `limit` must be the same.
        where: a filter on the columns (`store.filters`): `{"price": {"lt": 80}, "brand": ["a", "b"]}`.
        min_score: exclude hits with a lower score.
        diversity: 0 to 1, the weight of variety against similarity among the best max(100, 5 * limit) items
            (`reranking.diversity`). Start with 0.3.
        group_by: a column of single values; only the best item of each value is a hit. Items without it are kept.
        hybrid: also rank by the words of the captions (BM25) and fuse both rankings; for names and numbers that an
            encoder does not know. The share of the captions, from 0 to below 1; True means 0.5, False means 0. Scores
            are then ranks. With it, offset + limit is at most 500.
        rerank: re-rank this number of best items with the generator, 2 to 64 (`retrieval.reranking`); True means the
            number that the bundle recommends, False or 0 none. Needs a text. `min_score` and the choice of the best
            item of a group use the encoder's score; items after the re-ranked ones keep their order.
        ef: the number of candidates that the search index considers, 1 to 10,000 (`ef` of HNSW, Malkov and Yashunin
            2018). Fewer are faster, more find more of the nearest items. Default: the engine's, which is 100 on one
            machine. At least `limit`, and more while many items of the index are deleted.
        exact: compare with every item instead of searching the index. Finds all nearest items.
        clause: `where`, parsed.

    Raises:
        OptionError: an option is out of range, or two options exclude each other.
        FilterError: `where` is not a valid filter.
    """

    limit: int = 10
    offset: int = 0
    cursor: str | None = None
    where: Mapping[str, Any] | None = None
    min_score: float | None = None
    diversity: float | None = None
    group_by: str | None = None
    hybrid: bool | float = False
    rerank: bool | int = False
    ef: int | None = None
    exact: bool = False
    clause: Clause | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("limit", "offset", "min_score", "diversity", "hybrid", "rerank", "ef"):
            value = getattr(self, name)
            if (plain := plain_number(value)) is not value:
                object.__setattr__(self, name, plain)
        check_page(self.limit, self.offset)
        for name in ("min_score", "diversity", "hybrid", "rerank", "ef"):
            if isinstance(value := getattr(self, name), int) and value.bit_length() > 128:
                raise OptionError(f"{name} is {shown_integer(value)}: give a smaller number")
        if not isinstance(self.cursor, (str, type(None))):
            raise OptionError(f"cursor={self.cursor!r:.60}: not a cursor: give the attribute cursor of a Page")
        if self.cursor and self.offset:
            raise OptionError("offset= and cursor= exclude each other: a cursor already marks where its page starts")
        if self.min_score is not None and not is_finite_number(self.min_score):
            raise OptionError(f"min_score={self.min_score!r:.60}: give a finite number")
        if self.diversity is not None and not (is_finite_number(self.diversity) and 0 <= self.diversity <= 1):
            raise OptionError(f"diversity={self.diversity!r:.60}: give a number from 0 (none) to 1")
        if self.group_by is not None and (not isinstance(self.group_by, str) or not self.group_by):
            raise OptionError(f"group_by={self.group_by!r:.60}: give the name of a column")
        if self.diversity is not None and self.group_by is not None:
            raise OptionError("diversity= and group_by= exclude each other: choose one")
        hybrid = {True: _DEFAULT_HYBRID, False: 0.0}[self.hybrid] if isinstance(self.hybrid, bool) else self.hybrid
        if not (is_finite_number(hybrid) and 0 <= hybrid < 1):
            raise OptionError(f"hybrid={hybrid!r:.60}: give True, False, or a number from 0 to below 1")
        if hybrid and self.min_score is not None:
            raise OptionError("min_score= and hybrid= exclude each other: hybrid scores are ranks, not cosines")
        if hybrid and self.offset + self.limit > CANDIDATES:
            raise OptionError(
                f"offset + limit = {self.offset + self.limit:,}: give at most {CANDIDATES} in total with "
                f"hybrid=, which fuses the first {CANDIDATES} items of two rankings"
            )
        if not isinstance(self.rerank, bool) and not _is_reranked(self.rerank):
            raise OptionError(
                f"rerank={self.rerank!r:.60}: give True, False, or the number of items to re-rank, 2 to {MAX_RERANKED}"
            )
        if self.rerank and self.diversity is not None:
            raise OptionError("rerank= and diversity= exclude each other: choose one")
        if self.ef is not None and not (_is_integer(self.ef) and 1 <= self.ef <= MAX_EF):
            raise OptionError(f"ef={self.ef!r:.60}: give an integer from 1 to {MAX_EF:,}, or None")
        if not isinstance(self.exact, bool):
            raise OptionError(f"exact={self.exact!r:.60}: give True or False")
        if self.exact and self.ef is not None:
            raise OptionError("exact= and ef= exclude each other: an exact search does not use the index")
        object.__setattr__(self, "cursor", self.cursor or None)
        object.__setattr__(self, "hybrid", float(hybrid))
        object.__setattr__(self, "clause", parse(self.where))


def check_page(limit: int, offset: int) -> None:
    """Check the bounds of a page. Raises OptionError."""
    for name, value in {"limit": limit, "offset": offset}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise OptionError(f"{name}={value!r:.60}: give an integer")
    if not 1 <= limit <= MAX_LIMIT:
        raise OptionError(f"limit={shown_integer(limit)}: give an integer from 1 to {MAX_LIMIT:,}")
    if not 0 <= offset <= MAX_OFFSET:
        raise OptionError(f"offset={shown_integer(offset)}: give an integer from 0 to {MAX_OFFSET:,}")


def call_with(factory: Callable[..., T], arguments: Any, name: str) -> T:
    """Call with keyword arguments given by the user. Raises OptionError for unknown ones."""
    valid = list(inspect.signature(factory).parameters)
    if not isinstance(arguments, Mapping):
        raise OptionError(f"{name} is {arguments!r:.60}: give a dictionary with keys from {', '.join(valid)}")
    if unknown := [argument for argument in arguments if argument not in valid]:
        raise OptionError(f"{name} has no argument {', '.join(map(repr, unknown))}. Arguments: {', '.join(valid)}")
    return factory(**arguments)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_reranked(count: Any) -> bool:
    return isinstance(count, int) and (count == 0 or 2 <= count <= MAX_RERANKED)
