"""Requests that only read: which of them get the replica's pool, and what brings them back to the primary's.

Safe methods are those of RFC 9110, section 9.2.1.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg2
from psycopg2 import errorcodes
from webob.cookies import make_cookie

from .entry import one_line
from .errors import PoolError
from .lag import watch
from .lease import here
from .lease import Lease


if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection


log = logging.getLogger("zpgpool")

SAFE = ("GET", "HEAD", "OPTIONS")

#: What a request asks for the primary by: a header, and what an unsafe request leaves behind, the time of day of it.
HEADER = "Zpgpool-Primary"
COOKIE = "zpgpool-written"

#: How far the clocks of two machines may differ, in seconds.
SKEW = 1.0


def is_safe(environ: WSGIEnvironment) -> bool:
    """Whether the request's method promises to write nothing."""
    return environ.get("REQUEST_METHOD") in SAFE


def asks_for_primary(environ: WSGIEnvironment, seconds: float) -> bool:
    """Whether the request says so, or its client has written within so many seconds."""
    if environ.get(f"HTTP_{HEADER.upper().replace('-', '_')}", "0") not in ("", "0"):
        return True
    # All of that name: there may be one for each path that leads here, and the last write counts.
    written = re.findall(rf"(?:^|[;\s]){COOKIE}=(\d{{1,12}}(?:\.\d{{1,9}})?)(?=;|\s|$)", environ.get("HTTP_COOKIE", ""))
    return any(-SKEW <= time.time() - float(at) < seconds for at in written)


def remembering(start_response: StartResponse, environ: WSGIEnvironment, seconds: float) -> StartResponse:
    """Return a `start_response` that adds the cookie, which lasts for so many seconds."""
    # As the browser has it in its address, which it compares with the path.
    path = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace")) or "/"
    is_secure = environ.get("wsgi.url_scheme") == "https"

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        cookie = make_cookie(
            COOKIE,
            f"{time.time():.3f}",
            max_age=max(1, round(seconds)),
            path=path,
            secure=is_secure,
            httponly=True,
            samesite="Lax",
        )
        return start_response(status, [*headers, ("Set-Cookie", cookie)], *_given(exc_info))

    return start if seconds else start_response


def _given(exc_info: Any) -> Any:
    return () if exc_info is None else (exc_info,)


def watching(
    start_response: StartResponse, environ: WSGIEnvironment, seconds: float, lease: ReadingLease
) -> StartResponse:
    """Return a `start_response` for a request that reads from a replica: says to `lease` what has gone out.

    It adds the cookie where the request has written after all: on the primary, when its transaction was run again.
    """
    remember = remembering(start_response, environ, seconds)

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        begin = remember if lease.has_tried_to_write else start_response
        write = begin(status, headers, *_given(exc_info))

        def write_and_note(data: bytes) -> object:
            lease.has_sent = True
            return write(data)

        return write_and_note

    return start


def anew(start_response: StartResponse, error: BaseException) -> StartResponse:
    """Return a `start_response` for a request that begins again: the server may have been told of a response already.

    With `error` as its reason the server replaces that one, or raises the error when it has sent it (PEP 3333).
    """

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        reason: Any = (type(error), error, error.__traceback__)
        return start_response(status, headers, exc_info or reason)

    return start


class ReadingLease(Lease):
    """What a request holds that reads from the replica as long as that serves it, and from the primary from then on."""

    def __init__(self, pool: Any, environ: WSGIEnvironment, reader: Lease, is_own: bool) -> None:
        super().__init__(pool, environ)
        #: The lease on the replica; it is not our own where another filter serves that pool, too.
        self.reader = reader
        self._is_own = is_own
        self.is_reading = True
        #: Whether the replica has refused a write; and whether a part of the body has been sent.
        self.has_tried_to_write = False
        self.has_sent = False
        #: The last error that was the replica's: it may be asked about by a transaction's retry, and by the middleware.
        self._blamed: psycopg2.Error | None = None

    @contextmanager
    def run(self) -> Iterator[None]:
        """See `Lease`."""
        with self.reader.run() if self._is_own else nullcontext(), super().run():
            yield

    def connection(self) -> Connection:
        """See `Lease`: of the replica, if it gives one."""
        return self._read() or super().connection()

    def source(self) -> Any:
        """See `Lease`."""
        return self.pool if self._read() is None else self.reader.pool

    def _read(self) -> Connection | None:
        if self.is_over or not self.is_reading:
            return None
        try:
            return self.reader.connection()
        except psycopg2.Error as error:
            self.is_reading = False
            log.warning("%s reads from the primary: %s", self.request, self._text(error))
            if not isinstance(error, PoolError):  # which says that it is busy, not that it is lost
                watch(self.reader.pool).lost(self._text(error))
        return None

    def blames(self, error: psycopg2.Error) -> bool:
        """Whether the request may succeed on the primary: then it reads there from now on."""
        if error is self._blamed:
            return True
        if not (self.is_reading and self.reader.had(error) and _is_replicas_fault(error)):
            return False
        self.is_reading, self._blamed = False, error
        if is_refused_write(error):
            self.has_tried_to_write = True
            log.warning(
                "%s writes, which its method promises not to, and a replica refuses: let it be a POST, or ask for the "
                "primary with the header %s (%s)",
                self.request,
                HEADER,
                one_line(error),
            )
        else:
            log.warning("%s: the replica failed: %s", self.request, self._text(error))
        return True

    def _text(self, error: BaseException) -> str:
        return str(self.reader.pool.scrub(one_line(error)))

    def cancel(self) -> None:
        """See `Lease`."""
        self.reader.cancel()
        super().cancel()

    def end(self) -> None:
        """See `Lease`."""
        self._blamed = None  # its traceback refers to us
        try:
            super().end()
        finally:
            if self._is_own:
                self.reader.end()


def has_body(environ: WSGIEnvironment) -> bool:
    """Whether the request has a body, which can be read once only."""
    return environ.get("CONTENT_LENGTH", "") not in ("", "0") or "HTTP_TRANSFER_ENCODING" in environ


def is_refused_write(error: psycopg2.Error) -> bool:
    """Whether the server takes no writes."""
    return error.pgcode == errorcodes.READ_ONLY_SQL_TRANSACTION


def _is_replicas_fault(error: psycopg2.Error) -> bool:
    """Whether a replica said no to a write, or to a query that was in the way of its recovery, or has gone.

    PostgreSQL documentation, "Handling Query Conflicts" and "PostgreSQL Error Codes", classes 40 and 57.
    """
    if error.pgcode is None:
        # A plain DatabaseError is what libpq has no message for.
        lost = isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        return lost or type(error) is psycopg2.DatabaseError
    return is_refused_write(error) or error.pgcode.startswith(("40", "57P"))


def blames_replica(error: psycopg2.Error) -> bool:
    """Whether the calling thread's request had `error` from a replica, and may succeed on the primary."""
    leases = [lease for lease in list(here.mine.leases.values()) if isinstance(lease, ReadingLease)]
    return any(lease.blames(error) for lease in leases)
