"""SQLAlchemy: engines whose connections come from a pool, by SQLAlchemy's own rules."""

from __future__ import annotations

import gc
import logging
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from benchmarks.harness import free_port
from psycopg2.extensions import STATUS_READY
from sqlalchemy import event
from sqlalchemy import select
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm import Mapped
from sqlalchemy.orm import mapped_column
from sqlalchemy.orm import Session
from sqlalchemy.orm import sessionmaker
from zope.interface.interfaces import ComponentLookupError
from zope.interface.registry import Components

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import Outside
from zpgpool.sqlalchemy import pool_class


URL = "postgresql+psycopg2://"

ALL_POOL_OPTIONS = ["pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping", "pool_use_lifo"]

MakeEngine = Callable[..., Any]


@pytest.fixture
def pool(make_pool: Callable[..., Any]) -> Any:
    return make_pool(zpgpool.ThreadedConnectionPool, 0, 3, idle_timeout=60, timeout=20)


@pytest.fixture
def make_engine(pool: Any) -> Iterator[MakeEngine]:
    engines: list[Any] = []

    def make(source: Any = pool, url: str = URL, **options: Any) -> Any:
        engines.append(sqlalchemy.create_engine(url, poolclass=pool_class(source), **options))
        return engines[-1]

    yield make
    gc.collect()  # what a test dropped


@pytest.fixture
def engine(make_engine: MakeEngine) -> Any:
    return make_engine()


@pytest.fixture
def table(outside: Outside) -> Iterator[str]:
    outside.query("DROP TABLE IF EXISTS numbers; CREATE TABLE numbers (n int)")
    yield "numbers"
    outside.query("DROP TABLE numbers")


def backend(conn: Any) -> int:
    return int(conn.scalar(text("SELECT pg_backend_pid()")))


def all_is_well(pool: Any, outside: Outside) -> None:
    """All places are there, and nobody has a connection."""
    assert pool.holders() == []
    pool.wait(20)  # the last connect may have been killed, and its error is raised for a moment
    conns = [pool.getconn() for _ in range(pool.maxconn)]
    assert outside.backends() == {conn.get_backend_pid() for conn in conns}
    for conn in conns:
        assert (conn.status, conn.autocommit, conn.isolation_level) == (STATUS_READY, False, None)
        pool.putconn(conn)


class TestWhereConnectionsComeFrom:
    def test_the_pool(self, engine: Any, pool: Any, outside: Outside) -> None:
        with engine.connect() as conn:
            assert {backend(conn)} == outside.backends()
            [holder] = pool.holders()
            assert holder.backend_pid == backend(conn)
        all_is_well(pool, outside)

    def test_the_pool_of_a_name_at_first_use(self, make_engine: MakeEngine, pool: Any) -> None:
        engine = make_engine("main")
        with pytest.raises(ComponentLookupError, match="no pool is registered as 'main'"):
            engine.connect()
        zpgpool.register_pool(pool, "main")
        with engine.connect():
            assert len(pool.holders()) == 1

    def test_the_unnamed_pool(self, pool: Any) -> None:
        zpgpool.register_pool(pool)
        with sqlalchemy.create_engine(URL, poolclass=pool_class()).connect():
            assert len(pool.holders()) == 1

    def test_the_pool_of_another_registry(self, pool: Any) -> None:
        registry = Components()
        zpgpool.register_pool(pool, "main", registry)
        with sqlalchemy.create_engine(URL, poolclass=pool_class("main", registry)).connect():
            assert len(pool.holders()) == 1

    def test_the_next_pool_of_the_name_after_dispose(
        self, make_engine: MakeEngine, pool: Any, make_pool: Callable[..., Any]
    ) -> None:
        engine = make_engine("main")
        zpgpool.register_pool(pool, "main")
        with engine.connect():
            pass
        zpgpool.unregister_pool("main").close()
        with pytest.raises(DBAPIError, match="closed"):
            engine.connect()
        after = make_pool(zpgpool.ThreadedConnectionPool)
        zpgpool.register_pool(after, "main")
        engine.dispose()
        with engine.connect():
            assert len(after.holders()) == 1

    def test_a_connection_goes_back_to_where_it_came_from(
        self, engine: Any, pool: Any, make_pool: Callable[..., Any]
    ) -> None:
        conn = engine.connect()
        engine.dispose()
        conn.close()
        assert pool.holders() == []
        assert pool.get_stats()["pool_size"] == 0

    @pytest.mark.parametrize("name", ALL_POOL_OPTIONS)
    def test_options_of_other_pools_are_refused(self, make_engine: MakeEngine, name: str) -> None:
        with pytest.raises(TypeError, match=f"'{name}'.*ZpgPool"):
            make_engine(**{name: 1})

    def test_a_persistent_pool_is_refused(self, make_pool: Callable[..., Any], make_engine: MakeEngine) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool)
        with pytest.raises(ArgumentError, match="two of an engine's would share a transaction: use a 'threaded' pool"):
            pool_class(pool)
        zpgpool.register_pool(pool, "main")
        engine = make_engine("main")
        with pytest.raises(ArgumentError, match="use a 'threaded' pool"):
            engine.connect()

    def test_another_driver_is_refused(self, make_engine: MakeEngine) -> None:
        with pytest.raises(ArgumentError, match=r"not of pysqlite: use postgresql\+psycopg2://"):
            make_engine(url="sqlite://")

    def test_status_tells_how_many(self, engine: Any) -> None:
        with engine.connect():
            assert "0 idle of 1 open, at most 3" in engine.pool.status()
            pool = engine.pool
            assert (pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow()) == (3, 0, 1, 0)


