"""The middleware: each request has its connection, and gives it back when the request ends.

A request ends when the application has returned a list or tuple, or a `wsgi.file_wrapper`; otherwise when the body's
`close()` is called, whichever thread does (PEP 3333, "Specification Details").
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sized
from functools import partial
from time import monotonic
from typing import Any
from typing import TYPE_CHECKING

import psycopg2
from psycopg2 import errorcodes
from webob import Response
from zope.interface.registry import Components

from .errors import PoolError
from .errors import PoolTimeout
from .errors import TooManyRequests
from .lag import lag_of
from .lag import NOT_YET
from .lag import watch
from .lease import Disconnects
from .lease import here
from .lease import Lease
from .lease import lease_key
from .pool import SimpleConnectionPool
from .readers import anew
from .readers import asks_for_primary
from .readers import has_body
from .readers import is_refused_write
from .readers import is_safe
from .readers import ReadingLease
from .readers import remembering
from .readers import watching
from .registry import get_pool
from .registry import query_pool


if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIApplication
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from .settings import PoolSettings


log = logging.getLogger("zpgpool")


def get_connection(environ: WSGIEnvironment, name: str = "") -> Connection:
    """Return the connection of the request that `environ` belongs to, from the pool `name`; checked out on first use.

    Raises PoolError when no middleware serves that pool to the request, or the request has ended; and what
    `IConnectionPool.getconn` raises.
    """
    lease = environ.get(lease_key(name))
    if not isinstance(lease, Lease):
        raise PoolError(f"no PoolMiddleware serves a pool named {name!r} to this request")
    return lease.connection()


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

    Where the pool's settings name a `replica`, requests of safe methods get their connection from that pool.

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
        self._adopt(pool)
        self._is_by_name = pool is None
        self._registry = registry
        self._key = lease_key(name)
        self._is_left_out = False  # the replica
        self._disconnects = Disconnects() if cancel_on_disconnect else None

    @property
    def pool(self) -> Any:
        """The pool that is served. Raises ComponentLookupError when there is none yet."""
        if self._pool is None or (self._is_by_name and self._pool.closed):
            self._adopt(get_pool(self.name, self._registry))
        return self._pool

    def _adopt(self, pool: Any) -> None:
        self._pool = pool
        self._is_for_one_thread = isinstance(pool, SimpleConnectionPool)
        self._has_replica = bool(getattr(getattr(pool, "settings", None), "replica", ""))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        pool = self.pool
        if self._is_for_one_thread:
            _check_threads(pool, environ)
        outer = _outer_lease(environ, self._key, pool)
        if outer is not None:
            environ[self._key] = outer
            return self.app(environ, start_response)
        if self._has_replica:
            return self._route(environ, start_response, pool, pool.settings)
        return self._serve(environ, start_response, Lease(pool, environ))

    def _route(
        self, environ: WSGIEnvironment, start_response: StartResponse, pool: Any, settings: PoolSettings
    ) -> Iterable[bytes]:
        """Serve a request from the pool's replica, if it may be read from, or else from the pool."""
        seconds = settings.primary_after_write
        if not is_safe(environ):
            return self._serve(environ, remembering(start_response, environ, seconds), Lease(pool, environ))
        replica = None if asks_for_primary(environ, seconds) else self._find_replica(pool, settings)
        if replica is None:
            return self._serve(environ, start_response, Lease(pool, environ))
        before = dict(environ)

        def begin_again(error: psycopg2.Error) -> Iterable[bytes]:
            environ.clear()
            environ.update(before)
            # Whatever it does now, it may have written: its client shall see that.
            start = remembering(anew(start_response, error), environ, seconds if is_refused_write(error) else 0)
            return self._serve(environ, start, Lease(pool, environ))

        key = lease_key(settings.replica)
        _check_threads(replica, environ)
        reader = _outer_lease(environ, key, replica)
        is_own = reader is None
        reader = environ[key] = reader or Lease(replica, environ)
        lease = ReadingLease(pool, environ, reader, is_own)
        start = watching(start_response, environ, seconds, lease)
        return self._serve(environ, start, lease, None if has_body(environ) else begin_again)

    def _find_replica(self, pool: Any, settings: PoolSettings) -> Any:
        """Return the replica, or None when nobody should read there now."""
        replica: Any = query_pool(settings.replica, self._registry)
        if replica is None:
            why = f"no pool is registered as {settings.replica!r}"
        elif replica is pool:
            why = "it is the same"
        elif replica.closed:
            why = "it is closed"
        else:
            why = watch(replica).why_not(settings.max_lag, monotonic())
        if why is not NOT_YET and bool(why) is not self._is_left_out:
            self._is_left_out = bool(why)
            if why:
                log.warning("the replica %r is left out, %r is read from: %s", settings.replica, pool, why)
            else:
                log.warning("the replica %r is read from again", settings.replica)
        return None if why else replica

    def _serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        lease: Lease,
        begin_again: Callable[[psycopg2.Error], Iterable[bytes]] | None = None,
    ) -> Iterable[bytes]:
        """Call the application with `lease`, and end that with the request.

        begin_again -- serves the request on the primary, where the replica has failed it.
        """
        pool = lease.pool
        environ[self._key] = lease
        if environ.get("wsgi.run_once"):
            pool.is_attended = True  # a process for one request needs no timer
        while lease.home.unfinished:
            lease.home.unfinished.pop().abandon(f"{lease.request} begins, which must not commit it")
        if self._disconnects is not None:
            self._disconnects.add(lease, environ)
        body: Iterable[bytes] | None = None
        try:
            with lease.run():
                if self.eager:
                    environ["zpgpool.connection"] = lease.connection()
                body = self.app(environ, start_response)
        except psycopg2.Error as error:
            return self._refuse(environ, start_response, lease, begin_again, error)
        finally:
            # Nothing of the application runs after this; a file is sent, and closed, by whichever thread.
            if body is None or type(body) in (list, tuple) or _is_file(body, environ):
                lease.end()
        if lease.is_over:
            return body
        lease.is_streaming = True
        refuse = partial(self._refuse, environ, start_response, lease, begin_again)
        return (_SizedBody if isinstance(body, Sized) else _Body)(body, lease, refuse)

    def _refuse(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        lease: Lease,
        begin_again: Callable[[psycopg2.Error], Iterable[bytes]] | None,
        error: psycopg2.Error,
    ) -> Iterable[bytes]:
        """Answer from the primary, or that there is no database, if that is what `error` says; else raise it."""
        pool = lease.pool
        if isinstance(lease, ReadingLease) and lease.blames(error):
            if begin_again is None or lease.has_sent:
                raise error
            lease.end()
            return begin_again(error)
        if _is_demotion(error) and lease.had(error) and not pool.closed and lag_of(pool) is None:
            log.warning("%s: the server takes no writes any more; %r leaves it: %s", lease.request, pool, error)
            pool.drain()
        if not _is_unavailable(error, pool):
            raise error
        log.error("%s: 503 Service Unavailable: %s", lease.request, error, exc_info=error)
        return self._unavailable(environ, start_response)

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


