"""The data manager: every call sequence of `transaction`, one-phase and two-phase, in and outside of requests."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
import transaction
from psycopg2.errors import InFailedSqlTransaction
from psycopg2.errors import SerializationFailure
from psycopg2.errors import UniqueViolation
from psycopg2.extras import DictConnection
from psycopg2.extras import NamedTupleConnection
from psycopg2.extras import RealDictConnection
from psycopg2.extras import RealDictCursor
from transaction.interfaces import NoTransaction
from transaction.interfaces import TransactionFailedError
from transaction.interfaces import TransientError
from zope.interface.verify import verifyObject

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import Outside
from conftest import run
from proxy import Proxy
from zpgpool.datamanager import connection
from zpgpool.demo.server import EmbeddedServer
from zpgpool.onephase import DataManager
from zpgpool.transient import transient_cursor
from zpgpool.twophase import TwoPhaseDataManager
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


MakePool = Callable[..., Any]

SHARED = [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool]


class Table:
    """A table of the test's own, seen from outside."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        outside.query("SET lock_timeout = '5s'")  # a transaction left open must not stop the tests
        outside.query("DROP TABLE IF EXISTS dm; CREATE TABLE dm (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")

    @property
    def rows(self) -> list[int]:
        return [number for (number,) in self._outside.query("SELECT id FROM dm ORDER BY id")]

    @property
    def prepared(self) -> int:
        return len(self._outside.query("SELECT 1 FROM pg_prepared_xacts WHERE database = current_database()"))


@pytest.fixture
def table(outside: Outside) -> Iterator[Table]:
    table = Table(outside)
    yield table
    transaction.abort()
    for (gid,) in outside.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
        outside.query(f"ROLLBACK PREPARED '{gid}'")
    outside.query("DROP TABLE dm")


@pytest.fixture(params=[False, True], ids=["one-phase", "two-phase"])
def twophase(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=SHARED, ids=["threaded", "persistent"])
def pool(request: pytest.FixtureRequest, make_pool: MakePool, twophase: bool, table: Table) -> Any:
    pool = make_pool(request.param, 0, 2, idle_timeout=60, twophase=twophase, timeout=20)
    zpgpool.register_pool(pool)
    return pool


def insert(number: int, conn: Any = None) -> Any:
    conn = connection() if conn is None else conn
    run(conn, "INSERT INTO dm VALUES (%s)", number)
    return conn


def start(*args: object) -> Callable[[bytes], object]:
    """Start a response that nobody reads."""
    return lambda data: None


class Other:
    """Another resource, whose methods fail where it is told so."""

    transaction_manager = transaction.manager

    def __init__(self, key: str = "a", fails: str = "") -> None:
        self.key = key
        self.fails = fails
        self.calls: list[str] = []

    def sortKey(self) -> str:
        return self.key

    def __getattr__(self, name: str) -> Any:
        if name not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(name)

        def call(txn: object) -> None:
            self.calls.append(name)
            if name == self.fails:
                raise RuntimeError(f"{name} fails")

        return call


def is_at_rest(pool: Any) -> bool:
    """Whether everything is back, and clean."""
    gc.collect()
    assert all(not entry.conn.get_transaction_status() for entry in pool._parked.values())
    return bool(pool.holders() == [] and len(pool._parked) == pool.get_stats()["pool_size"])


