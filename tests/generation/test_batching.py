"""Continuous batching and denoising, with a UNet that is one line of NumPy and as slow or broken as a test needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff_sdk.errors import BusyError, GenerationError
from unidiff_sdk.generation.batching import Batcher
from unidiff_sdk.generation.denoising import Conditions, Job, KnownRegion, Progress, rescale_guidance
from unidiff_sdk.generation.samplers import FLOW_SAMPLERS, SAMPLERS, advance, make_table
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule

SHAPE, TOKENS, WIDTH = (4, 4, 6), 5, 3
STATES = "encoder_hidden_states"
SCHEDULE = Schedule(
    np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), prediction_type="v_prediction", steps_offset=1
)


def unet(sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
    """Each sample by itself, and so the same bit for bit in any batch."""
    meaning = sum(
        np.stack([row.mean(dtype=np.float64) for row in array]).astype(np.float32) for array in conditions.values()
    )
    late = np.cos(timestep * np.float32(0.01))
    return np.tanh(np.float32(0.7) * sample[:, ::-1] + (meaning + late)[:, None, None, None])


class Counted:
    """`unet` that records the batch size of each call. A call waits until `gate` is open."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
        for array in (timestep, *conditions.values()):
            assert sample.dtype == array.dtype == np.float32
            assert len(sample) == len(array)
        self.batches.append(len(sample))
        self.started.set()
        assert self.gate.wait(20)
        return unet(sample, timestep, conditions)


def job(
    seed: int,
    sampler: str = "ddim",
    steps: int = 4,
    guidance: float = 3.0,
    rescale: float = 0.0,
    shape: tuple[int, int, int] = SHAPE,
) -> Job:
    rng = np.random.default_rng(seed)
    table = make_table(sampler, FlowSchedule(shift=3.0) if sampler in FLOW_SAMPLERS else SCHEDULE, steps)
    conditions, negative = (
        {
            STATES: rng.standard_normal((TOKENS, WIDTH), dtype=np.float32),
            "text_embeds": rng.standard_normal(WIDTH, dtype=np.float32),
        }
        for _ in range(2)
    )
    x = rng.standard_normal(shape, dtype=np.float32) * np.float32(table.init_noise_sigma)
    return Job(table, x, conditions, None if guidance == 1 else negative, guidance, rescale, rng)


def batched(conditions: Conditions) -> Conditions:
    """The conditions of one sample, as a batch."""
    return {name: array[None] for name, array in conditions.items()}


def alone(job: Job) -> np.ndarray:
    """The plain loop of a textbook."""
    x, x0 = job.x[None], None
    for step in range(len(job.table)):
        row = job.table[step]
        scaled, timestep = x * row.input_scale, np.array([row.timestep])
        output = unet(scaled, timestep, batched(job.conditions))
        if job.negative is not None:
            negative = unet(scaled, timestep, batched(job.negative))
            guided = negative + np.float32(job.guidance_scale) * (output - negative)
            rescale = np.float32(job.guidance_rescale)
            output = rescale_guidance(guided, output, rescale) if rescale else guided
        noise = job.rng.standard_normal(x.shape[1:], dtype=np.float32)[None] if row.next_from_noise else None
        x, x0 = advance(row, x, output, x0, noise)
    return x[0]


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def open_gate_at(counted: Counted, batcher: Batcher, requests: int) -> None:
    ends = time.monotonic() + 20
    while len(batcher._requests) < requests and time.monotonic() < ends:
        time.sleep(0.005)
    counted.gate.set()


def idle(batcher: Batcher) -> bool:
    """Whether no request is left and no thread leads."""
    return not batcher._has_leader and not batcher._requests


