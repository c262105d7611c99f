"""A thread as a pool knows it.

The number of a thread (`get_ident`) is given to the next thread as soon as it is free, so it cannot say whose a
connection is. A `Caller` belongs to one thread for as long as that lives, whoever started it (`threading`, mod_wsgi,
C code): the thread's end drops its pulse.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from psycopg2.extensions import TRANSACTION_STATUS_INERROR
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS
from zope.interface import implementer

from .errors import PoolClosed
from .interfaces import IHold


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from .entry import Entry


class Pulse:
    """Lives in the `threading.local` of one thread, and nowhere else."""

    __slots__ = ("__weakref__",)


#: What each thread works on, by its number: whoever knows (the middleware) says it here, for holders and reports.
working_on: dict[int, str] = {}


class Caller:
    """One thread, as one pool knows it.

    `held` is what a persistent pool has given it (written by that thread, and under the pool's lock by others);
    `uses` counts its checkouts (written by that thread alone, so that no count is lost).
    """

    __slots__ = ("_pulse", "held", "ident", "name", "uses")

    def __init__(self, pulse: Pulse) -> None:
        self.held: Entry | None = None
        self.uses = 0
        self.ident = threading.get_ident()
        self.name = threading.current_thread().name
        self._pulse = weakref.ref(pulse)

    @property
    def is_alive(self) -> bool:
        return self._pulse() is not None

    @property
    def request(self) -> str:
        """What the thread works on, as far as somebody said."""
        return working_on.get(self.ident, "") if self.is_alive else ""

    @property
    def line(self) -> str:
        """The source line that the thread is at now: `file:number in function`."""
        return line_of(self.ident if self.is_alive else None)


def line_of(ident: int | None) -> str:
    """Return the source line that a thread is at now: `file:number in function`."""
    frame = _current_frames().get(ident) if ident is not None else None
    if frame is None:
        return "(its thread has ended)"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


class Held(Caller):
    """Not a thread, but whoever has a hold: it ends with the hold."""

    __slots__ = ()


_frames_lock = threading.Lock()

#: Whether the collector is off because of us.
_is_collector_off = False


def _renew_frames_lock() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _frames_lock, _is_collector_off
    _frames_lock = threading.Lock()
    if _is_collector_off:
        _is_collector_off = False
        gc.enable()


os.register_at_fork(after_in_child=_renew_frames_lock)


def _current_frames() -> dict[int, FrameType]:
    """Return `sys._current_frames()`, without the deadlock that a garbage collection inside it can end in.

    CPython's issue 106883, in 3.11 before 3.11.9: another thread that is just being started waits for the same lock.
    """
    global _is_collector_off
    with _frames_lock:
        was_enabled = gc.isenabled()
        try:
            _is_collector_off = was_enabled
            gc.disable()
            return sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()
            _is_collector_off = False


class Here(threading.local):
    """`here.caller` is the calling thread, made and added to `callers` when a thread first asks."""

    def __init__(self, callers: set[Caller]) -> None:
        self._pulse = Pulse()
        self.caller = Caller(self._pulse)
        callers.add(self.caller)


@implementer(IHold)
class Hold:
    """See `IHold`. `put` puts the connection away, if it is still held; `pulse` ends with this object."""

    def __init__(self, conn: Connection, put: Callable[[bool], object], pulse: Pulse | None = None) -> None:
        self.conn = conn
        self._pulse = pulse
        self._puts = [put]

    def putconn(self, close: bool = False) -> None:
        """See `IHold`."""
        # One of two threads, maybe: popping is the claim. And a pool that was closed has closed the connection, too.
        with suppress(IndexError, PoolClosed):
            self._puts.pop()(close)


@dataclass(frozen=True)
class Waiter:
    """Who waits for a connection: a snapshot, as `Holder` is one."""

    thread: str
    seconds: float
    request: str
    line: str

    @classmethod
    def of(cls, thread: threading.Thread, since: float, now: float) -> Waiter:
        """Return what is known at `now` (monotonic seconds) of a thread that waits since then."""
        ident = thread.ident or 0
        return cls(thread.name, max(0.0, now - since), working_on.get(ident, ""), line_of(ident))


STATUS = {
    TRANSACTION_STATUS_IDLE: "idle",
    TRANSACTION_STATUS_ACTIVE: "in a query",
    TRANSACTION_STATUS_INTRANS: "in a transaction",
    TRANSACTION_STATUS_INERROR: "in a failed transaction",
}


@dataclass(frozen=True)
class Holder:
    """Who holds a connection: a snapshot for messages and pages."""

    thread: str
    seconds: float
    status: str
    backend_pid: int
    request: str
    line: str

    @classmethod
    def of(cls, caller: Caller, entry: Entry, now: float) -> Holder:
        """Return what is known at `now` (monotonic seconds), without asking the server."""
        status, backend_pid = "lost", 0
        conn = entry.connection()
        if conn is not None:
            status = STATUS.get(conn.get_transaction_status(), "broken")
            backend_pid = 0 if conn.closed else entry.backend_pid
        return cls(caller.name, max(0.0, now - entry.since), status, backend_pid, caller.request, caller.line)

    def __str__(self) -> str:
        parts = [self.request, self.status, f"backend {self.backend_pid}", f"at {self.line}"]
        return f"thread {self.thread} for {self.seconds:.1f} s ({', '.join(part for part in parts if part)})"