class TestSequences:
    """Conventions 4.1: what `transaction` calls, and in which order."""

    def test_success(self, pool: Any, table: Table) -> None:
        conn = insert(1)
        assert connection() is conn
        assert len(pool.holders()) == 1
        transaction.commit()
        assert table.rows == [1]
        assert table.prepared == 0
        assert is_at_rest(pool)

    def test_abort(self, pool: Any, table: Table) -> None:
        insert(1)
        transaction.abort()
        assert table.rows == []
        assert is_at_rest(pool)

    def test_doom(self, pool: Any, table: Table) -> None:
        insert(1)
        transaction.doom()
        with pytest.raises(transaction.interfaces.DoomedTransaction):
            transaction.commit()
        transaction.abort()
        assert table.rows == []
        assert is_at_rest(pool)

    def test_nothing_was_done(self, pool: Any, table: Table) -> None:
        connection()
        transaction.commit()
        assert is_at_rest(pool)

    def test_our_vote_fails(self, pool: Any, table: Table) -> None:
        other = Other()
        insert(1)
        transaction.commit()
        insert(1)  # the constraint is deferred: it fails with the commit
        transaction.get().join(other)
        with pytest.raises(UniqueViolation):
            transaction.commit()
        assert "tpc_finish" not in other.calls
        assert "tpc_abort" in other.calls
        transaction.abort()
        transaction.abort()
        assert table.rows == [1]
        assert is_at_rest(pool)
        insert(2)
        transaction.commit()
        assert table.rows == [1, 2]

    @pytest.mark.parametrize("where", ["tpc_begin", "commit", "tpc_vote"])
    @pytest.mark.parametrize("key", ["a", "~~"], ids=["before", "after"])
    def test_another_fails_before_ours_commits(self, pool: Any, table: Table, where: str, key: str) -> None:
        insert(1)
        transaction.get().join(Other(key, where))
        with pytest.raises(RuntimeError):
            transaction.commit()
        transaction.abort()
        is_committed = key == "~~" and where == "tpc_vote" and not pool.twophase  # a second one-phase resource
        assert table.rows == ([1] if is_committed else [])
        assert table.prepared == 0
        assert is_at_rest(pool)

    def test_it_says_what_it_cannot_take_back(self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture) -> None:
        insert(1)
        transaction.get().join(Other("~~", "tpc_vote"))
        with pytest.raises(RuntimeError):
            transaction.commit()
        critical = [record for record in caplog.records if record.name == "zpgpool" and record.levelname == "CRITICAL"]
        assert len(critical) == (0 if pool.twophase else 1)

    def test_anothers_finish_fails(self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture) -> None:
        insert(1)
        transaction.get().join(Other("a", "tpc_finish"))
        with pytest.raises(RuntimeError):
            transaction.commit()
        transaction.abort()
        # It may have committed before it failed, as a ZEO client that has lost its server: nobody knows here.
        assert table.prepared == (1 if pool.twophase else 0)
        assert ("in doubt" in caplog.text) == pool.twophase
        assert is_at_rest(pool)

    def test_abort_after_finish_does_nothing(self, pool: Any, table: Table) -> None:
        """What an after-commit hook leads to."""
        insert(1)
        called: list[bool] = []
        transaction.get().addAfterCommitHook(called.append)
        transaction.commit()
        assert called == [True]
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_every_method_in_every_state(self, pool: Any, table: Table) -> None:
        txn = transaction.begin()
        insert(1)
        [manager] = txn._resources
        assert verifyObject(transaction.interfaces.ISavepointDataManager, manager)
        transaction.commit()
        for name in ("abort", "tpc_abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort", "abort"):
            getattr(manager, name)(txn)
            manager.savepoint().rollback()
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_a_late_abort_leaves_the_next_users_work_alone(self, pool: Any, table: Table) -> None:
        txn = transaction.begin()
        conn = insert(1)
        [manager] = txn._resources
        transaction.commit()

        def work() -> list[Any]:
            mine = insert(2)
            manager.abort(txn)
            manager.tpc_abort(txn)
            transaction.commit()
            return [mine]

        [other] = in_thread(work)
        assert other is conn  # the same connection, in other hands
        assert table.rows == [1, 2]

    def test_the_manager_may_finish_in_another_thread(self, pool: Any, table: Table) -> None:
        tm = transaction.TransactionManager(explicit=True)
        tm.begin()
        insert(1, connection(tm=tm))
        in_thread(tm.commit)
        assert table.rows == [1]
        assert is_at_rest(pool)


class TestWhatCannotBeCommitted:
    def test_a_swallowed_error(self, pool: Any, table: Table) -> None:
        other = Other()
        transaction.get().join(other)
        conn = insert(1)
        with pytest.raises(psycopg2.ProgrammingError):
            run(conn, "SELECT nonsense")
        with pytest.raises(InFailedSqlTransaction, match="nothing of it can be committed"):
            transaction.commit()
        assert "tpc_finish" not in other.calls
        transaction.abort()
        assert table.rows == []
        assert is_at_rest(pool)

    def test_a_connection_that_was_killed(self, pool: Any, table: Table, outside: Outside) -> None:
        conn = insert(1)
        outside.terminate(conn.info.backend_pid)
        with pytest.raises(psycopg2.Error):
            transaction.commit()
        transaction.abort()
        assert table.rows == []
        assert is_at_rest(pool)
        insert(2)
        transaction.commit()
        assert table.rows == [2]

    def test_a_connection_that_its_user_closed(self, pool: Any, table: Table) -> None:
        insert(1).close()
        with pytest.raises(psycopg2.InterfaceError):
            transaction.commit()
        transaction.abort()
        assert is_at_rest(pool)


