"""What the pools share: making, closing, maintenance, and the slow halves of getconn and putconn.

Knows nothing of WSGI, of transactions, or that a timer exists: `tend(now)` does what is due, whoever calls it.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import weakref
from abc import ABC
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any
from typing import NoReturn
from typing import TypeVar

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import STATUS_READY

from .caller import Caller
from .caller import Here
from .caller import Hold
from .caller import Holder
from .caller import Waiter
from .entry import cancel
from .entry import Entry
from .entry import one_line
from .errors import PoolClosed
from .errors import PoolError
from .errors import PoolTimeout
from .errors import TooManyRequests
from .handoff import Closed
from .handoff import LineFull
from .handoff import LOOK_AGAIN
from .herald import Herald
from .herald import weakly
from .interfaces import IObserver
from .session import Watched
from .session import watched
from .settings import check_sizes
from .settings import convert
from .settings import PoolSettings
from .settings import scrub
from .settings import sort_keywords
from .stock import NEVER
from .stock import Stock
from .watchdog import due_times
from .watchdog import end_held_too_long
from .watchdog import report_leaks


log = logging.getLogger("zpgpool")

#: Within so many seconds, at random, a refill by the timer begins: not in all processes at once, whose server is back.
SPREAD = 1.0

Self = TypeVar("Self", bound="AbstractConnectionPool")


class AbstractConnectionPool(ABC):
    """What the pools share. See `IConnectionPool`.

    minconn -- connections opened at once, and kept open by `prune()`.
    maxconn -- never more than these are open or being opened, as the server counts them.
    *args, **kwargs -- go to `psycopg2.connect()`, where `ENV:NAME` as the dsn reads the environment; but
        `idle_timeout` and the other names of the settings table (`zpgpool.settings.PoolSettings`) are the pool's own.
    open -- False: connect on first use only.

    Raises `ValueError` for an option that is unknown or cannot be, and what `psycopg2.connect()` raises.
    """

    #: Is called with a pool when it has opened its first connection; the package makes it the keeper's `watch`.
    attend: Callable[[AbstractConnectionPool], object] = staticmethod(lambda pool: None)

    #: Whether somebody calls `tend`. Who wants no timer sets it before the first connection is opened.
    is_attended: bool

    def __init__(
        self,
        minconn: int,
        maxconn: int,
        *args: Any,
        idle_timeout: float | None = 0,
        open: bool = True,
        **kwargs: Any,
    ) -> None:
        options, keywords = sort_keywords(args, kwargs)
        self.settings = PoolSettings(minconn=minconn, maxconn=maxconn, idle_timeout=idle_timeout, **options)
        self.closed = False
        # Closures, so that no attribute holds the password.
        factory = watched(keywords.get("connection_factory") or Connection)
        self._connect: Callable[[], Connection] = lambda: psycopg2.connect(
            **{**keywords, "connection_factory": factory}
        )
        plain = {**keywords, "connection_factory": None, "cursor_factory": None}
        self._connect_aside: Callable[..., Connection] = lambda more: psycopg2.connect(**{**plain, **more})
        self._scrub: Callable[[str], str] = lambda text: scrub(text, keywords)
        self._herald = Herald(self)
        self._start()
        if open:
            is_attended, self.is_attended = self.is_attended, True  # not before all is well
            try:
                self._stock.refill()
            except BaseException:
                self.close(0)
                raise
            self.is_attended = is_attended
            if self.minconn:
                self._herald.call_timer()

    def _start(self) -> None:
        """Begin with nothing: when made, and again in a forked child."""
        settings = self.settings
        self._callers: set[Caller] = set()
        self._here = Here(self._callers)
        self._stock = Stock(
            settings,
            weakly(self._open),
            self._herald,
            weakly(self._lose),
            weakly(self._tidy),
            self._make_lock(),
        )
        #: What the hit path and a clean return look at, without a detour.
        self._parked = self._stock.handoff.parked
        self._line = self._stock.handoff.line
        #: Whether each return goes the long way: to be reset, compared with how it was, or told of.
        self._is_long = settings.reset is not None or bool(self._herald.observers)
        #: From when on each return looks for more than waiters (monotonic seconds): see `_after_return`.
        self._watch_at = 0.0 if settings.idle_timeout == 0 else NEVER
        #: A connection that rested for longer is judged before it is handed out.
        rests = [settings.check_idle if settings.check_idle is not None else NEVER, settings.idle_timeout or NEVER]
        self._rest = min(rests) if settings.check is None else -1.0
        self.is_attended = False
        #: The last thread that opened connections up to `minconn`.
        self._refilling = threading.Timer(0, weakly(self._refill))
        #: What was lost without being returned, until its place is freed.
        self._strays: deque[Entry] = deque()
        _pools.add(self)

    def _open(self) -> Connection:
        conn = self._connect()
        # A factory that is no class, or makes another one's connections: nobody tells who changed what.
        self._is_long = self._is_long or not isinstance(conn, Watched)
        return conn

    def _make_lock(self) -> AbstractContextManager[object]:
        # Reentrant: the garbage collector, or a signal, may call us in the thread that holds it.
        return threading.RLock()

    # What the documentation of psycopg2.pool says --------------------------------------------------------------------

    @abstractmethod
    def getconn(self) -> Connection:
        """See `IConnectionPool`."""

    @abstractmethod
    def putconn(self, conn: Connection) -> None:
        """See `IConnectionPool`."""

    def prune(self) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self._stock.expire(monotonic())
        self._stock.refill()

    def closeall(self) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self.close(0)

    @property
    def minconn(self) -> int:
        """See `IConnectionPool`."""
        return self.settings.minconn

    @property
    def maxconn(self) -> int:
        """See `IConnectionPool`."""
        return self.settings.maxconn

    @property
    def name(self) -> str:
        """See `IConnectionPool`."""
        return self.settings.name

    @property
    def twophase(self) -> bool:
        """See `IConnectionPool`."""
        return self.settings.twophase

    @property
    def outage(self) -> psycopg2.Error | None:
        """See `IConnectionPool`."""
        return self._stock.outage.error

    @abstractmethod
    def connection(self) -> AbstractContextManager[Connection]:
        """See `IConnectionPool`."""

    @abstractmethod
    def hold(self, conn: Connection | None = None) -> Hold:
        """See `IConnectionPool`."""

    def close(self, timeout: float = 5.0) -> None:
        """See `IConnectionPool`."""
        stock = self._stock
        self.closed = True
        self._watch_at = 0.0
        stock.handoff.close()
        stock.discard_parked("the pool is closed")
        deadline = monotonic() + timeout
        while not stock.handoff.is_empty.wait(max(0.0, min(LOOK_AGAIN, deadline - monotonic()))):
            if monotonic() >= deadline:
                break
            self._bury()  # a thread may have ended meanwhile, or a connection been lost
            stock.handoff.forget_lost()
        stock.close()
        self._forget_users()

    def drain(self) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self._stock.drain()

    def resize(self, minconn: int, maxconn: int) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        minconn, maxconn = convert("minconn", minconn), convert("maxconn", maxconn)
        check_sizes(minconn, maxconn)
        self.settings.minconn, self.settings.maxconn = minconn, maxconn
        self._watch_at = 0.0
        self._stock.resized()

    def holders(self) -> list[Holder]:
        """See `IConnectionPool`."""
        now = monotonic()
        return [Holder.of(caller, entry, now) for caller, entry in self._users()]

    def waiters(self) -> list[Waiter]:
        """See `IConnectionPool`."""
        now = monotonic()
        return [Waiter.of(ticket.thread, ticket.since, now) for ticket in list(self._line)]

    def get_stats(self) -> dict[str, int]:
        """See `IConnectionPool`."""
        with self._stock.lock:  # as `_bury` has: the sum never goes back
            stats = self._stock.get_stats()
            stats["requests_num"] += sum(caller.uses for caller in list(self._callers))
        return stats

    def tend(self, now: float) -> float | None:
        """Do what is due at `now`, and return when to come again (monotonic seconds); None: never, it is closed.

        Due are: connections of threads that have ended, idle, aged and dead ones, `minconn`, reports of leaks.
        """
        if self.closed:
            return None
        settings, stock = self.settings, self._stock
        self._bury()
        end_held_too_long(self._users(), settings, self._herald, now)
        report_leaks(self._users(), settings, self._herald, now)
        stock.handoff.forget_lost()
        stock.expire(now)
        stock.look_at_all()
        if len(stock.handoff) < settings.minconn and not stock.outage.is_on:
            self._start_refill()
        due = [*due_times(self._users(), settings, now), *stock.due_times(now), *self._herald.tend(now)]
        return min([now + settings.prune_interval, *due])

    def observe(self, observer: IObserver) -> None:
        """See `IConnectionPool`."""
        self._herald.observers.append(observer)
        self._is_long = True

    def connect_aside(self, **keywords: Any) -> Connection:
        """See `IConnectionPool`."""
        return self._connect_aside(keywords)

    def scrub(self, text: str) -> str:
        """See `IConnectionPool`."""
        return self._scrub(text)

    def _start_refill(self) -> None:
        """Refill in a thread of its own: a server that does not answer must not stop the timer of all pools."""
        if not self._refilling.is_alive():
            self._refilling = threading.Timer(random.uniform(0, SPREAD), weakly(self._refill))
            self._refilling.name, self._refilling.daemon = "zpgpool-refill", True
            self._refilling.start()

    def _refill(self) -> None:
        try:
            self._stock.refill()
        except Exception as error:  # of the connect, or of the user's own `configure`
            if not self.closed:
                log.warning("%r cannot connect: %s", self, self.scrub(one_line(error)))

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{len(self._parked)} idle of {len(self._stock.handoff)} open, at most {self.maxconn}"
        return f"<{type(self).__name__} {self.name!r}: {'closed' if self.closed else size}>"

    # Who holds what: the subclass's table ----------------------------------------------------------------------------

    @abstractmethod
    def _users(self) -> list[tuple[Caller, Entry]]:
        """Return the connections in use, with who took them: a snapshot."""

    @abstractmethod
    def _seize(self, caller: Caller, entry: Entry) -> bool:
        """Take `entry` out of the table; False when it has been returned meanwhile."""

    @abstractmethod
    def _forget_users(self) -> None:
        """Empty the table."""

    # The slow halves of getconn and putconn --------------------------------------------------------------------------

    def _obtain(self, entry: Entry | None, start: float | None = None) -> Entry:
        """Return a connection fit for use: `entry`, if it is, else another one, waited for or opened.

        The `timeout` counts from `start` (monotonic seconds), by default from now.
        """
        start = monotonic() if start is None else start
        error: PoolError
        if entry is None and not self._parked:
            self._bury()  # before this thread opens one, or waits: a place may be held by nobody
        try:
            found = self._stock.obtain(entry, start)
            if found is not None:
                return found
            error = self._timed_out(monotonic() - start)
            self._herald.timed_out(monotonic() - start, error)
        except LineFull:
            error = TooManyRequests(f"{self!r}: {self.settings.max_waiting} threads are waiting already")
        except Closed:
            error = PoolClosed(f"{self!r}")
        self._stock.count(requests_errors=1)
        raise error from self.outage

    def _timed_out(self, waited: float) -> PoolTimeout:
        what = (
            f"no connection came free within {waited:.1f} s" if self.settings.timeout else "connection pool exhausted"
        )
        holders = "; ".join(str(holder) for holder in self.holders()) or "nobody"
        return PoolTimeout(f"{what}: {self!r}, {len(self._line)} more waiting. Held by {holders}")

    def _give_back(self, caller: Caller, entry: Entry, close: bool) -> None:
        """Park a connection that was taken out of the table, clean, where `caller` finds it; or discard it."""
        now = monotonic()
        conn: Any = entry.conn
        # Entry.is_clean, written out, for a session that nobody touched.
        if (
            close
            or now >= entry.expires
            or self._is_long
            or conn.is_touched
            or conn.status != STATUS_READY
            or conn.get_transaction_status()
        ):
            if not self._stock.clean(entry, close):
                return
            now = monotonic()
        entry.since = now
        # Handoff.park, written out because a call is a tenth of a return: park first, then look at the line.
        if self._parked.setdefault(caller, entry) is not entry:
            self._parked[entry] = entry
        if self._line or now >= self._watch_at:
            self._after_return(now)

    def _after_return(self, now: float) -> None:
        """What a return sees to besides its own connection: the line, too many idle ones, a pool that was closed."""
        self._stock.after_return()

    def _tidy(self) -> None:
        """Mend what an end of a thread, or an exception in one, left to those who wait."""
        self._bury()
        self._stock.trim()

    def _bury(self) -> None:
        """Close what threads that have ended still held, so that the server rolls back; free what was lost."""
        for caller, entry in self._users():
            if caller.is_alive:
                continue
            entry.is_passing = True  # before it is seized: who may not wait must see that the place comes free
            if not self._seize(caller, entry):
                entry.is_passing = False
            else:
                log.warning("%r: thread %s ended while it held a connection, which is closed", self, caller.name)
                self._stock.discard(entry, "its thread has ended")
        while self._strays:
            entry = self._strays.popleft()
            log.warning("%r: thread %s lost a connection without returning it", self, entry.caller.name)
            self._stock.discard(entry, "its user lost it")
        with self._stock.lock:  # several threads bury: each caller's uses count once
            gone = {caller for caller in list(self._callers) if not caller.is_alive}
            self._callers -= gone
            self._stock.count(requests_num=sum(caller.uses for caller in gone))

    @abstractmethod
    def _lose(self, ref: weakref.ref[Connection]) -> None:
        """A connection object is no more. Called by the garbage collector: takes no lock, logs nothing."""

    def cancel(self, conn: Connection) -> bool:
        """See `IConnectionPool`."""
        return bool(cancel(entry for _, entry in self._users() if entry.connection() is conn))

    def _check_open(self) -> None:
        if self.closed:
            raise PoolClosed(f"{self!r}")

    def _refuse(self, why: str) -> NoReturn:
        self._check_open()
        raise PoolError(f"{self!r}: {why}")

    def _forget(self) -> None:
        """In a forked child: leave the parent its connections, and begin anew."""
        for entry in self._stock.handoff.places:
            if entry.is_filled:
                entry.abandon()
        self._forget_users()
        self._start()
        for observer in self._herald.observers:
            observer.forget()
        if self.closed:
            self._stock.handoff.close()


#: All pools of the process: a forked child must forget the connections of each.
_pools: weakref.WeakSet[AbstractConnectionPool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_pools):
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
