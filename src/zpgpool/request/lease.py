"""What a request holds of a pool, from its first use to the request's end. Of WSGI it knows `environ`."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from threading import get_ident
from types import FrameType
from types import MappingProxyType
from typing import Any
from typing import TYPE_CHECKING

from psycopg2.extensions import STATUS_READY

from ..core import BROKEN
from ..core import set_temporarily
from ..core import tasks
from ..core import Work
from ..errors import PoolClosed
from ..errors import PoolError
from ..interfaces import IPoolManagement
from .shared import Orphan
from .shared import SharedCheckout
from .shared import Transaction


if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg2
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from ..types import Owner
    from ..types import PersistentPool
    from ..types import Pool

    Session = Mapping[str, Any]


log = logging.getLogger("zpgpool")


#: Where `environ` has the connection, if it is checked out before the application is called.
SHOWN = "zpgpool.connection"


class ThreadState:
    """What a thread's requests have: their leases, by the pool's id; and the transactions that outlived them."""

    def __init__(self) -> None:
        self.leases: dict[int, Lease] = {}
        self.orphaned: list[Orphan] = []

    def abandon_orphans(self, why: str) -> None:
        """Abort the transactions that outlived their requests."""
        while self.orphaned:
            orphan = self.orphaned[-1]
            orphan.abandon(why)
            with suppress(ValueError):
                self.orphaned.remove(orphan)  # after it: what an exception stops, the next request does again


class ThreadLocal(threading.local):
    """`local.state` is the calling thread's."""

    def __init__(self) -> None:
        self.state = ThreadState()


local = ThreadLocal()