class TestAfterAnError:
    """What a site's error page does, which is rendered before the abort: it asks for the connection, and reads."""

    def fail(self) -> Any:
        conn = insert(1)
        with pytest.raises(psycopg2.ProgrammingError):
            run(conn, "SELECT nonsense")
        return conn

    def check_that_nothing_commits(self, pool: Any, table: Table, error: type[Exception]) -> None:
        other = Other()
        transaction.get().join(other)
        with pytest.raises(error):
            transaction.commit()
        assert "tpc_finish" not in other.calls
        transaction.abort()
        assert (table.rows, table.prepared) == ([], 0)
        assert is_at_rest(pool)

    def test_of_a_statement(self, pool: Any, table: Table) -> None:
        conn = self.fail()
        assert connection() is conn
        assert run(conn, "SELECT count(*) FROM dm") == 0
        insert(2)
        self.check_that_nothing_commits(pool, table, InFailedSqlTransaction)

    def test_again(self, pool: Any, table: Table) -> None:
        self.fail()
        self.fail()
        insert(2)
        self.check_that_nothing_commits(pool, table, InFailedSqlTransaction)

    @pytest.mark.parametrize("notices", [True, False])
    def test_of_a_connection_that_was_lost(
        self, pool: Any, table: Table, outside: Outside, caplog: pytest.LogCaptureFixture, notices: bool
    ) -> None:
        conn = self.fail()
        outside.terminate(conn.info.backend_pid)
        if notices:
            with pytest.raises(psycopg2.Error):
                run(conn, "SELECT 1")
        assert connection() is not conn
        assert run(connection(), "SELECT count(*) FROM dm") == 0
        self.check_that_nothing_commits(pool, table, psycopg2.Error)

    def test_a_lost_connection_is_run_again(self, pool: Any, outside: Outside) -> None:
        """Though the loss was swallowed: the commit says so."""
        outside.terminate(insert(1).info.backend_pid)
        with pytest.raises(TransientError):
            insert(2)
        insert(3)
        with pytest.raises(TransientError):
            transaction.commit()
        transaction.abort()

    def test_none_is_to_be_had(self, pool: Any, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
        insert(1).close()
        with monkeypatch.context() as patched:
            patched.setattr(pool, "checkout", self.refuse)
            with pytest.raises(zpgpool.PoolTimeout):
                connection()
        assert run(connection(), "SELECT count(*) FROM dm") == 0
        self.check_that_nothing_commits(pool, table, psycopg2.InterfaceError)

    def test_none_is_to_be_had_until_the_end(self, pool: Any, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
        insert(1).close()
        monkeypatch.setattr(pool, "checkout", self.refuse)
        with pytest.raises(zpgpool.PoolTimeout):
            connection()
        self.check_that_nothing_commits(pool, table, psycopg2.InterfaceError)

    def refuse(self) -> None:
        raise zpgpool.PoolTimeout("none is to be had")

    def test_of_the_commit(self, pool: Any, table: Table) -> None:
        insert(1)
        transaction.get().join(Other("a", "tpc_vote"))
        with pytest.raises(RuntimeError):
            transaction.commit()
        assert run(connection(), "SELECT count(*) FROM dm") == 0
        insert(2)
        with pytest.raises(psycopg2.ProgrammingError):
            run(connection(), "SELECT nonsense")
        insert(3)
        with pytest.raises(TransactionFailedError):
            transaction.commit()
        transaction.abort()
        assert table.rows == []
        assert is_at_rest(pool)

    def test_of_a_session_that_only_reads(self, make_pool: MakePool, table: Table, twophase: bool) -> None:
        """Nothing can be lost: the others commit, the page that has swallowed the error is shown."""
        pool = make_pool(idle_timeout=60, twophase=twophase, readonly=True)
        zpgpool.register_pool(pool)
        for goes_on in (True, False):
            other = Other()
            transaction.get().join(other)
            self.fail_on(0)
            if goes_on:
                assert run(connection(), "SELECT count(*) FROM dm") == 0
            transaction.commit()
            assert "tpc_finish" in other.calls
            assert table.prepared == 0
            assert is_at_rest(pool)

    def test_the_savepoints_stay(self, pool: Any, table: Table) -> None:
        """A savepoint undoes the failure, if it is older than that."""
        insert(1)
        first = transaction.savepoint()
        insert(2)
        second = transaction.savepoint()
        self.fail_on(2)
        assert run(connection(), "SELECT count(*) FROM dm") == 2
        later = transaction.savepoint()
        later.rollback()
        second.rollback()
        insert(3)
        first.rollback()
        insert(4)
        transaction.commit()
        assert table.rows == [1, 4]
        assert is_at_rest(pool)

    def test_a_later_savepoint_does_not_undo_it(self, pool: Any, table: Table) -> None:
        self.fail()
        connection()
        savepoint = transaction.savepoint()
        insert(2)
        savepoint.rollback()
        self.check_that_nothing_commits(pool, table, InFailedSqlTransaction)

    def test_a_savepoint_from_before_it_joined(self, pool: Any, table: Table) -> None:
        savepoint = transaction.savepoint()
        self.fail()
        connection()
        savepoint.rollback()
        insert(2)
        transaction.commit()
        assert table.rows == [2]
        assert is_at_rest(pool)

    def fail_on(self, rows: int) -> None:
        assert run(connection(), "SELECT count(*) FROM dm") == rows
        with pytest.raises(psycopg2.ProgrammingError):
            run(connection(), "SELECT nonsense")


class TestRetry:
    def conflict(self, pool: Any) -> Any:
        """Return a function whose first run meets a serialization failure."""
        runs: list[int] = []

        def work() -> None:
            runs.append(1)
            conn = connection()
            run(conn, "SELECT count(*) FROM dm")
            if len(runs) == 1:
                in_thread(self.meanwhile, pool)
            run(conn, "INSERT INTO dm SELECT count(*) + 10 FROM dm")

        return work, runs

    def meanwhile(self, pool: Any) -> None:
        tm = transaction.TransactionManager()
        conn = connection(tm=tm)
        run(conn, "SELECT count(*) FROM dm")
        run(conn, "INSERT INTO dm SELECT count(*) FROM dm")
        tm.commit()

    @pytest.fixture
    def pool(self, make_pool: MakePool, twophase: bool, table: Table) -> Any:
        pool = make_pool(
            zpgpool.PersistentConnectionPool, 0, 3, idle_timeout=60, twophase=twophase, isolation_level="serializable"
        )
        zpgpool.register_pool(pool)
        return pool

    def test_a_manager_runs_it_again(self, pool: Any, table: Table) -> None:
        work, runs = self.conflict(pool)
        transaction.manager.run(work)
        assert len(runs) == 2
        assert table.rows == [0, 11]
        assert is_at_rest(pool)

    def test_the_error_is_what_zope_looks_for(self, pool: Any, table: Table) -> None:
        """At the statement, or at the commit: `isinstance(error, TransientError)` is all that Zope asks."""
        work, _ = self.conflict(pool)
        with pytest.raises(SerializationFailure) as caught:
            work()
            transaction.commit()
        assert isinstance(caught.value, TransientError)
        assert caught.value.pgcode == "40001"
        assert caught.value.diag.message_primary
        transaction.abort()

    def test_at_a_statement(self, pool: Any, table: Table) -> None:
        insert(1)
        transaction.commit()
        conn = connection()
        run(conn, "SELECT * FROM dm")

        def update() -> None:
            tm = transaction.TransactionManager()
            run(connection(tm=tm), "UPDATE dm SET id = 2")
            tm.commit()

        in_thread(update)
        with pytest.raises(SerializationFailure) as caught, conn.cursor() as cursor:
            cursor.execute("UPDATE dm SET id = 3")
        assert isinstance(caught.value, TransientError)
        with pytest.raises(InFailedSqlTransaction) as later:
            run(conn, "SELECT 1")
        assert not isinstance(later.value, TransientError)
        transaction.abort()

    def test_a_manager_asks(self, pool: Any) -> None:
        manager = DataManager(pool, transaction.manager)
        assert manager.should_retry(SerializationFailure()) is False  # no SQLSTATE: not the server's
        assert manager.should_retry(ValueError("x")) is False


class TestCursors:
    def test_the_users_factory_stays(self, make_pool: MakePool, table: Table) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, cursor_factory=RealDictCursor, idle_timeout=60)
        zpgpool.register_pool(pool)
        conn = connection()
        with conn.cursor() as cursor:
            assert isinstance(cursor, RealDictCursor)
            cursor.execute("SELECT 1 AS one")
            assert cursor.fetchone() == {"one": 1}
        transaction.commit()
        assert pool.getconn() is conn
        assert conn.cursor_factory is RealDictCursor
        pool.putconn()

    def test_all_ways_to_run_a_statement(self, pool: Any, table: Table) -> None:
        with connection().cursor() as cursor:
            cursor.executemany("INSERT INTO dm VALUES (%s)", [(1,), (2,)])
            cursor.callproc("now")
            with pytest.raises(psycopg2.Error):
                cursor.executemany("INSERT INTO nowhere VALUES (%s)", [(1,)])
            with pytest.raises(psycopg2.Error):
                cursor.callproc("nowhere")
        transaction.abort()

    @pytest.mark.parametrize("kind", [DictConnection, RealDictConnection, NamedTupleConnection])
    def test_a_connection_class_with_cursors_of_its_own(self, make_pool: MakePool, kind: Any) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, connection_factory=kind, idle_timeout=60)
        zpgpool.register_pool(pool)
        with pool.connection() as plain, plain.cursor() as cursor:
            base = type(cursor)
        with connection().cursor() as cursor:
            assert isinstance(cursor, base)
        transaction.abort()

    def test_a_factory_that_is_no_class(self) -> None:
        factory = lambda conn, name: None  # noqa: E731  # no class, and without a name
        assert transient_cursor(factory) is factory


