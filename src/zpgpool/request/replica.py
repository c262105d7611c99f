"""The rules for reading from a replica, which `wsgi.PoolMiddleware` applies, and the lease of a request that reads.

Safe methods are those of RFC 9110, section 9.2.1.
"""

from __future__ import annotations

import logging
import math
import re
import time
from contextlib import suppress
from enum import Enum
from typing import cast
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg2
from psycopg2 import errorcodes
from webob.cookies import make_cookie

from ..core import watch
from ..errors import database_error
from ..errors import one_line
from ..errors import PoolError
from .lease import Lease
from .lease import local
from .shared import SharedCheckout
from .shared import Transaction


if TYPE_CHECKING:
    from types import FrameType

    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from ..types import ObservedPool
    from ..types import Pool
    from .response import Headers


log = logging.getLogger("zpgpool")

SAFE = ("GET", "HEAD", "OPTIONS")

#: By this header a request of a safe method says that it writes; by this cookie its client has the time of its last
#: write.
HEADER = "Zpgpool-Primary"
COOKIE = "zpgpool-written"

#: What browsers leave as it is in the path of an address (URL Standard, "path percent-encode set").
PATH = "/:@!$&'()*+=~|[]%"

#: How far the clocks of two machines may differ, in seconds.
SKEW = 1.0


# Requests -------------------------------------------------------------------------------------------------------------


def is_safe(environ: WSGIEnvironment) -> bool:
    """Whether the request's method promises to write nothing."""
    return environ.get("REQUEST_METHOD") in SAFE


def has_body(environ: WSGIEnvironment) -> bool:
    """Whether the request has a body, which can be read once only."""
    return environ.get("CONTENT_LENGTH", "") not in ("", "0") or "HTTP_TRANSFER_ENCODING" in environ


def is_repeatable(environ: WSGIEnvironment) -> bool:
    """Whether the request may be served twice: it promises to write nothing, and has no body."""
    return environ.get("REQUEST_METHOD") in SAFE and not has_body(environ)


def may_write(environ: WSGIEnvironment) -> bool:
    """Whether the request does not promise to write nothing, by its method; or says that it breaks that promise."""
    return not is_safe(environ) or environ.get(f"HTTP_{HEADER.upper().replace('-', '_')}", "0") not in ("", "0")


def has_written(environ: WSGIEnvironment, seconds: float) -> bool:
    """Whether the request's client has written within so many seconds."""
    # All of that name: there may be one for each path that leads here, and the last write counts. A server joins two
    # headers with a comma.
    cookies = environ.get("HTTP_COOKIE", "")
    written = re.findall(rf"(?:^|[;,\s]){COOKIE}=(\d{{1,12}}(?:\.\d{{1,9}})?)(?=[;,\s]|$)", cookies)
    return any(-SKEW <= time.time() - float(at) < seconds for at in written)


def with_write_cookie(headers: Headers, environ: WSGIEnvironment, seconds: float) -> Headers:
    """Return `headers` with the cookie that keeps its client on the primary for so many seconds; 0: without."""
    if not seconds:
        return headers
    cookie = make_cookie(
        COOKIE,
        f"{time.time():.3f}",
        max_age=math.ceil(seconds),
        path=_cookie_path(environ.get("SCRIPT_NAME", "")),
        secure=environ.get("wsgi.url_scheme") == "https",
        httponly=True,
        samesite="Lax",
    )
    # No cache that several clients share may give it to another one.
    return [*headers, ("Set-Cookie", cookie), ("Cache-Control", "private")]


def _cookie_path(script_name: str) -> str:
    """Return the application's path as the browser has it in its address, which it compares with the cookie's."""
    names = script_name.replace("%", "%25").split("/")
    # A cookie's path cannot have these: then the folder above, where more requests go to the primary than need to.
    stop = next((place for place, name in enumerate(names) if ";" in name or "," in name), len(names))
    return quote("/".join(names[:stop]).encode("latin-1", "replace"), PATH) or "/"


# Errors ---------------------------------------------------------------------------------------------------------------


class Fault(Enum):
    """What an error from a replica says."""

    #: It refuses a write.
    REFUSED_WRITE = 1
    #: The query was in the way of its recovery, or the replica is gone, or a standby cannot do that (0A000): read an
    #: unlogged table, SERIALIZABLE, READ WRITE.
    LOST = 2
    #: Nothing that the primary would not say, too.
    NONE = 3


def classify(error: psycopg2.Error) -> Fault:
    """Return what `error` says, if a replica has said it.

    PostgreSQL documentation, "Handling Query Conflicts" and "PostgreSQL Error Codes", classes 40 and 57.
    """
    if error.pgcode is None:
        # A plain DatabaseError is what libpq has no message for.
        is_lost = isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        return Fault.LOST if is_lost or type(error) is psycopg2.DatabaseError else Fault.NONE
    if error.pgcode == errorcodes.READ_ONLY_SQL_TRANSACTION:
        return Fault.REFUSED_WRITE
    return Fault.LOST if error.pgcode.startswith(("40", "57P", errorcodes.FEATURE_NOT_SUPPORTED)) else Fault.NONE


