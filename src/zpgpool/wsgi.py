"""The middleware: each request has its connection, and returns it when the request ends.

A request ends when the application has returned a list or tuple, or a `wsgi.file_wrapper`; otherwise when the body's
`close()` is called, whichever thread does (PEP 3333, "Specification Details").
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from collections.abc import Iterable
from functools import partial
from os import getpid
from time import monotonic
from typing import cast
from typing import TYPE_CHECKING

from zope.interface.registry import Components

from .core import lag_of
from .core import NOT_YET
from .core import refuse_greenlets
from .core import SimpleConnectionPool
from .core import watch
from .errors import database_error
from .errors import one_line
from .errors import PoolError
from .errors import SettingError
from .interfaces import IPoolInternals
from .interfaces import IPoolManagement
from .registry import get_pool
from .registry import query_pool
from .request import begin_body
from .request import close_body
from .request import Disconnects
from .request import has_left_primary
from .request import has_written
from .request import Headers
from .request import HeldResponse
from .request import InnerBody
from .request import is_complete
from .request import is_lost
from .request import is_repeatable
from .request import is_safe
from .request import is_unavailable
from .request import Lease
from .request import lease_class
from .request import lease_keys
from .request import local
from .request import make_unavailable
from .request import may_write
from .request import ReplicaLease
from .request import reveal
from .request import swapped
from .request import ThreadLease
from .request import with_write_cookie


if TYPE_CHECKING:
    from types import FrameType

    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIApplication
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from .settings import PoolSettings
    from .types import ManagedPool
    from .types import Pool


log = logging.getLogger("zpgpool")


def get_connection(environ: WSGIEnvironment, name: str = "") -> Connection:
    """Return the connection of the request that `environ` belongs to, from the pool `name`; checked out on first use.

    Raises PoolError when no middleware serves that pool to the request, or the request has ended; and what
    `IConnectionPool.getconn` raises.
    """
    lease = environ.get(lease_keys[name])
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
    cancel_on_disconnect -- cancel the query of a request whose client is gone, as waitress tells when its setting
        `channel_request_lookahead` is above 0.
    retry_safe -- serve a request once more that has lost its connection before any part of its response was sent, if
        its method is safe (RFC 9110, section 9.2.1: GET, HEAD, OPTIONS) and it has no body.
    unavailable -- a WSGI application that answers in place of that 503.

    Where the pool's settings name a `replica`, requests of safe methods get their connection from that pool.

    The start of a response is held back until the first part of its body exists. Before that, a 503 can replace it.

    A pool for one thread is refused with PoolError when the server says that it runs several.
    """

    def __init__(
        self,
        app: WSGIApplication,
        pool: Pool | None = None,
        name: str = "",
        eager: bool = False,
        retry_after: int = 5,
        registry: Components | None = None,
        cancel_on_disconnect: bool = False,
        retry_safe: bool = True,
        unavailable: WSGIApplication | None = None,
    ) -> None:
        self.app = app
        self.name = name
        self.eager = eager
        self.retry_after = retry_after
        self.retry_safe = retry_safe
        self.unavailable = unavailable
        self._registry = registry
        self._key = lease_keys[name]
        self._is_by_name = pool is None
        self._pool: Pool | None = None
        if pool is not None:
            self._adopt(pool)
        self._is_left_out = False  # the replica
        self._process = getpid()
        self._disconnects = Disconnects() if cancel_on_disconnect else None
        self._has_options = eager or cancel_on_disconnect

    @property
    def pool(self) -> Pool:
        """The pool that is served. Raises ComponentLookupError when there is none yet."""
        if self._pool is None or (self._is_by_name and self._pool.closed):
            self._adopt(get_pool(self.name, self._registry))
        pool = self._pool
        assert pool is not None
        return pool

    def _adopt(self, pool: Pool) -> None:
        self._is_for_one_thread = isinstance(pool, SimpleConnectionPool)
        self._lease_class = lease_class(pool)
        settings: PoolSettings | None = getattr(pool, "settings", None)
        self._has_replica = bool(getattr(settings, "replica", ""))
        self._commits_at_once = getattr(settings, "autocommit", None) == "safe"
        self._pool = pool

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        pool = self._pool
        if pool is None or pool.closed:
            pool = self.pool
        if self._process != getpid():
            self._process = getpid()
            if IPoolInternals.providedBy(pool):
                pool.check_process()
        if self._is_for_one_thread:
            _check_threads(pool, environ)
        before = environ.get(self._key)
        state = local.state
        if before is not None or state.leases or state.orphaned:
            outer = self._find_outer(environ, before, pool)
            if outer is not None:
                return self._serve_inner(environ, start_response, outer, before)
        if self._has_replica:
            return self._route(environ, start_response, pool, before)
        # As it is now: applications change it, and a request that begins again begins as it did.
        original = dict(environ) if self.retry_safe else None
        lease = self._lease_class(pool, environ, sys._getframe())
        return self._serve(environ, start_response, lease, before, original)

    def _find_outer(self, environ: WSGIEnvironment, known: object, pool: Pool) -> Lease | None:
        """Return the lease of a request that this one is part of: another filter's, or one with a subrequest.

        Otherwise this is the outermost request of its thread: clear what the thread has left.
        """
        if isinstance(known, Lease) and known.pool is pool and not known.is_over:
            return known
        state = local.state
        lease = state.leases.get(id(pool))
        if lease is not None and lease.is_running:
            return lease
        if lease is not None and not lease.is_over:
            refuse_greenlets()
            is_bound = isinstance(lease, ThreadLease | ReplicaLease)
            if lease.is_busy:
                if is_bound:
                    raise PoolError(
                        f"{lease}: another thread iterates its body still, and this one begins a new request, but "
                        f"{pool!r} has one connection for each thread: use a 'threaded' pool with this server"
                    )
            elif is_bound or lease.is_ending or not lease.is_streaming:
                is_open = lease.is_streaming and not lease.is_ending
                why = "its body was not closed" if is_open else "its end was interrupted"
                log.warning("%s: %s before the thread's next request; ended now", lease, why)
                lease.end()
        request = f"{environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')}"
        state.abandon_orphans(f"{request} begins, which must not commit it")
        return None

    def _serve_inner(
        self, environ: WSGIEnvironment, start_response: StartResponse, outer: Lease, before: object
    ) -> Iterable[bytes]:
        own: dict[str, object] = {self._key: outer}
        if self.eager:
            own["zpgpool.connection"] = outer.connection()
        with swapped(environ, own):
            body = self.app(environ, start_response)
        is_plain = before is None or before is outer or is_complete(body, environ)
        return body if is_plain else InnerBody(body, environ, own)

    def _serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        lease: Lease,
        before: object = None,
        original: WSGIEnvironment | None = None,
        begin_again: Callable[[], Iterable[bytes]] | None = None,
        hook: Callable[[Headers], Headers] | None = None,
    ) -> Iterable[bytes]:
        """Call the application with `lease`, and end that with the request.

        before -- what `environ` had in the place of the lease.
        original -- what `environ` was; None: the request must not begin again.
        begin_again -- serves the request once more; by default with a lease of the same kind.
        hook -- changes the headers just before they go out.
        """
        environ[self._key] = lease
        if self._commits_at_once and is_safe(environ):
            lease.set_session(autocommit=True)
        response, goes_on, begins_again = HeldResponse(), False, False
        response.start_response, response.hook = start_response, hook
        try:
            if self._has_options or environ.get("wsgi.run_once"):
                self._prepare(environ, lease)
            body = self.app(environ, response)
            if type(body) is not list and not is_complete(body, environ):
                body, goes_on = begin_body(body, lease, environ, self._key, response, original), True
            elif (response.status or "").startswith("5"):
                reveal(body, response, lease, original)
        except Exception as error:
            begins_again = self._may_begin_again(error, original, response, lease)
            if not begins_again:
                if (answer := self._refuse(error, environ, response, lease)) is None:
                    raise
                body = answer
        finally:
            (lease.pause if goes_on else lease.end)()
            if before is not None:
                environ[self._key] = before
        if begins_again and original is not None:
            environ.clear()
            environ.update(original)
            return begin_again() if begin_again else self._serve_again(environ, start_response, lease, before)
        try:
            response.send()
        except BaseException:  # the server's: it will not close what it never gets
            close_body(body)
            raise
        return body

    def _prepare(self, environ: WSGIEnvironment, lease: Lease) -> None:
        """Do before the application what few servers and options want."""
        if environ.get("wsgi.run_once") and IPoolInternals.providedBy(lease.pool):
            lease.pool.forgo_timer()
        if self._disconnects is not None:
            self._disconnects.add(lease, environ)
        if self.eager:
            lease.show_connection()

    def _serve_again(
        self, environ: WSGIEnvironment, start_response: StartResponse, failed: Lease, before: object
    ) -> Iterable[bytes]:
        lease = self._lease_class(failed.pool, environ, sys._getframe())
        return self._serve(environ, start_response, lease, before)

    def _may_begin_again(
        self, error: Exception, original: WSGIEnvironment | None, response: HeldResponse, lease: Lease
    ) -> bool:
        """Whether the request has failed because of its connection, and nothing of its response was sent."""
        if original is None or response.is_sent or lease.has_committed or not is_repeatable(original):
            return False
        cause = database_error(error)
        if cause is not None and isinstance(lease, ReplicaLease) and lease.may_succeed_on_primary(cause):
            lease.fail_over(cause)
            return True
        if lease.has_failed_over:  # the application has made a page of the error
            return True
        if not (self.retry_safe and (lease.has_lost_connection or is_lost(cause, lease))):
            return False
        log.warning("%s has lost its connection, and begins again: %s", lease, one_line(cause or error))
        return True

    def _refuse(
        self, error: Exception, environ: WSGIEnvironment, response: HeldResponse, lease: Lease
    ) -> Iterable[bytes] | None:
        """Answer that there is no database, if that is what `error` says; else return None.

        The caller raises it: raised in this frame, which refers to it, it would keep the frames of its traceback, and a
        connection in one of those, until the next garbage collection.
        """
        cause = database_error(error)
        if cause is None or response.is_sent:
            return None
        if isinstance(lease, ReplicaLease) and lease.may_succeed_on_primary(cause):
            lease.fail_over(cause)
            return None
        pool = lease.pool
        if not pool.closed and lag_of(pool) is None and has_left_primary(cause, lease):
            log.warning("%s: the server takes no writes any more; %r leaves it: %s", lease, pool, cause)
            if IPoolManagement.providedBy(pool):
                pool.drain()
        if not is_unavailable(cause, lease):
            return None
        log.error("%s: 503 Service Unavailable: %s", lease, cause, exc_info=error)
        return self._answer_unavailable(environ, response)

    def _answer_unavailable(self, environ: WSGIEnvironment, response: HeldResponse) -> Iterable[bytes]:
        response.forget()
        if self.unavailable is not None:
            return self.unavailable(environ, response)
        answer = make_unavailable(self.retry_after)
        response(answer.status, answer.headerlist)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]

    def _route(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        pool: Pool,
        before: object,
        begins_again: bool = False,
    ) -> Iterable[bytes]:
        """Serve a request that only reads from the pool's replica, if that may be read, and every other from the pool.

        Who may write gets the cookie; so does who begins again, and may write then.
        """
        writes = begins_again or may_write(environ)
        original = dict(environ) if is_safe(environ) and not begins_again else None
        lease = (self._lease_class if writes else self._lease_to_read)(pool, environ, sys._getframe())

        def hook(headers: Headers) -> Headers:
            is_writer = writes or (isinstance(lease, ReplicaLease) and lease.has_tried_to_write)
            seconds = cast("ManagedPool", pool).settings.primary_after_write
            return with_write_cookie(headers, environ, seconds) if is_writer else headers

        begin_again = partial(self._route, environ, start_response, pool, before, begins_again=True)
        return self._serve(environ, start_response, lease, before, original, begin_again, hook)

    def _lease_to_read(self, pool: Pool, environ: WSGIEnvironment, frame: FrameType) -> Lease:
        """Return a lease that reads: from the replica, if it may be, by the lease of a filter that serves it, too."""
        seconds = cast("ManagedPool", pool).settings.primary_after_write
        replica = None if has_written(environ, seconds) else self._find_replica(pool)
        if replica is None:
            primary: Lease = self._lease_class(pool, environ, frame)
            return ReplicaLease(primary, primary, False, environ)
        _check_threads(replica, environ)  # before there is a lease: what is refused leaves none
        outer = self._find_outer(environ, None, replica)
        primary = self._lease_class(pool, environ, frame)
        reader = outer or lease_class(replica)(replica, environ, frame)
        return ReplicaLease(primary, reader, outer is None, environ)

    def _find_replica(self, pool: Pool) -> Pool | None:
        """Return the replica, or None when it must not be read now."""
        settings = cast("ManagedPool", pool).settings
        replica = query_pool(settings.replica, self._registry)
        if replica is None:
            why = f"no pool is registered as {settings.replica!r}"
        elif replica is pool:
            why = "it is the same"
        elif replica.closed:
            why = "it is closed"
        elif getattr(getattr(replica, "settings", None), "replica", ""):  # it would become read-only
            why = "it has a replica itself"
        else:
            try:
                why = watch(replica).why_not(settings.max_lag, monotonic())
            except SettingError as error:  # its sessions cannot be read-only
                why = str(error)
        if why is not NOT_YET and bool(why) is not self._is_left_out:
            self._is_left_out = bool(why)
            if why:
                log.warning("the replica %r is left out, %r is read from: %s", settings.replica, pool, why)
            else:
                log.warning("the replica %r is read from again", settings.replica)
        return None if why else replica


def _check_threads(pool: Pool, environ: WSGIEnvironment) -> None:
    if isinstance(pool, SimpleConnectionPool) and environ.get("wsgi.multithread"):
        raise PoolError(f"{pool!r} is for one thread, this server runs several: use 'persistent' or 'threaded'")
