"""The pools that a user could take instead, each as a pair of functions: get a connection, put it back.

Like for like: every pair leaves the connection idle, outside of a transaction. Imports are where they are needed: a
process that runs one of them has no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg2
import psycopg2.pool

import zpgpool


@dataclass
class Peer:
    """A pool behind two functions; `close` ends it."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]
    close: Callable[[], object]
    can_wait: bool = True


def ours(dsn: str, size: int, factory: Any = zpgpool.PersistentConnectionPool, **options: Any) -> Peer:
    pool = factory(0, size, dsn, **{"idle_timeout": 600, "max_lifetime": 3600, "timeout": 60, **options})
    return Peer(
        f"zpgpool {factory.__name__.removesuffix('ConnectionPool').lower()}", pool.getconn, pool.putconn, pool.close
    )


def ours_threaded(dsn: str, size: int) -> Peer:
    return ours(dsn, size, zpgpool.ThreadedConnectionPool)


def theirs_psycopg2(dsn: str, size: int) -> Peer:
    pool = psycopg2.pool.ThreadedConnectionPool(size, size, dsn)
    return Peer("psycopg2.pool", pool.getconn, pool.putconn, pool.closeall, can_wait=False)


def theirs_psycopg2_pool(dsn: str, size: int) -> Peer:
    import psycopg2_pool

    pool = psycopg2_pool.ThreadSafeConnectionPool(minconn=size, maxconn=size, dsn=dsn)
    return Peer("psycopg2-pool", pool.getconn, pool.putconn, pool.clear, can_wait=False)


def theirs_psycopg_pool(dsn: str, size: int, **options: Any) -> Peer:
    import psycopg_pool

    pool = psycopg_pool.ConnectionPool(dsn, min_size=size, max_size=size, open=True, timeout=60, **options)
    pool.wait()
    return Peer("psycopg_pool", pool.getconn, pool.putconn, pool.close)


def theirs_psycopg_pool_check(dsn: str, size: int) -> Peer:
    import psycopg_pool

    # Without prepared statements, which a PgBouncer that pools transactions does not keep.
    options = {"check": psycopg_pool.ConnectionPool.check_connection, "kwargs": {"prepare_threshold": None}}
    peer = theirs_psycopg_pool(dsn, size, **options)
    peer.name += " + check"
    return peer


def theirs_sqlalchemy(dsn: str, size: int, **options: Any) -> Peer:
    import sqlalchemy

    engine = sqlalchemy.create_engine(
        "postgresql+psycopg2://",
        creator=lambda: psycopg2.connect(dsn),
        pool_size=size,
        max_overflow=0,
        pool_timeout=60,
        **options,
    )
    return Peer("SQLAlchemy", engine.raw_connection, lambda conn: conn.close(), engine.dispose)


def theirs_sqlalchemy_ping(dsn: str, size: int) -> Peer:
    peer = theirs_sqlalchemy(dsn, size, pool_pre_ping=True)
    peer.name += " + pre_ping"
    return peer


def theirs_dbutils(dsn: str, size: int) -> Peer:
    import dbutils.pooled_db

    pool = dbutils.pooled_db.PooledDB(psycopg2, maxconnections=size, maxcached=size, blocking=True, dsn=dsn)
    return Peer("DBUtils", pool.dedicated_connection, lambda conn: conn.close(), pool.close)


def theirs_dbutils_persistent(dsn: str, size: int) -> Peer:
    """It leaves the transaction open: we end it, as its users must."""
    import dbutils.persistent_db

    pool = dbutils.persistent_db.PersistentDB(psycopg2, closeable=False, dsn=dsn)
    return Peer("DBUtils PersistentDB", pool.connection, lambda conn: conn.rollback(), lambda: None)


def theirs_zpsycopgda(dsn: str, size: int) -> Peer:
    """The pool of Products.ZPsycopgDA: by the number of the thread; it leaves the transaction open, too."""
    from Products.ZPsycopgDA import pool as zpsycopgda

    def put(conn: Any) -> None:
        conn.rollback()
        zpsycopgda.putconn(dsn, conn)

    return Peer("ZPsycopgDA", lambda: zpsycopgda.getconn(dsn), put, lambda: zpsycopgda.flushpool(dsn))


def connect_each(dsn: str, size: int) -> Peer:
    return Peer("connect per request", lambda: psycopg2.connect(dsn), lambda conn: conn.close(), lambda: None)


def ours_autocommit(dsn: str, size: int) -> Peer:
    peer = ours(dsn, size, autocommit=True)
    peer.name += " autocommit"
    return peer


def thread_local_autocommit(dsn: str, size: int) -> Peer:
    return thread_local(dsn, size, autocommit=True)


def thread_local(dsn: str, size: int, autocommit: bool = False) -> Peer:
    """The limit: a connection for each thread, without any check, never returned."""
    here = threading.local()
    conns = []

    def get() -> Any:
        try:
            return here.conn
        except AttributeError:
            here.conn = psycopg2.connect(dsn)
            here.conn.autocommit = autocommit
            conns.append(here.conn)
            return here.conn

    def put(conn: Any) -> None:
        if conn.get_transaction_status():
            conn.rollback()

    return Peer("thread-local (limit)", get, put, lambda: [conn.close() for conn in conns])


ALL = [
    ours,
    ours_threaded,
    theirs_psycopg2,
    theirs_psycopg2_pool,
    theirs_psycopg_pool,
    theirs_sqlalchemy,
    theirs_dbutils,
    theirs_dbutils_persistent,
    theirs_zpsycopgda,
    thread_local,
]
