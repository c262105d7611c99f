"""SQLAlchemy: `create_engine("postgresql+psycopg2://", poolclass=pool_class("main"))` is an engine on a pool.

SQLAlchemy has a record of each connection, and sends the event `connect` when it makes one. So a record is kept while
its connection rests in the pool: the listeners, and the driver's own set-up, see each connection once. `Any` stands for
its records and connections: its types know no attributes of psycopg2's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .errors import PoolError
from .errors import PoolTimeout
from .errors import TooManyRequests
from .interfaces import IPersistentConnectionPool
from .interfaces import IPoolManagement
from .registry import get_pool
from .types import Pool


try:
    import sqlalchemy.pool
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.exc import TimeoutError
    from sqlalchemy.pool.base import _ConnectionRecord
except ImportError as error:
    raise ImportError(f"zpgpool.sqlalchemy needs the extra zpgpool[sqlalchemy]: {error}") from None


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from sqlalchemy.engine import Dialect
    from sqlalchemy.event.base import _DispatchCommon
    from sqlalchemy.event.registry import _ListenerFnType
    from sqlalchemy.log import _EchoFlagType
    from sqlalchemy.pool import ConnectionPoolEntry
    from sqlalchemy.pool.base import _ConnDialect
    from sqlalchemy.pool.base import _ResetStyleArgType
    from zope.interface.registry import Components


def pool_class(pool: Pool | str = "", registry: Components | None = None) -> type[sqlalchemy.pool.Pool]:
    """Return the `poolclass` of an engine whose connections come from `pool`.

    pool -- a pool, or the name of one, which is looked up when the engine gets its first connection, and again after
        `engine.dispose()`; by default the unnamed one.
    registry -- where the name is looked up; by default the global registry.

    A connect raises `sqlalchemy.exc.TimeoutError` where the pool raises PoolTimeout or TooManyRequests, which is its
    `__cause__`, and `sqlalchemy.exc.OperationalError` when the server cannot be reached.

    Raises `sqlalchemy.exc.ArgumentError` for a persistent pool: now, or at the first connect of a pool by name.
    """
    if not isinstance(pool, str):
        _check(pool)

    def find() -> Pool:
        return _check(get_pool(pool, registry)) if isinstance(pool, str) else pool

    return type("ZpgPool", (_Pool,), {"find": staticmethod(find)})


def _check(pool: Pool) -> Pool:
    if IPersistentConnectionPool.providedBy(pool):
        raise ArgumentError(
            f"{pool!r} has one connection for each thread, so that two of an engine's would share a transaction: use a "
            "'threaded' pool"
        )
    return pool


#: What listeners of `connect` may change of a session, and the pool brings back at each return. In an order in which it
#: can be set: in autocommit, the server would be told of the levels.
SESSION = ("encoding", "isolation_level", "readonly", "deferrable", "autocommit")


class _Record(_ConnectionRecord):
    """What SQLAlchemy knows of one connection of the pool. Refers to it only while it is in use."""

    def __init__(self, pool: _Pool, conn: Connection) -> None:
        before = [getattr(conn, name) for name in SESSION]
        #: What the pool's creator, which is called now, returns.
        self.given: Connection | None = conn
        super().__init__(pool)
        after = [getattr(conn, name) for name in SESSION]
        self._session = [(name, new) for name, old, new in zip(SESSION, before, after, strict=True) if new != old]

    def use(self, conn: Any) -> None:
        """Hand out the connection, as the listeners of `connect` have left it when it was new."""
        self.dbapi_connection = conn
        for name, value in self._session:
            if name == "encoding":
                conn.set_client_encoding(value)
            else:
                setattr(conn, name, value)


class _Pool(sqlalchemy.pool.Pool):
    """A pool as its engine sees it. Refuses `pool_size`, `pool_pre_ping` and the like: the pool has its settings."""

    find: Callable[[], Pool]

    def __init__(
        self,
        creator: object,
        echo: _EchoFlagType = None,
        logging_name: str | None = None,
        # Before what SQLAlchemy itself restores. The pool then finds nothing to roll back.
        reset_on_return: _ResetStyleArgType = True,
        events: list[tuple[_ListenerFnType, str]] | None = None,
        dialect: _ConnDialect | Dialect | None = None,
        _dispatch: _DispatchCommon[sqlalchemy.pool.Pool] | None = None,
    ) -> None:
        driver = getattr(dialect, "driver", "psycopg2")
        if driver != "psycopg2":
            raise ArgumentError(f"zpgpool has connections of psycopg2, not of {driver}: use postgresql+psycopg2://")
        connect: Any = self._connect  # under another name of the argument
        super().__init__(connect, -1, echo, logging_name, reset_on_return, events, dialect, _dispatch=_dispatch)
        self._source: Pool | None = None
        #: The records of the connections that rest in the pool.
        self._records: WeakKeyDictionary[Connection, _Record] = WeakKeyDictionary()

    @property
    def source(self) -> Pool:
        """The pool that the connections come from: one and the same, because they go back there."""
        if self._source is None:
            self._source = self.find()
        return self._source

    def _getconn(self) -> Connection:
        try:
            return self.source.getconn()
        except (PoolTimeout, TooManyRequests) as error:
            raise TimeoutError(str(error)) from error

    def _do_get(self) -> ConnectionPoolEntry:
        while True:
            conn = self._getconn()
            record = self._records.pop(conn, None)
            try:
                if record is None:
                    return _Record(self, conn)
                record.use(conn)
            except BaseException:
                self._close_connection(conn)
                raise
            if not record._is_hard_or_soft_invalidated():
                return record
            record.close()

    def _connect(self, record: Any) -> Any:
        """Return a new connection, which SQLAlchemy then tells of by `connect`."""
        conn, record.given = record.given, None
        if conn is None:  # its user, or a listener, has found that it is of no use: another one
            conn = self._getconn()
            while self._records.pop(conn, None) is not None:
                self._close_connection(conn)
                conn = self._getconn()
        return conn

    def _do_return_conn(self, record: Any) -> None:
        conn = record.dbapi_connection
        if conn is None:
            return  # it was closed, or detached
        if record._is_hard_or_soft_invalidated():
            record.close()
            return
        record.dbapi_connection = None
        self._records[conn] = record  # first: the next user may come at once
        with suppress(PoolError):
            self.source.putconn(conn)

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        # The pool closes it, so that its place is free. In a forked child, and after its end, it has done so already.
        with suppress(PoolError):
            self.source.putconn(connection, close=True)

    def dispose(self) -> None:
        """Replace all connections of the pool: those in use when they are returned."""
        source: object = self._source
        if IPoolManagement.providedBy(source):
            with suppress(PoolError):
                source.drain()

    def recreate(self) -> _Pool:
        """Return another one like this."""
        return type(self)(
            None,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            dialect=self._dialect,
            _dispatch=self.dispatch,
        )

    def size(self) -> int:
        """Return how many connections there may be, as `QueuePool` has it."""
        return self.source.maxconn

    def checkedin(self) -> int:
        """Return how many connections are idle."""
        return self.source.get_stats()["pool_available"]

    def checkedout(self) -> int:
        """Return how many connections are in use, by whichever engine."""
        stats = self.source.get_stats()
        return stats["pool_size"] - stats["pool_available"]

    def overflow(self) -> int:
        """Return 0: there is never one above `size()`."""
        return 0

    def status(self) -> str:
        """Return how many connections there are, and how many may be."""
        return repr(self.source)
