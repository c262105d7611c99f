"""Whole requests: waitress on one processor, wrk on another, one way to the connections after the other.

Unpinned, waitress' threads fight for the interpreter's lock across processors: that is measured, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions

from benchmarks.harness import compare
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import say
from benchmarks.wire import Wire


SECONDS = 1
ROUNDS = 15
CLIENTS = 16

#: How long a packet takes over the wire, in seconds.
WIRE = 0.0005

WAYS = [
    "limit",
    "limit autocommit",
    "zpgpool persistent",
    "zpgpool persistent autocommit",
    "zpgpool persistent safe",
    "zpgpool threaded",
    "psycopg2.pool",
    "psycopg_pool",
    "SQLAlchemy",
]

#: Asked once: each costs a quarter of a minute for each question.
OTHERS = ["psycopg2-pool", "DBUtils PersistentDB", "connect per request"]

#: What `/proc/PID/stat` counts in.
TICK = os.sysconf("SC_CLK_TCK")

#: What wrk prints in, as milliseconds.
UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


class Site:
    """A server process."""

    def __init__(self, way: str, dsn: str, threads: int, processor: int) -> None:
        command = [sys.executable, "-m", "benchmarks.site", way, dsn, str(threads), str(processor)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.forget()

    def forget(self) -> None:
        """Forget what was measured."""
        #: Latencies, and the processor's time that each request took.
        self.more: dict[str, list[float]] = {"p50 ms": [], "p99 ms": [], "CPU µs": []}

    def _processor_time(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def medians(self) -> dict[str, float]:
        """Return the medians of what was measured besides."""
        return {label: sorted(values)[len(values) // 2] for label, values in self.more.items()}

    def ask(self, path: str, processor: int, clients: int = CLIENTS) -> float:
        """Return the requests per second of one round."""
        before = self._processor_time()
        output = subprocess.check_output(
            ["taskset", "-c", str(processor), "wrk", "-t1", f"-c{clients}", f"-d{SECONDS}s", "--latency",
             f"http://127.0.0.1:{self.port}{path}"],
            text=True,
        )  # fmt: skip
        for name, label in (("p50 ms", "50%"), ("p99 ms", "99%")):
            found = re.search(rf"{label}\s+([\d.]+)(us|ms|s)", output)
            assert found is not None, output
            self.more[name].append(float(found[1]) * UNITS[found[2]])
        count = re.search(r"(\d+) requests in", output)
        assert count is not None, output
        self.more["CPU µs"].append((self._processor_time() - before) / int(count[1]) * 1e6)
        rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
        assert rate is not None, output
        assert "Non-2xx" not in output, output
        return float(rate[1])

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._process.kill()
        self._process.wait()


def page(
    dsn: str,
    path: str,
    threads: int,
    title: str,
    ways: list[str],
    is_pinned: bool = True,
    name: str = "",
    clients: int = CLIENTS,
) -> Question:
    """Compare the ways at one page."""
    last = (os.cpu_count() or 1) - 1
    with ExitStack() as stack:
        sites = {way: stack.enter_context(Site(way, dsn, threads, 0 if is_pinned else -1)) for way in ways}
        for site in sites.values():
            site.ask(path, last, clients)
            site.forget()
        name = name or f"wsgi{path.replace('/', '-')}-{threads}{'' if is_pinned else '-unpinned'}"
        return compare(
            name,
            f"waitress, {threads} threads, {title}",
            "requests/s",
            {way: lambda site=site: site.ask(path, last, clients) for way, site in sites.items()},
            ways[0],
            is_less_better=False,
            rounds=3 if QUICK else ROUNDS,
            more=lambda peer: sites[peer].medians(),
        )


@contextmanager
def watched(port: int) -> Iterator[None]:
    """Return a context manager that asks for the JSON every second, and for the metrics, as a page and a scraper do."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(1.0):
            for path in ("json", "metrics"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/status/{path}") as answer:
                    answer.read()

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield
    finally:
        is_over.set()
        looker.join()


def watching(dsn: str) -> Question:
    """What it costs to look: the status page and the metrics, asked for every second."""
    last = (os.cpu_count() or 1) - 1
    with Site("zpgpool persistent", dsn, 4, 0) as plain, Site("zpgpool watched", dsn, 4, 0) as observed:
        plain.ask("/one", last), observed.ask("/one", last)
        with watched(observed.port):
            return compare(
                "watching",
                "waitress, 4 threads, one SELECT 1, with the status page's JSON and the metrics asked for every second",
                "requests/s",
                {"zpgpool persistent": lambda: plain.ask("/one", last), "watched": lambda: observed.ask("/one", last)},
                "zpgpool persistent",
                is_less_better=False,
                rounds=3 if QUICK else 12,
            )


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    missing = [tool for tool in ("wrk", "taskset") if shutil.which(tool) is None]
    if missing:
        say(f"\nNo requests measured: {missing[0]} is missing (apt-get install wrk util-linux)")
        return []
    few = WAYS[:3]
    with Wire(server.port, WIRE) as wire:
        far = psycopg2.extensions.make_dsn(server.dsn, host="127.0.0.1", port=wire.port)
        wired = f"one SELECT 1 over a wire of {WIRE * 1000:g} ms each way"
        if QUICK:
            return [
                page(server.dsn, "/one", 4, "one SELECT 1", few),
                page(far, "/one", 4, wired, few, name="wsgi-one-4-wire"),
                watching(server.dsn),
            ]
        return [
            watching(server.dsn),
            page(server.dsn, "/one", 4, "one SELECT 1", [*WAYS, *OTHERS]),
            page(server.dsn, "/one", 16, "one SELECT 1", WAYS),
            page(server.dsn, "/page", 4, "a page of 20 rows", WAYS),
            page(server.dsn, "/none", 4, "a page without the database", few),
            page(server.dsn, "/one", 4, "one SELECT 1, not pinned to a processor", WAYS, is_pinned=False),
            page(server.dsn, "/one", 16, "one SELECT 1, not pinned to a processor", WAYS, is_pinned=False),
            page(far, "/one", 4, wired, WAYS, name="wsgi-one-4-wire"),
            page(far, "/one", 4, f"{wired}, one request at a time", WAYS, name="wsgi-one-4-wire-1", clients=1),
        ]
