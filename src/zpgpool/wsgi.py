"""The middleware: each request has its connection, and gives it back when the request ends.

A request ends when the application has returned a list or tuple, or a `wsgi.file_wrapper`; otherwise when the body's
`close()` is called, whichever thread does (PEP 3333, "Specification Details").
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sized
from contextlib import contextmanager
from typing import Any
from typing import TYPE_CHECKING

import psycopg2
from psycopg2 import errorcodes
from webob import Response
from zope.interface.registry import Components

from .caller import working_on
from .errors import PoolClosed
from .errors import PoolError
from .errors import PoolTimeout
from .errors import TooManyRequests
from .interfaces import IPersistentConnectionPool
from .keeper import keeper
from .pool import SimpleConnectionPool
from .registry import get_pool


if TYPE_CHECKING:
    from wsgiref.types import StartResponse
    from wsgiref.types import WSGIApplication
    from wsgiref.types import WSGIEnvironment

    from psycopg2.extensions import connection as Connection

    from .caller import Caller


log = logging.getLogger("zpgpool")


def get_connection(environ: WSGIEnvironment, name: str = "") -> Connection:
    """Return the connection of the request that `environ` belongs to, from the pool `name`; checked out on first use.

    Raises PoolError when no middleware serves that pool to the request, or the request has ended; and what
    `IConnectionPool.getconn` raises.
    """
    lease = environ.get(_key(name))
    if not isinstance(lease, Lease):
        raise PoolError(f"no PoolMiddleware serves a pool named {name!r} to this request")
    return lease.connection()


def _key(name: str) -> str:
    return f"zpgpool.lease.{name}" if name else "zpgpool.lease"


class _Here(threading.local):
    """The leases that the calling thread's requests have not ended yet, by the pool's id."""

    def __init__(self) -> None:
        self.leases: dict[int, Lease] = {}
        #: Transactions that go on after their requests' ends.
        self.unfinished: list[Any] = []


_here = _Here()


class Lease:
    """What a request holds of a pool: at most one connection, from its first use to the request's end."""

    def __init__(self, pool: Any, environ: WSGIEnvironment) -> None:
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        self.request = f"{environ.get('REQUEST_METHOD', '?')} {path}"
        self.pool = pool
        self.is_over = False
        #: The threads whose stack has the application's code on it just now, once for each call into it.
        self.running: list[int] = []
        self._environ = environ
        self._thread = threading.get_ident()
        self._conn: Connection | None = None  # not with a persistent pool
        #: The request's connection once a transaction has joined it: only this puts it away.
        self._hold: Any = None
        #: Whose transaction goes on with it, when the request ends first.
        self.borrower: Any = None
        #: Whether the application has returned its body, and goes on in that; and whether it borrowed since.
        self.is_streaming = False
        self._lent_in_body = False
        self._unfinished = _here.unfinished
        #: With a persistent pool the connection is the thread's, however the application asks for it.
        self._caller: Caller | None = pool.caller() if IPersistentConnectionPool.providedBy(pool) else None
        _here.leases[id(pool)] = self
        self._leases = _here.leases
        working_on[self._thread] = self.request

    @contextmanager
    def run(self) -> Iterator[None]:
        """Return a context manager around a call into the application's code."""
        here, leases, number = threading.get_ident(), _here.leases, id(self.pool)
        before = leases.get(number)
        leases[number] = self  # also in a thread that only iterates the body
        self.running.append(here)
        try:
            yield
        finally:
            self.running.remove(here)
            if leases.get(number) is self and (leases is not self._leases or self.is_over):
                del leases[number]
                if before is not None and not before.is_over:
                    leases[number] = before

    @property
    def is_thread_bound(self) -> bool:
        """Whether a thread can hold one lease of the pool at a time only."""
        return self._caller is not None

    def connection(self) -> Connection:
        """Return the request's connection. Raises PoolError after the request's end."""
        if self.is_over:
            raise PoolError(f"{self.request}: the request has ended, and its connection was given back")
        hold = self._live_hold()
        if hold is not None:
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

    def cancel(self) -> None:
        """Cancel the query that the request waits for, if it does. From any thread."""
        entry = self._caller.held if self._caller is not None else None
        for conn in (self._hold and self._hold.conn, self._conn, entry and entry.conn):
            if conn is not None and self.pool.cancel(conn):
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
        if self._leases.get(id(self.pool)) is self:
            del self._leases[id(self.pool)]
        if working_on.get(self._thread) is self.request:
            del working_on[self._thread]
        self._release()
        self._environ = {}  # it refers to us

    def _release(self) -> None:
        close = bool(self._environ.get("wsgi.run_once"))
        conn, self._conn = self._conn, None
        hold, self._hold = self._hold, None
        try:
            borrower = self.borrower
            if hold is not None and (borrower is None or not borrower.is_joined):
                self.borrower = None
                hold.putconn(close)
            elif hold is not None and self._lent_in_body:
                borrower.abandon(f"{self.request} has ended, and this was begun in its body")
                hold.putconn(close)
            elif hold is not None:
                self._unfinished.append(borrower)
                log.warning(
                    "%s has ended, but its transaction has not: %r keeps the connection until it does. The zpgpool "
                    "filter must stand left of (outside) the filter that commits, as in `pipeline = zpgpool tm app`",
                    self.request,
                    borrower,
                )
            if self._caller is not None:
                self.pool.putconn_of(self._caller, close=close)
            elif conn is not None:
                self.pool.putconn(conn, close=close)
        except PoolClosed:
            pass  # the pool was closed during the request, and its connection with it
        except PoolError as error:
            log.warning("%s: the connection could not be given back: %s", self.request, error)


