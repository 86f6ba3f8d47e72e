"""The simulation of a cluster against the closed forms of queueing theory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fan_out import Cluster, simulate

EXPONENTIAL = np.random.default_rng(0).exponential(1.0, 200_000)  # seconds


def test_nearly_idle_shards_answer_with_the_maximum_of_independent_times() -> None:
    latencies = simulate(EXPONENTIAL, Cluster(shards=50, replicas=1, load=1e-4), 10_000)
    harmonic = sum(1 / k for k in range(1, 51))  # the mean of the maximum of 50 exponential times
    assert latencies.mean() == pytest.approx(harmonic, rel=0.02)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_shard_is_an_m_m_1_queue(load: float) -> None:
    latencies = simulate(EXPONENTIAL, Cluster(shards=1, replicas=1, load=load), 100_000)
    # The time in an M/M/1 queue is exponential with rate 1 - load, for a mean service time of 1.
    assert latencies.mean() == pytest.approx(1 / (1 - load), rel=0.1)
    assert np.quantile(latencies, 0.99) == pytest.approx(np.log(100) / (1 - load), rel=0.15)


def test_replicas_share_the_load() -> None:
    latencies = simulate(EXPONENTIAL, Cluster(shards=1, replicas=2, load=0.5), 60_000)
    # Random choice splits a Poisson process into Poisson processes, so each replica is an M/M/1 queue of load 0.5.
    assert latencies.mean() == pytest.approx(2, rel=0.1)


def test_first_of_two_answers_comes_sooner_at_low_load() -> None:
    one = simulate(EXPONENTIAL, Cluster(shards=1, replicas=2, load=1e-4), 20_000)
    both = simulate(EXPONENTIAL, Cluster(shards=1, replicas=2, load=1e-4, ask_all=True), 20_000)
    assert one.mean() == pytest.approx(1, rel=0.03)
    assert both.mean() == pytest.approx(1 / 2, rel=0.03)  # the minimum of two exponential times


def test_simulation_is_reproducible() -> None:
    cluster = Cluster(shards=8, replicas=2, load=0.5)
    assert np.array_equal(simulate(EXPONENTIAL, cluster, 1000), simulate(EXPONENTIAL, cluster, 1000))
    assert not np.array_equal(simulate(EXPONENTIAL, cluster, 1000), simulate(EXPONENTIAL, cluster, 1000, seed=1))
