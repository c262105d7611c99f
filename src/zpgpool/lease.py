"""What a request holds of a pool, from its first use to the request's end; and who looks after it meanwhile.

Knows nothing of WSGI but what `environ` says.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from typing import TYPE_CHECKING

from .caller import working_on
from .errors import PoolClosed
from .errors import PoolError
from .interfaces import IPersistentConnectionPool
from .keeper import keeper


if TYPE_CHECKING:
    import psycopg2
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from .caller import Caller


log = logging.getLogger("zpgpool")


def lease_key(name: str) -> str:
    """Return where `environ` has the lease of the pool `name`."""
    return f"zpgpool.lease.{name}" if name else "zpgpool.lease"


class Mine:
    """What a thread's requests have not ended yet: their leases, by the pool's id; their transactions, without them."""

    def __init__(self) -> None:
        self.leases: dict[int, Lease] = {}
        self.unfinished: list[Any] = []


class Here(threading.local):
    """`here.mine` is the calling thread's."""

    def __init__(self) -> None:
        self.mine = Mine()


here = Here()


class Lease:
    """What a request holds of a pool: at most one connection, from its first use to the request's end."""

    is_over = False

    #: The connection, where the pool is not a persistent one.
    _conn: Connection | None = None

    #: The request's connection once a transaction has joined it: only this puts it away.
    _hold: Any = None

    #: Whose transaction goes on with it, when the request ends first.
    borrower: Any = None

    #: Whether the application has returned its body, and goes on in that; and whether it borrowed since.
    is_streaming = False
    _lent_in_body = False

    def __init__(self, pool: Any, environ: WSGIEnvironment) -> None:
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        self.request = f"{environ.get('REQUEST_METHOD', '?')} {path}"
        self.pool = pool
        #: The threads whose stack has the application's code on it just now, once for each call into it.
        self.running: list[int] = []
        #: What the thread that it begins in has of leases, and of transactions.
        self.home = here.mine
        self._environ = environ
        self._thread = threading.get_ident()
        #: With a persistent pool the connection is the thread's, however the application asks for it.
        self._caller: Caller | None = pool.caller() if IPersistentConnectionPool.providedBy(pool) else None
        self.home.leases[id(pool)] = self
        working_on[self._thread] = self.request

    def run(self) -> AbstractContextManager[None]:
        """Return a context manager around a call into the application's code."""
        return Run(self)

    @property
    def is_thread_bound(self) -> bool:
        """Whether a thread can hold one lease of the pool at a time only."""
        return self._caller is not None

    def connection(self) -> Connection:
        """Return the request's connection. Raises PoolError after the request's end."""
        if self.is_over:
            raise PoolError(f"{self.request}: the request has ended, and its connection was given back")
        if self._hold is not None and (hold := self._live_hold()) is not None:
            held: Connection = hold.conn
            return held
        if self._caller is not None:
            return self._connection_of(self._caller)
        if self._conn is None or self._conn.closed:
            if self._conn is not None:
                self.pool.putconn(self._conn)
            self._conn = self.pool.getconn()
        return self._conn

    def _connection_of(self, caller: Caller) -> Connection:
        here = self.pool.caller()
        if here is not caller:  # a server that iterates the body in another thread than it called the app in
            if caller.held is not None:
                return caller.held.conn
            self._caller = here
        conn: Connection = self.pool.getconn()
        return conn

    def source(self) -> Any:
        """Return the pool that the request's connection comes from."""
        return self.pool

    def had(self, error: psycopg2.Error) -> bool:
        """Whether the request had `error` from its connection: one without a cursor is of a closed connection."""
        conn = error.cursor.connection if error.cursor is not None else None
        return any(own is conn or (conn is None and own.closed) for own in self._conns())

    def _conns(self) -> list[Connection]:
        entry = self._caller.held if self._caller is not None else None
        conns = (self._hold and self._hold.conn, self._conn, None if entry is None else entry.conn)
        return [conn for conn in conns if conn is not None]

    def cancel(self) -> None:
        """Cancel the query that the request waits for, if it does. From any thread."""
        for conn in self._conns():
            if self.pool.cancel(conn):
                log.info("%s: its client has gone, and its query was cancelled", self.request)

    def lend(self, borrower: Any) -> Any:
        """Let a transaction have the request's connection until it ends; return that."""
        hold = self.hold()
        self.borrower, self._lent_in_body = borrower, self.is_streaming
        return hold

    def hold(self) -> Any:
        """Return a hold (`IHold`) on the request's connection: from now on only that puts it away."""
        hold = self._live_hold()
        if hold is None:
            conn = self.connection()
            hold = self._hold = self.pool.hold(conn)
            self._conn = None
        return hold

    def _live_hold(self) -> Any:
        hold = self._hold
        if hold is not None and hold.conn.closed:
            self._hold = None
            hold.putconn()
        return self._hold

    def end(self) -> None:
        """Give the connection back. From any thread; harmless when repeated."""
        if self.is_over:
            return
        self.is_over = True
        self._environ.pop("zpgpool.connection", None)
        leases, number = self.home.leases, id(self.pool)
        if leases.get(number) is self:
            del leases[number]
        if working_on.get(self._thread) is self.request:
            del working_on[self._thread]
        self._release()
        self._environ = {}  # it refers to us

    def _release(self) -> None:
        close = bool(self._environ.get("wsgi.run_once"))
        try:
            if self._hold is not None:
                self._release_hold(close)
            if self._caller is not None:
                self.pool.putconn_of(self._caller, close=close)
            elif self._conn is not None:
                conn, self._conn = self._conn, None
                self.pool.putconn(conn, close=close)
        except PoolClosed:
            pass  # the pool was closed during the request, and its connection with it
        except PoolError as error:
            log.warning("%s: the connection could not be given back: %s", self.request, error)

    def _release_hold(self, close: bool) -> None:
        hold, self._hold = self._hold, None
        borrower = self.borrower
        if borrower is None or not borrower.is_joined:
            self.borrower = None
            hold.putconn(close)
        elif self._lent_in_body:
            borrower.abandon(f"{self.request} has ended, and this was begun in its body")
            hold.putconn(close)
        else:
            self.home.unfinished.append(borrower)
            log.warning(
                "%s has ended, but its transaction has not: %r keeps the connection until it does. The zpgpool "
                "filter must stand left of (outside) the filter that commits, as in `pipeline = zpgpool tm app`",
                self.request,
                borrower,
            )


