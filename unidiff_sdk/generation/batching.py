"""Continuous batching: pictures that stand at different steps of different tables share the UNet's calls.

A picture under way is a `Job`: latents, what conditions them, and a row index into the table of its sampler. Because
the UNet takes a timestep for each sample and `samplers.advance` a row for each, one call can take any jobs whose
latents are of one size. A request joins at the next call and leaves when its jobs are done, whatever the others do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import BusyError, GenerationError, UniDiffError

from .samplers import Row, Table, advance

__all__ = ["MAX_REQUESTS", "Engine", "Job", "Kept", "Step", "rescaled"]

Float32 = NDArray[np.float32]
Predict = Callable[[Float32, Float32, Float32], Float32]

MAX_REQUESTS = 64
"""How many requests are taken at once; one more is refused instead of waiting for an unknown time."""

# How long a call waits for requests whose callback is running: this share of the time that the last call took. So a
# callback that returns soon costs its request no turn, and one that takes long does not hold up the others.
_CALLBACK_GRACE = 0.1


@dataclass(frozen=True)
class Kept:
    """What an inpainted picture keeps: `clean` latents wherever `repaint` is 0, each with the noise of the step.

    `clean` and `noise` are float32[channels, height, width], `repaint` float32[1, height, width] of 0 and 1.
    """

    clean: Float32
    noise: Float32
    repaint: Float32


@dataclass(eq=False)
class Job:
    """One picture on its way from noise to clean latents.

    Attributes:
        table: the rows that it goes through, one with each call.
        x: its latents, float32[channels, height, width].
        states: token states of the prompt, float32[tokens, width].
        without: those of the negative prompt, of the same shape; None for no guidance, at half the work.
        guidance_scale: how far beyond the prediction without the prompt (Ho & Salimans 2022, arXiv:2207.12598).
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds is taken back.
        stream: draws the noise that stochastic samplers add.
        kept: what an inpainted picture keeps.
        step: the row that comes next.
        x0: the estimate of the clean latents of the step before.
    """

    table: Table
    x: Float32
    states: Float32
    without: Float32 | None
    guidance_scale: float
    guidance_rescale: float
    stream: np.random.Generator
    kept: Kept | None = None
    step: int = 0
    x0: Float32 = field(init=False)
    kind: tuple[int, ...] = field(init=False)  # only jobs of one kind can share a call

    def __post_init__(self) -> None:
        self.x0 = np.zeros_like(self.x)
        self.kind = (*self.x.shape, *self.states.shape)

    @property
    def positions(self) -> int:
        """What it adds to a call: latent positions, twice with guidance."""
        _, height, width = self.x.shape
        return int((1 if self.without is None else 2) * height * width)

    @property
    def finished(self) -> bool:
        return self.step == len(self.table)


class Step:
    """Where a request stands after one of its steps.

    Attributes:
        done, total: steps, summed over its pictures.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.done = sum(job.step for job in jobs)
        self.total = sum(len(job.table) for job in jobs)

    def estimates(self) -> Float32:
        """The clean latents as they are now foreseen: float32[pictures, channels, height, width]."""
        return np.stack([job.x0 for job in self._jobs])


