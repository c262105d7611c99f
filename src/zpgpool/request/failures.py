"""What a request's failure says: that there is no database, that its connection was lost, or something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg2
from psycopg2 import errorcodes
from webob import Response

from ..core import is_at_end
from ..core import is_demoted
from ..core import is_temporary
from ..errors import PoolTimeout
from ..errors import TooManyRequests
from .lease import Lease
from .replica import is_repeatable
from .response import HeldResponse


if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


def reveal(body: object, response: HeldResponse, lease: Lease, original: WSGIEnvironment | None) -> None:
    """Raise the database error that the application has caught and answered with 500, if a better answer is known."""
    is_500 = (response.status or "").startswith("500")
    # Not reported, it is a guess: an error from before the connection that there is may have been got over.
    failure = lease.reported or (None if lease.connections() else lease.failure)
    if failure is None or not is_500 or not is_unavailable(failure, lease):
        may_repeat = original is not None and is_repeatable(original) and not lease.has_committed
        is_lost = may_repeat and (lease.has_lost_connection or lease.has_failed_over)
        failure = psycopg2.OperationalError(response.status) if is_lost else None
    if failure is not None:
        close_body(body)
        try:
            raise failure
        finally:
            del failure  # no cycle with this frame: it would keep the frames of the traceback


def is_lost(error: psycopg2.Error | None, lease: Lease) -> bool:
    """Whether `error` says that the request's connection was lost, although psycopg2 has not noticed; then close it.

    Of a write that failed libpq tells before it has read the end (seen under load, when a crashed backend had all
    sessions ended): an error without a code, and `closed` is 0. The pool would take the connection for a clean one.
    """
    if error is None or error.pgcode is not None or lease.was_ended or not is_temporary(error):
        return False
    lost = [conn for conn in lease.connections() if is_at_end(conn)]
    for conn in lost:
        conn.close()
    return bool(lost)


def make_unavailable(retry_after: int) -> Response:
    """Return the 503, which says when to ask again, in seconds."""
    return Response(
        "The database is not available just now. Please try again in a moment.\n",
        status=503,
        content_type="text/plain",
        charset="utf-8",
        retry_after=retry_after,
        cache_control="no-store",
    )


def close_body(body: object) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


def has_left_primary(error: psycopg2.Error, lease: Lease) -> bool:
    """Whether a write was refused (25006) because the server is no longer a primary: it is asked, over the connection.

    Not because the session, or the transaction, was made read-only.
    """
    if error.pgcode != errorcodes.READ_ONLY_SQL_TRANSACTION or error.cursor is None or not lease.had(error):
        return False
    return is_demoted(error.cursor.connection)


def is_unavailable(error: psycopg2.Error, lease: Lease) -> bool:
    """Whether the request failed because no connection was to be had."""
    if isinstance(error, PoolTimeout | TooManyRequests):
        return True
    # An error of a connect has no SQLSTATE, but neither has a connection that broke during a query: nobody should be
    # asked to repeat that one.
    is_connect = isinstance(error, psycopg2.OperationalError) and error.pgcode is None
    # The failure may be of another pool, without a filter.
    is_down = error is lease.failure or getattr(lease.pool, "last_connect_error", None) is not None
    return is_connect and is_down and not lease.has_lost_connection