class TestWithoutAConnection:
    def test_a_timeout_tells_who_holds_them(self, make_engine: MakeEngine, make_pool: Callable[..., Any]) -> None:
        engine = make_engine(make_pool(zpgpool.ThreadedConnectionPool, 3, 3, timeout=0.1))
        conns = [engine.connect() for _ in range(3)]
        with pytest.raises(TimeoutError, match=r"no connection came free within .* Held by thread MainThread") as info:
            engine.connect()
        assert isinstance(info.value.__cause__, zpgpool.PoolTimeout)
        assert str(info.value) == str(info.value.__cause__)
        for conn in conns:
            conn.close()

    def test_too_many_requests_are_a_timeout_too(self, make_engine: MakeEngine, make_pool: Callable[..., Any]) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, maxconn=1, timeout=20, max_waiting=1)
        engine = make_engine(pool)
        with engine.connect():
            waiter = Call(lambda: engine.connect().close())
            eventually(pool.waiters)
            with pytest.raises(TimeoutError, match="1 threads are waiting already"):
                engine.connect()
        waiter.result()

    def test_a_server_that_is_down(self, make_engine: MakeEngine, make_pool: Callable[..., Any]) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, dsn=f"host=127.0.0.1 port={free_port()} dbname=x user=x")
        with pytest.raises(OperationalError, match="Connection refused"):
            make_engine(pool).connect()

    def test_whoever_waits_is_served_in_turn(self, make_engine: MakeEngine, make_pool: Callable[..., Any]) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, maxconn=1, timeout=20)
        engine = make_engine(pool)
        conn = engine.connect()
        waiter = Call(lambda: engine.connect().close())
        eventually(pool.waiters)
        conn.close()
        waiter.result()


