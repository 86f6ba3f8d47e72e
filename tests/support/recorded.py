"""A bundle whose sessions record their calls, so that a test sees how the runtime uses a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.inference.sessions import Session, create_session

Arrays = dict[str, np.ndarray]


class RecordedSession:
    """A session that records its calls.

    Attributes:
        shapes: for each call the shape of each input.
        alter_feeds, alter_outputs: applied before and after each call.
    """

    def __init__(self, session: Session) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.providers, self.captured = session.providers, session.captured
        self.session = session
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.alter_feeds: Callable[[Arrays], Arrays] = dict
        self.alter_outputs: Callable[[Arrays], Arrays] = dict

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> Arrays:
        self.shapes.append({name: array.shape for name, array in feeds.items()})
        return self.alter_outputs(self.session.run(self.alter_feeds(dict(feeds)), outputs))

    @property
    def batches(self) -> list[int]:
        """The batch size of each call."""
        return [next(iter(shapes.values()))[0] for shapes in self.shapes]


def recorded_session(file: Path, **options: Any) -> RecordedSession:
    """A session factory."""
    return RecordedSession(create_session(file, **options))


def open_recorded(folder: Path) -> Bundle:
    """Open a bundle whose sessions are `RecordedSession`s."""
    return Bundle(folder, Manifest.read(folder), threads=1, session_factory=recorded_session)


def recorded(bundle: Bundle, graph: str) -> RecordedSession:
    """The session of a graph of such a bundle."""
    session = bundle.session(graph)
    assert isinstance(session, RecordedSession)
    return session


def open_watched(folder: Path, before_run: Callable[[str, Arrays], None]) -> Bundle:
    """Open a bundle that calls `before_run(graph, feeds)` before each call of a graph: to count, delay or fail it."""

    def watched_session(file: Path, **options: Any) -> RecordedSession:
        def watch(feeds: Arrays) -> Arrays:
            before_run(file.parent.name, feeds)
            return feeds

        session = recorded_session(file, **options)
        session.alter_feeds = watch
        return session

    return Bundle(folder, Manifest.read(folder), session_factory=watched_session)
