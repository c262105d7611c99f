"""The leases of the kinds of pools: which connection is the request's, and how it goes back."""

from __future__ import annotations

import logging
from contextlib import suppress
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING

from ..core import tasks
from ..errors import PoolError
from ..interfaces import IKeyedConnectionPool
from ..interfaces import IPersistentConnectionPool
from .lease import Lease
from .lease import local


if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from ..core.owners import OwnerLocal
    from ..types import KeyedPool
    from ..types import PersistentPool
    from ..types import Pool


log = logging.getLogger("zpgpool")


class ThreadLease(Lease):
    """A lease of a persistent pool: the connection is the thread's, however the application asks for it."""

    pool: PersistentPool

    _own_references = 3  # the pool has one, too

    def __init__(self, pool: PersistentPool, environ: WSGIEnvironment, frame: FrameType | None = None) -> None:
        # That of `Lease`, written out, and a look without a call where the pool is one of ours: see test_budget.py.
        self.pool = self._thread_pool = pool
        self.environ = environ
        self.frame = frame
        self._thread = get_ident()
        here: OwnerLocal | None = getattr(pool, "here", None)
        owner = self._owner = pool.owner() if here is None else here.owner
        self.home = local.state
        self.home.leases[id(pool)] = self  # last: an exception may come between any two lines
        tasks[self._thread] = self
        if (here is None or owner.entry is not None) and pool.connection_of(owner) is not None:
            log.warning("%s: its thread had a connection when it began; that is rolled back, and returned", self)
            pool.putconn_of(owner)

    def connection(self) -> Connection:
        """See `Lease`."""
        if self._shared is not None or self.is_over:
            conn = self.shared_connection()
            if conn is not None:
                return conn
        if get_ident() != self._thread:  # a server that iterates the body in another thread than it called the app in
            conn = self.pool.connection_of(self._owner)
            if conn is not None:
                return conn
            tasks.pop(self._thread, None)
            self._owner, self._thread = self.pool.owner(), get_ident()
        if not self.session:
            return self.pool.getconn()
        self._take_for_reading()
        return self._set(self.pool.getconn())

    def connections(self) -> list[Connection]:
        """See `Lease`."""
        conn = self.pool.connection_of(self._owner)
        return super().connections() if conn is None else [conn]


class OwnLease(Lease):
    """A lease of any other pool: the connection is the request's."""

    def _getconn(self) -> Connection:
        return self.pool.getconn()

    _conn: Connection | None = None

    def connection(self) -> Connection:
        """See `Lease`."""
        if self._shared is not None or self.is_over:
            conn = self.shared_connection()
            if conn is not None:
                return conn
        if self._conn is None or self._conn.closed:
            if self._conn is not None:
                self._give_back()
            self._conn = self._getconn()
        return self._set(self._conn) if self.session else self._conn

    def connections(self) -> list[Connection]:
        """See `Lease`."""
        return super().connections() if self._conn is None else [self._conn]

    def _hand_over(self) -> None:
        self._conn = None

    def _give_back(self) -> None:
        if self._conn is not None:
            self.pool.putconn(self._conn, close=bool(self.environ.get("wsgi.run_once")))
            self._conn = None  # after it: what an exception stops is done again


class KeyedLease(OwnLease):
    """A lease of a pool with keys: it is the key itself, so that the connection of a thread that dies is known."""

    pool: KeyedPool

    #: Whether the pool was asked for a connection: an exception may come before `_conn` has it.
    _has_asked = False

    def _getconn(self) -> Connection:
        self._has_asked = True
        if self.session:
            self._take_for_reading(self)
        return self.pool.getconn(self)

    def _give_back(self) -> None:
        if self._conn is not None:
            self.pool.putconn(self._conn, self, bool(self.environ.get("wsgi.run_once")))
            self._conn, self._has_asked = None, False
        elif self._has_asked:
            with suppress(PoolError):  # it gave none
                self.pool.putconn(key=self)

    def _hand_over(self) -> None:
        super()._hand_over()
        self._has_asked = False


def lease_class(pool: Pool) -> Callable[..., Lease]:
    """Return what makes a lease of `pool`."""
    if IPersistentConnectionPool.providedBy(pool):
        return ThreadLease
    return KeyedLease if IKeyedConnectionPool.providedBy(pool) else OwnLease