class Engine:
    """Runs the denoising of any number of threads in one of them at a time, and starts none.

    Whoever comes first leads: it runs the calls, with whatever jobs others bring, until its own request is over, and
    then another one that waits goes on. A thread of its own would cost a lone request two switches between threads.

    Requests are taken in the order of their arrival. Of each, one picture after the other gets a place in a call, in
    turn, until the call is full; and who has got a picture goes behind the others for the next. So a request for one
    picture never waits for another's hundred. Sizes that cannot share a call take turns.

    Args:
        predict: the UNet: (sample [rows, channels, height, width], timestep [rows], states [rows, tokens, width]) to
            its output, which must not alias an input.
        positions: how many latent positions there are in one call at most; one picture is always taken.
        max_requests: one more raises BusyError.
    """

    def __init__(self, predict: Predict, *, positions: int, max_requests: int = MAX_REQUESTS) -> None:
        self._predict = predict
        self._positions = positions
        self._max_requests = max_requests
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # what the thread that leads waits on
        self._requests: list[_Request] = []
        self._batch: _Batch | None = None
        self._led = False
        self._calls = 0
        self._last_call: dict[tuple[int, ...], int] = {}
        self._call_seconds = 0.0

    def denoise(self, jobs: Sequence[Job], on_step: Callable[[Step], None] | None = None) -> Float32:
        """Bring jobs to their end: float32[len(jobs), channels, height, width], an array of the caller's own.

        Args:
            jobs: at least one; all of one size.
            on_step: called in this thread after each step; its request goes on when it returns. What it raises ends
                this request and no other.

        Raises:
            BusyError: too many requests are under way.
            GenerationError: a call failed; an error of this package's own comes as it is.
        """
        request = _Request(jobs, self._lock, waits=on_step is not None)
        self._submit(request)
        try:
            while True:
                self._lead_or_wait(request)
                with self._lock:
                    if isinstance(request.error, UniDiffError):  # says already what was wrong
                        raise request.error
                    if request.error is not None:
                        raise GenerationError(f"a call of the UNet failed ({request.error})") from request.error
                if on_step is not None:
                    on_step(Step(jobs))
                with self._lock:
                    request.held = False
                    if request.over:
                        return np.stack([job.x for job in jobs])
                    self._changed.notify()
        finally:
            with self._lock:
                if request in self._requests:  # the callback raised, or the thread was interrupted
                    self._remove(request)
                    self._changed.notify()
                    self._call_leader()

    def _submit(self, request: _Request) -> None:
        with self._lock:
            if len(self._requests) >= self._max_requests:
                raise BusyError(
                    f"{len(self._requests)} requests are being drawn, as many as are taken at once; try again later"
                )
            self._requests.append(request)

    def _lead_or_wait(self, request: _Request) -> None:
        """Until the request waits for its callback or is over: run the calls, or let another thread run them."""
        with self._lock:
            request.news.wait_for(lambda: request.stopped or not self._led)
            if request.stopped:
                return
            self._led = True
        try:
            while not request.stopped:
                self._call()
        finally:
            with self._lock:
                self._led = False
                self._call_leader()

    def _call_leader(self) -> None:
        """Wake one of those that wait, if nobody leads. (One whose callback runs leads when it comes back.)"""
        waiting = next((request for request in self._requests if not request.stopped), None)
        if not self._led and waiting is not None:
            waiting.news.notify()

    # In the thread that leads

    def _call(self) -> None:
        jobs = self._next_jobs()
        try:
            if self._batch is None or self._batch.jobs != jobs:
                self._batch = _Batch(jobs)
            started = time.perf_counter()
            self._batch.step(self._predict)
            self._call_seconds = time.perf_counter() - started
            self._tell(jobs)
        except Exception as error:  # whatever it is, those who wait for it must hear of it
            self._batch = None
            self._fail(jobs, error)
        except BaseException:  # this thread alone is interrupted: the others' jobs go on from where they stand
            self._batch = None
            self._tell(jobs)
            raise

    def _next_jobs(self) -> list[Job]:
        """The jobs of the next call."""
        with self._lock:
            grace = _CALLBACK_GRACE * self._call_seconds
            self._changed.wait_for(lambda: not any(r.held for r in self._requests), grace)
            queues = [request.unfinished for request in self._requests if not request.held]
            kinds = dict.fromkeys(job.kind for queue in queues for job in queue)  # in the order of their arrival
            kind = min(kinds, key=lambda kind: self._last_call.get(kind, -1))
            self._calls += 1
            self._last_call[kind] = self._calls
            return _dealt([[job for job in queue if job.kind == kind] for queue in queues], self._positions)

    def _tell(self, jobs: list[Job]) -> None:
        taken = set(map(id, jobs))
        with self._lock:
            for request in list(self._requests):
                if any(id(job) in taken for job in request.unfinished):
                    left = [job for job in request.unfinished if not job.finished]
                    if left and len(left) < len(request.unfinished):  # a picture is done: the next is another's turn
                        self._requests.remove(request)
                        self._requests.append(request)
                    request.unfinished = left
                    request.held = request.waits
                    self._notify(request, over=not request.unfinished)

    def _fail(self, jobs: list[Job], error: BaseException) -> None:
        taken = set(map(id, jobs))
        with self._lock:
            for request in list(self._requests):
                if any(id(job) in taken for job in request.unfinished):
                    request.error = error
                    self._notify(request, over=True)

    def _notify(self, request: _Request, *, over: bool) -> None:
        if over:
            request.over = True
            self._remove(request)
        if request.stopped:
            request.news.notify()

    def _remove(self, request: _Request) -> None:
        self._requests.remove(request)
        if not self._requests:
            self._batch = None
            self._last_call.clear()


