"""2,500 exceptions at random moments of getconn and putconn: `python interrupts.py CLASS SEED DSN`."""

from __future__ import annotations

import random
import signal
import sys
import threading
from typing import Any

import zpgpool


HITS = 2500


class Interrupt(Exception):
    """Raised by a signal, between any two bytecodes."""


class Interrupts:
    """A timer whose signal raises once each time it was armed."""

    def __init__(self) -> None:
        self.is_armed = False
        self.hits = 0
        signal.signal(signal.SIGALRM, self.strike)

    def strike(self, number: int, frame: Any) -> None:
        if self.is_armed:
            self.is_armed = False
            self.hits += 1
            raise Interrupt

    def arm(self, seconds: float) -> None:
        self.is_armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)


def use(pool: Any, interrupts: Interrupts, seconds: float, held: list[Any]) -> None:
    """Get and put until struck. In a frame of its own: a loop's own jump may stand outside of its try (3.13)."""
    interrupts.arm(seconds)
    for _ in range(20):
        held[:] = [pool.getconn()]
        pool.putconn(held[0])
        held.clear()
    while interrupts.is_armed:
        pass


def main(kind: str, seed: int, dsn: str) -> None:
    sys.unraisablehook = lambda unraisable: (
        None
    )  # where an exception strikes a finalizer, Python reports it, and goes on
    pool = getattr(zpgpool, kind)(0, 4, dsn, idle_timeout=60, timeout=5)
    dice = random.Random(seed)
    interrupts = Interrupts()
    while interrupts.hits < HITS:
        held: list[Any] = []
        pool.putconn(pool.getconn())  # they shall strike hits, not only connects
        try:
            use(pool, interrupts, dice.uniform(2e-6, 6e-5), held)
        except Interrupt:
            pass
        interrupts.is_armed = False
        for conn in held:
            try:
                pool.putconn(conn)
            except zpgpool.PoolError:
                pass  # it was put away before the interrupt
    signal.setitimer(signal.ITIMER_REAL, 0)
    held, conn = [], None
    if pool.holders() and kind == "PersistentConnectionPool":
        pool.putconn()
    # Full capacity, and never one connection with two users.
    barrier = threading.Barrier(4)
    pids = set()

    def hold() -> None:
        conn = pool.getconn()
        barrier.wait(10)
        pids.add(conn.info.backend_pid)
        barrier.wait(10)
        pool.putconn(conn)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 4, f"{len(pids)} of 4 places are left"
    assert pool.get_stats()["pool_size"] == 4, pool
    pool.closeall()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
