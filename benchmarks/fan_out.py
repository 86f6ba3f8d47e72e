"""Tail latency of a search over many shards, simulated from the measured latencies of one shard.

    python benchmarks/fan_out.py            prints the table
    python benchmarks/fan_out.py --record   also writes it to docs/results/fan_out.md

A search over a cluster asks every shard and waits for the slowest. Searches arrive at random times (a Poisson process).
Each replica of a shard is a queue: one core that answers one search after the other. How long it works on a search is
sampled from the times that `Catalog.search` took over one shard on this machine. The simulation therefore leaves out
the network, the merging of the results, other work of the machines, and several cores per shard.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click
from _host import host

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results" / "fan_out.md"
DATA = ROOT / "benchmarks" / "fan_out.json"
SHARDS = (1, 8, 64, 512)
LOADS = (0.2, 0.5, 0.8)
REPLICAS = (1, 2)
WARM_UP = 0.2  # of the simulated searches, while the queues fill


@dataclass(frozen=True)
class Cluster:
    """The simulated cluster.

    Attributes:
        shards: every search asks all of them.
        replicas: of each shard. A search asks one of them at random, or all.
        load: the share of time that a replica works if each search asks one of them, 0 to 1.
        ask_all: ask all replicas of a shard and take the first answer, as Qdrant's `read_fan_out_factor` does.
    """

    shards: int
    replicas: int
    load: float
    ask_all: bool = False


def simulate(service: NDArray[np.float64], cluster: Cluster, searches: int, seed: int = 0) -> NDArray[np.float64]:
    """Return the latency of each search after the warm-up.

    Args:
        service: the times that one shard works on a search; each is equally likely.
        cluster: the cluster.
        searches: the number of searches to simulate.
        seed: of the random numbers.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    shards, replicas = np.arange(cluster.shards), cluster.replicas
    between = service.mean() / (cluster.load * replicas)
    arrivals = rng.exponential(between, searches).cumsum()
    free = np.zeros((cluster.shards, replicas))  # when each replica has answered all searches that it was asked
    latencies = np.empty(searches)
    for number, arrival in enumerate(arrivals):
        if cluster.ask_all:
            np.maximum(free, arrival, out=free)
            free += service[rng.integers(len(service), size=free.shape)]
            answered = free.min(axis=1)
        else:
            asked = shards, rng.integers(replicas, size=cluster.shards)
            answered = np.maximum(free[asked], arrival) + service[rng.integers(len(service), size=cluster.shards)]
            free[asked] = answered
        latencies[number] = answered.max() - arrival
    return latencies[round(WARM_UP * searches) :]


@click.command()
@click.option("--items", default=100_000, show_default=True, help="Items of the measured shard.")
@click.option("--queries", default=2000, show_default=True, help="Searches to measure.")
@click.option("--searches", default=20_000, show_default=True, help="Searches to simulate for each cluster.")
@click.option("--record", is_flag=True, help=f"Write {DATA.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}.")
def main(items: int, queries: int, searches: int, record: bool) -> None:
    """Measure one shard, simulate clusters of it, and print p50 and p99 by shards, load and replicas."""
    import numpy as np

    service = measured_times(items, queries)
    rows = []
    for replicas, ask_all, load, shards in product(REPLICAS, (False, True), LOADS, SHARDS):
        if ask_all and (replicas == 1 or load * replicas >= 1):
            continue  # nothing to choose from, or more work than the replicas can do
        cluster = Cluster(shards, replicas, load, ask_all)
        p50, p99 = np.quantile(simulate(service, cluster, searches), (0.5, 0.99)) * 1000
        rows.append({"shards": shards, "replicas": replicas, "ask_all": ask_all, "load": load, "p50": p50, "p99": p99})
    shard = {"items": items, "queries": queries} | {
        f"p{q}": float(np.quantile(service, q / 100)) * 1000 for q in (50, 99)
    }
    result = {**host(), "shard": shard, "searches": searches, "rows": rows}
    click.echo("\n".join(page(result)))
    if record:
        DATA.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text("\n".join(page(result)) + "\n", encoding="utf-8")


def measured_times(items: int, queries: int) -> NDArray[np.float64]:
    """Return the seconds that each of some searches over one shard takes, one after the other."""
    import numpy as np
    from engines import filled_catalog
    from search import isotropic

    stored, asked = np.split(isotropic(items + queries), [items])
    with tempfile.TemporaryDirectory() as folder, filled_catalog(Path(folder) / "shop.catalog", stored) as catalog:
        catalog.optimize()
        times = []
        for query in asked:
            started = time.perf_counter()
            catalog.search(vector=query, limit=10)
            times.append(time.perf_counter() - started)
    return np.array(times[queries // 10 :])


def page(result: dict[str, object]) -> list[str]:
    """Return the lines of the page."""
    shard, rows = result["shard"], result["rows"]
    assert isinstance(shard, dict) and isinstance(rows, list)
    columns = [f"{n} shard{'s' * (n > 1)}, p50 / p99" for n in SHARDS]
    lines = [
        "# Searches over many shards",
        "",
        "Simulated by `python benchmarks/fan_out.py --record` from the measured latencies of one shard. Its docstring "
        "has the model. The network and the merging of results are not part of it.",
        "",
        f"The shard, measured on {str(result['date'])[:10]} with {result['cores']} cores of {result['cpu']}: "
        f"{shard['items']:,} random vectors of 512 dimensions, the hardest case, {shard['queries']:,} searches, "
        f"p50 {shard['p50']:.2f} ms, p99 {shard['p99']:.2f} ms. Each figure below comes from "
        f"{result['searches']:,} simulated searches.",
        "",
        "| " + " | ".join(["Replicas", "Asked", "Load of a replica", *columns]) + " |",
        "|---" * (3 + len(SHARDS)) + "|",
    ]
    kinds = dict.fromkeys((row["replicas"], row["ask_all"], row["load"]) for row in rows)
    for replicas, ask_all, load in kinds:
        cells = [
            f"{row['p50']:.1f} / {row['p99']:.1f} ms"
            for row in rows
            if (row["replicas"], row["ask_all"], row["load"]) == (replicas, ask_all, load)
        ]
        effective = load * replicas if ask_all else load
        lines.append(f"| {replicas} | {'all' if ask_all else 'one'} | {effective:.0%} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