class TestEvents:
    @pytest.fixture
    def seen(self, engine: Any) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        def listen(name: str) -> None:
            event.listen(engine, name, lambda conn, *rest: seen.append((name, conn.get_backend_pid())))

        for name in ("connect", "checkout", "checkin", "reset", "close", "invalidate", "soft_invalidate", "detach"):
            listen(name)
        return seen

    def test_connect_comes_once_for_each_connection_and_checkout_each_time(self, engine: Any, seen: Any) -> None:
        pids = []
        for _ in range(3):
            with engine.connect() as conn:
                pids.append(backend(conn))
        pid = pids[0]
        assert pids == [pid] * 3
        assert seen == [("connect", pid), *[(name, pid) for name in ("checkout", "reset", "checkin")] * 3]

    def test_connect_comes_for_each_new_connection(self, engine: Any, seen: Any, outside: Outside) -> None:
        with engine.connect(), engine.connect():
            pass
        with engine.connect(), engine.connect():
            pass
        assert {pid for name, pid in seen if name == "connect"} == outside.backends()
        assert Counter(name for name, _ in seen) == {"connect": 2, "checkout": 4, "reset": 4, "checkin": 4}

    def test_info_is_the_connections(self, engine: Any) -> None:
        with engine.connect() as one, engine.connect() as other:
            one.info["n"], other.info["n"] = backend(one), backend(other)
        with engine.connect() as one, engine.connect() as other:
            assert (one.info["n"], other.info["n"]) == (backend(one), backend(other))

    def test_the_dialect_asks_the_server_once(self, make_engine: MakeEngine, make_pool: Callable[..., Any]) -> None:
        statements: list[str] = []

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, sql: Any, args: Any = None) -> None:
                statements.append(str(sql))
                super().execute(sql, args)

        engine = make_engine(make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60, cursor_factory=Cursor))
        with engine.connect():
            pass
        assert any("version()" in sql for sql in statements)
        statements.clear()
        with engine.connect(), engine.connect() as conn:
            conn.execute(text("SELECT 1"))
        # The hstore's number is asked for each connection, by the driver.
        assert [sql for sql in statements if "pg_type" not in sql] == ["SELECT 1"]

    def test_a_listener_that_fails_costs_no_place(self, engine: Any, pool: Any, outside: Outside) -> None:
        def fail(*args: Any) -> None:
            raise LookupError

        for name in ("connect", "checkout"):
            event.listen(engine, name, fail)
            for _ in range(pool.maxconn + 1):
                with pytest.raises(LookupError):
                    engine.connect()
            event.remove(engine, name, fail)
        all_is_well(pool, outside)

    def test_what_listeners_of_connect_set_is_there_for_each_user(self, make_engine: MakeEngine) -> None:
        engine = make_engine(client_encoding="LATIN1")

        @event.listens_for(engine, "connect")
        def set_up(conn: Any, record: Any) -> None:
            conn.set_session(isolation_level="SERIALIZABLE", readonly=True, deferrable=True)

        for _ in range(3):
            with engine.connect() as conn:
                shown = [conn.scalar(text(f"SHOW {name}")) for name in SHOWN]
                assert shown == ["LATIN1", "serializable", "on", "on"]

    def test_other_engines_of_the_pool_and_other_users_do_not_find_it(
        self, make_engine: MakeEngine, pool: Any, outside: Outside
    ) -> None:
        with make_engine(isolation_level="AUTOCOMMIT").connect() as conn:
            pid = backend(conn)
        with make_engine().connect() as conn:
            assert backend(conn) == pid
            assert conn.connection.dbapi_connection.autocommit is False
        all_is_well(pool, outside)


SHOWN = ["client_encoding", "transaction_isolation", "transaction_read_only", "transaction_deferrable"]