JOBS = st.builds(
    job,
    seed=st.integers(0, 99),
    sampler=st.sampled_from(sorted(SAMPLERS | FLOW_SAMPLERS)),
    steps=st.integers(1, 9),
    guidance=st.sampled_from([1.0, 0.0, 2.0, 7.5]),
    rescale=st.sampled_from([0.0, 0.7]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(JOBS, min_size=1, max_size=7), st.integers(1, 400), st.data())
def test_batching_does_not_change_the_result_of_a_job(jobs: list[Job], positions: int, data: st.DataObject) -> None:
    """Whatever samplers, steps and guidance share its calls, and from however many threads they come."""
    copies = [
        Job(j.table, j.x.copy(), j.conditions, j.negative, j.guidance_scale, j.guidance_rescale, _fork(j)) for j in jobs
    ]
    expected = [alone(copy) for copy in copies]
    batcher = Batcher(unet, positions=positions)
    cut = data.draw(st.integers(0, len(jobs)))
    parts = [part for part in (jobs[:cut], jobs[cut:]) if part]
    latents = np.concatenate(in_threads([lambda part=part: batcher.denoise(part) for part in parts]))
    for got, wanted in zip(latents, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6 * max(1, np.abs(wanted).max()), rtol=0)
    assert idle(batcher)


def _fork(job: Job) -> np.random.Generator:
    fork = np.random.default_rng()
    fork.bit_generator.state = job.rng.bit_generator.state
    return fork


def test_sixteen_threads_share_calls_without_changing_results() -> None:
    wanted = [alone(job(seed, steps=3 + seed % 5)) for seed in range(16)]
    counted = Counted()
    batcher = Batcher(counted, positions=2 * 8 * 24)
    counted.gate.clear()
    calls: list[Callable[[], Any]] = [lambda s=seed: batcher.denoise([job(s, steps=3 + s % 5)]) for seed in range(16)]
    *results, _ = in_threads([*calls, lambda: open_gate_at(counted, batcher, 16)])
    for latents, expected in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(latents[0], expected)
    total = sum(2 * (3 + seed % 5) for seed in range(16))
    assert sum(counted.batches) == total
    assert max(counted.batches) == 16  # never more than eight guided jobs
    assert len(counted.batches) < total / 8  # and far fewer calls than one job at a time would take


def test_request_for_one_image_does_not_wait_for_a_large_request() -> None:
    late = job(99, guidance=1, steps=6)
    counted, served = Counted(), []

    def watched(sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
        served.append(any(np.array_equal(row, late.conditions[STATES]) for row in conditions[STATES]))
        return counted(sample, timestep, conditions)

    batcher = Batcher(watched, positions=4 * 24)
    counted.gate.clear()
    in_threads(
        [
            lambda: batcher.denoise([job(seed, guidance=1, steps=6) for seed in range(40)]),
            lambda: (counted.started.wait(20), batcher.denoise([late])),
            lambda: open_gate_at(counted, batcher, 2),
        ]
    )
    # the first call was running when it came; it has a place in each call after that
    assert served[:8] == [False, *[True] * 6, False] and not any(served[8:])


def test_request_for_one_image_does_not_wait_where_a_call_holds_one_image() -> None:
    late = job(99, guidance=1, steps=2)
    counted, served = Counted(), []

    def watched(sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
        served.append(np.array_equal(conditions[STATES][0], late.conditions[STATES]))
        return counted(sample, timestep, conditions)

    batcher = Batcher(watched, positions=1)
    counted.gate.clear()
    in_threads(
        [
            lambda: batcher.denoise([job(seed, guidance=1, steps=2) for seed in range(20)]),
            lambda: (counted.started.wait(20), batcher.denoise([late])),
            lambda: open_gate_at(counted, batcher, 2),
        ]
    )
    # only the image that was running when it came is finished before it
    assert served[:5] == [False, False, True, True, False] and not any(served[5:])


def test_shapes_that_cannot_share_a_call_take_turns() -> None:
    shapes: list[tuple[int, ...]] = []

    def watched(sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
        shapes.append(sample.shape[1:])
        return unet(sample, timestep, conditions)

    batcher = Batcher(watched, positions=1000)
    wide = (4, 4, 10)
    latents = batcher.denoise([job(0, steps=3), job(1, steps=3), job(2, steps=5)])
    assert latents.shape == (3, *SHAPE)
    shapes.clear()
    counted = [job(3, steps=4, shape=wide), job(4, steps=4)]
    small, large = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        small.set()
        large.wait(0.2)

    results = in_threads(
        [
            lambda: batcher.denoise([counted[1]], hold),
            lambda: (small.wait(20), large.set(), batcher.denoise([counted[0]])),
        ]
    )
    assert results[0].shape == (1, *SHAPE)
    assert shapes.count(wide) == shapes.count(SHAPE) == 4


def test_callback_receives_every_step_and_the_estimates() -> None:
    seen: list[tuple[int, int]] = []
    estimates: list[np.ndarray] = []

    def on_step(progress: Progress) -> None:
        seen.append((progress.done, progress.total))
        estimates.append(progress.estimates())

    work = [job(0, steps=3), job(1, steps=3)]
    latents = Batcher(unet, positions=1000).denoise(work, on_step)
    assert seen == [(2, 6), (4, 6), (6, 6)]
    np.testing.assert_allclose(estimates[-1], latents, rtol=0.02, atol=0.2)  # all but clean
    assert not np.shares_memory(latents, work[0].x)


def test_cancelled_request_leaves_the_others_unchanged() -> None:
    expected = alone(job(7, steps=12))
    counted = Counted()
    batcher = Batcher(counted, positions=1000)

    def stop(progress: Progress) -> None:
        if progress.done >= 2:
            raise KeyboardInterrupt

    results = in_threads(
        [lambda: batcher.denoise([job(6, steps=12)], stop), lambda: batcher.denoise([job(7, steps=12)])]
    )
    assert isinstance(results[0], KeyboardInterrupt)
    np.testing.assert_array_equal(results[1][0], expected)
    assert idle(batcher)
    assert sum(counted.batches) == 2 * (12 + 2)  # no step was taken for the cancelled one


def test_interrupt_in_a_shared_call_leaves_the_others_unchanged() -> None:
    """Ctrl-C reaches the thread that runs the calls; the requests that share them continue."""
    expected = [alone(job(seed, "euler_a", steps=6)) for seed in (7, 8)]
    together = 0

    def interrupted(sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
        nonlocal together
        together += len(sample) == 2 * 3
        if threading.current_thread() is leader and together == 2:
            raise KeyboardInterrupt
        return counted(sample, timestep, conditions)

    counted = Counted()
    counted.gate.clear()
    batcher = Batcher(interrupted, positions=1000)
    results: list[Any] = []

    def lead() -> None:
        with pytest.raises(KeyboardInterrupt):
            batcher.denoise([job(6, steps=12)])
        results.append("interrupted")

    leader = threading.Thread(target=lead)
    leader.start()
    assert counted.started.wait(20)
    calls = [lambda seed=seed: batcher.denoise([job(seed, "euler_a", steps=6)])[0] for seed in (7, 8)]
    *others, _ = in_threads([*calls, lambda: open_gate_at(counted, batcher, 3)])
    leader.join(20)
    assert results == ["interrupted"]
    np.testing.assert_array_equal(others, expected)
    assert idle(batcher)


def test_slow_callback_does_not_delay_other_requests() -> None:
    batcher = Batcher(unet, positions=1000)
    released, entered = threading.Event(), threading.Event()

    def slow(progress: Progress) -> None:
        entered.set()
        assert released.wait(20)

    def other() -> np.ndarray:
        assert entered.wait(20)
        try:
            return batcher.denoise([job(1, steps=6)])
        finally:
            released.set()

    results = in_threads([lambda: batcher.denoise([job(0, steps=2)], slow), other])
    np.testing.assert_array_equal(results[1][0], alone(job(1, steps=6)))
    np.testing.assert_array_equal(results[0][0], alone(job(0, steps=2)))


def test_request_beyond_the_limit_is_refused_at_once() -> None:
    counted = Counted()
    batcher = Batcher(counted, positions=1000, max_requests=2)
    counted.gate.clear()
    refused = threading.Event()

    def third() -> None:
        ends = time.monotonic() + 20
        while len(batcher._requests) < 2 and time.monotonic() < ends:
            time.sleep(0.005)
        try:
            with pytest.raises(BusyError, match="2 generations are running, which is the limit; try again later"):
                batcher.denoise([job(2)])
            refused.set()
        finally:
            counted.gate.set()

    results = in_threads([lambda: batcher.denoise([job(0)]), lambda: batcher.denoise([job(1)]), third])
    assert refused.is_set() and results[0].shape == (1, *SHAPE)
    assert batcher.denoise([job(2)]).shape == (1, *SHAPE)  # and accepted when there is room again


def test_failed_call_is_reported_and_the_next_one_works() -> None:
    broken = True

    def fails(sample: np.ndarray, timestep: np.ndarray, conditions: Conditions) -> np.ndarray:
        if broken:
            raise RuntimeError("no memory for 12345 bytes")
        return unet(sample, timestep, conditions)

    batcher = Batcher(fails, positions=1000)
    with pytest.raises(GenerationError, match=r"a call of the UNet failed \(no memory for 12345 bytes\)"):
        batcher.denoise([job(0)])
    broken = False
    np.testing.assert_array_equal(batcher.denoise([job(0)])[0], alone(job(0)))


def test_values_that_are_not_finite_do_not_spread() -> None:
    broken_job = job(0)
    broken_job.x[0, 0, 0] = np.nan
    latents = Batcher(unet, positions=1000).denoise([broken_job, job(1)])
    assert not np.isfinite(latents[0]).all()
    np.testing.assert_array_equal(latents[1], alone(job(1)))


def test_known_region_is_kept_to_the_end() -> None:
    work = job(0, sampler="dpm++2m", steps=5)
    rng = np.random.default_rng(5)
    clean, noise = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    repaint = np.zeros((1, *SHAPE[1:]), np.float32)
    repaint[:, :, :3] = 1
    work.known = KnownRegion(clean, noise, repaint)
    latents = Batcher(unet, positions=1000).denoise([work])[0]
    np.testing.assert_array_equal(latents[:, :, 3:], clean[:, :, 3:])
    assert np.abs(latents[:, :, :3] - clean[:, :, :3]).min() > 0


@pytest.mark.parametrize("amount", [0.0, 0.4, 0.7, 1.0])
def test_rescale_guidance_equals_diffusers(amount: float) -> None:
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    rng = np.random.default_rng(0)
    guided, prompted = 3 * rng.standard_normal((3, *SHAPE), dtype=np.float32), rng.standard_normal((3, *SHAPE))
    prompted = prompted.astype(np.float32)
    expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(prompted), amount)
    got = rescale_guidance(guided, prompted, np.full((3, 1, 1, 1), amount, np.float32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)