class TestSavepoints:
    def test_rollback(self, pool: Any, table: Table) -> None:
        insert(1)
        savepoint = transaction.savepoint()
        conn = insert(2)
        savepoint.rollback()
        assert connection() is conn
        insert(3)
        transaction.commit()
        assert table.rows == [1, 3]

    def test_after_an_error(self, pool: Any, table: Table) -> None:
        conn = insert(1)
        savepoint = transaction.savepoint()
        with pytest.raises(psycopg2.ProgrammingError):
            run(conn, "SELECT nonsense")
        savepoint.rollback()
        insert(2)
        transaction.commit()
        assert table.rows == [1, 2]
        assert is_at_rest(pool)

    def test_two_of_them(self, pool: Any, table: Table) -> None:
        insert(1)
        first = transaction.savepoint()
        insert(2)
        second = transaction.savepoint()
        insert(3)
        second.rollback()
        insert(4)
        first.rollback()
        insert(5)
        transaction.commit()
        assert table.rows == [1, 5]

    def test_joined_after_it(self, pool: Any, table: Table) -> None:
        savepoint = transaction.savepoint()
        conn = insert(1)
        savepoint.rollback()
        if not pool.twophase:
            run(conn, "SELECT 1")  # the user may go on with what it has
        insert(2)
        transaction.commit()
        assert table.rows == [2]
        assert is_at_rest(pool)

    def test_work_that_goes_on_after_it_is_committed(self, pool: Any, table: Table) -> None:
        """The user has not asked for the connection again."""
        savepoint = transaction.savepoint()
        conn = insert(1)
        savepoint.rollback()
        insert(2, conn)
        if pool.twophase:
            with pytest.raises(zpgpool.PoolError, match="one phase already"):
                transaction.commit()
            transaction.abort()
        else:
            transaction.commit()
            assert table.rows == [2]
        assert is_at_rest(pool)

    def test_what_was_done_unjoined_has_no_second_phase(self, pool: Any, table: Table) -> None:
        savepoint = transaction.savepoint()
        conn = insert(1)
        savepoint.rollback()
        run(conn, "SELECT 1")
        if pool.twophase:
            with pytest.raises(zpgpool.PoolError, match="in a transaction of one phase already"):
                connection()
        transaction.abort()
        assert is_at_rest(pool)

    def test_joined_after_it_and_not_used_again(self, pool: Any, table: Table) -> None:
        savepoint = transaction.savepoint()
        insert(1)
        savepoint.rollback()
        transaction.commit()
        assert table.rows == []
        assert is_at_rest(pool)

    def test_with_autocommit(self, make_pool: MakePool, table: Table) -> None:
        zpgpool.register_pool(make_pool(zpgpool.PersistentConnectionPool))
        connection().autocommit = True
        with pytest.raises(zpgpool.PoolError, match="autocommit has no transaction"):
            transaction.savepoint()
        transaction.abort()


