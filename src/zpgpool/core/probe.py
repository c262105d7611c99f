"""A question to a pool's server over a connection of its own, answered in time even by a server that is silent."""

from __future__ import annotations

import select
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import closing
from time import monotonic
from typing import Any
from typing import TYPE_CHECKING

import psycopg2
from psycopg2.extensions import POLL_OK
from psycopg2.extensions import POLL_READ

from ..errors import one_line
from .libpq import tell_sqlstates


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from ..types import ObservedPool


class NoAnswer(Exception):
    """What the server cannot be asked; the message is one line, without a secret."""


class Silent(NoAnswer):
    """The server has not answered in time."""


def query(
    pool: ObservedPool,
    application_name: str,
    sql: str,
    args: Sequence[object] | Mapping[str, object],
    until: float,
    least: float = 0.0,
) -> tuple[list[tuple[Any, ...]], int]:
    """Return the rows that `sql` gives, and the process number that the connection has been told.

    least -- how many seconds each answer is waited for, also after `until`: a busy process may have come to ask late.

    Raises NoAnswer, at `until` (monotonic seconds) at the latest, unless `least` is given.
    """
    try:
        # Asynchronous: no deadline of libpq's ends a connect, or a query, to a server that has fallen silent.
        with closing(pool.open_connection(async_=True, application_name=application_name)) as conn:
            _wait(conn, until, least)
            with conn.cursor() as cursor:
                cursor.execute(sql, args)
                _wait(conn, until, least)
                return cursor.fetchall(), conn.get_backend_pid()
    except TimeoutError:
        raise Silent("the server does not answer") from None
    except (psycopg2.Error, OSError, UnicodeError) as error:
        raise NoAnswer(pool.scrub(one_line(error))) from None


def ask_why(open_connection: Callable[..., Connection | None], until: float) -> str:
    """Connect once more, and return the error of that, with its SQLSTATE; nothing when it succeeds, or takes too long.

    open_connection -- opens a connection, with libpq's keywords on top of the pool's; None: its pool is gone.
    until -- monotonic seconds.
    """
    try:
        conn = open_connection(async_=True)
        if conn is None:
            return ""
        with closing(conn):
            tell_sqlstates(conn)
            _wait(conn, until)
    except psycopg2.Error as error:
        return str(error)
    except (TimeoutError, OSError):
        pass
    return ""


def _wait(conn: Connection, until: float, least: float = 0.0) -> None:
    """Wait until a connect or query has ended. Raises TimeoutError at `until`."""
    while (state := conn.poll()) != POLL_OK:
        poll = select.poll()  # a new one: while it connects, the socket may become another one
        poll.register(conn, select.POLLIN if state == POLL_READ else select.POLLOUT)
        if not poll.poll(max(least, until - monotonic()) * 1000):
            raise TimeoutError