def current_lease(pool: object) -> Lease | None:
    """Return the lease on `pool` of the request whose code the calling thread runs; None outside of requests."""
    lease = _here.leases.get(id(pool))
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


class PoolMiddleware:
    """Gives each request of `app` its connection, and takes it back when the request ends.

    pool -- the pool; without it, the one that is registered as `name` when the first request comes, and again when
        that was closed.
    name -- by which `get_connection(environ, name)` knows the pool.
    eager -- check the connection out before `app` is called, and put it at `environ['zpgpool.connection']`.
    retry_after -- in seconds: told with `503 Service Unavailable`, which is the answer when no connection came free
        in time, too many wait for one, or the server is down.
    registry -- where `name` is looked up; by default the global registry.
    cancel_on_disconnect -- cancel the query of a request whose client has gone, as waitress tells when its setting
        `channel_request_lookahead` is above 0.

    A pool for one thread is refused with PoolError when the server says that it runs several.
    """

    def __init__(
        self,
        app: WSGIApplication,
        pool: Any = None,
        name: str = "",
        eager: bool = False,
        retry_after: int = 5,
        registry: Components | None = None,
        cancel_on_disconnect: bool = False,
    ) -> None:
        self.app = app
        self.name = name
        self.eager = eager
        self.retry_after = retry_after
        self._pool = pool
        self._is_by_name = pool is None
        self._registry = registry
        self._key = _key(name)
        self._disconnects = Disconnects() if cancel_on_disconnect else None

    @property
    def pool(self) -> Any:
        """The pool that is served. Raises ComponentLookupError when there is none yet."""
        if self._pool is None or (self._is_by_name and self._pool.closed):
            self._pool = get_pool(self.name, self._registry)
        return self._pool

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        pool = self.pool
        if isinstance(pool, SimpleConnectionPool) and environ.get("wsgi.multithread"):
            raise PoolError(f"{pool!r} is for one thread, this server runs several: use 'persistent' or 'threaded'")
        outer = self._outer_lease(environ)
        if outer is not None:
            environ[self._key] = outer
            return self.app(environ, start_response)
        if environ.get("wsgi.run_once"):
            pool.is_attended = True  # a process for one request needs no timer
        lease = environ[self._key] = Lease(pool, environ)
        while _here.unfinished:
            _here.unfinished.pop().abandon(f"{lease.request} begins, which must not commit it")
        if self._disconnects is not None:
            self._disconnects.add(lease, environ)
        body: Iterable[bytes] | None = None

        def refuse(error: psycopg2.Error) -> Iterable[bytes]:
            """Answer that the database is not available, if that is what `error` says; else raise it."""
            if _is_demotion(error) and not pool.closed:
                log.warning("%s: the server takes no writes any more; %r leaves it: %s", lease.request, pool, error)
                pool.drain()
            if not _is_unavailable(error, pool):
                raise error
            log.error("%s: 503 Service Unavailable: %s", lease.request, error, exc_info=error)
            return self._unavailable(environ, start_response)

        try:
            with lease.run():
                if self.eager:
                    environ["zpgpool.connection"] = lease.connection()
                body = self.app(environ, start_response)
        except psycopg2.Error as error:
            return refuse(error)
        finally:
            # Nothing of the application runs after this; a file is sent, and closed, by whichever thread.
            if body is None or type(body) in (list, tuple) or _is_file(body, environ):
                lease.end()
        if lease.is_over:
            return body
        lease.is_streaming = True
        return (_SizedBody if isinstance(body, Sized) else _Body)(body, lease, refuse)

    def _outer_lease(self, environ: WSGIEnvironment) -> Lease | None:
        """Return the lease of a request that this one is part of: another filter's, or a subrequest's."""
        lease = environ.get(self._key)
        if isinstance(lease, Lease) and lease.pool is self.pool and not lease.is_over:
            return lease
        lease = _here.leases.get(id(self.pool))
        if lease is None or threading.get_ident() in lease.running:
            return lease
        if lease.is_thread_bound:
            if lease.running:
                raise PoolError(
                    f"{lease.request}: another thread iterates its body still, and this one begins a new request, but "
                    f"{self.pool!r} has one connection for each thread: use a 'threaded' pool with this server"
                )
            log.warning("%s: its body was not closed before the thread's next request; ended now", lease.request)
            lease.end()
        return None

    def _unavailable(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        response = Response(
            "The database is not available just now. Please try again in a moment.\n",
            status=503,
            content_type="text/plain",
            charset="utf-8",
            retry_after=self.retry_after,
            cache_control="no-store",
        )
        # With exc_info: the application may have started its response, which the server knows how to replace.
        start_response(response.status, response.headerlist, sys.exc_info())
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [response.body]


class _Body:
    """The application's body; its `close()` ends the request.

    Where the application asks for a connection with its first chunk only, and none is to be had, `refuse` answers.
    """

    def __init__(
        self, body: Iterable[bytes], lease: Lease, refuse: Callable[[psycopg2.Error], Iterable[bytes]]
    ) -> None:
        self._body = body
        self._lease = lease
        self._refuse = refuse
        self._iterator: Iterator[bytes] | None = None
        self._has_begun = False
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            with self._lease.run():
                if self._iterator is None:
                    self._iterator = iter(self._body)
                chunk = next(self._iterator)
        except psycopg2.Error as error:
            if self._has_begun:
                raise
            self._iterator = iter(self._refuse(error))
            chunk = next(self._iterator)
        self._has_begun = True
        return chunk

    def close(self) -> None:
        """Close the application's body, then end the request, whatever that raised; once."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if hasattr(self._body, "close"):
                with self._lease.run():
                    self._body.close()
        finally:
            self._lease.end()

    def __del__(self) -> None:
        if not self._is_closed:
            if not self._lease.is_over:
                log.warning("%s: the server dropped its body without closing it (PEP 3333)", self._lease.request)
            self.close()


class _SizedBody(_Body):
    """A body whose length a server may ask for: waitress keeps a connection alive by it."""

    _body: Any

    def __len__(self) -> int:
        return len(self._body)


def _is_file(body: object, environ: WSGIEnvironment) -> bool:
    """Whether the server's own file wrapper was returned, which it recognises only as it is."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)


def _is_demotion(error: psycopg2.Error) -> bool:
    """Whether the server refuses what the session did not forbid itself: a primary no more (SQLSTATE 25006)."""
    is_ours = error.cursor is not None and error.cursor.connection.readonly
    return error.pgcode == errorcodes.READ_ONLY_SQL_TRANSACTION and not is_ours


def _is_unavailable(error: psycopg2.Error, pool: Any) -> bool:
    """Whether the request failed because no connection was to be had."""
    if isinstance(error, PoolTimeout | TooManyRequests):
        return True
    # An error of a connect has no SQLSTATE, but neither has a connection that broke during a query.
    is_connect = isinstance(error, psycopg2.OperationalError) and error.pgcode is None
    return is_connect and getattr(pool, "outage", None) is not None
