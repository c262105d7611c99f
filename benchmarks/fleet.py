"""What to set for many processes: a real run of four, the simulation of the same, then that of up to a thousand."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg2

from benchmarks.harness import Figure
from benchmarks.harness import free_port
from benchmarks.harness import percentile
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import say
from benchmarks.harness import tell
from benchmarks.simulation import Outcome
from benchmarks.simulation import simulate
from benchmarks.simulation import Site
from zpgpool.demo.server import SERVANT


INI = Path(__file__).parent.parent / "docs" / "deploy" / "pgbouncer.ini"

#: How far the simulation may be from the real run.
AGREEMENT = 0.10

#: How often a run that a neighbour disturbed may be done again.
TRIES = 3

REAL = Site(processes=4, threads=8, maxconn=4, timeout=30.0, service=0.030, think=0.030, seconds=2.0 if QUICK else 20.0)

#: One of the processes of the real run: the draws are those of the simulation's thread of the same numbers.
WORKER = """
import json, random, sys, threading, time
import zpgpool
dsn, seed, process = sys.argv[1], sys.argv[2], sys.argv[3]
threads, maxconn, timeout, service, think, seconds = map(float, sys.argv[4:])
pool = zpgpool.PersistentConnectionPool(
    int(maxconn), int(maxconn), dsn, idle_timeout=600, timeout=timeout, autocommit=True
)
waits, beyond = [], []

def work(thread):
    draws = random.Random(f"{seed}-{process}-{thread}")
    while True:
        pause, length = draws.expovariate(1 / think), draws.expovariate(1 / service)
        time.sleep(pause)
        asked = time.monotonic()
        if asked >= end:
            return
        conn = pool.getconn()
        got = time.monotonic()
        with conn.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [length])
        pool.putconn()
        if asked >= begin + seconds / 10:
            waits.append(got - asked)
            beyond.append(time.monotonic() - got - length)

