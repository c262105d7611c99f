"""The demo's load: threads that use the pool, more than there are connections, and count what they get."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psycopg2

from ..core import AbstractConnectionPool
from ..core import task
from .server import EmbeddedServer


#: How many threads more than there are connections make load, and for how long, in seconds.
MORE = 4
SECONDS = 20.0

#: How long the load runs before a restart, and after it, in seconds.
BEFORE, AFTER = 0.5, 1.5


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
        with task("the demo's load"):
            while self._goes_on(pool, number):
                begun, failed = self._clock(), 0
                try:
                    pool.run_transaction(_sleep)
                except psycopg2.Error:
                    failed = 1
                seconds = self._clock() - begun
                with self._lock:
                    now = self._tally
                    self._tally = Tally(now.requests + 1, now.failed + failed, max(now.longest, seconds))

    def restart(self, pool: AbstractConnectionPool, server: EmbeddedServer) -> tuple[float, Tally]:
        """Restart the server under load; return for how many seconds it was down, and what the load got meanwhile."""
        self.start(pool)
        time.sleep(BEFORE)
        with self._lock:
            self._tally = Tally()
        begun = self._clock()
        server.halt()
        server.launch()
        down = self._clock() - begun
        time.sleep(AFTER)
        with self._lock:
            return down, self._tally


def _sleep(conn: psycopg2.extensions.connection) -> None:
    with conn.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [random.uniform(0, 1)])
