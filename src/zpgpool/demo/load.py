"""The demo's load: threads that use the pool, more than there are connections, and count what they get."""

from __future__ import annotations

import random
import threading
import time
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

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._tally = Tally()

    def start(self, pool: AbstractConnectionPool) -> None:
        """Make load from now on; harmless while there is some."""
        with self._lock:
            if time.monotonic() < self._until:
                return
            self._until = time.monotonic() + SECONDS
        for number in range(pool.maxconn + MORE):
            threading.Thread(target=self._use, args=(pool,), name=f"demo-load-{number}", daemon=True).start()

    def _use(self, pool: AbstractConnectionPool) -> None:
        with task("the demo's load"):
            while time.monotonic() < self._until and not pool.closed:
                begun, failed = time.monotonic(), 0
                try:
                    pool.run_transaction(_sleep)
                except psycopg2.Error:
                    failed = 1
                seconds = time.monotonic() - begun
                with self._lock:
                    now = self._tally
                    self._tally = Tally(now.requests + 1, now.failed + failed, max(now.longest, seconds))

    def restart(self, pool: AbstractConnectionPool, server: EmbeddedServer) -> tuple[float, Tally]:
        """Restart the server under load; return for how many seconds it was down, and what the load got meanwhile."""
        self.start(pool)
        time.sleep(BEFORE)
        with self._lock:
            self._tally, self._until = Tally(), max(self._until, time.monotonic() + SECONDS)
        begun = time.monotonic()
        server.halt()
        server.launch()
        down = time.monotonic() - begun
        time.sleep(AFTER)
        with self._lock:
            return down, self._tally


def _sleep(conn: psycopg2.extensions.connection) -> None:
    with conn.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [random.uniform(0, 1)])
