"""The demo's load: threads that use the pool, more than there are connections, and what can go wrong meanwhile."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psycopg2
from psycopg2.extensions import connection as Connection

from ..core import AbstractConnectionPool
from ..core import task
from .server import EmbeddedServer


#: How many threads more than there are connections make load, and for how long, in seconds.
MORE = 4
SECONDS = 20.0

#: How long the load runs before something happens to it, and after it, in seconds.
BEFORE, AFTER = 0.5, 1.5

#: How long the import holds its lock, and how long the queue is kept full, in seconds.
LOCKED = 10.0
FULL = 3.0

#: The number of the lock for which a POST /basket waits while POST /import has it.
LOCK = 7410232

#: What the load asks for; the argument is for how long, in seconds.
REQUESTS = {
    "GET /catalogue": "SELECT count(*) FROM pg_class, pg_sleep(%s)",
    "GET /search?q=blue": "SELECT relname FROM pg_class, pg_sleep(%s) WHERE relname LIKE '%%blue%%'",
    "POST /basket": f"SELECT pg_advisory_xact_lock_shared({LOCK}), pg_sleep(%s)",
    "GET /report/2026-10": "SELECT sum(reltuples) FROM pg_class, pg_sleep(%s)",
}


@dataclass(frozen=True)
class Tally:
    """What became of the requests that ended in a time: `longest` is in seconds."""

    requests: int = 0
    failed: int = 0
    longest: float = 0.0


class Load:
    """Makes load for a while each time it is started."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until = -math.inf
        #: The threads that make load, by their numbers.
        self._running: set[int] = set()
        self._tally = Tally()

    def start(self, pool: AbstractConnectionPool) -> None:
        """Make load from now on, for SECONDS; where there is some already, it only lasts longer."""
        with self._lock:
            self._until = self._clock() + SECONDS
            missing = set(range(pool.maxconn + MORE)) - self._running
            self._running |= missing
        for number in missing:
            threading.Thread(target=self._use, args=(pool, number), name=f"demo-load-{number}", daemon=True).start()

    def _goes_on(self, pool: AbstractConnectionPool, number: int) -> bool:
        with self._lock:  # so that nobody counts on a thread that is about to end
            if self._clock() < self._until and not pool.closed:
                return True
            self._running.discard(number)
            return False

    def _use(self, pool: AbstractConnectionPool, number: int) -> None:
        while self._goes_on(pool, number):
            request, sql = random.choice(list(REQUESTS.items()))
            begun, failed = self._clock(), 0
            try:
                with task(request):
                    pool.run_transaction(partial(_run, sql=sql, seconds=random.uniform(0, 1)))
            except psycopg2.Error:
                failed = 1
            seconds = self._clock() - begun
            with self._lock:
                now = self._tally
                self._tally = Tally(now.requests + 1, now.failed + failed, max(now.longest, seconds))

    def lock(self, pool: AbstractConnectionPool) -> None:
        """Let one request hold a lock for LOCKED seconds, for which some of the load waits."""
        self.start(pool)
        threading.Thread(target=_import, args=(pool,), name="demo-import", daemon=True).start()

    def fill(self, pool: AbstractConnectionPool, most: int) -> None:
        """Keep the queue of `most` waiters full for FULL seconds; return when it is."""
        self.start(pool)
        until = time.monotonic() + FULL
        for number in range(most + pool.maxconn):  # more than may wait
            threading.Thread(target=_crowd, args=(pool, until), name=f"demo-crowd-{number}", daemon=True).start()
        while len(pool.waiters()) < most and time.monotonic() < until:
            time.sleep(0.01)

    def restart(self, pool: AbstractConnectionPool, server: EmbeddedServer) -> tuple[float, Tally]:
        """Restart the server under load; return for how many seconds it was down, and what the load got meanwhile."""
        self._begin_tally(pool)
        begun = self._clock()
        server.halt()
        server.launch()
        down = self._clock() - begun
        return down, self._end_tally()

    def kill(self, pool: AbstractConnectionPool) -> tuple[str, Tally]:
        """End the server's process of the oldest holder; return which request that was, and what the load got."""
        self._begin_tally(pool)
        request = ""
        if holders := pool.holders():
            oldest = max(holders, key=lambda holder: holder.seconds)
            request = oldest.request
            with closing(pool.open_connection()) as conn, conn.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [oldest.backend_pid])
        return request, self._end_tally()

    def _begin_tally(self, pool: AbstractConnectionPool) -> None:
        self.start(pool)
        time.sleep(BEFORE)
        with self._lock:
            self._tally = Tally()

    def _end_tally(self) -> Tally:
        time.sleep(AFTER)
        with self._lock:
            return self._tally


def _run(conn: Connection, sql: str, seconds: float) -> None:
    with conn.cursor() as cursor:
        cursor.execute(sql, [seconds])


def _import(pool: AbstractConnectionPool) -> None:
    with task("POST /import"), suppress(psycopg2.Error):
        pool.run_transaction(partial(_run, sql=f"SELECT pg_advisory_xact_lock({LOCK}), pg_sleep(%s)", seconds=LOCKED))


def _crowd(pool: AbstractConnectionPool, until: float) -> None:
    with task("GET /sale"):
        while time.monotonic() < until and not pool.closed:
            try:
                pool.run_transaction(partial(_run, sql="SELECT pg_sleep(%s)", seconds=0.3))
            except psycopg2.Error:
                time.sleep(0.02)  # the queue is full
