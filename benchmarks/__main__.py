"""Measure every peer in one run: `make bench`; `docs/benchmarks/` keeps the figures, the tables and the drawings.

`QUICK=1` in the environment makes the rounds short, and keeps nothing: for breakage, not for figures. Arguments name
the modules to ask, by default all; the others' figures stay as they were kept.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import psycopg2

from benchmarks import harness
from benchmarks.harness import free_port
from benchmarks.harness import QUICK
from benchmarks.harness import say
from zpgpool.demo.server import EmbeddedServer


MODULES = ["checkout", "requests", "overload", "faults", "outages", "growth", "fleet", "instructions"]

KEPT = Path(__file__).parent.parent / "docs" / "benchmarks"

PACKAGES = [
    "psycopg2-binary", "psycopg2-pool", "psycopg-pool", "SQLAlchemy", "DBUtils", "Products.ZPsycopgDA", "waitress",
]  # fmt: skip

OPTIONS = {"fsync": "off", "max_connections": "1300", "shared_buffers": "16MB"}


def main(modules: list[str]) -> None:
    """Run, print, and keep."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        # The server has a processor of its own while ours is pinned to another: otherwise a query takes 40 µs or 120,
        # depending on where its process wakes up.
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(everywhere)})
        with EmbeddedServer(Path(folder) / "data", port=free_port(), options=OPTIONS) as server:
            os.sched_setaffinity(0, everywhere)
            conn = psycopg2.connect(server.dsn)
            about = {
                "date": datetime.date.today().isoformat(),
                "machine": f"{os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}, "
                f"PostgreSQL {conn.info.parameter_status('server_version')}; "
                + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
            }
            conn.close()
            say(about["machine"])
            for name in modules or MODULES:
                keep(about, import_module(f"benchmarks.{name}").all_of(server))
    say(f"\n{time.monotonic() - start:.0f} s")


def keep(about: dict[str, str], asked: list[harness.Question]) -> None:
    """Keep what was measured beside what was kept before, and write the documentation's part again."""
    if QUICK:
        return
    from benchmarks import report

    path = KEPT / "results.json"
    kept = harness.read(path)[1] if path.exists() else []
    before = {question.name: question for question in kept}
    for question in asked:
        question.remember(before.pop(question.name).orders if question.name in before else [])
    questions = [*before.values(), *asked]
    harness.write(path, about, questions)
    report.write(KEPT, about, questions)


if __name__ == "__main__":
    main(sys.argv[1:])
