"""What a pool tells others: events to subscribers, each wait and use to observers.

Holds the pool weakly, like every part of a pool.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import ParamSpec
from typing import TYPE_CHECKING
from typing import TypeVar

import psycopg2

from ..errors import one_line
from ..events import ConnectFailed
from ..events import ConnectionClosed
from ..events import ConnectionLeaked
from ..events import ConnectionOpened
from ..events import notify
from ..events import OutageBegan
from ..events import OutageEnded
from ..events import PoolEvent
from ..events import RequestRefused
from ..events import RequestTimedOut
from ..interfaces import IObserver


if TYPE_CHECKING:
    from ..errors import PoolError
    from ..types import ObservedPool
    from .entry import Entry
    from .owners import Holder


log = logging.getLogger("zpgpool")

P = ParamSpec("P")
T = TypeVar("T")


class Notifier:
    """Speaks for one pool, as long as that lives; `str()` of it names the pool in messages."""

    def __init__(self, pool: ObservedPool) -> None:
        self._pool = weakref.ref(pool)
        self.observers: list[IObserver] = []

    def __str__(self) -> str:
        return repr(self._pool())

    def opened(self, entry: Entry, seconds: float) -> None:
        """Tell of a new connection, which took so long."""
        self._tell(ConnectionOpened, entry.backend_pid, seconds)

    def cannot_connect(self, error: BaseException, outage_wait: float) -> None:
        """Log a failure that no caller gets: none waits, or those that wait, wait out the outage."""
        pool = self._pool()
        if pool is not None:
            more = f"; checkouts now wait for the server, up to {outage_wait:g} s" if outage_wait else ""
            log.warning("%r cannot connect: %s%s", pool, pool.scrub(one_line(error)), more)

    def outage_began(self, error: psycopg2.OperationalError) -> None:
        """Tell that the server is gone."""
        self._tell(OutageBegan, error)

    def outage_ended(self, seconds: float, waiting: int) -> None:
        """Tell that it is back, after so long, and how many waited for it."""
        log.warning("%s: the server is back after %.1f s; %d waited for it", self, seconds, waiting)
        self._tell(OutageEnded, seconds, waiting)

    def failed(self, error: psycopg2.OperationalError, seconds: float) -> None:
        """Tell of a connect that failed after so long."""
        self._tell(ConnectFailed, error, seconds)

    def closed(self, entry: Entry, reason: str) -> None:
        """Tell of a connection that was closed."""
        self._tell(ConnectionClosed, entry.backend_pid, reason)

    def timed_out(self, seconds: float, error: PoolError) -> None:
        """Tell of a checkout that was given up."""
        self._tell(RequestTimedOut, seconds, error)

    def refused(self, error: PoolError) -> None:
        """Tell of a checkout that found too many others in the queue."""
        self._tell(RequestRefused, error)

    def leaked(self, holder: Holder) -> None:
        """Tell of a connection that is held for long."""
        self._tell(ConnectionLeaked, holder)

    def _tell(self, make: Callable[..., PoolEvent], *details: object) -> None:
        pool = self._pool()
        if pool is not None:
            notify(make(pool, *details))

    def waited(self, seconds: float) -> None:
        """Tell the observers of a wait in the queue."""
        self._call(lambda observer: observer.waited(seconds))

    def used(self, seconds: float) -> None:
        """Tell the observers of a use."""
        self._call(lambda observer: observer.used(seconds))

    def maintain(self, now: float) -> list[float]:
        """Let the observers do what is due, and return when to come again (monotonic seconds)."""
        return self._call(lambda observer: observer.maintain(now))

    def _call(self, method: Callable[[IObserver], T]) -> list[T]:
        """Return what the observers do. What one of them raises is logged, and stops nothing."""
        done = []
        for observer in list(self.observers):
            try:
                done.append(method(observer))
            except Exception:
                log.exception("an observer of %s failed: %r", self, observer)
        return done


def weakly(method: Callable[P, T]) -> Callable[P, T | None]:
    """Return a function that calls `method` as long as its object lives, which it does not keep alive."""
    weak_method = weakref.WeakMethod(method)

    def call(*args: P.args, **keywords: P.kwargs) -> T | None:
        found = weak_method()
        return None if found is None else found(*args, **keywords)

    return call
