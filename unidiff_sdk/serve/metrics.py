"""Metrics for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["method", "route"]
        self._requests = Counter(
            "unidiff_requests", "Requests by status.", [*labels, "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "unidiff_request_seconds", "Duration of requests.", labels, buckets=_SECONDS, registry=self._registry
        )
        self._running = Gauge("unidiff_running", "Calls that run or wait.", ["kind"], registry=self._registry)
        self._items = Gauge("unidiff_items", "Items in the catalog.", registry=self._registry)
        self._images = Counter("unidiff_generated_images", "Images that were generated.", registry=self._registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def set_running(self, kind: str, count: int) -> None:
        """Record how many calls of a kind run or wait."""
        self._running.labels(kind).set(count)

    def add_images(self, count: int) -> None:
        """Count generated images."""
        self._images.inc(count)

    def render(self, items: int) -> bytes:
        """The metrics in the text format of Prometheus."""
        self._items.set(items)
        return generate_latest(self._registry)
