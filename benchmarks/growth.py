"""What it costs to be large: many parked connections; and what the package costs to have at all."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from typing import Any

import zpgpool
from benchmarks import peers
from benchmarks.checkout import loop
from benchmarks.checkout import nothing
from benchmarks.harness import Figure
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import ROUNDS
from benchmarks.harness import say
from benchmarks.harness import tell


SIZES = [10, 100] if QUICK else [10, 100, 1000]


def parked(dsn: str) -> list[Question]:
    """The cost of a pair, of `prune()` and of `get_stats()` by the number of parked connections."""
    pools = {}
    memory = {}
    for size in SIZES:
        say(f"  opening {size} connections ...")
        tracemalloc.start()
        pools[size] = zpgpool.PersistentConnectionPool(size, size, dsn, idle_timeout=600, max_lifetime=3600)
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/zpgpool/*")])
        memory[size] = sum(statistic.size for statistic in ours.statistics("filename")) / size / 1024
        tracemalloc.stop()
    what = {
        "pair": lambda pool: loop(peers.Peer("", pool.getconn, pool.putconn, pool.close), 1, nothing, 0.03),
        "prune": lambda pool: _each(pool.prune),
        "get_stats": lambda pool: _each(pool.get_stats),
    }
    found: dict[tuple[str, int], list[float]] = {(name, size): [] for name in what for size in SIZES}
    for _ in range(ROUNDS):
        for name, measure in what.items():
            for size, pool in pools.items():
                found[name, size].append(measure(pool))
    questions = []
    for name in what:
        figures = []
        for size in SIZES:
            values = found[name, size]
            ratio = statistics.median(value / ten for value, ten in zip(values, found[name, SIZES[0]], strict=True))
            low, _, high = statistics.quantiles(values, n=4)
            more = {"KiB of ours each": memory[size]} if name == "pair" else {}
            figures.append(Figure(f"{size} parked", statistics.median(values), low, high, ratio, more))
        questions.append(
            tell(Question(f"growth-{name}", f"One {name} by parked connections", "µs", figures, f"{SIZES[0]} parked"))
        )
    for pool in pools.values():
        pool.closeall()
    return questions


def _each(call: Any) -> float:
    start = time.perf_counter()
    for _ in range(200):
        call()
    return (time.perf_counter() - start) / 200 * 1e6


def footprint() -> Question:
    """The import's milliseconds, beside psycopg2's own."""
    figures = []
    for module in ("psycopg2.pool", "zpgpool", "zpgpool.wsgi", "zpgpool.core.timer", "psycopg_pool", "sqlalchemy.pool"):
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        times = [float(subprocess.check_output([sys.executable, "-c", code])) * 1000 for _ in range(3 if QUICK else 9)]
        low, _, high = statistics.quantiles(times, n=4)
        figures.append(Figure(module, statistics.median(times), low, high))
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("zpgpool")]
    return tell(Question("import", "Import time", "ms", figures, note=f"Threads of ours in this process: {threads}."))


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    return [*parked(server.dsn), footprint()]