class TestInvalidation:
    def test_closes_the_connection_and_frees_its_place(self, engine: Any, pool: Any, outside: Outside) -> None:
        with engine.connect() as conn:
            pid = backend(conn)
            conn.invalidate()
            assert outside.backends() == set()
            assert pool.get_stats()["pool_size"] == 0
            conn.rollback()
            assert backend(conn) != pid
        all_is_well(pool, outside)

    def test_softly_lets_its_user_finish(self, engine: Any, pool: Any, outside: Outside) -> None:
        with engine.connect() as conn:
            pid = backend(conn)
            conn.connection.invalidate(soft=True)
            assert backend(conn) == pid
        assert outside.backends() == set()
        all_is_well(pool, outside)

    def test_a_connection_that_breaks_in_use(self, engine: Any, pool: Any, outside: Outside) -> None:
        for _ in range(pool.maxconn + 1):
            with engine.connect() as conn:
                outside.terminate(backend(conn))
                with pytest.raises(OperationalError) as info:
                    conn.execute(text("SELECT 1"))
                assert info.value.connection_invalidated
                assert pool.get_stats()["pool_size"] == 0
                conn.rollback()
                conn.execute(text("SELECT 1"))
        all_is_well(pool, outside)

    def test_connections_that_break_at_rest_are_nobodys_trouble(self, engine: Any, pool: Any, outside: Outside) -> None:
        """Without `pool_pre_ping`."""
        conns = [engine.connect() for _ in range(3)]
        for conn in conns:
            conn.close()
        assert len(outside.backends()) == 3
        outside.terminate()
        conns = [engine.connect() for _ in range(3)]
        for conn in conns:
            conn.execute(text("SELECT 1"))
            conn.close()
        all_is_well(pool, outside)

    def test_a_broken_one_outdates_those_from_before(self, engine: Any, outside: Outside) -> None:
        """As SQLAlchemy has it: what rests was opened before the server's trouble."""
        with engine.connect() as conn, engine.connect() as other:
            before = {backend(conn), pid := backend(other)}
        with engine.connect() as conn, engine.connect() as other:
            assert {backend(conn), backend(other)} == before
            outside.terminate(pid)
            with pytest.raises(OperationalError):
                [each.execute(text("SELECT 1")) for each in (conn, other)]
        with engine.connect() as conn, engine.connect() as other:
            assert not {backend(conn), backend(other)} & before
        assert not outside.backends() & before

    @pytest.mark.parametrize("error", [DisconnectionError, InvalidatePoolError])
    def test_a_listener_that_refuses_connections_gets_new_ones(
        self, engine: Any, pool: Any, outside: Outside, error: type[DisconnectionError]
    ) -> None:
        with engine.connect() as conn, engine.connect() as other:
            before = {backend(conn), backend(other)}
        new: list[int] = []
        event.listen(engine, "connect", lambda conn, record: new.append(conn.get_backend_pid()))

        @event.listens_for(engine, "checkout")
        def refuse(conn: Any, record: Any, proxy: Any) -> None:
            if conn.get_backend_pid() in before:
                raise error

        with engine.connect() as conn, engine.connect() as other:
            after = {backend(conn), backend(other)}
        assert not after & before
        assert sorted(new) == sorted(after)  # each is announced, once
        # One more may have been opened for a checkout that a return has served meanwhile.
        assert after <= outside.backends()
        eventually(lambda: not outside.backends() & before)
        all_is_well(pool, outside)

    def test_invalidating_in_the_middle_of_a_query(self, engine: Any, pool: Any, outside: Outside) -> None:
        conn = engine.connect()
        pid = backend(conn)
        call = Call(conn.execute, text("SELECT pg_sleep(60)"))
        eventually(lambda: outside.state(pid) == "active")
        outside.terminate(pid)
        with pytest.raises(OperationalError):
            call.result()
        conn.close()
        all_is_well(pool, outside)


class TestTheEnd:
    def test_a_dropped_connection_is_returned(self, engine: Any, pool: Any, outside: Outside) -> None:
        conn = engine.connect()
        pid = backend(conn)
        del conn
        gc.collect()
        assert pool.holders() == []
        assert outside.backends() == {pid}
        all_is_well(pool, outside)

    def test_a_detached_connection_counts_until_it_is_closed(self, engine: Any, pool: Any, outside: Outside) -> None:
        conn = engine.connect()
        conn.detach()
        assert backend(conn) in outside.backends()
        others = [engine.connect() for _ in range(2)]
        waiter = Call(engine.connect)
        eventually(pool.waiters)
        assert len(outside.backends()) == 3
        conn.close()
        for each in [waiter.result(), *others]:
            each.close()
        all_is_well(pool, outside)

    def test_a_detached_connection_that_is_dropped(
        self, engine: Any, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        conn = engine.connect()
        conn.detach()
        del conn
        gc.collect()
        all_is_well(pool, outside)

    def test_dispose_closes_idle_ones_now_and_the_others_on_their_return(
        self, engine: Any, pool: Any, outside: Outside
    ) -> None:
        with engine.connect() as conn:
            with engine.connect():
                pass
            engine.dispose()
            eventually(lambda: outside.backends() == {backend(conn)})
            with engine.connect() as other:
                pid = backend(other)
        eventually(lambda: outside.backends() == {pid})
        all_is_well(pool, outside)

    def test_dispose_before_the_first_use(self, make_engine: MakeEngine) -> None:
        make_engine("nobody").dispose()

    def test_the_pool_was_closed_meanwhile(self, engine: Any, pool: Any) -> None:
        conn, other, third = [engine.connect() for _ in range(3)]
        pool.close(0)
        conn.close()
        other.invalidate()
        third.detach()
        third.close()
        engine.dispose()

    def test_another_thread_may_return_it(self, engine: Any, pool: Any, outside: Outside) -> None:
        conn = in_thread(engine.connect)
        conn.execute(text("SELECT 1"))
        in_thread(conn.close)
        all_is_well(pool, outside)

    def test_what_was_not_committed_is_rolled_back_once(
        self, make_engine: MakeEngine, make_pool: Callable[..., Any], outside: Outside, table: str
    ) -> None:
        rollbacks = []

        class Counted(psycopg2.extensions.connection):
            def rollback(self) -> None:
                rollbacks.append(self)
                super().rollback()

        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60, connection_factory=Counted)
        engine = make_engine(pool)
        engine.connect().close()
        rollbacks.clear()
        conn = engine.raw_connection()
        conn.cursor().execute(f"INSERT INTO {table} VALUES (1)")
        conn.close()
        assert len(rollbacks) == 1
        with engine.connect() as conn:
            conn.execute(text(f"INSERT INTO {table} VALUES (2)"))
        assert len(rollbacks) == 2
        assert outside.query(f"SELECT * FROM {table}") == []

    def test_reset_on_return_is_followed(self, make_engine: MakeEngine, outside: Outside, table: str) -> None:
        conn = make_engine(pool_reset_on_return="commit").raw_connection()
        conn.cursor().execute(f"INSERT INTO {table} VALUES (1)")
        conn.close()
        assert outside.query(f"SELECT * FROM {table}") == [(1,)]


