"""The owners of connections in use: a thread, as a pool knows it, or a checkout; and what messages say of them.

The number of a thread (`get_ident`) is given to the next thread as soon as it is free, so it cannot say whose a
connection is. A `ThreadOwner` belongs to one thread for as long as that lives, whatever started it (`threading`,
mod_wsgi, C code): the thread's end drops its token.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from psycopg2.extensions import TRANSACTION_STATUS_INERROR
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS
from zope.interface import implementer

from ..errors import PoolClosed
from ..errors import PoolError
from ..interfaces import ICheckout
from ..interfaces import IHolder
from ..interfaces import IWaiter
from .entry import Entry
from .entry import LifeToken as LifeToken
from .entry import Owner
from .handoff import RETURNING
from .lines import current_lines
from .lines import ENDED


# What threads work on -------------------------------------------------------------------------------------------------

#: What each thread works on, by its number: something whose text says so. For holders and reports.
tasks: dict[int, object] = {}


class Work:
    """What a thread works on, where that wants to know what became of its connections."""

    #: Why it got no connection the last time, if it did not.
    failure: psycopg2.Error | None = None

    #: Whether one that it used was lost: the server has ended it, or the network; or `hold_limit`.
    has_lost = was_ended = False


def current_work() -> Work | None:
    """Return what the calling thread works on, where that wants to know."""
    work = tasks.get(threading.get_ident())
    return work if isinstance(work, Work) else None


@contextmanager
def task(name: str) -> Iterator[None]:
    """Name what the calling thread works on: `with zpgpool.task("nightly report"):`.

    `PoolTimeout`, the log and the status page then say it of the connection that the thread holds, as they say the
    path of a request. Tasks may be nested.
    """
    number = threading.get_ident()
    before = tasks.get(number)
    tasks[number] = name
    try:
        yield
    finally:
        if before is None:
            tasks.pop(number, None)
        else:
            tasks[number] = before


def forget_tasks(numbers: Iterable[int]) -> None:
    """Forget what threads worked on that have ended in the middle of it; not where their number has a new thread."""
    left = [number for number in numbers if number in tasks]
    if left:
        alive = current_lines()
        for number in left:
            if number not in alive:
                tasks.pop(number, None)


# Owners ---------------------------------------------------------------------------------------------------------------


def refuse_greenlets() -> None:
    """Raise PoolError where threads are greenlets: gevent and eventlet put their own in the place of Python's.

    One thread of the system has many of them: its connection, and a wait in libpq, would be shared by all.
    """
    module = threading.get_ident.__module__
    if module != "_thread":
        raise PoolError(
            f"{module.partition('.')[0]} has put greenlets in the place of threads, and zpgpool needs threads: run the "
            "server with these, as gunicorn's worker class gthread does"
        )


class ThreadOwner:
    """One thread, as one pool knows it.

    `entry` is what a persistent pool has given it (written by that thread, and under the pool's lock by others);
    `uses` counts its checkouts (written by that thread alone, so that no count is lost). What it has parked is found by
    the owner itself as key; by `reader`, if its last request has left autocommit on.
    """

    __slots__ = ("_life", "entry", "ident", "name", "reader", "uses")

    def __init__(self, life: LifeToken) -> None:
        self.entry: Entry | None = None
        self.uses = 0
        self.reader = object()
        self.ident = threading.get_ident()
        self.name = threading.current_thread().name
        self._life = weakref.ref(life)

    @property
    def is_alive(self) -> bool:
        return self._life() is not None


def who(owner: Owner) -> str:
    """Return how messages name an owner: its thread, and what that works on."""
    work = tasks.get(owner.ident, "") if owner.is_alive else ""
    return f"thread {owner.name}, {work}" if work else f"thread {owner.name}"


class CheckoutOwner(ThreadOwner):
    """The owner of a checkout, in place of a thread: it ends with the checkout."""

    __slots__ = ()


class OwnerLocal(threading.local):
    """`local.owner` is the calling thread, made and given to `add` when a thread first asks."""

    def __init__(self, add: Callable[[ThreadOwner], object]) -> None:
        self._life = LifeToken()
        self.owner = ThreadOwner(self._life)
        add(self.owner)


@implementer(ICheckout)
class Checkout:
    """See `ICheckout`. `put` puts the connection away, if it is still held; `life` ends with this object."""

    def __init__(self, conn: Connection, put: Callable[[bool], object], life: LifeToken | None = None) -> None:
        self.conn = conn
        self._life = life
        self._put: Callable[[bool], object] | None = put

    def putconn(self, close: bool = False) -> None:
        """See `ICheckout`."""
        # The pool knows whether it is still held. After it: what an exception stops is done again. And a pool that was
        # closed has closed the connection, too.
        if (put := self._put) is not None:
            with suppress(PoolClosed):
                put(close)
            self._put = None


# Reports --------------------------------------------------------------------------------------------------------------


@implementer(IWaiter)
@dataclass(frozen=True)
class Waiter:
    """See `IWaiter`."""

    thread: str
    seconds: float
    request: str
    line: str

    @classmethod
    def of(cls, thread: threading.Thread, seconds: float, lines: dict[int, str]) -> Waiter:
        """Return what is known of a thread that has waited for so long."""
        number = thread.ident or 0
        return cls(thread.name, max(0.0, seconds), str(tasks.get(number, "")), lines.get(number, ENDED))


STATUS = {
    TRANSACTION_STATUS_IDLE: "idle",
    TRANSACTION_STATUS_ACTIVE: "in a query",
    TRANSACTION_STATUS_INTRANS: "in a transaction",
    TRANSACTION_STATUS_INERROR: "in a failed transaction",
}


@implementer(IHolder)
@dataclass(frozen=True)
class Holder:
    """See `IHolder`."""

    thread: str
    seconds: float
    status: str
    backend_pid: int
    request: str
    line: str

    @classmethod
    def of(cls, owner: Owner, entry: Entry, now: float, lines: dict[int, str]) -> Holder:
        """Return what is known at `now` (monotonic seconds), without asking the server."""
        status, backend_pid = "lost", 0
        conn = entry.connection()
        if conn is not None:
            status = STATUS.get(conn.get_transaction_status(), "broken")
            backend_pid = 0 if conn.closed else entry.backend_pid
        if entry.state == RETURNING:
            status = "returning"
        request, line = "", ENDED
        if owner.is_alive:
            request, line = str(tasks.get(owner.ident, "")), lines.get(owner.ident, ENDED)
        return cls(owner.name, max(0.0, now - entry.since), status, backend_pid, request, line)

    def __str__(self) -> str:
        parts = [self.request, self.status, f"backend {self.backend_pid}", f"at {self.line}"]
        return f"thread {self.thread} for {self.seconds:.1f} s ({', '.join(part for part in parts if part)})"
