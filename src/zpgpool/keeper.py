"""The timer: one daemon thread of this process calls `tend(now)` of every pool that it watches, when that is due.

Owns the only thread of this package that lives on, and knows one method name. Pools are held weakly: the thread ends
when none is left.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Protocol


log = logging.getLogger("zpgpool")

#: After an exception in `tend`, in seconds.
TRY_AGAIN = 1.0

#: The longest wait of the thread, in seconds: there are times that a lock cannot wait for.
LONGEST = 3600.0


class Tended(Protocol):
    """What the keeper needs."""

    def tend(self, now: float) -> float | None:
        """Do what is due at `now` and return when to come again (monotonic seconds); None: never."""


class Keeper:
    """Calls `tend` of the pools it watches."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._forget()

    def _forget(self) -> None:
        # After a fork, too: the thread is gone, the lock may be held for ever, and the pools tell when they need us.
        self._changed = threading.Condition()
        self._due: weakref.WeakKeyDictionary[Tended, float] = weakref.WeakKeyDictionary()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None

    def watch(self, pool: Tended) -> None:
        """Tend `pool` from now on, for as long as it lives."""
        with self._changed:
            self._due[pool] = self._clock()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="zpgpool-keeper", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def run_due(self, now: float) -> float | None:
        """Tend every pool whose time has come; return when the next one's comes, or None when no pool is left."""
        with self._changed:
            refs = self._due.keyrefs()
        for ref in refs:
            pool = ref()
            if pool is not None and self._due.get(pool, now + 1) <= now:
                self._tend(pool, now)
            del pool  # or it would be kept alive until the next round
        with self._changed:
            return min(self._due.values(), default=None)

    def _tend(self, pool: Tended, now: float) -> None:
        next_time: float | None = now + TRY_AGAIN
        try:
            next_time = pool.tend(now)
        except BaseException:  # a SystemExit of some subscriber, too, must not end the timer of all pools
            log.exception("tending a pool failed; next try in %.0f s", TRY_AGAIN)
        with self._changed:
            if next_time is None:
                self._due.pop(pool, None)
            else:
                self._due[pool] = next_time

    def _run(self) -> None:
        while True:
            self.run_due(self._clock())
            with self._changed:
                due = min(self._due.values(), default=None)
                if due is None:
                    self._thread = None
                    return
                self._changed.wait(min(max(0.0, due - self._clock()), LONGEST))


#: The one of this process.
keeper = Keeper()
os.register_at_fork(after_in_child=keeper._forget)