class Lease(Work):
    """What a request holds of a pool: at most one connection, from its first use to the request's end.

    `str()` of it is what messages call the request.
    """

    is_over = False

    #: Whether the application has returned its body, and goes on in that.
    is_streaming = False

    #: The request's connection once a transaction shares it.
    _shared: SharedCheckout | None = None

    #: How many references to it are ours then, as `sys.getrefcount` counts: the checkout's, and its own argument.
    _own_references = 2

    #: Whether the transaction began in the body: then the lease must end it.
    _is_shared_in_body = False

    #: The pool, where the connection is the thread's that `_owner` stands for: see `ThreadLease`.
    _thread_pool: PersistentPool | None = None
    _owner: Owner = None

    #: What the session is set to for the request, as `set_session()` takes it; the return sets it back.
    session: Session = MappingProxyType({})

    #: Whether what it reads from has failed, or refused a write: see `ReplicaLease`.
    has_failed_over = False

    #: What the application says that it has failed with, and has answered itself.
    reported: psycopg2.Error | None = None

    #: Whether a transaction of the request was committed, with this pool or another: it must not run again.
    has_committed = False

    #: Transactions that were begun in the body with a pool that no filter serves to the request.
    guests: tuple[Transaction, ...] = ()

    #: The connection that was set so.
    _has_set: Connection | None = None

    #: The connection that it has put into `environ`, if it has, and what was there before.
    _shown: tuple[Connection, object] | None = None

    #: The thread that ends it. Another one that comes to it meanwhile leaves it to that.
    _ender = 0

    def __init__(self, pool: Pool, environ: WSGIEnvironment, frame: FrameType | None = None) -> None:
        self.pool = pool
        self.environ = environ
        #: The call into the application's code that is on a stack now, if one is: see `is_running`.
        self.frame = frame
        self._thread = get_ident()
        self.home = local.state
        self.home.leases[id(pool)] = self  # last: an exception may come between any two lines
        tasks[self._thread] = self

    def __str__(self) -> str:
        environ = self.environ
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        return f"{environ.get('REQUEST_METHOD', '?')} {path}"

    @property
    def is_busy(self) -> bool:
        """Whether some thread, or greenlet, runs the request's code: a call into that has not returned."""
        try:
            if self.frame is not None:
                self.frame.clear()  # of a call that has returned; one that has not refuses
            return False
        except RuntimeError:
            return True

    @property
    def is_ending(self) -> bool:
        """Whether the calling thread has begun to end it, and an exception has stopped that."""
        return self._ender == get_ident() and not self.is_over

    @property
    def is_running(self) -> bool:
        """Whether the calling thread, or greenlet, runs the request's code: a call into that is on its stack.

        The stack cannot be wrong. A list of calls can: an asynchronous exception leaves in it what has ended.
        """
        wanted = self.frame
        frame: FrameType | None = sys._getframe(1) if wanted is not None else None
        while frame is not None:
            if frame is wanted:
                return True
            frame = frame.f_back
        return False

    def enter(self, frame: FrameType) -> Lease | None:
        """Say that the calling thread runs the request's code in `frame`; return what to give to `leave`."""
        leases = local.state.leases
        before = leases.get(id(self.pool))
        leases[id(self.pool)], self.frame = self, frame
        return before

    def leave(self, before: Lease | None) -> None:
        """Say that the calling thread no longer does so. Its own request goes on until that has ended."""
        self.frame = None
        leases, number = local.state.leases, id(self.pool)
        if leases.get(number) is self and (leases is not self.home.leases or self.is_over):
            del leases[number]
            if before is not None and before is not self and not before.is_over:
                leases[number] = before

    def begin_body(self) -> None:
        """Say that the application has returned, and goes on in its body.

        What it has committed by a transaction does not keep its connection, if nothing in the body refers to that: the
        next use gets one again.
        """
        self.is_streaming = True
        if self._shared is not None and sys.getrefcount(self._shared.conn) <= self._own_references:
            self.let_go()

    def pause(self) -> None:
        """Say that the application's code is left, until the server asks for more of its body."""
        self.frame = None

    # The connection --------------------------------------------------------------------------------------------------

    def connection(self) -> Connection:
        """Return the request's connection. Raises PoolError after the request's end, and what `getconn` raises."""
        raise NotImplementedError  # each kind of pool has a lease of its own, which says how

    def set_session(self, **session: bool | str) -> None:
        """Have the session be so for the request, too: from its next use on, if it is in a transaction now."""
        self.session = {**self.session, **session}
        self._has_set = None

    def _take_for_reading(self, key: Lease | None = None) -> None:
        """Have the pool check out what has autocommit on already, where the request is to have that."""
        take = getattr(self.pool, "take_for_reading", None)
        if take is not None and "autocommit" in self.session:
            take(key)

    def _set(self, conn: Connection) -> Connection:
        """Set the session once: the user may change it after that."""
        if conn is not self._has_set and conn.status == STATUS_READY:
            set_temporarily(conn, self.session)
            self._has_set = conn
        return conn

    def shared_connection(self) -> Connection | None:
        """Return the connection that a transaction shares; None without one, or when it was closed."""
        if self.is_over:
            raise PoolError(f"{self}: the request has ended, and its connection was returned")
        shared = self._shared
        if shared is not None and shared.conn.closed and shared.transaction is None:
            self._shared = None
            shared.let_go(self)
        return None if self._shared is None else self._shared.conn

    def source(self) -> Pool:
        """Return the pool that the request's connection comes from."""
        return self.pool

    def share(self, transaction: Transaction) -> SharedCheckout | None:
        """Return the request's connection, which goes back when the request and `transaction` have both let go of it.

        None when another transaction has it.
        """
        conn = self.shared_connection()
        if self._shared is None:
            conn = self.connection() if conn is None else conn
            self._shared = self._check_out(conn)
            self._hand_over()
        if self._shared.transaction is not None:
            return None
        if self.session:
            self._set(self._shared.conn)
            if self._shared.conn is self._has_set and "autocommit" in self.session:
                self._shared.conn.autocommit = False
        self._shared.add(transaction)
        self._is_shared_in_body = self.is_streaming
        return self._shared

    def _check_out(self, conn: Connection) -> SharedCheckout:
        checkout = self.pool.checkout(conn)
        try:
            return SharedCheckout(checkout, self)
        except BaseException:  # the traceback, which somebody may keep, has the checkout
            self._hand_over()
            checkout.putconn(close=True)  # the application may know the connection
            raise

    def _hand_over(self) -> None:
        """Forget the connection: the checkout has it."""

    def connections(self) -> list[Connection]:
        """Return what the request holds, without getting anything; from any thread."""
        return [] if self._shared is None else [self._shared.conn]

    @property
    def has_lost_connection(self) -> bool:
        """Whether a connection of the request was lost: ended by the server, or the network, not by `hold_limit`."""
        is_lost = self.has_lost or any(conn.closed == BROKEN for conn in self.connections())
        return is_lost and not self.was_ended

    def had(self, error: psycopg2.Error) -> bool:
        """Whether the request had `error` from its connection: one without a cursor is of a closed connection."""
        conn = error.cursor.connection if error.cursor is not None else None
        return any(own is conn or (conn is None and own.closed) for own in self.connections())

    def cancel(self) -> None:
        """Have the query cancelled that the request waits for, if it does. From any thread; does not wait."""
        if IPoolManagement.providedBy(self.pool):
            for conn in self.connections():
                if self.pool.cancel(conn, 0):
                    log.info("%s: its client has gone, and its query was cancelled", self)

    # The end ---------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Return the connection. From any thread; harmless when repeated, and goes on where an exception stopped it."""
        if self.is_over or self._ender not in (0, get_ident()):
            return
        self._ender = get_ident()
        for guest in self.guests:
            guest.abandon(f"{self} has ended, and this was begun in its body")
        try:
            if self._shared is not None:
                self._end_shared(self._shared)
            if self._thread_pool is not None:  # here, and not in `_give_back`: a call less for each request
                self._thread_pool.putconn_of(self._owner, bool(self.environ.get("wsgi.run_once")))
            else:
                self._give_back()
        except PoolClosed:
            pass  # the pool was closed during the request, and its connection with it
        except PoolError as error:
            log.warning("%s: the connection could not be returned: %s", self, error)
        if self.home.leases.get(id(self.pool)) is self:
            del self.home.leases[id(self.pool)]
        if tasks.get(self._thread) is self:
            del tasks[self._thread]
        if self._shown is not None:
            self._hide_connection(*self._shown)
        self.frame = self.failure = self.reported = self._has_set = None
        self.guests = ()
        self.is_over = True
        # Only what names the request: this lease and its environ refer to each other, and what the environ has, an
        # uploaded body too, would stay until the next collection of garbage.
        environ = self.environ
        self.environ = {
            "REQUEST_METHOD": environ.get("REQUEST_METHOD", "?"),
            "SCRIPT_NAME": environ.get("SCRIPT_NAME", ""),
            "PATH_INFO": environ.get("PATH_INFO", ""),
        }

    def show_connection(self) -> None:
        """Put the connection into `environ` until the end, in the place of another filter's."""
        conn = self.connection()
        self._shown = conn, self.environ.get(SHOWN)
        self.environ[SHOWN] = conn

    def _hide_connection(self, conn: Connection, before: object) -> None:
        self._shown = None
        if self.environ.get(SHOWN) is conn:
            del self.environ[SHOWN]
            if before is not None:
                self.environ[SHOWN] = before

    def let_go(self) -> None:
        """Return the connection, if no transaction has it; the next use gets one again."""
        if (shared := self._shared) is not None and shared.transaction is None:
            self._shared = self._has_set = None
            shared.let_go(self)

    def _give_back(self) -> None:
        """Return the connection to the pool, if there is one that no transaction shares."""

    def _end_shared(self, shared: SharedCheckout) -> None:
        transaction = shared.transaction
        if transaction is not None:
            if self._is_shared_in_body:
                Orphan(transaction, shared).abandon(f"{self} has ended, and this was begun in its body")
            else:
                self.home.orphaned.append(Orphan(transaction, shared))
                # By the pyramid_tm of an application that has called this one it ends soon.
                log.log(
                    logging.DEBUG if "tm.active" in self.environ else logging.WARNING,
                    "%s has ended, but its transaction has not: %r keeps the connection until it does. The zpgpool "
                    "filter must stand left of (outside) the filter that commits, as in `pipeline = zpgpool tm app`",
                    self,
                    transaction,
                )
        shared.let_go(self)
        self._shared = None  # after it: what an exception stops is done again


def note_commit() -> None:
    """Take note that a transaction of the calling thread's request was committed, with whichever pool."""
    for lease in local.state.leases.values():
        lease.has_committed = True


def current_lease(pool: object) -> Lease | None:
    """Return the lease on `pool` of the request whose code the calling thread runs; None outside of requests."""
    lease = local.state.leases.get(id(pool))
    return lease if lease is not None and lease.is_running else None