class TestJoining:
    def test_autocommit_is_refused(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, autocommit=True)
        zpgpool.register_pool(pool)
        with pytest.raises(zpgpool.PoolError, match="commits at once"):
            connection()
        assert is_at_rest(pool)
        transaction.commit()

    def test_an_explicit_manager_that_has_not_begun(self, pool: Any) -> None:
        tm = transaction.TransactionManager(explicit=True)
        with pytest.raises(NoTransaction, match="no transaction was begun"):
            connection(tm=tm)
        tm.begin()
        insert(1, connection(tm=tm))
        tm.abort()
        assert is_at_rest(pool)

    def test_a_transaction_that_has_failed(self, pool: Any, table: Table) -> None:
        transaction.get().join(Other("a", "tpc_vote"))
        with pytest.raises(RuntimeError):
            transaction.commit()
        insert(2)  # for the page that tells of it
        with pytest.raises(TransactionFailedError):
            transaction.commit()
        transaction.abort()
        assert is_at_rest(pool)
        insert(1)
        transaction.commit()
        assert table.rows == [1]

    def test_no_pool(self) -> None:
        with pytest.raises(LookupError, match="no pool is registered as 'nowhere'"):
            connection("nowhere")

    def test_a_registry_of_ones_own(self, pool: Any) -> None:
        from zope.interface.registry import Components

        registry = Components()
        zpgpool.register_pool(pool, "mine", registry)
        insert(1, connection("mine", registry=registry))
        transaction.abort()

    def test_two_pools(self, pool: Any, make_pool: MakePool, table: Table) -> None:
        other = make_pool(type(pool), 0, 2, idle_timeout=60, twophase=pool.twophase)
        zpgpool.register_pool(other, "other")
        insert(1)
        insert(2, connection("other"))
        transaction.commit()
        assert table.rows == [1, 2]
        assert is_at_rest(pool)
        assert is_at_rest(other)

    def test_the_threads_own_connection_is_another_one(self, make_pool: MakePool, table: Table) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 2, idle_timeout=60)
        zpgpool.register_pool(pool)
        mine = pool.getconn()
        joined = insert(1)
        assert joined is not mine
        pool.putconn()  # which rolls back
        transaction.commit()
        assert table.rows == [1]

    def test_what_sorts_where(self, make_pool: MakePool) -> None:
        pool = make_pool(open=False)
        one, two = (
            DataManager(pool, transaction.manager).sortKey(),
            TwoPhaseDataManager(pool, transaction.manager).sortKey(),
        )
        for storage in ("/var/Data.fs:1", "zodb:2", "MappingStorage:3", "ZZ"):
            assert storage < two < one

    def test_a_manager_that_is_dropped(self, pool: Any, table: Table) -> None:
        tm = transaction.TransactionManager()
        insert(1, connection(tm=tm))
        del tm

        def is_closed() -> bool:
            gc.collect()
            pool.run_maintenance(time.monotonic())
            return bool(pool.get_stats()["pool_size"] == 0)

        eventually(is_closed)
        assert table.rows == []