class TestTransactions:
    def test_of_the_orm(self, engine: Any, pool: Any, outside: Outside) -> None:
        class Base(DeclarativeBase):
            pass

        class Thing(Base):
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        Base.metadata.create_all(engine)
        try:
            with Session(engine) as session:
                session.add_all([Thing(name="a"), Thing(name="b")])
                session.commit()
                with session.begin_nested():
                    session.add(Thing(name="c"))
                session.rollback()
                assert session.scalars(select(Thing.name).order_by(Thing.id)).all() == ["a", "b"]
        finally:
            Base.metadata.drop_all(engine)
        all_is_well(pool, outside)

    def test_savepoints(self, engine: Any, outside: Outside, table: str) -> None:
        with engine.begin() as conn:
            conn.execute(text(f"INSERT INTO {table} VALUES (1)"))
            with pytest.raises(DBAPIError), conn.begin_nested():
                conn.execute(text(f"INSERT INTO {table} VALUES (1 / 0)"))
            with conn.begin_nested():
                conn.execute(text(f"INSERT INTO {table} VALUES (3)"))
        assert outside.query(f"SELECT * FROM {table} ORDER BY 1") == [(1,), (3,)]

    def test_of_two_phases(self, engine: Any, pool: Any, outside: Outside, table: str) -> None:
        with engine.connect() as conn:
            trans = conn.begin_twophase()
            conn.execute(text(f"INSERT INTO {table} VALUES (1)"))
            trans.prepare()
            trans.commit()
        with engine.connect() as conn:
            trans = conn.begin_twophase()
            conn.execute(text(f"INSERT INTO {table} VALUES (2)"))
            trans.prepare()
            trans.rollback()
        with engine.connect() as conn:
            conn.begin_twophase()
            conn.execute(text(f"INSERT INTO {table} VALUES (3)"))
        assert outside.query(f"SELECT * FROM {table}") == [(1,)]
        assert outside.query("SELECT * FROM pg_prepared_xacts WHERE database = current_database()") == []
        all_is_well(pool, outside)

    def test_autocommit_of_one_connection_is_not_the_next_ones(
        self, engine: Any, pool: Any, outside: Outside, table: str
    ) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            pid = backend(conn)
            conn.execute(text(f"INSERT INTO {table} VALUES (1)"))
            assert outside.query(f"SELECT * FROM {table}") == [(1,)]
        with engine.connect() as conn:
            assert backend(conn) == pid
            conn.execute(text(f"INSERT INTO {table} VALUES (2)"))
        assert outside.query(f"SELECT * FROM {table}") == [(1,)]
        all_is_well(pool, outside)

    @pytest.mark.parametrize("how", ["engine", "execution_options"])
    def test_autocommit_of_an_engine_is_each_ones(
        self, make_engine: MakeEngine, pool: Any, outside: Outside, table: str, how: str
    ) -> None:
        if how == "engine":
            engine = make_engine(isolation_level="AUTOCOMMIT")
        else:
            engine = make_engine().execution_options(isolation_level="AUTOCOMMIT")
        for number in range(3):
            with engine.connect() as conn:
                conn.execute(text(f"INSERT INTO {table} VALUES ({number})"))
        assert outside.query(f"SELECT count(*) FROM {table}") == [(3,)]
        all_is_well(pool, outside)

    def test_isolation_level_of_a_connection(self, engine: Any, pool: Any, outside: Outside) -> None:
        show = text("SHOW transaction_isolation")
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as conn:
            assert conn.scalar(show) == "serializable"
        with engine.connect() as conn:
            assert conn.scalar(show) == "read committed"
        all_is_well(pool, outside)

    def test_options_of_a_connection_that_are_restored_after_its_transaction(
        self, engine: Any, pool: Any, outside: Outside
    ) -> None:
        """What SQLAlchemy restores at the return, psycopg2 refuses within a transaction."""
        with engine.connect().execution_options(postgresql_readonly=True, postgresql_deferrable=True) as conn:
            pid = backend(conn)
            conn.rollback()
            conn.connection.cursor().execute("SELECT 1")  # not known to SQLAlchemy
        with engine.connect() as conn:
            assert backend(conn) == pid
            assert conn.scalar(text("SHOW transaction_read_only")) == "off"
        all_is_well(pool, outside)

    def test_streamed_results(self, engine: Any, pool: Any, outside: Outside) -> None:
        with engine.connect().execution_options(stream_results=True, yield_per=10) as conn:
            rows = iter(conn.execute(text("SELECT generate_series(1, 1000)")))
            assert [next(rows)[0] for _ in range(25)] == list(range(1, 26))
            assert conn.scalar(text("SELECT count(*) FROM pg_cursors WHERE statement NOT LIKE '%pg_cursors%'")) == 1
        all_is_well(pool, outside)