class Run:
    """A call into the application's code, in whichever thread: meanwhile its lease is the thread's.

    A class, because a generator with `contextmanager` takes three times as long (measured: 0.75 against 0.25 µs).
    """

    __slots__ = ("_before", "_ident", "_lease", "_mine", "_number")

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._number = id(lease.pool)
        self._ident = threading.get_ident()
        self._mine = here.mine
        self._before = self._mine.leases.get(self._number)

    def __enter__(self) -> None:
        self._mine.leases[self._number] = self._lease
        self._lease.running.append(self._ident)

    def __exit__(self, *exc_info: object) -> None:
        lease, leases, before = self._lease, self._mine.leases, self._before
        lease.running.remove(self._ident)
        if (self._mine is not lease.home or lease.is_over) and leases.get(self._number) is lease:
            del leases[self._number]
            if before is not None and not before.is_over:
                leases[self._number] = before


def current_lease(pool: object) -> Lease | None:
    """Return the lease on `pool` of the request whose code the calling thread runs; None outside of requests."""
    lease = here.mine.leases.get(id(pool))
    return lease if lease is not None and threading.get_ident() in lease.running else None


class Disconnects:
    """Requests whose clients may go before they are answered: the timer looks after them."""

    #: How often, in seconds.
    EVERY = 0.5

    def __init__(self) -> None:
        self._leases: dict[Lease, Callable[[], bool]] = {}
        self._watched_in = 0

    def add(self, lease: Lease, environ: WSGIEnvironment) -> None:
        """Look after a request, if the server can tell."""
        has_gone = environ.get("waitress.client_disconnected")
        if has_gone is not None:
            self._leases[lease] = has_gone
            if self._watched_in != os.getpid():  # after a fork the timer has forgotten us
                self._watched_in = os.getpid()
                keeper.watch(self)

    def tend(self, now: float) -> float:
        """Cancel what nobody waits for any more, and return when to come again."""
        for lease, has_gone in list(self._leases.items()):
            if lease.is_over:
                self._leases.pop(lease, None)
            elif has_gone():
                lease.cancel()
        return now + self.EVERY
