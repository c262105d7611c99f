"""One connection of a pool: its times, whether it lives, and how it is reset.

Knows nothing of the pool, or of other entries.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any
from typing import Protocol

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor
from psycopg2.extensions import STATUS_PREPARED
from psycopg2.extensions import STATUS_READY
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from ..errors import one_line
from ..settings import PoolSettings
from ..settings import Reset
from .handoff import Slot
from .handoff import Ticket
from .libpq import CancelHandle
from .readable import make_look
from .session import does_refuse_writes
from .session import forget_messages
from .session import has_only_autocommit
from .session import is_touched
from .session import restore
from .session import roll_back
from .session import session_of
from .session import set_up
from .session import unset
from .session import untouch


#: How many times a readable socket is emptied before its connection is given up. One read takes what a server sends
#: to an idle session (a NOTIFY, a changed parameter, a TLS ticket); a server that is gone is known after two.
READS = 16

#: A look at the socket is good for this long, in seconds: 1 ms costs a busy thread no system call per checkout.
MOMENT = 0.001

#: How long a connection that rested for more than `check_idle` may take to answer, in seconds; longer, where the
#: connect took longer.
PING = 2.0

#: A time that has passed, and one that does not come (monotonic seconds). Not 0.0: a machine may just have started.
NEVER_YET = float("-inf")
NEVER = float("inf")

#: How long to wait for the server to hang up after a connection was closed, in seconds. Measured: 1 to 3 ms, and
#: up to 300 on a busy machine.
HANG_UP = 1.0

#: `closed` of a connection that was not closed by its user (psycopg2, "connection.closed").
BROKEN = 2

#: Why a connection that its user closed cannot be made clean: nothing to warn of.
CLOSED = "its user closed it"


class LifeToken:
    """Lives as long as what it stands for: in the `threading.local` of a thread, in a block, in a checkout."""

    __slots__ = ("__weakref__",)


class Owner(Protocol):
    """What an entry knows of its user: see `owners`."""

    ident: int
    name: str

    @property
    def is_alive(self) -> bool:
        """Whether it can put the connection away still."""


class Descriptor(socket.socket):
    """A socket that closes itself: in a cycle the collector may come to it before its entry, and would warn."""

    def __del__(self) -> None:
        self.close()


class Entry(Slot):
    """A slot with its connection."""

    __slots__ = (
        "backend_pid",
        "baseline",
        "cancel_handle",
        "checkout",
        "conn",
        "ended",
        "expires",
        "is_cut",
        "is_leaving",
        "is_new",
        "is_standby",
        "look",
        "look_at",
        "owner",
        "patience",
        "pid",
        "ref",
        "refuses_writes",
        "reported",
        "sharers",
        "since",
        "sock",
        "waiter",
    )

    #: The connection. Deleted while a user without a key has it, so that only the user's reference keeps it alive.
    conn: Connection
    #: Always the connection, but weakly: a connection that its user lost is closed, and its slot is room again.
    ref: weakref.ref[Connection]
    #: The process that opened it, and the server's process at its other end.
    pid: int
    backend_pid: int
    #: What ends a query of it, from any thread.
    cancel_handle: CancelHandle
    #: How long the server may take to answer a ping, in seconds.
    patience: float
    #: The thread that took it (set by pools that keep no such table by thread).
    owner: Owner
    #: The other threads that asked with its key.
    sharers: tuple[Owner, ...]
    #: The token of the checkout that has it, if one does: then only that returns it.
    checkout: weakref.ref[LifeToken] | None
    #: The ticket for which it was opened, which gets the error if that fails.
    waiter: Ticket[Entry] | None
    #: Whether it has had no user yet.
    is_new: bool
    #: Whether another thread closes it: it counts as a slot still, but will not stay.
    is_leaving: bool
    #: Whether we have ended it ourselves, so that nothing was lost.
    is_cut: bool
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
    #: Whether the server refuses writes, and shall do so for every user.
    refuses_writes: bool
    #: The connection's socket, by a descriptor of ours: whatever has closed the connection, this tells when the server
    #: has hung up, and can be looked at and cut without a fear that its number belongs to another socket by now.
    sock: socket.socket
    #: `look(0)` is 0 while nothing waits on the socket.
    look: Callable[[int], int]

    def __init__(self) -> None:
        super().__init__()
        self.reported = self.ended = NEVER_YET
        self.sharers = ()
        self.waiter = self.checkout = None
        self.is_leaving = self.is_cut = False

    @property
    def has_checkout(self) -> bool:
        """Whether a checkout has it that is still referred to."""
        return self.checkout is not None and self.checkout() is not None

    def attach(self, conn: Connection, ref: weakref.ref[Connection]) -> None:
        """Take a new connection."""
        sock = Descriptor(fileno=os.dup(conn.fileno()))  # first: without a descriptor left, nothing has begun
        self.look = make_look(sock)
        hash(ref)  # now or never: a dead reference has no hash, unless it was asked before
        self.conn, self.ref, self.pid, self.sock = conn, ref, os.getpid(), sock
        self.backend_pid = conn.get_backend_pid()
        self.cancel_handle = CancelHandle(conn)

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection."""
        return hasattr(self, "sock")

    def begin(self, now: float, seconds: float, refuses_writes: bool) -> None:
        """Remember the session as it is now: set up as every user shall find it. To connect has taken `seconds`.

        refuses_writes -- whether the server was asked to refuse writes; not all do so, and tell.
        """
        self.since = now
        self.is_new = True
        self.expires = NEVER
        self.look_at = NEVER_YET
        # A connect takes several answers of the server: a slow network is no reason to take it for dead.
        self.patience = max(PING, seconds)
        forget_messages(self.conn)
        untouch(self.conn)
        self.baseline = session_of(self.conn)
        self.refuses_writes = refuses_writes and does_refuse_writes(self.conn)
        self.is_standby = self.conn.get_parameter_status("in_hot_standby") == "on"

    def expire_now(self) -> None:
        """Let its lifetime end with its present use; at rest, with the next look at it."""
        self.expires = self.look_at = NEVER_YET

    def is_clean(self) -> bool:
        """Whether the session is as configured, outside of any transaction: known locally, without a round trip."""
        conn = self.conn
        is_as_before = not conn.get_transaction_status() and session_of(conn) == self.baseline
        return is_as_before and (not self.refuses_writes or does_refuse_writes(conn))

    def reset(self, settings: PoolSettings, extra: Reset = None) -> str:
        """Bring the session back to its baseline; return why that cannot be, and the connection must go, if so.

        It may keep the autocommit of a request: see `_may_rest_so`.

        extra -- what `settings` want to be done besides, if it shall be done.

        Never raises for what the server did, nor for what the user's own `extra` did.
        """
        conn = self.conn
        try:
            if conn.closed:
                return CLOSED
            # A prepared transaction belongs to its transaction manager: neither commit nor rollback is ours to choose.
            if conn.status == STATUS_PREPARED:
                return "its transaction is prepared, and neither committed nor rolled back"
            if conn.get_transaction_status() == TRANSACTION_STATUS_ACTIVE:
                return "a COPY, or another thread's query, is not finished"
            if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE or conn.status != STATUS_READY:
                roll_back(conn)
            return "" if extra is None and self._may_rest_so() else self._restore(settings, extra)
        except Exception as error:
            return one_line(error)

    def _may_rest_so(self) -> bool:
        """Whether it may keep the autocommit that a request had: the next one like it need not turn that on.

        Each change gives the interpreter's lock away, and the thread waits for it: docs/performance.rst.
        """
        conn = self.conn
        is_so = has_only_autocommit(conn, self.baseline) and (not self.refuses_writes or does_refuse_writes(conn))
        return is_so and conn.status == STATUS_READY and not conn.get_transaction_status()

    def _restore(self, settings: PoolSettings, extra: Reset) -> str:
        conn = self.conn
        if extra == "discard":
            conn.reset()
            set_up(conn, settings)
        unset(conn, self.baseline)
        if is_touched(conn) or self.refuses_writes:  # that may have been undone in SQL
            forget_messages(conn)
            if not self.is_clean():
                restore(conn, self.baseline, self.refuses_writes)
        if callable(extra):
            extra(conn)
        if is_touched(conn) or self.refuses_writes:
            untouch(conn)  # before it is compared: another thread that still has it may change it meanwhile
            is_clean = self.is_clean()
        else:
            is_clean = conn.status == STATUS_READY and not conn.get_transaction_status()
        if is_clean:
            return ""
        return f"{extra!r} left a transaction, or other settings: it must commit" if extra else "its session changed"

    def turn_autocommit_off(self) -> None:
        """Set autocommit as configured, where a request has left it on."""
        conn: Any = self.conn
        if conn.autocommit is self.baseline[1]:
            return
        with contextlib.suppress(psycopg2.Error):  # it is closed, which is found out when it is judged
            unset(conn, self.baseline)
            if conn.autocommit is not self.baseline[1]:  # a message of the server has come meanwhile, and was noted
                conn.autocommit = self.baseline[1]

    def refusal(self, check: Callable[[Connection], object], settings: PoolSettings) -> str:
        """Return why the user's `check` refuses it, or nothing; what the check leaves in the session is undone."""
        try:
            check(self.conn)
        except Exception as error:
            return one_line(error)
        forget_messages(self.conn)
        return "" if self.is_clean() else self.reset(settings)

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
        try:
            deadline.start()
        except RuntimeError:  # no thread can be started: at exit, or at a limit of processes
            return self.is_alive()
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
        self.is_cut = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def let_end(self, until: float) -> bool:
        """Whether the server hangs up until then (monotonic seconds), when it is told that nothing more comes."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: no time is left
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(until - monotonic())
            while self.sock.recv(1 << 16):
                self.sock.settimeout(until - monotonic())
            return True
        return False

    def connection(self) -> Connection | None:
        """Return the connection, parked or in use; None when its user lost it."""
        return getattr(self, "conn", None) or self.ref()

    def close(self, until: float | None = None) -> None:
        """Close the connection, and wait until the server has hung up: only then its slot there is free.

        Waits until the monotonic time `until` at the longest, by default for HANG_UP seconds.

        A query that runs on it must have been stopped by `hang_up` or `cut`: otherwise this waits for its end.
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
        # Lost by an exception between two bytecodes. Its slot is room again, so its use must end.
        if self.is_attached and self.sock.fileno() != -1 and self.pid == os.getpid():
            if self.is_active:
                self.cut()
            self.close(monotonic())  # without waiting: the thread that triggered the collection has no part in it

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
