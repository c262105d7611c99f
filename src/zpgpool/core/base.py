"""What the pools share: making, closing, maintenance, and the slow halves of getconn and putconn.

Knows nothing of WSGI, or of the package `transaction`.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import count
from os import getpid
from time import monotonic
from typing import Any
from typing import TypeVar

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import STATUS_READY

from ..dsn import resolve
from ..dsn import scrub
from ..errors import PoolClosed
from ..errors import PoolError
from ..errors import PoolTimeout
from ..errors import TooManyRequests
from ..settings import check_sizes
from ..settings import convert
from ..settings import PoolSettings
from ..settings import sort_keywords
from .connections import Connections
from .entry import Entry
from .entry import NEVER
from .entry import NEVER_YET
from .handoff import Closed
from .handoff import LOOK_AGAIN
from .handoff import QueueFull
from .management import ManagedPool
from .notifier import Notifier
from .notifier import weakly
from .owners import Checkout
from .owners import LifeToken
from .owners import OwnerLocal
from .owners import refuse_greenlets
from .owners import ThreadOwner
from .probe import ask_why
from .session import is_watched
from .session import watched
from .timer import MaintenanceTimer
from .timer import timer as process_timer
from .transactions import run_transaction
from .users import MANY


Self = TypeVar("Self", bound="AbstractConnectionPool")
T = TypeVar("T")

_numbers = count(1)


class AbstractConnectionPool(ManagedPool):
    """What the pools share. See `IConnectionPool`.

    minconn -- connections opened at once, and kept open.
    maxconn -- never more than these are open or being opened, as the server counts them.
    *args, **kwargs -- go to `psycopg2.connect()`, where `ENV:NAME` as the dsn reads the environment; but
        `idle_timeout` and the other names of the settings table (`zpgpool.settings.PoolSettings`) are the pool's own.
        A `dsn` or `password` that is callable is called for each connect, and what it returns is not kept.
    open -- False: connect on first use, or with `open()`.
    timer -- what calls `run_maintenance` when that is due: the process's one by default; None: nothing does.

    Raises ValueError (`SettingError`) for an option that is unknown, or cannot be; TypeError for an argument too many;
    and the `psycopg2.OperationalError` of a connect that failed.
    """

    #: Whether other threads may open, close and maintain its connections.
    _in_background = True

    def __init__(
        self,
        minconn: int,
        maxconn: int,
        *args: object,
        idle_timeout: float | None = 0,
        open: bool = True,
        timer: MaintenanceTimer | None = process_timer,
        **kwargs: Any,
    ) -> None:
        refuse_greenlets()
        options, keywords = sort_keywords(args, kwargs)
        self.settings = PoolSettings(minconn=minconn, maxconn=maxconn, idle_timeout=idle_timeout, **options)
        self._name = self.settings.name or f"pool-{next(_numbers)}"
        self.closed = False
        self._has_unwatched = False
        # Closures, so that no attribute holds the password.
        factory = watched(keywords.get("connection_factory") or Connection)
        self._connect: Callable[[], Connection] = lambda: psycopg2.connect(
            **{**resolve(keywords), "connection_factory": factory}
        )
        plain = {**keywords, "connection_factory": None, "cursor_factory": None}
        self._open_connection: Callable[..., Connection] = lambda more: psycopg2.connect(**{**resolve(plain), **more})
        self._scrub: Callable[[str], str] = lambda text: scrub(text, keywords)
        self._timer: MaintenanceTimer | None = None  # not before all is well
        self._notifier = Notifier(self)
        self._owners: set[ThreadOwner] = set()
        self._many_owners = MANY
        #: `here.owner` is the calling thread, as this pool knows it.
        self.here = OwnerLocal(weakly(self._add_owner))
        self._start()
        if open:
            try:
                self._connections.refill()
            except BaseException:
                self.close(0)
                raise
        self._timer = timer
        if open and self.minconn:
            self._call_timer()

    def _start(self) -> None:
        """Begin with nothing: when made, and again in a forked child."""
        self._pid = getpid()
        self._connections = Connections(
            self.settings,
            weakly(self._open),
            self._notifier,
            weakly(self._on_lost),
            weakly(self._tidy),
            self._make_lock(),
            self._in_background,
            partial(ask_why, weakly(self.open_connection)),
        )
        #: What the hit path and a clean return look at, without a detour.
        self._parked = self._connections.handoff.parked
        self._queue = self._connections.handoff.queue
        #: The outermost `connection()` blocks, by key.
        self._blocks: dict[Hashable, weakref.ref[LifeToken]] = {}
        #: What was lost without being returned, until its slot is freed.
        self._lost: deque[Entry] = deque()
        self._astray, self._collected, self._looked_at = set(), set(), NEVER_YET
        self._apply(self.settings)
        _pools.add(self)

    def _apply(self, settings: PoolSettings) -> None:
        """Follow these settings from now on: the one place where they are read for the hit path."""
        self.settings = settings
        self._connections.apply(settings)
        #: Whether each return goes the long way: to be reset, compared, or told of.
        self._is_long = (
            settings.reset is not None
            or settings.refuses_writes
            or bool(self._notifier.observers)
            or self._has_unwatched
        )
        #: From when on each return looks for more than waiters (monotonic seconds): see `_after_return`.
        self._watch_at = NEVER_YET if settings.idle_timeout == 0 or not self._in_background else NEVER
        #: A connection that rested for longer is judged before it is handed out, in seconds.
        rests = [settings.check_idle if settings.check_idle is not None else NEVER, settings.idle_timeout or NEVER]
        self._rest = min(rests) if settings.check is None else -1.0

    def _open(self) -> Connection:
        conn = self._connect()
        # A factory that is no class, or makes another one's connections: changes of the session cannot be noticed.
        if not is_watched(conn):
            self._has_unwatched = self._is_long = True
        self._call_timer()
        return conn

    def _call_timer(self) -> None:
        if self._timer is not None:
            self._timer.watch(self)

    def _make_lock(self) -> AbstractContextManager[object]:
        # Reentrant: the garbage collector, or a signal, may call us in the thread that holds it.
        return threading.RLock()

    # What the documentation of psycopg2.pool says --------------------------------------------------------------------

    @abstractmethod
    def getconn(self, *, timeout: float | None = None) -> Connection:
        """See `IConnectionPool`."""

    @abstractmethod
    def putconn(self, conn: Connection, *, close: bool = False) -> None:
        """See `IConnectionPool`."""

    def prune(self) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self._connections.prune()

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
        return self._name

    @property
    def twophase(self) -> bool:
        """See `IConnectionPool`."""
        return self.settings.twophase

    @abstractmethod
    def connection(self, *, timeout: float | None = None) -> AbstractContextManager[Connection]:
        """See `IConnectionPool`."""

    @abstractmethod
    def checkout(self, conn: Connection | None = None) -> Checkout:
        """See `IConnectionPool`."""

    def open(self) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self._call_timer()
        self._connections.opener.open_missing(self.minconn)

    def wait(self, timeout: float = 30.0) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self._call_timer()
        number = max(1, self.minconn)
        if not self._connections.opener.wait_for(number, monotonic() + timeout):
            error = PoolTimeout(f"{self!r}: the server gave no {number} connections within {timeout:g} s")
            raise error from self.last_connect_error

    def run_transaction(self, function: Callable[[Connection], T], attempts: int = 3) -> T:
        """Call `function(conn)` in a transaction of its own, commit, and return the result.

        attempts -- how often it is run at most: again after a serialization failure, a deadlock, and a connection that
            could not be opened, or was lost before the commit; after pauses that grow from 0.1 to 1 s.

        Whatever else `function` does is done again, too. It must neither commit nor roll back. Raises CommitInDoubt
        when the answer to the commit was lost (see the setting `verify_commit`); PoolError when the connection is in a
        transaction already; what `getconn` and the last run of `function` raise.
        """
        return run_transaction(self, function, attempts)

    def close(self, timeout: float = 5.0) -> None:
        """See `IConnectionPool`."""
        self.check_process()
        connections = self._connections
        self.closed = True
        self._watch_at = NEVER_YET
        connections.handoff.close()
        connections.discard_parked("the pool is closed")
        self._reap()  # what was lost stands in no table
        deadline = monotonic() + timeout
        while not connections.handoff.is_empty.wait(max(0.0, min(LOOK_AGAIN, deadline - monotonic()))):
            if monotonic() >= deadline:
                break
            self._reap()  # a thread may have ended meanwhile, or a connection been lost
        connections.close()
        self._forget_users()

    def resize(self, minconn: int, maxconn: int) -> None:
        """See `IPoolManagement`."""
        self._check_open()
        minconn, maxconn = convert("minconn", minconn), convert("maxconn", maxconn)
        check_sizes(minconn, maxconn)
        self._apply(replace(self.settings, minconn=minconn, maxconn=maxconn))
        self._watch_at = NEVER_YET  # those in use may be too many
        self._connections.resized()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{len(self._parked)} idle of {len(self._connections.handoff)} open, at most {self.maxconn}"
        return f"<{type(self).__name__} {self.name!r}: {'closed' if self.closed else size}>"

    # The slow halves of getconn and putconn --------------------------------------------------------------------------

    def _obtain(self, entry: Entry | None, timeout: float | None = None, start: float | None = None) -> Entry:
        """Return a connection fit for use: `entry`, if it is, else another one, waited for or opened.

        The `timeout` counts from `start` (monotonic seconds), by default from now; by default it is the setting.
        """
        refuse_greenlets()
        start = monotonic() if start is None else start
        timeout = self.settings.timeout if timeout is None else convert("timeout", timeout)
        if self._pid != getpid():  # forked by C code, which does not call Python's hooks
            self._forget()
            entry = None
        if entry is None and (entry := self._parked.pop(self.here.owner.reader, None)) is None and not self._parked:
            self._reap()  # before this thread waits: a slot may be held by nobody
        error: PoolError
        try:
            found = self._connections.obtain(entry, start, timeout)
            if found is not None:
                return found
            error = self._timed_out(timeout, monotonic() - start)
            self._notifier.timed_out(monotonic() - start, error)
        except QueueFull:
            waiting = f"{self.settings.max_waiting} threads are waiting already"
            error = TooManyRequests(f"{self!r}: {waiting}. Held by {self._held_lately()}")
            self._notifier.refused(error)
        except Closed:
            error = PoolClosed(f"{self!r}")
        except BaseException as failure:
            self._connections.note_failure(failure)
            raise
        self._connections.note_failure(error)
        try:
            raise error from self.last_connect_error
        finally:
            del error  # no cycle with this frame: it would keep all frames of the traceback until a garbage collection

    def _timed_out(self, timeout: float, waited: float) -> PoolTimeout:
        what = f"no connection came free within {waited:.1f} s" if timeout else "connection pool exhausted"
        outage = self.outage_seconds
        down = "" if outage is None else f" The server cannot be reached for {outage:.1f} s."
        full = " The server has too many clients (53300)." if self._connections.backoff.is_full else ""
        return PoolTimeout(f"{what}: {self!r}, {len(self._queue)} more waiting.{down}{full} Held by {self._held_by()}")

    def _give_back(self, owner: ThreadOwner, entry: Entry, close: bool) -> None:
        """Park a connection that was taken out of the table, clean, where `owner` finds it; or discard it."""
        now = monotonic()
        conn: Any = entry.conn
        key: Hashable = owner
        # Entry.is_clean, written out, for a session whose settings are unchanged.
        if close or now >= entry.expires or self._is_long or conn.is_touched:
            entry.owner = owner
            if not self._connections.clean(entry, close):
                return
            if conn.autocommit is not entry.baseline[1]:
                key = owner.reader
            now = monotonic()
        elif conn.status != STATUS_READY or conn.get_transaction_status():
            entry.owner = owner
            if not self._connections.roll_back(entry, now) and not self._connections.clean(entry, close):
                return
            now = monotonic()
        entry.since = now
        # Handoff.park, written out because a call is a tenth of a return: park first, then look at the queue.
        if self._parked.setdefault(key, entry) is not entry:
            self._parked[entry] = entry
        if self._queue or now >= self._watch_at:
            self._after_return(now)

    def _after_return(self, now: float) -> None:
        """What a return sees to besides its own connection: the queue, too many idle ones, a pool that was closed."""
        self._connections.after_return()
        is_settled = len(self._connections.handoff) <= self.maxconn and not self.closed
        if is_settled and self._in_background and self.settings.idle_timeout != 0:
            self._watch_at = NEVER  # nothing is left to do after a resize()

    def _tidy(self) -> None:
        """Repair the queue after a thread has ended, or an exception has hit one."""
        self._reap()
        self._collect_astray(monotonic())
        self._connections.trim(later=True)

    def _forget(self) -> None:
        """In a forked child: leave the parent its connections, and begin with none."""
        for entry in self._connections.handoff.slots:
            if entry.is_attached:
                entry.abandon()
        self._forget_users()
        self._start()
        for observer in self._notifier.observers:
            observer.forget()
        if self.closed:
            self._connections.handoff.close()


#: All pools of the process: a forked child must forget the connections of each.
_pools: weakref.WeakSet[AbstractConnectionPool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_pools):
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
