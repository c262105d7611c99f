"""What psycopg2 does not pass on of libpq: a cancel request that waits without a lock, the SQLSTATE of a connect."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import psycopg2
from psycopg2.extensions import connection as Connection


PQERRORS_VERBOSE = 2


class CancelHandle:
    """What a cancel request needs to know of a connection (PostgreSQL documentation, "Canceling Queries in Progress").

    Copied when the connection is made, as psycopg2 does for itself: later another thread may just be freeing the
    connection (measured: SIGSEGV). Freed with the last reference, which a thread inside of `send` has.

    Not psycopg2's `cancel()`, which dials the server, and waits for it without limit, with the interpreter locked:
    a silent server would stop every thread (measured with psycopg2 2.9.13). ctypes calls libpq with it unlocked.
    """

    __slots__ = ("_libpq", "_lock", "_pointer")

    def __init__(self, conn: Connection) -> None:
        self._lock = threading.Lock()
        self._libpq = _libpq()
        self._pointer = ctypes.c_void_p(self._libpq.PQgetCancel(ctypes.c_void_p(conn.pgconn_ptr)))

    def send(self) -> None:
        """Ask the server to end the query that runs; harmless while another thread is asking."""
        if self._lock.acquire(blocking=False):
            try:
                message = ctypes.create_string_buffer(256)
                self._libpq.PQcancel(self._pointer, message, len(message))
            finally:
                self._lock.release()

    def __del__(self) -> None:
        self._libpq.PQfreeCancel(self._pointer)


def tell_sqlstates(conn: Connection) -> None:
    """Have `conn` put the SQLSTATE into the errors of its connect, which psycopg2 does not tell otherwise.

    PostgreSQL documentation, "PQsetErrorVerbosity". Of use only while it connects: for one that is asynchronous.
    """
    _libpq().PQsetErrorVerbosity(ctypes.c_void_p(conn.pgconn_ptr), PQERRORS_VERBOSE)


@cache
def _libpq() -> ctypes.CDLL:
    """Return the libpq that psycopg2 uses."""
    libpq = ctypes.CDLL(psycopg2._psycopg.__file__)
    libpq.PQgetCancel.restype = ctypes.c_void_p
    return libpq
