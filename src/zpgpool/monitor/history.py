"""What happened to the pools lately: samples of their sizes, distributions of times, incidents.

Nothing is kept, and no pool observed, before `begin` is called: by the status page, or an exporter of metrics.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from typing import TYPE_CHECKING

import zope.event
from zope.interface import implementer

from ..core import lag_of
from ..errors import one_line
from ..events import ConnectFailed
from ..events import ConnectionClosed
from ..events import ConnectionLeaked
from ..events import ConnectionOpened
from ..events import OutageEnded
from ..events import PoolEvent
from ..events import RequestRefused
from ..events import RequestTimedOut
from ..interfaces import IObserver
from ..interfaces import IPoolInternals
from ..interfaces import IPoolManagement


if TYPE_CHECKING:
    from ..types import Pool
    from ..types import Waiter


#: Between two samples, and how far back they are kept, in seconds.
EVERY = 5.0
SPAN = 600.0

#: How many incidents are kept of each pool.
INCIDENTS = 50

#: How many single times wait for an exporter that wants each: the newest, when it comes too rarely.
UNSENT = 100_000

#: The upper bounds of the distributions, in seconds: those of OpenTelemetry's database conventions.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

#: Those in a row are one incident, with the last one's text, which lists the current holders.
TIMED_OUT, REFUSED = "timed out", "refused"

#: Which ends of a connection are worth a incident, and its kind.
ENDS = {
    "its thread has ended": "thread reclaimed",
    "its user lost it": "connection lost",
    "the server has gone": "server gone",
    "rested beside one that did not answer": "server gone",
    "another connection was lost": "server gone",
}


class Sample(NamedTuple):
    """A pool's sizes at a moment (monotonic seconds), the longest wait since the sample before, a replica's lag."""

    at: float
    used: int
    idle: int
    waiting: int
    wait: float
    lag: float | None = None


@dataclass
class Incident:
    """Something that happened, and how often in a row; `at` is the time of day of the last time."""

    at: float
    kind: str
    text: str
    count: int = 1


class Times:
    """A distribution: how many times were up to each of BOUNDS, and above the last one; and their sum."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may end a request in the middle of `add`.
        self._lock = threading.RLock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        with self._lock:
            self._counts[bisect_left(BOUNDS, seconds)] += 1
            self._sum += seconds

    def read(self) -> tuple[list[int], float]:
        """Return the counts, not cumulative, and the sum."""
        with self._lock:
            return list(self._counts), self._sum


@implementer(IObserver)
class History:
    """What is kept of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = weakref.ref(pool)
        self.forget()

    def forget(self) -> None:
        """See `IObserver`."""
        self.samples: deque[Sample] = deque(maxlen=round(SPAN / EVERY))
        self.incidents: deque[Incident] = deque(maxlen=INCIDENTS)
        #: Of waiting, using and creating a connection, under the names of OpenTelemetry.
        self.times = {"wait_time": Times(), "use_time": Times(), "create_time": Times()}
        self._unsent: deque[tuple[str, float]] = deque(maxlen=UNSENT)
        self.timeouts = 0
        self._longest_wait = 0.0
        self._due = -math.inf

    def waited(self, seconds: float) -> None:
        """See `IObserver`."""
        self._longest_wait = max(self._longest_wait, seconds)
        self._add("wait_time", seconds)

    def used(self, seconds: float) -> None:
        """See `IObserver`."""
        self._add("use_time", seconds)

    def _add(self, name: str, seconds: float) -> None:
        self.times[name].add(seconds)
        if _exporters:
            self._unsent.append((name, seconds))

    def maintain(self, now: float) -> float:
        """See `IObserver`: take a sample, if that is due."""
        pool = self._pool()
        if now >= self._due and pool is not None:
            self._due = now + EVERY
            stats = pool.get_stats()
            idle, waiting = stats["pool_available"], waiters_of(pool)
            longest, self._longest_wait = self._longest_wait, 0.0
            wait = max([longest, *(waiter.seconds for waiter in waiting)])
            lag = lag_of(pool)
            used = max(0, stats["pool_size"] - idle)
            self.samples.append(Sample(now, used, idle, len(waiting), wait, None if lag is None else lag.seconds))
        return self._due

    def tell(self, event: PoolEvent) -> None:
        """Keep the incident of an event, if it is worth one."""
        match event:
            case ConnectionOpened():
                self._add("create_time", event.seconds)
            case ConnectFailed():
                self._tell("connect failed", event.pool.scrub(one_line(event.error)))
            case OutageEnded():
                self._tell("server back", f"after {event.seconds:.1f} s; {event.waiting} waited for it")
            case RequestTimedOut():
                with _lock:
                    self.timeouts += 1
                self._tell(TIMED_OUT, str(event.error))
            case RequestRefused():
                self._tell(REFUSED, str(event.error))
            case ConnectionLeaked():
                self._tell("held for long", str(event.holder))
            case ConnectionClosed() if event.reason in ENDS:
                self._tell(ENDS[event.reason], event.reason)

    def _tell(self, kind: str, text: str) -> None:
        now = time.time()
        last = self.incidents[-1] if self.incidents else None
        if last is not None and last.kind == kind and (last.text == text or kind in (TIMED_OUT, REFUSED)):
            last.at, last.text, last.count = now, text, last.count + 1
        else:
            self.incidents.append(Incident(now, kind, text))

    def drain(self) -> Iterator[tuple[str, float]]:
        """Yield each single time since the last call, where an exporter wants them (`begin`)."""
        while self._unsent:
            yield self._unsent.popleft()


_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)

_histories: weakref.WeakKeyDictionary[Pool, History] = weakref.WeakKeyDictionary()

#: The exporters that want each single time.
_exporters: list[object] = []


def waiters_of(pool: Pool) -> Sequence[Waiter]:
    """Return the requests that wait for a connection of `pool`; none where the pool does not tell."""
    return pool.waiters() if IPoolManagement.providedBy(pool) else ()


def begin(exporter: object = None) -> None:
    """Keep a history of each pool from now on: of every one that opens a connection, or is asked for.

    exporter -- the object that reads each single time by `History.drain`.
    """
    with _lock:
        if exporter is not None:
            _exporters.append(exporter)
        if _hear not in zope.event.subscribers:
            zope.event.subscribers.append(_hear)


def history_of(pool: Pool) -> History:
    """Return the history of `pool`, which begins with the first call."""
    with _lock:
        history = _histories.get(pool)
        if history is None:
            history = _histories[pool] = History(pool)
            if IPoolInternals.providedBy(pool):
                pool.observe(history)
        return history


def _hear(event: object) -> None:
    if isinstance(event, PoolEvent):
        history_of(event.pool).tell(event)
