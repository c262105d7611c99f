"""What must hold in every scenario of `make stress`: throughout, and in the end."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

import zpgpool
from waiting import eventually
from waiting import is_within


MAXCONN = 6

#: How long a checkout may take, and how much longer on a machine that has nothing else to do, in seconds.
TIMEOUT = 2.0
LATE = 0.5

#: The one thread of the package that may stay: it ends with its next round.
STAYS = "zpgpool-timer"

PAGE = resource.getpagesize()


def memory() -> int:
    """Return what this process has of the memory now, in KiB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE // 1024


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Invariants:
    """What is seen of a pool and of its server, and what of that is wrong.

    patience -- multiplies the bounds of time.
    """

    def __init__(self, application_name: str, patience: float) -> None:
        #: The pool's sessions have this name on the server.
        self.application_name = application_name
        self.patience = patience
        self.problems: list[str] = []
        #: The longest checkout, in seconds.
        self.longest = 0.0
        self.pool: Any = None
        #: A connection of no pool.
        self.watcher: Any = None

    def query(self, sql: str, *args: object) -> Any:
        with self.watcher.cursor() as cursor:
            cursor.execute(sql, args or None)
            return cursor.fetchall() if cursor.description else []

    def sessions(self) -> set[int]:
        """Return the numbers of the backends that the pool has, as the server counts them."""
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
        return {pid for (pid,) in self.query(sql, self.application_name)}

    def transactions(self) -> Any:
        """Return the transactions of our role on the server, whichever session has them: what it is, and its query."""
        sql = "SELECT application_name, query FROM pg_stat_activity WHERE usename = current_user AND pid != %s"
        return self.query(f"{sql} AND xact_start IS NOT NULL", self.watcher.info.backend_pid)

    # Throughout ------------------------------------------------------------------------------------------------------

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """Judge how long a checkout took, whatever came of it."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.longest = max(self.longest, seconds)
            bound = (TIMEOUT + LATE) * self.patience
            if seconds > bound and not is_within(seconds, bound):
                self.problems.append(f"getconn() took {seconds:.1f} s, with a timeout of {TIMEOUT:g} s")

    def check_begins(self, conn: Any) -> None:
        status = conn.info.transaction_status
        if status != TRANSACTION_STATUS_IDLE and not conn.closed:
            self.problems.append(f"a connection came with transaction status {status}")

    # In the end -------------------------------------------------------------------------------------------------------

    def expect(self, condition: Callable[[], Any], problem: Callable[[], str]) -> None:
        try:
            eventually(condition, 10 * self.patience)
        except AssertionError:
            self.problems.append(problem())

    def check_end(self) -> None:
        pool = self.pool
        slots = pool._connections.handoff
        pool.resize(0, MAXCONN)
        pool.run_maintenance(time.monotonic())
        deadline = time.monotonic() + 5
        while pool.last_connect_error is not None and time.monotonic() < deadline:
            try:  # the last attack may have hit the server
                with pool.connection():
                    pass
            except psycopg2.Error:
                time.sleep(0.05)
        self.check_capacity()
        self.expect(lambda: not pool.holders(), lambda: f"in use still: {pool.holders()}")
        self.expect(lambda: not pool.waiters(), lambda: f"somebody still waits: {pool.waiters()}")
        self.expect(
            lambda: self.sessions() == set(pool.backend_pids()) and len(self.sessions()) == len(slots),
            lambda: f"the server counts {self.sessions()}, the pool {pool.backend_pids()}: {pool!r}",
        )
        self.check_containers(pool)
        self.expect(lambda: not self.transactions(), lambda: f"transactions are open: {self.transactions()}")
        pool.close(1)
        self.expect(lambda: not self.sessions(), lambda: f"a closed pool leaves {self.sessions()}")

    def check_capacity(self) -> None:
        """Check all connections out at the same time."""
        pool, barrier, pids = self.pool, threading.Barrier(MAXCONN), set()

        def hold() -> None:
            try:
                with pool.connection(timeout=15 * self.patience) as conn:
                    barrier.wait(15 * self.patience)
                    self.check_begins(conn)
                    pids.add(conn.info.backend_pid)
                    barrier.wait(15 * self.patience)
            except Exception as error:
                barrier.abort()
                self.problems.append(f"not all can be checked out at the same time: {error!r}")

        threads = [threading.Thread(target=hold) for _ in range(MAXCONN)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(pids) != MAXCONN:
            self.problems.append(f"only {len(pids)} of {MAXCONN} places are left")

    def check_containers(self, pool: Any) -> None:
        """See that what the pool remembers is of what there is."""
        pool.run_maintenance(time.monotonic())
        connections = pool._connections
        bound = 4 * MAXCONN + 16
        sizes = {
            name: len(container)
            for name, container in {
                "slots": connections.handoff._refs,
                "ends of lifetimes": connections._ends,
                "blocks": pool._blocks,
                "threads": pool._owners,
                "in use": getattr(pool, "_used", ()),
                "keys that are being got": getattr(pool, "_comers", ()),
                "lost": pool._lost,
                "tasks": zpgpool.core.owners.tasks,
            }.items()
        }
        self.expect(
            lambda: not connections.opener.under_way and not connections._leaving(),
            lambda: f"{connections.opener.under_way} connects, {connections._leaving()} closes have not ended",
        )
        if any(size > bound for size in sizes.values()):
            self.problems.append(f"a pool at rest keeps {sizes}")

    @staticmethod
    def footprint() -> tuple[set[threading.Thread], int]:
        return set(threading.enumerate()), descriptors()

    def check_left(self, threads: set[threading.Thread], number: int) -> None:
        """See that no thread or descriptor is left over."""

        def left() -> list[str]:
            return [each.name for each in set(threading.enumerate()) - threads if each.name != STAYS]

        self.expect(lambda: not left(), lambda: f"threads are left: {left()}")
        self.expect(lambda: descriptors() <= number, lambda: f"{number} descriptors have become {descriptors()}")
