"""A session is compared with how it was when somebody may have changed it, and only then."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from psycopg2.extensions import connection as Connection
from psycopg2.extras import DictCursor
from psycopg2.extras import LoggingConnection

import zpgpool
from zpgpool.session import is_watched
from zpgpool.session import session_of
from zpgpool.session import watched


MakePool = Callable[..., Any]


class Slotted(Connection):
    """A user's own class, with a place for something."""

    __slots__ = ("note",)


class Counting(Connection):
    """A user's own class that overrides what we watch."""

    sessions = 0
    note = ""

    def set_session(self, *args: Any, **keywords: Any) -> None:
        self.sessions += 1
        super().set_session(*args, **keywords)


def by_hand(dsn: str, *args: Any) -> Connection:
    """Make a connection as a factory that is no class does."""
    return Counting(dsn, *args)


TOUCHES: dict[str, Callable[[Any], object]] = {
    "autocommit": lambda conn: setattr(conn, "autocommit", True),
    "isolation_level": lambda conn: setattr(conn, "isolation_level", "SERIALIZABLE"),
    "readonly": lambda conn: setattr(conn, "readonly", True),
    "deferrable": lambda conn: setattr(conn, "deferrable", True),
    "cursor_factory": lambda conn: setattr(conn, "cursor_factory", DictCursor),
    "set_session": lambda conn: conn.set_session(readonly=True),
    "set_isolation_level": lambda conn: conn.set_isolation_level(0),
    "set_client_encoding": lambda conn: conn.set_client_encoding("LATIN1"),
}


@pytest.mark.parametrize("how", TOUCHES)
@pytest.mark.parametrize("factory", [None, Connection, Slotted, Counting, LoggingConnection, by_hand])
def test_whatever_was_changed_is_as_configured_for_the_next(make_pool: MakePool, factory: Any, how: str) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60, connection_factory=factory)
    with pool.connection() as conn:
        if factory is LoggingConnection:
            conn.initialize(io.StringIO())
        before, first = session_of(conn), conn
        TOUCHES[how](conn)
        assert session_of(conn) != before
    with pool.connection() as conn:
        assert conn is first
        assert session_of(conn) == before


@pytest.mark.parametrize("how", [*TOUCHES, "reset"])
def test_whoever_changes_something_touches(make_pool: MakePool, how: str) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60)
    for _ in range(2):
        with pool.connection() as conn:
            assert not conn.is_touched
            TOUCHES[how](conn) if how in TOUCHES else conn.reset()
            assert conn.is_touched


def test_work_does_not_touch(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60)
    with pool.connection() as conn:
        with conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1")
        conn.rollback()
        assert not conn.is_touched


@pytest.mark.parametrize("how", ["set_session", "autocommit"])
def test_a_class_of_the_users_own_is_kept(make_pool: MakePool, how: str) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, connection_factory=Counting, readonly=True)
    with pool.connection() as conn:
        assert isinstance(conn, Counting)
        assert (type(conn).__name__, type(conn).__doc__) == ("Counting", Counting.__doc__)
        assert conn.sessions == 1  # by the pool, through the user's own method
        conn.note = "as an object with a __dict__ does"


def test_the_default_class_has_no_dict(make_pool: MakePool) -> None:
    with make_pool(zpgpool.PersistentConnectionPool, 1, 1).connection() as conn:
        assert isinstance(conn, Connection)
        assert not hasattr(conn, "__dict__")


@pytest.mark.parametrize("factory", [by_hand, object, 5])
def test_what_is_no_class_of_connections_is_left_alone(factory: Any) -> None:
    assert watched(factory) is factory
    assert not is_watched(factory)


def test_a_watched_class_is_made_once() -> None:
    assert watched(Slotted) is watched(Slotted)
    assert watched(watched(Slotted)) is watched(Slotted)