sys.stdin.readline()
begin = time.monotonic()
end = begin + seconds
workers = [threading.Thread(target=work, args=(thread,)) for thread in range(int(threads))]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(json.dumps([waits, beyond]))
"""


def run_really(dsn: str, site: Site) -> tuple[list[float], list[float]]:
    """Return the waits of a real run, and what each query took beyond its service."""
    numbers = (site.threads, site.maxconn, site.timeout, site.service, site.think, site.seconds)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, dsn, str(site.seed), str(process), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(site.processes)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    waits: list[float] = []
    beyond: list[float] = []
    for process in processes:
        out, _ = process.communicate(timeout=site.seconds + 60)
        own_waits, own_beyond = json.loads(out)
        waits += own_waits
        beyond += own_beyond
    return waits, beyond


def figure(name: str, times: list[float], more: dict[str, float]) -> Figure:
    """Return a row: the mean in milliseconds, and the quartiles."""
    shown = [time * 1000 for time in times] or [0.0, 0.0]
    low, _, high = statistics.quantiles(shown, n=4)
    return Figure(name, statistics.fmean(shown), low, high, None, {**more, "p99 ms": percentile(shown, 99)})


def agree(name: str, dsn: str, site: Site, how: str) -> Question:
    """Ask the real thing and the simulation the same. Raises SystemExit when they do not agree."""
    # What a query takes beyond its service is measured alone, where nobody waits.
    _, alone = run_really(dsn, replace(site, processes=1, threads=1, maxconn=1, seconds=site.seconds / 4))
    overhead = statistics.median(alone)
    simulated = simulate(replace(site, overhead=overhead)).waits
    for _ in range(TRIES):
        waits, beyond = run_really(dsn, site)
        if site.shared is not None:  # who waits for a connection of PgBouncer's, waits in the query
            waits = [wait + more - overhead for wait, more in zip(waits, beyond, strict=True)]
        off = statistics.fmean(simulated) / statistics.fmean(waits) - 1
        say(f"  the simulation is off by {off:+.1%}")
        if abs(off) <= AGREEMENT or QUICK:
            break
    else:
        raise SystemExit("the simulation does not reproduce the real run: it has nothing to say of fleets")
    return tell(
        Question(
            name,
            f"{site.processes} processes of {site.threads} threads over {how}: mean wait",
            "ms",
            [
                figure("real", waits, {"requests": len(waits)}),
                figure("simulated", simulated, {"requests": len(simulated), "off by %": off * 100}),
            ],
            note=f"A thread thinks for {site.think * 1000:g} ms, then queries for {site.service * 1000:g} ms, in the "
            f"mean; both draw the same numbers. A query takes {overhead * 1000:.2f} ms more than pg_sleep(), measured "
            "alone.",
        )
    )


def agreements(server: Any) -> list[Question]:
    """Ask directly, and through PgBouncer, where that is installed."""
    direct = f"{REAL.maxconn} connections each"
    questions = [agree("fleet-direct", server.dsn, REAL, direct)]
    if program := shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"):
        site = replace(REAL, maxconn=REAL.threads, shared=10)
        with pgbouncer(program, server, 10) as bouncer:
            questions.append(agree("fleet-pgbouncer", bouncer.dsn, site, "10 connections of PgBouncer"))
    else:
        say("  without PgBouncer, which is not installed")
    return questions


class Bouncer:
    """A PgBouncer that runs."""

    def __init__(self, command: list[str], dsn: str) -> None:
        self._command = command
        self.dsn = dsn
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            with suppress(psycopg2.OperationalError):
                psycopg2.connect(self.dsn).close()
                return
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()


@contextmanager
def pgbouncer(program: str, server: Any, connections: int) -> Iterator[Bouncer]:
    """Run PgBouncer as the documentation has it."""
    port = free_port()
    values = {
        "shop": f"host={server.sockets} port={server.port} user=postgres dbname=postgres",
        "listen_port": port,
        "auth_type": "any",
        "default_pool_size": connections,
    }
    text = INI.read_text()
    for name, value in values.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    text = re.sub(r"^logfile.*$", "", text, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "pgbouncer.ini"
        path.write_text(text)
        command = [program, "-q", str(path)]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid", SERVANT, "--clear-groups", "--inh-caps", "+dac_read_search",
                       "--ambient-caps", "+dac_read_search", *command]  # fmt: skip
        bouncer = Bouncer(command, f"host=127.0.0.1 port={port} user=postgres dbname=shop")
        try:
            yield bouncer
        finally:
            bouncer.stop()


# Up to a thousand ----------------------------------------------------------------------------------------------------

#: The site: a server of 32 processors, which its requests keep busy to 70 %, however many processes share the work.
PROCESSORS = 32
LOAD = 0.7
SITE = Site(processes=10, processors=PROCESSORS, seconds=2.0 if QUICK else 20.0)

#: What the server may have, connected directly.
MAX_CONNECTIONS = 400


def row(name: str, outcome: Outcome, is_answer: bool = False) -> Figure:
    """Return a simulated row: of the waits, or of the answers."""
    count = len(outcome.answers) or 1
    more = {"503 %": 100 * outcome.refused / count, "connections": outcome.connections}
    return figure(name, outcome.answers if is_answer else outcome.waits, more)


def size(processes: int, load: float = LOAD) -> Question:
    """The same site on more processes: own connections against shared ones."""
    figures = []
    rate = load * PROCESSORS / SITE.service
    for maxconn in (1, 2, 4, 8, 16):
        if processes * maxconn <= MAX_CONNECTIONS:
            site = replace(SITE, processes=processes, maxconn=maxconn, rate=rate)
            figures.append(row(f"direct, maxconn {maxconn}", simulate(site)))
    for shared in (24, 32, 48):
        if shared > load * PROCESSORS:
            site = replace(SITE, processes=processes, shared=shared, rate=rate)
            figures.append(row(f"PgBouncer, {shared} connections", simulate(site)))
    return tell(
        Question(
            f"fleet-{processes}-{load * 100:.0f}",
            f"{processes:,} processes of 16 threads, the server busy to {load * 100:.0f} %: the mean wait",
            "ms",
            figures,
            note=f"{rate:,.0f} requests a second in all. A wait is from asking the pool until the server works on it.",
        )
    )


#: Ten processes of 16 threads with fewer connections, and how long somebody waits for one.
TEN = replace(SITE, maxconn=4, think=0.005, seconds=SITE.seconds * 3)


def patience(name: str, title: str, site: Site, note: str) -> Question:
    """What `timeout` and `max_waiting` do when not all can be served."""
    figures = []
    for timeout, max_waiting in ((30.0, None), (10.0, None), (2.0, None), (10.0, 8), (10.0, 4), (10.0, 0)):
        limit = "" if max_waiting is None else f", max_waiting {max_waiting}"
        outcome = simulate(replace(site, timeout=timeout, max_waiting=max_waiting))
        figures.append(row(f"timeout {timeout:g}{limit}", outcome, is_answer=True))
    return tell(Question(name, title, "ms", figures, note=note))


def overload() -> Question:
    """Ask with more requests than the server can serve."""
    return patience(
        "fleet-overload",
        "A fifth too many requests, for a minute: mean time to the answer",
        replace(TEN, rate=1.2 * PROCESSORS / TEN.service),
        "10 processes of 16 threads over 4 connections each. The time counts from the request's arrival; a 503 is an "
        "answer, too.",
    )


def stall() -> Question:
    """Ask while nothing goes on for a while."""
    begin = TEN.seconds / 3
    return patience(
        "fleet-stall",
        f"A server that stands still for {TEN.seconds / 4:g} s: mean time to the answer",
        replace(TEN, rate=LOAD * PROCESSORS / TEN.service, stall=(begin, begin + TEN.seconds / 4)),
        "The same, with the server busy to 70 % before and after.",
    )


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    questions = agreements(server)
    questions += [size(processes) for processes in ([10, 100] if QUICK else [10, 100, 1000])]
    return [*questions, size(100, 0.9), overload(), stall()]