class TestInRequests:
    def call(self, pool: Any, app: Callable[[dict[str, Any]], Any]) -> list[bytes]:
        """Call `app` behind the middleware, as a server does."""

        def wsgi(environ: Any, start_response: Any) -> Any:
            body = app(environ)
            start_response("200 OK", [])
            return [b"ok"] if body is None else body

        body = PoolMiddleware(wsgi, pool)({"REQUEST_METHOD": "GET", "PATH_INFO": "/it"}, start)
        try:
            return list(body)
        finally:
            if hasattr(body, "close"):
                body.close()

    def test_it_is_the_requests_connection(self, pool: Any, table: Table) -> None:
        def app(environ: dict[str, Any]) -> None:
            raw = get_connection(environ)
            assert connection() is raw is get_connection(environ)
            insert(1)
            transaction.commit()
            assert get_connection(environ) is raw
            assert connection() is raw
            insert(2)
            transaction.abort()
            assert len(pool.holders()) == 1
            assert pool.holders()[0].request == "GET /it"

        self.call(pool, app)
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_work_after_the_commit_is_rolled_back(
        self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        def app(environ: dict[str, Any]) -> Any:
            conn = insert(1)
            transaction.commit()

            def body() -> Iterator[bytes]:
                run(conn, "INSERT INTO dm VALUES (2)")
                yield b"streamed"

            return body()

        assert self.call(pool, app) == [b"streamed"]
        assert table.rows == [1]
        assert is_at_rest(pool)
        assert not caplog.records

    def test_a_request_that_ends_before_its_transaction(
        self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept: list[Any] = []
        self.call(pool, lambda environ: kept.append(insert(1)))
        [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "GET /it has ended, but its transaction has not" in record.getMessage()
        assert "left of (outside)" in record.getMessage()
        assert len(pool.holders()) == 1
        other = in_thread(lambda: self.call(pool, lambda environ: kept.append(get_connection(environ))))
        assert other == [b"ok"]
        assert kept[1] is not kept[0]
        transaction.commit()
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_the_next_request_does_not_commit_it(
        self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A page that raised, in a site where nobody ends its transaction."""
        self.call(pool, lambda environ: [insert(1), None][1])

        def app(environ: dict[str, Any]) -> None:
            insert(2)
            transaction.commit()

        self.call(pool, app)
        assert table.rows == [2]
        assert "neither committed nor aborted; it is aborted now: GET /it begins" in caplog.text
        assert is_at_rest(pool)

    def test_another_resource_that_cannot_abort_is_not_the_next_requests_concern(
        self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(environ: dict[str, Any]) -> None:
            insert(1)
            transaction.get().join(Other("a", "abort"))

        self.call(pool, fail)
        self.call(pool, lambda environ: [insert(2), transaction.commit(), None][2])
        assert table.rows == [2]
        assert "aborting it failed" in caplog.text
        assert is_at_rest(pool)

    def test_a_connection_asked_for_in_the_body_after_the_commit(
        self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        def app(environ: dict[str, Any]) -> Any:
            insert(1)
            transaction.commit()

            def body() -> Iterator[bytes]:
                insert(2)
                yield b"streamed"

            return body()

        assert self.call(pool, app) == [b"streamed"]
        assert is_at_rest(pool)
        assert table.rows == [1]
        assert "this was begun in its body" in caplog.text

    def test_a_body_that_another_thread_iterates(self, pool: Any, table: Table) -> None:
        def app(environ: dict[str, Any]) -> Any:
            def body() -> Iterator[bytes]:
                assert connection() is get_connection(environ)
                insert(1)
                transaction.commit()
                yield b"streamed"

            return body()

        def wsgi(environ: Any, start_response: Any) -> Any:
            return app(environ)

        body = PoolMiddleware(wsgi, pool)({"REQUEST_METHOD": "GET"}, start)

        def iterate() -> None:
            list(body)
            body.close()  # type: ignore[attr-defined]  # PEP 3333: a body may have it

        in_thread(iterate)
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_the_threads_connection_in_a_persistent_pool_is_the_same(self, make_pool: MakePool, table: Table) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 1, idle_timeout=60)
        zpgpool.register_pool(pool)

        def app(environ: dict[str, Any]) -> None:
            raw = pool.getconn()
            assert insert(1) is raw is pool.getconn()
            pool.putconn(raw)  # the transaction has it: nothing happens
            assert pool.getconn() is raw
            transaction.commit()
            assert pool.getconn() is raw
            with pool.connection() as conn:
                assert conn is raw
            pool.getconn().close()
            run(pool.getconn(), "SELECT 1")

        self.call(pool, app)
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_a_joined_connection_is_not_the_users_to_put_away(self, pool: Any, table: Table) -> None:
        """Somebody's `putconn()` behind the manager's back."""
        conn = insert(1)
        with pytest.raises(zpgpool.PoolError):
            pool.putconn(conn)
        with pytest.raises(zpgpool.PoolError):
            pool.checkout(conn)
        transaction.commit()
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_two_managers_in_one_request(self, pool: Any, table: Table) -> None:
        def app(environ: dict[str, Any]) -> None:
            tm = transaction.TransactionManager()
            assert insert(1) is not insert(2, connection(tm=tm))
            tm.abort()
            transaction.commit()

        self.call(pool, app)
        assert table.rows == [1]
        assert is_at_rest(pool)

    def test_a_connection_that_broke_is_replaced_in_the_same_request(
        self, pool: Any, table: Table, outside: Outside
    ) -> None:
        def app(environ: dict[str, Any]) -> None:
            conn = insert(1)
            outside.terminate(conn.info.backend_pid)
            with pytest.raises(psycopg2.Error):
                insert(2)
            transaction.abort()
            assert insert(3) is not conn
            transaction.commit()
            get_connection(environ).close()
            run(get_connection(environ), "SELECT 1")

        self.call(pool, app)
        assert table.rows == [3]
        assert is_at_rest(pool)

    def test_a_failed_join_leaves_the_request_its_connection(self, pool: Any, table: Table) -> None:
        def app(environ: dict[str, Any]) -> None:
            transaction.get().join(Other("a", "tpc_vote"))
            with pytest.raises(RuntimeError):
                transaction.commit()
            insert(1)
            run(get_connection(environ), "SELECT 1")
            transaction.abort()
            assert run(get_connection(environ), "SELECT count(*) FROM dm") == 0

        self.call(pool, app)
        assert is_at_rest(pool)

    def test_a_pool_that_closes_meanwhile(self, pool: Any, table: Table) -> None:
        self.call(pool, lambda environ: [insert(1), pool.close(0), None][2])
        with pytest.raises(psycopg2.Error):
            transaction.commit()
        transaction.abort()


class TestTwoPhase:
    @pytest.fixture
    def pool(self, make_pool: MakePool, table: Table) -> Any:
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 2, idle_timeout=60, twophase=True)
        zpgpool.register_pool(pool)
        return pool

    def test_a_server_that_cannot_prepare(self, tmp_path: Any) -> None:
        with EmbeddedServer(tmp_path / "data", options={"fsync": "off", "max_prepared_transactions": "0"}) as server:
            with pytest.raises(zpgpool.PoolError, match="max_prepared_transactions is 0"):
                zpgpool.ThreadedConnectionPool(1, 1, server.dsn, twophase=True)

    def test_a_connection_in_a_transaction_cannot_join(self, pool: Any, table: Table) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            run(get_connection(environ), "SELECT 1")
            with pytest.raises(zpgpool.PoolError, match="in a transaction of one phase already"):
                connection()
            start_response("200 OK", [])
            return []

        PoolMiddleware(app, pool)({"REQUEST_METHOD": "GET"}, start)
        transaction.abort()
        assert is_at_rest(pool)

    @pytest.mark.parametrize(
        "statement", ["CREATE TEMP TABLE x (a int)", "LISTEN news", "DECLARE c CURSOR WITH HOLD FOR SELECT 1"]
    )
    def test_what_cannot_be_prepared(self, pool: Any, table: Table, statement: str) -> None:
        transaction.get().join(Other())  # alone it would commit in one phase
        run(insert(1), statement)
        with pytest.raises(psycopg2.NotSupportedError):
            transaction.commit()
        transaction.abort()
        assert table.rows == []
        assert is_at_rest(pool)
        insert(2)
        transaction.commit()
        assert table.rows == [2]

    def lose(self, outside: Outside, pid: int) -> Other:
        """Return a resource that ends the session between its vote and the end."""
        kill = Other("~")
        kill.tpc_vote = lambda txn: outside.terminate(pid)  # type: ignore[attr-defined]  # only this one dies
        return kill

    def test_a_connection_lost_before_the_end_is_made_up_for(
        self, pool: Any, table: Table, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        transaction.get().join(self.lose(outside, insert(1).info.backend_pid))
        transaction.commit()
        assert table.rows == [1]
        assert table.prepared == 0
        assert "in doubt" not in caplog.text
        assert is_at_rest(pool)

    def test_an_answer_that_was_lost(
        self, pool: Any, table: Table, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        lose = self.lose(outside, insert(1).info.backend_pid)
        kill = lose.tpc_vote

        def commit_and_kill(txn: object) -> None:
            kill(txn)
            [(gid,)] = outside.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
            outside.query(f"COMMIT PREPARED '{gid}'")

        lose.tpc_vote = commit_and_kill  # type: ignore[attr-defined]
        transaction.get().join(lose)
        transaction.commit()
        assert table.rows == [1]
        assert "COMMIT PREPARED was not answered, and is done" in caplog.text
        assert "in doubt" not in caplog.text

    @pytest.mark.parametrize("is_done", [True, False], ids=["prepared", "still preparing"])
    def test_the_answer_to_prepare_is_lost(
        self,
        make_pool: MakePool,
        own_server: EmbeddedServer,
        caplog: pytest.LogCaptureFixture,
        is_done: bool,
    ) -> None:
        """A deferred trigger, which runs in PREPARE, holds it until the client has lost its connection."""
        outside = Outside(own_server.dsn)
        outside.query(
            "CREATE TABLE IF NOT EXISTS lost (id int);"
            "CREATE OR REPLACE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN NULL; END';"
            "DROP TRIGGER IF EXISTS wait ON lost;"
            "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON lost DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        proxy = Proxy(own_server.port or 0)

        def tap(data: bytes) -> None:
            if is_done and b"PREPARE TRANSACTION" in data:
                proxy.tap = lambda data: None
                proxy.is_forwarding = False  # the answer

        def break_it() -> None:
            active = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'PREPARE TRANSACTION%'"
            prepared = "SELECT 1 FROM pg_prepared_xacts"
            eventually(lambda: bool(outside.query(prepared if is_done else active)))
            proxy.rst()
            proxy.is_forwarding = True

        if not is_done:
            outside.query("SELECT pg_advisory_lock(7)")
        proxy.tap = tap
        pool = zpgpool.ThreadedConnectionPool(0, 2, proxy.dsn(own_server.dsn), twophase=True, timer=None)
        try:
            zpgpool.register_pool(pool)
            run(connection(), "INSERT INTO lost VALUES (1)")
            transaction.get().join(Other())
            breaking = Call(break_it)
            with pytest.raises(psycopg2.OperationalError):
                transaction.commit()
            transaction.abort()
            breaking.result()
            outside.query("SELECT pg_advisory_unlock_all()")
            assert outside.query("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'PREPARE TRANSACTION%'") == []
            assert outside.query("SELECT gid FROM pg_prepared_xacts") == []
            assert ("PREPARE was not answered, but done" in caplog.text) == is_done
            assert "in doubt" not in caplog.text
        finally:
            outside.query("SELECT pg_advisory_unlock_all()")
            outside.conn.close()
            pool.close(0)
            proxy.close()

    @pytest.mark.parametrize("ends_by", ["commit", "abort"])
    def test_what_cannot_be_ended_is_in_doubt(
        self,
        pool: Any,
        table: Table,
        outside: Outside,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        ends_by: str,
    ) -> None:
        def fail() -> Any:
            raise psycopg2.OperationalError("the server is down")

        monkeypatch.setattr(pool, "open_connection", fail)
        transaction.get().join(self.lose(outside, insert(1).info.backend_pid))
        if ends_by == "commit":
            transaction.commit()  # the others have committed: no error may come out
        else:
            transaction.get().join(Other("~~", "tpc_vote"))
            with pytest.raises(RuntimeError):
                transaction.commit()
            transaction.abort()
        assert table.prepared == 1
        assert "in doubt" in caplog.text
        assert "zpgpool recover" in caplog.text
        assert is_at_rest(pool)

    def test_alone_it_has_nothing_to_agree_on(self, pool: Any, table: Table) -> None:
        run(insert(1), "CREATE TEMP TABLE x (a int)")  # which cannot be prepared
        transaction.commit()
        assert table.rows == [1]

    def test_prepared_and_the_pool_is_closed(self, pool: Any, table: Table, caplog: pytest.LogCaptureFixture) -> None:
        insert(1)
        close = Other("~")
        close.tpc_vote = lambda txn: pool.close(0)  # type: ignore[attr-defined]
        transaction.get().join(close)
        transaction.get().join(Other("~~", "tpc_vote"))
        with pytest.raises(RuntimeError):
            transaction.commit()
        assert table.prepared == 1
        assert "ROLLBACK PREPARED" in caplog.text

    def test_one_id_for_all_pools(self, pool: Any, make_pool: MakePool, table: Table, outside: Outside) -> None:
        zpgpool.register_pool(make_pool(zpgpool.ThreadedConnectionPool, twophase=True), "päö" * 30)
        insert(1)
        insert(2, connection("päö" * 30))
        seen: list[Any] = []
        look = Other("~")
        sql = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        look.tpc_vote = lambda txn: seen.extend(outside.query(sql))  # type: ignore[attr-defined]
        txn = transaction.get()
        txn.join(look)
        gtrid = txn.extension["zpgpool"]
        transaction.commit()
        make: Any = psycopg2.extensions.Xid.from_string
        xids = [make(gid) for (gid,) in seen]
        assert len(xids) == 2
        assert {xid.gtrid for xid in xids} == {gtrid}
        assert table.rows == [1, 2]


def test_a_dropped_hold_is_closed(make_pool: MakePool, outside: Outside) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60)
    hold = pool.checkout()
    with pytest.raises(zpgpool.PoolError):
        pool.checkout(psycopg2.extensions.connection.__new__(psycopg2.extensions.connection))
    pid = hold.conn.info.backend_pid
    del hold
    gc.collect()
    pool.run_maintenance(time.monotonic())
    eventually(lambda: pid not in outside.backends())
    assert pool.holders() == []


@pytest.mark.parametrize("factory", SHARED)
def test_a_hold(factory: Any, make_pool: MakePool) -> None:
    pool = make_pool(factory, 0, 2, idle_timeout=60)
    assert verifyObject(zpgpool.interfaces.ICheckout, pool.checkout())
    mine = pool.getconn()
    hold = pool.checkout(mine)
    assert hold.conn is mine
    with pytest.raises(zpgpool.PoolError):
        pool.checkout(psycopg2.connect((pool._parked and mine.dsn) or mine.dsn))
    in_thread(hold.putconn)
    hold.putconn()
    eventually(lambda: is_at_rest(pool))  # the checkout that was lost is closed by another thread
    assert pool.getconn() is mine  # parked where its thread finds it
    pool.putconn(mine)


def test_a_hold_on_a_keys_connection_takes_it_from_the_key(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60)
    conn = pool.getconn("key")
    hold = pool.checkout(conn)
    assert pool.getconn("key") is not conn
    pool.putconn(key="key")
    hold.putconn()
    assert is_at_rest(pool)


def test_a_hold_that_is_dropped_frees_its_place(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, idle_timeout=60)
    pool.checkout(pool.getconn("key"))
    gc.collect()
    with pool.connection() as conn:
        assert run(conn, "SELECT 1") == 1


def test_threads_do_not_share(make_pool: MakePool, table: Table) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 4, idle_timeout=60)
    zpgpool.register_pool(pool)
    barrier = threading.Barrier(4)

    def work(number: int) -> Any:
        conn = insert(number)
        barrier.wait(10)
        transaction.commit()
        return conn

    conns = [call.result() for call in [Call(work, number) for number in range(4)]]
    assert len({id(conn) for conn in conns}) == 4
    assert table.rows == [0, 1, 2, 3]
