"""The timer: one daemon thread of this process, which calls `run_maintenance(now)` of each pool when that is due.

Owns the only thread of `core` that lives on, and knows one method name. Pools are held weakly: the thread ends when
none is left.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from queue import SimpleQueue
from time import monotonic
from typing import Protocol

from .workers import start


log = logging.getLogger("zpgpool")

#: After an exception in `run_maintenance`, in seconds.
TRY_AGAIN = 1.0

#: Between two rounds of a pool, in seconds, whatever it says.
LEAST = 0.01

#: The longest wait of the thread, in seconds: there are times that a lock cannot wait for.
LONGEST = 3600.0


class Maintained(Protocol):
    """What the timer needs."""

    def run_maintenance(self, now: float) -> float | None:
        """Do what is due at `now` and return when to come again (monotonic seconds); None: never."""


class MaintenanceTimer:
    """Calls `run_maintenance` of the pools it watches."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._forget()

    def _forget(self) -> None:
        # After a fork, too: the thread is gone, the lock may be held for ever, and the pools tell when they need us.
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._due: weakref.WeakKeyDictionary[Maintained, float] = weakref.WeakKeyDictionary()
        #: Set by the thread itself, and forgotten by it.
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether the thread is there."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def watch(self, pool: Maintained) -> None:
        """Maintain `pool` from now on, for as long as it lives; harmless when repeated."""
        if self._process != os.getpid():  # forked by C code, which does not call Python's hooks
            self._forget()
        if pool not in self._due:
            self._add(pool)
        elif not self.is_running:  # it could not be started, or was lost
            self._start()

    def hurry(self, pool: Maintained) -> None:
        """Maintain `pool` now, if it is watched."""
        if pool in self._due:
            self._add(pool)

    def _add(self, pool: Maintained) -> None:
        with self._lock:
            self._due[pool] = self._clock()
        self._wake.put(None)
        if not self.is_running:
            self._start()

    def _start(self) -> None:
        start(self._run, "zpgpool-timer")

    def run_due(self, now: float) -> float | None:
        """Maintain every pool whose time has come; return when the next one's comes, or None when no pool is left."""
        with self._lock:
            refs = self._due.keyrefs()
        for ref in refs:
            pool = ref()
            if pool is not None and self._due.get(pool, now + 1) <= now:
                self._run_maintenance(pool, now)
            del pool  # or it would be kept alive until the next round
        with self._lock:
            return min(self._due.values(), default=None)

    def _run_maintenance(self, pool: Maintained, now: float) -> None:
        next_time: float | None = now + TRY_AGAIN
        try:
            next_time = pool.run_maintenance(now)
        except BaseException:  # a SystemExit of some subscriber, too, must not end the timer of all pools
            log.exception("the maintenance of a pool failed; next try in %.0f s", TRY_AGAIN)
        with self._lock:
            if next_time is None:
                self._due.pop(pool, None)
            else:
                self._due[pool] = max(next_time, now + LEAST)

    def _run(self) -> None:
        with self._lock:
            if self.is_running:  # two were started
                return
            self._thread = threading.current_thread()
        while True:
            self.run_due(self._clock())
            with self._lock:
                due = min(self._due.values(), default=None)
                if due is None:
                    self._thread = None
                    return
            with suppress(Empty):
                self._wake.get(timeout=min(max(0.0, due - self._clock()), LONGEST))


#: The one of this process.
timer = MaintenanceTimer()
os.register_at_fork(after_in_child=timer._forget)
