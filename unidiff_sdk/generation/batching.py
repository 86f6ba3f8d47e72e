"""Continuous batching: which jobs share the next call of the UNet.

Requests come from any number of threads. A request joins at the next call and leaves when its jobs are finished,
whatever the others do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.lifetimes import Owner
from unidiff_sdk.errors import BusyError, GenerationError, StoreError, UniDiffError

from .denoising import Batch, Job, Predict, Progress

__all__ = ["MAX_REQUESTS", "Batcher", "cancellation"]

Float32 = NDArray[np.float32]

MAX_REQUESTS = 64
"""The most requests at the same time. One more is refused instead of waiting for an unknown time."""

cancellation: ContextVar[threading.Event | None] = ContextVar("cancellation", default=None)
"""Set by the caller of `Batcher.denoise`: an event that ends its request, also while it waits for its turn."""

_CANCELLATION_SECONDS = 0.25  # between two checks of that event

# How long a call waits for requests whose callback is running, as a share of the duration of the last call. So a
# callback that returns soon costs its request no turn, and a slow one does not delay the others.
_CALLBACK_GRACE = 0.1


class Batcher:
    """Runs the denoising of many threads in one of them at a time; it starts no thread.

    The first thread leads: it runs the calls, with the jobs of all requests, until its own request is finished. Then
    another waiting thread leads. A dedicated thread would cost a single request two switches between threads.

    Requests are served in the order of their arrival. In turn, each gets a place in the call for one image, until the
    call is full. A request of which an image is finished moves behind the others. So a request for one image never
    waits for another request's hundred. Shapes that cannot share a call take turns.

    Args:
        predict: the UNet. Its output must not alias an input.
        positions: the most latent positions in one call; a call holds at least one image.
        max_requests: one more raises BusyError.
    """

    def __init__(self, predict: Predict, *, positions: int, max_requests: int = MAX_REQUESTS) -> None:
        self._predict = predict
        self._positions = positions
        self._max_requests = max_requests
        self._owner = Owner("The generator")
        self._lock = threading.Lock()  # of all fields below, and of the requests
        self._callback_returned = threading.Condition(self._lock)
        self._requests: list[_Request] = []
        self._batch: Batch | None = None
        self._has_leader = False
        self._stopped = ""  # the reason
        self._calls = 0
        self._last_call: dict[tuple[Any, ...], int] = {}  # by the shape of its jobs
        self._call_seconds = 0.0

    def denoise(self, jobs: Sequence[Job], on_step: Callable[[Progress], None] | None = None) -> Float32:
        """Finish jobs: float32[len(jobs), channels, height, width], a new array.

        Args:
            jobs: at least one; all of one shape.
            on_step: called in this thread after each step; the request continues when it returns. An exception from it
                ends this request and no other.

        Raises:
            BusyError: too many requests are running.
            GenerationError: a call failed, or `cancellation` was set. Errors of this package are passed on.
            StoreError: `stop` was called.
        """
        self._owner.check()
        request = _Request(jobs, self._lock, has_callback=on_step is not None)
        self._submit(request)
        try:
            while True:
                self._lead_or_wait(request)
                with self._lock:
                    if request.is_cancelled and not request.finished:
                        raise GenerationError("the task that awaited these images was cancelled")
                    if isinstance(request.error, UniDiffError):  # already says what is wrong
                        raise request.error
                    if request.error is not None:
                        raise GenerationError(f"a call of the UNet failed ({request.error})") from request.error
                if on_step is not None:
                    on_step(Progress(jobs))
                with self._lock:
                    request.in_callback = False
                    if request.finished and request.error is None:
                        return np.stack([job.x for job in jobs])
                    self._callback_returned.notify()
        finally:
            with self._lock:
                if request in self._requests:  # the callback raised, or the thread was interrupted
                    self._remove(request)
                    self._callback_returned.notify()
                    self._wake_leader()

    def stop(self, reason: str) -> None:
        """End all requests with a StoreError, and refuse new ones."""
        with self._lock:
            self._stopped = reason
            for request in list(self._requests):
                request.error = StoreError(reason)
                self._notify(request, finished=True)

    def _submit(self, request: _Request) -> None:
        with self._lock:
            if self._stopped:
                raise StoreError(self._stopped)
            if len(self._requests) >= self._max_requests:
                raise BusyError(f"{len(self._requests)} generations are running, which is the limit; try again later")
            self._requests.append(request)

    # Leading

    def _lead_or_wait(self, request: _Request) -> None:
        """Run calls, or let another thread run them, until the request is in its callback or finished."""
        with self._lock:
            while not request.paused and self._has_leader:
                if request.is_cancelled:
                    return
                request.changed.wait(None if request.cancelled is None else _CANCELLATION_SECONDS)
            if request.paused:
                return
            self._has_leader = True
        try:
            while not request.paused and not request.is_cancelled:
                self._call()
        finally:
            with self._lock:
                self._has_leader = False
                self._wake_leader()

    def _wake_leader(self) -> None:
        """Wake a waiting thread if no thread leads. (One in its callback leads when it returns.)"""
        waiting = next((request for request in self._requests if not request.paused), None)
        if not self._has_leader and waiting is not None:
            waiting.changed.notify()

    def _call(self) -> None:
        jobs = self._next_jobs()
        try:
            if self._batch is None or self._batch.jobs != jobs:
                self._batch = Batch(jobs)
            started = time.perf_counter()
            self._batch.step(self._predict)
            self._call_seconds = time.perf_counter() - started
            self._report_step(jobs)
        except Exception as error:  # of any kind: it is raised in the threads of the requests
            self._batch = None
            self._report_failure(jobs, error)
        except BaseException:  # only this thread is interrupted: the jobs of the others continue from where they are
            self._batch = None
            self._report_step(jobs)
            raise

    def _next_jobs(self) -> list[Job]:
        """The jobs of the next call."""
        with self._lock:
            if (continued := self._continued_jobs()) is not None:
                return continued
            grace = _CALLBACK_GRACE * self._call_seconds
            self._callback_returned.wait_for(lambda: not any(r.in_callback for r in self._requests), grace)
            queues = [request.unfinished for request in self._requests if not request.in_callback]
            shapes = dict.fromkeys(job.shape for queue in queues for job in queue)  # in the order of their arrival
            shape = min(shapes, key=lambda shape: self._last_call.get(shape, -1))
            self._calls += 1
            self._last_call[shape] = self._calls
            return _fill_call([[job for job in queue if job.shape == shape] for queue in queues], self._positions)

    def _continued_jobs(self) -> list[Job] | None:
        """The jobs of the last call, if the only request takes its next step with all of them, as most requests do."""
        if self._batch is None or len(self._requests) != 1:
            return None
        (request,) = self._requests
        continues = not request.in_callback and request.unfinished == self._batch.jobs
        return self._batch.jobs if continues else None

    # Reporting to the threads of the requests

    def _report_step(self, jobs: list[Job]) -> None:
        called = set(map(id, jobs))
        with self._lock:
            for request in list(self._requests):
                if any(id(job) in called for job in request.unfinished):
                    left = [job for job in request.unfinished if not job.finished]
                    if left and len(left) < len(request.unfinished):  # an image is finished: now another's turn
                        self._requests.remove(request)
                        self._requests.append(request)
                    request.unfinished = left
                    request.in_callback = request.has_callback
                    self._notify(request, finished=not request.unfinished)

    def _report_failure(self, jobs: list[Job], error: BaseException) -> None:
        called = set(map(id, jobs))
        with self._lock:
            for request in list(self._requests):
                if any(id(job) in called for job in request.unfinished):
                    request.error = error
                    self._notify(request, finished=True)

    def _notify(self, request: _Request, *, finished: bool) -> None:
        if finished:
            request.finished = True
            self._remove(request)
        if request.paused:
            request.changed.notify()

    def _remove(self, request: _Request) -> None:
        self._requests.remove(request)
        if not self._requests:
            self._batch = None
            self._last_call.clear()


class _Request:
    """The jobs of one call of `Batcher.denoise`, and its state, which its thread shares with the leading one."""

    def __init__(self, jobs: Sequence[Job], lock: threading.Lock, *, has_callback: bool) -> None:
        self.unfinished = list(jobs)
        self.has_callback = has_callback
        self.in_callback = False
        self.finished = False
        self.cancelled = cancellation.get()
        self.error: BaseException | None = None
        self.changed = threading.Condition(lock)  # the thread of the request waits for it

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller no longer waits for the images."""
        return self.cancelled is not None and self.cancelled.is_set()

    @property
    def paused(self) -> bool:
        """Whether no call may include it: it is in its callback, or finished."""
        return self.in_callback or self.finished


def _fill_call(queues: Sequence[Sequence[Job]], positions: int) -> list[Job]:
    """A job of each queue in turn until the next one does not fit; at least one."""
    jobs: list[Job] = []
    for job in _round_robin(queues):
        positions -= job.positions
        if jobs and positions < 0:
            break
        jobs.append(job)
    return jobs


def _round_robin(queues: Sequence[Sequence[Job]]) -> Iterator[Job]:
    for round_ in zip_longest(*queues):
        yield from (job for job in round_ if job is not None)
