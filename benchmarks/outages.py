"""Requests lost when the server goes away: the same fault, at the same moment, for all pools, each in its own site.

Each site is a waitress with four threads, and each has its clients: three GETs to one POST. Kept are the moments of the
requests that failed.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg2

from benchmarks.fleet import pgbouncer
from benchmarks.harness import Figure
from benchmarks.harness import free_port
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import say
from benchmarks.harness import tell
from benchmarks.pair import Pair
from benchmarks.requests import Site
from zpgpool.demo.server import EmbeddedServer


WAYS = [
    "zpgpool run_transaction",
    "zpgpool defaults",
    "psycopg_pool + check",
    "psycopg2.pool",
    "SQLAlchemy + pre_ping",
    "DBUtils PersistentDB",
]

THREADS, CLIENTS, PAUSE = 4, 4, 0.08

#: When the fault comes, and how long is looked at, in seconds.
FAULT, SECONDS = 1.5, 4.0 if QUICK else 8.0

#: How long the server is down when it is restarted, in seconds.
DOWN = 2.0

OPTIONS = {"fsync": "off", "max_connections": "200", "shared_buffers": "16MB"}

TABLE = "CREATE TABLE IF NOT EXISTS written (id text)"


class Clients:
    """The clients of one site."""

    def __init__(self, port: int, start: float) -> None:
        self._port = port
        self._start = start
        self.answers: list[tuple[float, float, bool]] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _work(self, client: int) -> None:
        number = client
        while (begun := time.monotonic()) < self._start + SECONDS:
            is_good = self._ask("POST" if number % 4 == 0 else "GET")
            self.answers.append((begun - self._start, time.monotonic() - begun, is_good))
            number += 1
            time.sleep(PAUSE)

    def _ask(self, method: str) -> bool:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as conn:
                conn.request(method, "/outage")
                return conn.getresponse().status == 200
        except OSError:
            return False

    def figure(self, way: str) -> Figure:
        """Return what is to be told of them."""
        for thread in self._threads:
            thread.join()
        marks = sorted(round(begun, 3) for begun, _, is_good in self.answers if not is_good)
        longest = max(seconds for _, seconds, _ in self.answers)
        more = {"of": float(len(self.answers)), "longest s": longest}
        return Figure(way, len(marks), len(marks), len(marks), more=more, marks=marks)


def ask(name: str, title: str, dsn: str, fault: Callable[[], object]) -> Question:
    """Let the fault come to all sites at once."""
    say(f"\nmeasuring: {title} ...")
    with ExitStack() as stack:
        sites = {way: stack.enter_context(Site(way, dsn, THREADS, -1)) for way in WAYS}
        start = time.monotonic()
        clients = {way: Clients(site.port, start) for way, site in sites.items()}
        time.sleep(FAULT)
        fault()
        return tell(
            Question(
                f"lost-{name}",
                f"Requests lost: {title}",
                "requests",
                [each.figure(way) for way, each in clients.items()],
            )
        )


def restart(server: EmbeddedServer, how: signal.Signals, seconds: float) -> None:
    server.halt(how)
    time.sleep(seconds)
    server.launch()


def kill_a_backend(server: EmbeddedServer) -> None:
    """The server ends all its sessions then, and recovers."""
    with closing(psycopg2.connect(server.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid != pg_backend_pid() LIMIT 1"
        )
        [(pid,)] = cursor.fetchall()
    os.kill(pid, signal.SIGKILL)


def make_table(dsn: str) -> None:
    with closing(psycopg2.connect(dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(TABLE)
        conn.commit()


@contextmanager
def folder() -> Iterator[Path]:
    """Return a context manager: a folder that another user's server can read."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here, each of a server of its own."""
    questions = []
    with folder() as path, EmbeddedServer(path / "data", port=free_port(), options=OPTIONS) as own:
        make_table(own.dsn)
        faults: dict[str, tuple[str, Callable[[], object]]] = {
            "restart": (f"the server restarts, and is down for {DOWN:g} s", lambda: restart(own, signal.SIGINT, DOWN)),
            "crash": ("it crashes, and starts at once", lambda: restart(own, signal.SIGQUIT, 0)),
            "killed": ("one of its backends is killed", lambda: kill_a_backend(own)),
        }
        if QUICK:
            faults = {"killed": faults["killed"]}
        questions += [ask(name, title, own.dsn, fault) for name, (title, fault) in faults.items()]
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if program and not QUICK:
            with pgbouncer(program, own, 40) as bouncer:
                title = f"the server behind PgBouncer restarts, and is down for {DOWN:g} s"
                questions.append(ask("behind", title, bouncer.dsn, faults["restart"][1]))
                questions.append(ask("pgbouncer", "PgBouncer is restarted", bouncer.dsn, bouncer.restart))
    if not QUICK:
        with folder() as path:
            pair = Pair(path)
            try:
                make_table(pair.primary.dsn)
                pair.attach()
                dsn = f"{pair.dsn} connect_timeout=5"
                questions.append(
                    ask("failover", "it crashes, and its synchronous standby is promoted", dsn, pair.fail_over)
                )
            finally:
                pair.stop()
    return questions