FORK = """
import os, sys
import sqlalchemy, zpgpool
from zpgpool.sqlalchemy import pool_class

pool = zpgpool.ThreadedConnectionPool(0, 3, sys.argv[1], idle_timeout=60)
engine = sqlalchemy.create_engine("postgresql+psycopg2://", poolclass=pool_class(pool))
ask = lambda conn: conn.scalar(sqlalchemy.text("SELECT pg_backend_pid()"))
with engine.connect() as conn:
    at_rest = ask(conn)
conn, other = engine.connect(), engine.connect()
in_use = ask(conn)
conn.rollback()  # what is in a transaction when the process forks fails in the child, and is the parent's still
for child in range(2):
    if (pid := os.fork()) == 0:
        conn.close()
        other.invalidate()
        if child:
            engine.dispose(close=False)  # as SQLAlchemy's documentation has it
        with engine.connect() as conn:
            assert ask(conn) not in (at_rest, in_use)
        assert pool.holders() == []
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
assert ask(conn) == in_use
ask(other)
conn.close()
other.close()
assert pool.get_stats()["pool_size"] == 2
"""


def test_a_forked_child_has_connections_of_its_own(dsn: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, dsn],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == ""
    assert result.returncode == 0


def test_with_flask_sqlalchemy(pool: Any, outside: Outside) -> None:
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy()

    class Item(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.Text, nullable=False)

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = URL
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"poolclass": pool_class(pool)}
    db.init_app(app)

    @app.post("/<name>")
    def add(name: str) -> str:
        db.session.add(Item(name=name))
        if name == "oops":
            raise LookupError
        db.session.commit()
        return str(db.session.query(Item).count())

    with app.app_context():
        db.create_all()
    try:
        client = app.test_client()
        assert [client.post(path).text for path in ("/a", "/b")] == ["1", "2"]
        assert client.post("/oops").status_code == 500
        assert client.post("/c").text == "3"
        all_is_well(pool, outside)
    finally:
        with app.app_context():
            db.drop_all()


