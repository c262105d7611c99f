"""One connection of a pool: its times, whether it lives, and how it becomes clean again.

Knows nothing of the pool, of other entries, or where the time comes from.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from time import monotonic
from time import sleep
from typing import TYPE_CHECKING

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor
from psycopg2.extensions import STATUS_PREPARED
from psycopg2.extensions import STATUS_READY
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from .handoff import Place
from .session import is_touched
from .session import restore
from .session import roll_back
from .session import session_of
from .session import untouch
from .settings import Reset


if TYPE_CHECKING:
    from .caller import Caller


log = logging.getLogger("zpgpool")

#: How many times a readable socket is emptied before its connection is given up. One read takes what a server sends
#: to an idle session (a NOTIFY, a changed parameter, a TLS ticket); a server that is gone is known after two.
READS = 16

#: A look at the socket is good for this long, in seconds: 1 ms costs a busy thread no system call per checkout.
MOMENT = 0.001

#: How long to wait for the server to hang up after a connection was closed, in seconds. Measured: 1 to 3 ms, and
#: up to 300 on a busy machine.
HANG_UP = 1.0

#: What `cancel()` may take when a connection is closed during a query, in seconds: it dials the server once more.
CANCEL = 1.0

#: How long a query may take to end after it was cancelled, in seconds, before its socket is ended. A COPY that was
#: broken off never does.
CANCELLED = 0.1


class Entry(Place):
    """A place with its connection."""

    __slots__ = (
        "backend_pid",
        "baseline",
        "caller",
        "conn",
        "ended",
        "expires",
        "is_held",
        "is_standby",
        "look",
        "look_at",
        "pid",
        "ref",
        "reported",
        "sharers",
        "since",
        "sock",
    )

    #: The connection; gone while a user without a key has it (`lend`).
    conn: Connection
    #: Always the connection, but weakly: a connection that its user lost is closed, and its place is room again.
    ref: weakref.ref[Connection]
    #: The process that opened it, and the server's process at its other end.
    pid: int
    backend_pid: int
    #: The thread that took it (set by pools that keep no such table by thread).
    caller: Caller
    #: The other threads that asked with its key.
    sharers: tuple[Caller, ...]
    #: Whether a hold has it: then only that puts it away.
    is_held: bool
    #: When it last changed hands, and when its lifetime ends (monotonic seconds).
    since: float
    expires: float
    #: When its last long holding was reported: the `since` of then.
    reported: float
    #: When its last holding that was ended by force began: the `since` of then.
    ended: float
    #: When the next look at the socket is due.
    look_at: float
    #: The session as configured; what `is_clean` compares with.
    baseline: tuple[object, ...]
    #: The connection's socket, by a descriptor of ours: whoever has closed the connection, this tells when the server
    #: has hung up, and can be looked at and cut without a fear that its number belongs to another socket by now.
    sock: socket.socket
    #: `look(0)` is empty while nothing waits on the socket: a bound method, so that the hit path pays one call. For
    #: the owner of the place only: a second thread in it would raise RuntimeError.
    look: Callable[[int], list[tuple[int, int]]]

    def __init__(self) -> None:
        super().__init__()
        self.reported = self.ended = 0.0
        self.sharers = ()
        self.is_held = False

    def attach(self, conn: Connection, ref: weakref.ref[Connection]) -> None:
        """Take a new connection."""
        sock = socket.socket(fileno=os.dup(conn.fileno()))  # first: without a descriptor left, nothing has begun
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        self.look = poll.poll
        hash(ref)  # now or never: a dead reference has no hash, unless it was asked before
        self.conn, self.ref, self.pid, self.sock = conn, ref, os.getpid(), sock
        self.backend_pid = conn.get_backend_pid()

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection."""
        return hasattr(self, "sock")

    def begin(self, now: float, expires: float) -> None:
        """Remember the session as it is now: set up as every user shall find it."""
        self.since = now
        self.expires = expires
        self.look_at = 0.0
        untouch(self.conn)
        self.baseline = session_of(self.conn)
        self.is_standby = self.conn.get_parameter_status("in_hot_standby") == "on"

    def doom(self) -> None:
        """Let its lifetime end with its present use; at rest, with the next look at it."""
        self.expires = self.look_at = 0.0

    def is_clean(self) -> bool:
        """Whether the session is as configured, outside of any transaction: known locally, without a round trip."""
        return not self.conn.get_transaction_status() and session_of(self.conn) == self.baseline

    def reset(self, extra: Reset, set_up: Callable[[Connection], object]) -> bool:
        """Bring the session back to its baseline; False when that cannot be, and the connection must go.

        Never raises for what the server did, nor for what the user's own `extra` did.
        """
        conn = self.conn
        try:
            if (
                conn.closed
                or conn.status == STATUS_PREPARED
                or conn.get_transaction_status() == TRANSACTION_STATUS_ACTIVE
            ):
                # A prepared transaction belongs to its transaction manager: neither commit nor rollback is ours to
                # choose. An active one is in the middle of a COPY, or another thread's query.
                return False
            if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE or conn.status != STATUS_READY:
                roll_back(conn)
            if extra == "discard":
                conn.reset()
                set_up(conn)
            if is_touched(conn) and session_of(conn) != self.baseline:
                restore(conn, self.baseline)
            if callable(extra):
                extra(conn)
            if not is_touched(conn):
                return conn.status == STATUS_READY and not conn.get_transaction_status()
            untouch(conn)  # before it is compared: another thread that still has it may change it meanwhile
            return self.is_clean()
        except Exception as error:
            log.warning("a returned connection could not be made clean and is closed: %s", one_line(error))
            return False

    def is_alive(self) -> bool:
        """Whether the server is at the other end, as far as the socket tells: no round trip.

        A readable socket is only a suspicion (a NOTIFY waits there, too): psycopg2 reads it empty. The first read
        after the server's end may still succeed; the second cannot.
        """
        try:
            for _ in range(READS):
                if not self.look(0):
                    return not self.conn.closed and not self.is_demoted
                self.conn.poll()
        except psycopg2.Error:
            pass
        return False

    @property
    def is_demoted(self) -> bool:
        """Whether the primary that this was opened to is a standby now, as PostgreSQL >= 14 reports by itself."""
        return not self.is_standby and self.conn.get_parameter_status("in_hot_standby") == "on"

    def ping(self, timeout: float) -> bool:
        """Ask the server, for at most `timeout` seconds; False when it did not answer. One round trip."""
        conn = self.conn
        # psycopg2 waits without limit, and only an end of the socket wakes it.
        deadline = threading.Timer(timeout, self.cut)
        deadline.daemon = True
        deadline.start()
        try:
            autocommit = conn.autocommit
            conn.autocommit = True
            with conn.cursor(cursor_factory=cursor) as curs:
                curs.execute("SELECT 1")
            conn.autocommit = autocommit
        except psycopg2.Error:
            return False
        finally:
            deadline.cancel()
            deadline.join()  # it may be cutting just now
        return self.is_alive()

    def cut(self) -> None:
        """End the socket under the connection: a thread that waits on it gets an OperationalError. Does not block."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def connection(self) -> Connection | None:
        """Return the connection, whoever has it; None when its user lost it."""
        return getattr(self, "conn", None) or self.ref()

    def close(self, until: float | None = None) -> None:
        """Close the connection, and wait until the server has hung up: only then its place there is free.

        Waits until the monotonic time `until` at the longest, by default for HANG_UP seconds.

        Who uses it just now, in a query, must have been stopped by `hang_up` or `cut`: otherwise this waits for him.
        """
        conn = self.connection()
        with self.sock, contextlib.suppress(OSError, psycopg2.Error):
            if conn is not None:
                conn.close()
            self.sock.settimeout(HANG_UP if until is None else max(0.001, until - monotonic()))
            while self.sock.recv(4096):
                pass

    @property
    def is_active(self) -> bool:
        """Whether a query runs, or a COPY."""
        conn = self.connection()
        return conn is not None and conn.get_transaction_status() == TRANSACTION_STATUS_ACTIVE

    def __del__(self) -> None:
        # Lost by an exception between two bytecodes. Its place is room again, so nobody may go on using it.
        if getattr(self, "is_filled", False) and self.pid == os.getpid():
            if self.is_active:
                self.cut()
            self.close()  # the weak reference that counts the place is alive until this has returned

    def abandon(self) -> None:
        """In a forked child: release the parent's socket without a word to the server, whose session goes on.

        The descriptor's number stays taken (by the null device): a forgotten connection object must never find
        another connection's socket under it.
        """
        self.sock.close()
        with contextlib.suppress(OSError, psycopg2.Error):
            if (conn := self.connection()) is not None:
                with open(os.devnull, "rb+", buffering=0) as null:
                    os.dup2(null.fileno(), conn.fileno())


def hang_up(entries: Iterable[Entry]) -> None:
    """End the queries that run on `entries`, so that closing them does not wait; in `CANCEL` seconds at most.

    The server is asked to cancel: otherwise it would count the session until the query is done. Then the socket ends.
    """
    deadline = monotonic() + CANCEL
    busy = cancel(entries)
    deadline = min(deadline, monotonic() + CANCELLED)
    while busy and monotonic() < deadline:
        busy = [entry for entry in busy if entry.is_active]
        sleep(0.001)
    for entry in busy:
        entry.cut()


def cancel(entries: Iterable[Entry]) -> list[Entry]:
    """Ask the server to end the queries that run on `entries`, and return these; in `CANCEL` seconds at most."""
    deadline = monotonic() + CANCEL
    busy = [entry for entry in entries if entry.is_active]
    threads = [threading.Thread(target=_cancel, args=(entry,), daemon=True) for entry in busy]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    return busy


def _cancel(entry: Entry) -> None:
    """Send a cancel request (PostgreSQL documentation, "Canceling Queries in Progress").

    Not by psycopg2's `cancel()`, which dials the server, and waits for it without limit, with the interpreter locked:
    a silent server would stop every thread (measured with psycopg2 2.9.13). ctypes calls libpq with it unlocked.
    """
    libpq = ctypes.CDLL(psycopg2._psycopg.__file__)
    libpq.PQgetCancel.restype = ctypes.c_void_p
    conn = entry.connection()
    if conn is not None and conn.pgconn_ptr:
        cancel = ctypes.c_void_p(libpq.PQgetCancel(ctypes.c_void_p(conn.pgconn_ptr)))
        message = ctypes.create_string_buffer(256)
        libpq.PQcancel(cancel, message, len(message))
        libpq.PQfreeCancel(cancel)


def one_line(error: BaseException) -> str:
    """Return an error's message as one line for the log."""
    return " ".join(str(error).split()) or type(error).__name__