class _Request:
    """The jobs of one call of `Engine.denoise`, and what that thread and the one that leads tell each other."""

    def __init__(self, jobs: Sequence[Job], lock: threading.Lock, *, waits: bool) -> None:
        self.unfinished = list(jobs)
        self.waits = waits  # for the callback after each step
        self.held = False  # until the callback has returned
        self.over = False
        self.error: BaseException | None = None
        self.news = threading.Condition(lock)  # what the thread that asked waits on

    @property
    def stopped(self) -> bool:
        """No call takes it: it waits for its callback, or it is over."""
        return self.held or self.over


class _Batch:
    """The jobs of one call, side by side for as long as the same ones go on together."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        # the rows of all jobs for each step that they can go together, read once
        steps = min(len(job.table) - job.step for job in jobs)
        rows = np.stack([job.table.rows[job.step : job.step + steps] for job in jobs], axis=2)[..., None, None, None]
        self._rows = (Row(*row) for row in rows)
        self.x, self.x0 = np.stack([job.x for job in jobs]), np.stack([job.x0 for job in jobs])
        # the rows with a prompt, one for each job, then those without
        guided = [i for i, job in enumerate(jobs) if job.without is not None]
        self.guided: list[int] | slice = slice(None) if len(guided) == len(jobs) else guided  # a slice copies nothing
        self.guidance_scale = _column(job.guidance_scale for job in jobs)[self.guided]
        self.guidance_rescale = _column(job.guidance_rescale for job in jobs)[self.guided]
        self._rescales = bool(self.guidance_rescale.any())
        without = [job.without for job in jobs if job.without is not None]
        self.states = np.stack([job.states for job in jobs] + without)
        self._noisy = any(job.table.needs_noise for job in jobs)

    def step(self, predict: Predict) -> None:
        """One call of the UNet, and with it each job one row further."""
        # 1. Predict
        row = next(self._rows)
        scaled, timestep = self.x * row.input_scale, row.timestep.ravel()
        if self.guided:
            scaled = np.concatenate([scaled, scaled[self.guided]])
            timestep = np.concatenate([timestep, timestep[self.guided]])
        output = self._guide(predict(scaled, timestep, self.states))

        # 2. Step
        self.x, self.x0 = advance(row, self.x, output, self.x0, self._noise(row) if self._noisy else None)

        # 3. Hand out
        for job, x, x0 in zip(self.jobs, self.x, self.x0, strict=True):
            if job.kept is not None:
                clean, noise = job.table.levels[job.step + 1]
                x[:] = np.where(job.kept.repaint, x, clean * job.kept.clean + noise * job.kept.noise)
            job.x, job.x0, job.step = x, x0, job.step + 1

    def _guide(self, output: Float32) -> Float32:
        if not self.guided:
            return output
        prompted, without = output[: len(self.jobs)], output[len(self.jobs) :]
        if isinstance(self.guided, slice):
            return self._guided(prompted, without)
        guided = prompted.copy()
        guided[self.guided] = self._guided(prompted[self.guided], without)
        return guided

    def _guided(self, prompted: Float32, without: Float32) -> Float32:
        guided: Float32 = without + self.guidance_scale * (prompted - without)
        return rescaled(guided, prompted, self.guidance_rescale) if self._rescales else guided

    def _noise(self, row: Row) -> Float32 | None:
        wanted = np.ravel(row.next_from_noise).nonzero()[0]
        if not len(wanted):
            return None
        noise = np.zeros_like(self.x)
        for i in wanted:
            noise[i] = self.jobs[i].stream.standard_normal(self.x.shape[1:], dtype=np.float32)
        return noise


def rescaled(guided: Float32, prompted: Float32, amount: Float32) -> Float32:
    """Guidance without the contrast that it adds: Lin et al. 2023 (arXiv:2305.08891), equations 15 and 16.

    Args:
        guided, prompted: predictions with guidance and with the prompt alone, float32[batch, channels, height, width].
        amount: 0 to 1, the paper's phi; float32[batch, 1, 1, 1].
    """
    axes = tuple(range(1, guided.ndim))
    contrast = prompted.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
    result: Float32 = guided * (amount * contrast + (1 - amount))
    return result


def _column(values: Iterable[float]) -> Float32:
    return np.array(list(values), np.float32)[:, None, None, None]


def _dealt(queues: Sequence[Sequence[Job]], positions: int) -> list[Job]:
    """A job of each queue in turn until the next one has no room; at least one."""
    dealt: list[Job] = []
    for job in _in_turn(queues):
        positions -= job.positions
        if dealt and positions < 0:
            break
        dealt.append(job)
    return dealt


def _in_turn(queues: Sequence[Sequence[Job]]) -> Iterator[Job]:
    for round_ in zip_longest(*queues):
        yield from (job for job in round_ if job is not None)
