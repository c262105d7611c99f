"""A session is compared with how it was when somebody may have changed it, and only then."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from psycopg2.extensions import connection as Connection
from psycopg2.extras import DictCursor
from psycopg2.extras import LoggingConnection

import zpgpool
from zpgpool.core import set_temporarily
from zpgpool.core.entry import Entry
from zpgpool.core.session import session_of
from zpgpool.core.session import watched


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


def test_autocommit_for_one_request_is_set_by_the_users_own_method(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60, connection_factory=Counting)
    with pool.connection() as conn:
        before = conn.sessions
        set_temporarily(conn, {"autocommit": True})
        assert (conn.autocommit, conn.sessions) == (True, before + 1)
    with pool.connection() as conn:
        assert not conn.autocommit


class Interrupted:
    """psycopg2's attribute, which waits for another thread before it is set: a fake, as no test can time that."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile: Callable[[], object] | None = meanwhile

    def __set__(self, conn: Any, value: bool) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        vars(Connection)["autocommit"].__set__(conn, value)


class TestTwoThreads:
    """Two threads of one request, of which one sets autocommit while the other returns the connection."""

    @pytest.fixture
    def pool(self, make_pool: MakePool) -> Any:
        # With a `reset`, a connection rests as configured.
        return make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60, reset=lambda conn: None)

    def test_what_is_set_too_late_is_noted(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        conn = pool.getconn()
        monkeypatch.setattr("zpgpool.core.session._AUTOCOMMIT", Interrupted(pool.putconn))
        set_temporarily(conn, {"autocommit": True})
        assert (conn.autocommit, conn.is_touched) == (True, True)
        pool.putconn(pool.getconn())
        assert (conn.autocommit, conn.is_touched) == (False, False)

    def test_what_is_changed_meanwhile_is_noted(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        conn = pool.getconn()
        set_temporarily(conn, {"autocommit": True})
        monkeypatch.setattr(
            "zpgpool.core.session._AUTOCOMMIT", Interrupted(lambda: setattr(conn, "cursor_factory", DictCursor))
        )
        pool.putconn()
        with pool.connection() as again:
            assert again is conn
            assert conn.cursor_factory is None
            assert not conn.autocommit


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
    pool = make_pool(
        zpgpool.PersistentConnectionPool, 1, 1, connection_factory=Counting, isolation_level="SERIALIZABLE"
    )
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


class Sly(Connection):
    """Changes its session by a method of its own."""

    def make_it_readonly(self) -> None:
        super().set_session(readonly=True)


class Strict(Connection):
    """Admits the settings it knows only."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory"):
            raise AttributeError(f"no such setting: {name}")
        super().__setattr__(name, value)


class Choosy(Connection):
    """Makes connections of another class."""

    def __new__(cls, dsn: str, *args: Any) -> Any:
        return Connection(dsn, *args)


class Demanding(Connection):
    """Wants something of each subclass."""

    def __init_subclass__(cls, *, dialect: str) -> None:
        pass


@dataclass
class Maker:
    """A factory that cannot be hashed."""

    made: int = 0

    def __call__(self, dsn: str, *args: Any) -> Connection:
        self.made += 1
        return Connection(dsn, *args)


@pytest.mark.parametrize("factory", [Sly, Strict, Choosy, Demanding, Maker()], ids=lambda factory: str(factory))
def test_whatever_a_factory_is_its_connections_are_kept_clean(make_pool: MakePool, factory: Any) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 1, idle_timeout=60, connection_factory=factory)
    for _ in range(3):
        with pool.connection() as conn:
            assert (conn.autocommit, conn.readonly) == (False, None)
            conn.autocommit = True
            if factory is Sly:
                conn.autocommit = False
                conn.make_it_readonly()
    assert pool.get_stats()["connections_num"] == 1


def test_what_is_deleted_is_there_for_the_next(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60, cursor_factory=DictCursor)
    with pool.connection() as conn:
        del conn.cursor_factory
    with pool.connection() as conn:
        assert conn.cursor_factory is DictCursor


def test_a_change_while_it_is_compared_is_seen_at_the_next_return(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thread that has it still: its note must outlive the comparison."""
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60)
    conn = pool.getconn()
    is_clean = Entry.is_clean

    def compare_and_change(entry: Entry) -> bool:
        same = is_clean(entry)
        conn.autocommit = True
        return same

    monkeypatch.setattr(Entry, "is_clean", compare_and_change)
    conn.readonly = True
    pool.putconn(conn)
    monkeypatch.undo()
    pool.putconn(pool.getconn())
    with pool.connection() as conn:
        assert not conn.autocommit