class ReplicaLease(Lease):
    """What a request reads by, a route over two leases: the replica's as long as that serves it, then the primary's.

    Sessions of both are read-only. A write is refused, and the request begins again with a lease of the primary's that
    is none of these; or its transaction does, and then the primary's session is no longer read-only.

    primary, replica -- the two; without a replica that may be read from it is the primary's twice.
    is_own -- whether the replica's is this request's: it is not where another filter serves that pool, too.
    """

    def __init__(self, primary: Lease, replica: Lease, is_own: bool, environ: WSGIEnvironment) -> None:
        super().__init__(primary.pool, environ, primary.frame)
        primary.set_session(readonly=True)
        self._primary = primary
        self._replica = replica
        self._both = (replica, primary) if replica is not primary else (primary,)
        self._is_own = is_own
        self._before: Lease | None = None
        self.is_reading = replica is not primary
        replicas: object = getattr(replica.pool, "settings", None)
        if getattr(replicas, "autocommit", None) == "safe":
            replica.set_session(autocommit=True)
        #: Whether the session has refused a write.
        self.has_tried_to_write = False
        #: The last error because of which the transaction runs again.
        self._blamed: psycopg2.Error | None = None

    def set_session(self, **session: bool | str) -> None:
        """See `Lease`: of the primary's; the replica's pool has a setting of its own."""
        self._primary.set_session(**session)

    def enter(self, frame: FrameType) -> Lease | None:
        """See `Lease`."""
        if self._is_own:
            self._before = self._replica.enter(frame)
        self._primary.frame = frame
        return super().enter(frame)

    def leave(self, before: Lease | None) -> None:
        """See `Lease`."""
        self._primary.frame = None
        if self._is_own:
            self._replica.leave(self._before)
        super().leave(before)

    def begin_body(self) -> None:
        """See `Lease`."""
        super().begin_body()
        self._primary.begin_body()
        if self._is_own:
            self._replica.begin_body()

    def pause(self) -> None:
        """See `Lease`."""
        super().pause()
        self._primary.pause()
        if self._is_own:
            self._replica.pause()

    def connection(self) -> Connection:
        """See `Lease`: of the replica, if it gives one."""
        return self._read() or self._primary.connection()

    def source(self) -> Pool:
        """See `Lease`."""
        return self._primary.pool if self._read() is None else self._replica.pool

    def _read(self) -> Connection | None:
        if self.is_over or not self.is_reading:
            return None
        try:
            return self._replica.connection()
        except psycopg2.Error as error:
            self.is_reading = False
            log.warning("%s reads from the primary: %s", self, self._text(error))
            if not isinstance(error, PoolError):  # which says that it is busy, not that it is lost
                watch(cast("ObservedPool", self._replica.pool)).lost(self._text(error))
        return None

    def share(self, transaction: Transaction) -> SharedCheckout | None:
        """See `Lease`."""
        return (self._replica if self.is_reading else self._primary).share(transaction)

    def connections(self) -> list[Connection]:
        """See `Lease`."""
        return [conn for lease in self._both for conn in lease.connections()]

    def let_go(self) -> None:
        """See `Lease`."""
        for lease in self._both:
            lease.let_go()

    def cancel(self) -> None:
        """See `Lease`."""
        for lease in self._both:
            lease.cancel()

    def may_succeed_on_primary(self, error: psycopg2.Error) -> bool:
        """Whether the request may succeed where it may write, or the replica has no part in it. Changes nothing."""
        fault = classify(error)
        if error is self._blamed or fault is Fault.NONE:
            return error is self._blamed
        if self.is_reading and self._replica.had(error):
            return True
        return fault is Fault.REFUSED_WRITE and not self.has_tried_to_write and self._primary.had(error)

    def fail_over(self, error: psycopg2.Error) -> None:
        """Use the primary from now on, because of `error`, for which `may_succeed_on_primary` holds."""
        if error is self._blamed:
            return
        self.is_reading, self.has_failed_over, self._blamed = False, True, error
        if classify(error) is Fault.REFUSED_WRITE:
            self.has_tried_to_write = True
            self._primary.set_session(readonly="DEFAULT")
            log.warning(
                "%s writes, which its method promises not to, and what it reads from refuses: let it be a POST, or ask "
                "for the primary with the header %s (%s)",
                self,
                HEADER,
                one_line(error),
            )
        else:
            log.warning("%s: the replica failed: %s", self, self._text(error))

    def _text(self, error: BaseException) -> str:
        scrub = getattr(self._replica.pool, "scrub", str)
        return str(scrub(one_line(error)))

    def end(self) -> None:
        """See `Lease`."""
        self._blamed = None  # its traceback refers to us
        try:
            if self._is_own:
                self._replica.end()
            elif self.has_failed_over:  # the filter that serves it gives it to who begins again
                for conn in self._replica.connections():
                    with suppress(psycopg2.Error):
                        conn.rollback()
        finally:
            try:
                self._primary.end()
            finally:
                super().end()


def current_routes() -> list[ReplicaLease]:
    """Return the routes of the request whose code the calling thread runs."""
    leases = list(local.state.leases.values())
    return [lease for lease in leases if isinstance(lease, ReplicaLease) and lease.is_running]


def may_succeed_on_primary(error: psycopg2.Error) -> bool:
    """Whether the calling thread's request had `error` from a replica, and may succeed on the primary."""
    return any(route.may_succeed_on_primary(error) for route in current_routes())


def fail_over(error: psycopg2.Error) -> None:
    """Have the calling thread's request read from the primary from now on, if `error` is a replica's."""
    for route in current_routes():
        if route.may_succeed_on_primary(error):
            route.fail_over(error)


def report(error: BaseException) -> None:
    """Tell the calling thread's request what it has failed with, before the application makes a page of that."""
    cause = database_error(error)
    if cause is not None:
        for lease in list(local.state.leases.values()):
            if lease.is_running:
                lease.reported = cause
        fail_over(cause)