def _check_threads(pool: Any, environ: WSGIEnvironment) -> None:
    if isinstance(pool, SimpleConnectionPool) and environ.get("wsgi.multithread"):
        raise PoolError(f"{pool!r} is for one thread, this server runs several: use 'persistent' or 'threaded'")


def _outer_lease(environ: WSGIEnvironment, key: str, pool: Any) -> Lease | None:
    """Return the lease on `pool` of a request that this one is part of: another filter's, or a subrequest's."""
    lease = environ.get(key)
    if isinstance(lease, Lease) and lease.pool is pool and not lease.is_over:
        return lease
    lease = here.mine.leases.get(id(pool))
    if lease is None or threading.get_ident() in lease.running:
        return lease
    if lease.is_thread_bound:
        if lease.running:
            raise PoolError(
                f"{lease.request}: another thread iterates its body still, and this one begins a new request, but "
                f"{pool!r} has one connection for each thread: use a 'threaded' pool with this server"
            )
        log.warning("%s: its body was not closed before the thread's next request; ended now", lease.request)
        lease.end()
    return None


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
            self._close_body()
            self._body = self._refuse(error)
            self._iterator = iter(self._body)
            chunk = next(self._iterator)
        self._has_begun = True
        return chunk

    def close(self) -> None:
        """Close the application's body, then end the request, whatever that raised; once."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._close_body()
        finally:
            self._lease.end()

    def _close_body(self) -> None:
        body, self._body = self._body, ()
        if hasattr(body, "close"):
            with self._lease.run():
                body.close()

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