def test_with_zope_sqlalchemy_and_pyramid_tm(engine: Any, pool: Any, outside: Outside, table: str) -> None:
    from pyramid.config import Configurator
    from webtest import TestApp
    from zope.sqlalchemy import mark_changed
    from zope.sqlalchemy import register

    make_session = sessionmaker(engine)

    def view(request: Any) -> Any:
        session = make_session(info={"request": request})
        register(session, transaction_manager=request.tm)
        session.execute(text(f"INSERT INTO {table} VALUES (1)"))
        mark_changed(session)
        if request.path == "/oops":
            raise LookupError
        return request.response

    config = Configurator(settings={"tm.manager_hook": "pyramid_tm.explicit_manager"})
    config.include("pyramid_tm")
    config.add_route("all", "/*path")
    config.add_view(view, route_name="all")
    app = TestApp(config.make_wsgi_app())
    app.get("/")
    with pytest.raises(LookupError):
        app.get("/oops")
    app.get("/")
    assert outside.query(f"SELECT count(*) FROM {table}") == [(2,)]
    all_is_well(pool, outside)


KINDS_OF_FIRE = ("killed", "broken", "invalidated", "soft", "detached")


@pytest.mark.slow
def test_under_fire(make_pool: Callable[..., Any], make_engine: MakeEngine, outside: Outside, table: str) -> None:
    """Eight threads, three connections, kills and invalidations: what was committed is stored, by never more than 3."""
    outside.query(f"ALTER TABLE {table} ADD UNIQUE (n)")
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 3, idle_timeout=60, timeout=60)
    engine = make_engine(pool)
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    start = monotonic()
    committed: set[int] = set()
    in_doubt: set[int] = set()
    counts: Counter[str] = Counter()

    def goes_on() -> bool:
        """For eight seconds; on a machine that does too little in that time, for as long as it needs."""
        seconds, rarest = monotonic() - start, min(counts[name] for name in KINDS_OF_FIRE)
        return seconds < 8 or (rarest <= 5 and seconds < 100)

    def work(seed: int) -> None:
        dice = random.Random(seed)
        number = seed * 1_000_000
        while goes_on():
            number += 1
            sent = False
            try:
                with engine.connect() as conn:
                    conn.execute(text(f"INSERT INTO {table} VALUES (:n)"), {"n": number})
                    chance = dice.random()
                    if chance < 0.05:
                        conn.invalidate()
                        counts["invalidated"] += 1
                        continue
                    if chance < 0.1:
                        conn.connection.invalidate(soft=True)
                        counts["soft"] += 1
                    elif chance < 0.12:
                        conn.detach()
                        counts["detached"] += 1
                    sent = True
                    conn.commit()
                    committed.add(number)
            except DBAPIError:
                counts["broken"] += 1
                if sent:
                    in_doubt.add(number)

    def kill() -> None:
        dice = random.Random(0)
        while goes_on():
            pids = outside.backends()
            counts["most"] = max(counts["most"], len(pids))
            if pids and dice.random() < 0.05:
                outside.query("SELECT pg_terminate_backend(%s)", dice.choice(sorted(pids)))
                counts["killed"] += 1

    calls = [Call(work, seed) for seed in range(1, 9)] + [Call(kill)]
    for call in calls:
        call.result(160)
    assert counts["most"] == 3
    assert min(counts[name] for name in KINDS_OF_FIRE) > 5, counts
    stored = {n for (n,) in outside.query(f"SELECT n FROM {table}")}
    assert len(committed) > 100
    assert committed <= stored <= committed | in_doubt
    all_is_well(pool, outside)


@pytest.mark.parametrize("module", ["sqlalchemy", "flask", "django"])
def test_nobody_imports_an_adapter_who_does_not_ask_for_it(module: str, tmp_path: Path) -> None:
    others = ["wsgi", "status", "metrics", "datamanager", "paste", "pyramid", "zcml", "zsql"]
    script = "import zpgpool\n" + "\n".join(f"import zpgpool.{name}" for name in others)
    command = [sys.executable, "-W", "ignore", "-X", "importtime", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert {f"zpgpool.{name}" for name in others} <= imported
    assert not {name for name in imported if module in name.split(".")}
