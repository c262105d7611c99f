"""What the next user gets is a fresh session, whatever the last one left: parked clean, or closed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import psycopg2
import psycopg2.extensions as ext
import pytest
from psycopg2.extras import DictCursor

import zpgpool
from conftest import eventually
from conftest import Outside
from conftest import run
from zpgpool.core import set_temporarily


MakePool = Callable[..., Any]

PARKED, CLOSED = True, False


class AbortedFile(io.RawIOBase):
    """A file that breaks off half-way."""

    def __init__(self) -> None:
        self.chunks = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.chunks += 1
        if self.chunks == 2:
            raise OSError("the disk is gone")
        return b"1\n" * 10

    def write(self, data: Any) -> int:
        raise OSError("the disk is full")


def failed_transaction(conn: Any, outside: Outside) -> None:
    with pytest.raises(psycopg2.errors.DivisionByZero):
        run(conn, "SELECT 1/0")


def open_transaction(conn: Any, outside: Outside) -> None:
    run(conn, "CREATE TABLE never_stored (n int)")


def autocommit_left_on(conn: Any, outside: Outside) -> None:
    conn.autocommit = True


def isolation_changed(conn: Any, outside: Outside) -> None:
    conn.set_session(isolation_level="SERIALIZABLE", deferrable=True)


def readonly(conn: Any, outside: Outside) -> None:
    conn.readonly = True


def autocommit_and_isolation(conn: Any, outside: Outside) -> None:
    conn.set_session(isolation_level="SERIALIZABLE", readonly=True, autocommit=True)
    assert run(conn, "SHOW default_transaction_isolation") == "serializable"


def encoding_changed(conn: Any, outside: Outside) -> None:
    conn.set_client_encoding("LATIN1")


def cursor_factory_changed(conn: Any, outside: Outside) -> None:
    conn.cursor_factory = DictCursor


def open_named_cursor(conn: Any, outside: Outside) -> None:
    cursor = conn.cursor(name="left")
    cursor.execute("SELECT * FROM generate_series(1, 100000)")
    cursor.fetchone()


def committed_set(conn: Any, outside: Outside) -> None:
    run(conn, "SET work_mem = '77kB'")
    conn.commit()


def listen(conn: Any, outside: Outside) -> None:
    run(conn, "LISTEN news")
    conn.commit()


def advisory_lock(conn: Any, outside: Outside) -> None:
    run(conn, "SELECT pg_advisory_lock(4711)")
    conn.commit()


def temporary_table(conn: Any, outside: Outside) -> None:
    run(conn, "CREATE TEMPORARY TABLE left_over (n int)")
    conn.commit()


def copy_in_aborted(conn: Any, outside: Outside) -> None:
    run(conn, "CREATE TEMPORARY TABLE copied (n int) ON COMMIT DROP")
    with pytest.raises((psycopg2.Error, OSError)), conn.cursor() as cursor:
        cursor.copy_expert("COPY copied FROM STDIN", AbortedFile())


def copy_out_aborted(conn: Any, outside: Outside) -> None:
    with pytest.raises((psycopg2.Error, OSError)), conn.cursor() as cursor:
        cursor.copy_expert("COPY (SELECT * FROM generate_series(1, 100000)) TO STDOUT", AbortedFile())


def two_phase_begun(conn: Any, outside: Outside) -> None:
    conn.tpc_begin(conn.xid(1, "zpgpool-test", "begun"))
    run(conn, "SELECT 1")


def two_phase_prepare_failed(conn: Any, outside: Outside) -> None:
    conn.tpc_begin(conn.xid(1, "zpgpool-test", "failed"))
    run(conn, "CREATE TEMPORARY TABLE not_preparable (n int)")
    with pytest.raises(psycopg2.Error):  # for the temporary table, or because the server allows no prepared ones
        conn.tpc_prepare()


def autocommit_and_begin(conn: Any, outside: Outside) -> None:
    conn.autocommit = True
    run(conn, "BEGIN")
    run(conn, "CREATE TABLE never_stored (n int)")


def closed_by_the_user(conn: Any, outside: Outside) -> None:
    conn.close()


def killed(conn: Any, outside: Outside) -> None:
    outside.terminate(conn.info.backend_pid)


def killed_in_a_transaction(conn: Any, outside: Outside) -> None:
    run(conn, "SELECT 1")
    outside.terminate(conn.info.backend_pid)


def nothing(conn: Any, outside: Outside) -> None:
    pass


def committed_work(conn: Any, outside: Outside) -> None:
    run(conn, "SELECT 1")
    conn.commit()


STATES: list[tuple[Callable[[Any, Outside], None], bool]] = [
    (nothing, PARKED),
    (committed_work, PARKED),
    (failed_transaction, PARKED),
    (open_transaction, PARKED),
    (autocommit_left_on, PARKED),
    (isolation_changed, PARKED),
    (readonly, PARKED),
    (autocommit_and_isolation, PARKED),
    (encoding_changed, PARKED),
    (cursor_factory_changed, PARKED),
    (open_named_cursor, PARKED),
    (copy_in_aborted, PARKED),
    (copy_out_aborted, CLOSED),
    (two_phase_begun, PARKED),
    (two_phase_prepare_failed, PARKED),
    (autocommit_and_begin, PARKED),
    (closed_by_the_user, CLOSED),
    (killed_in_a_transaction, CLOSED),
    # Nothing local tells before the next look at the socket.
    (killed, PARKED),
]

DISCARDED = [committed_set, listen, advisory_lock, temporary_table]


def fingerprint(conn: Any) -> dict[str, Any]:
    """Everything that a user could find changed."""
    found = {
        "autocommit": conn.autocommit,
        "isolation_level": conn.isolation_level,
        "readonly": conn.readonly,
        "deferrable": conn.deferrable,
        "encoding": conn.encoding,
        "cursor_factory": conn.cursor_factory,
        "status": conn.status,
        "transaction_status": conn.info.transaction_status,
        "settings": run(conn, "SELECT json_object_agg(name, setting)::text FROM pg_settings"),
        "channels": run(conn, "SELECT count(*) FROM pg_listening_channels()"),
        "cursors": run(conn, "SELECT count(*) FROM pg_cursors WHERE is_holdable"),
        "temporary": run(conn, "SELECT count(*) FROM pg_class WHERE relpersistence = 't' AND relname = 'left_over'"),
        "locks": run(conn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"),
        "never_stored": run(conn, "SELECT to_regclass('never_stored')::text"),
    }
    conn.rollback()
    return found


@pytest.fixture(params=["simple", "threaded", "persistent"])
def factory(request: pytest.FixtureRequest) -> Any:
    from conftest import KINDS

    return KINDS[request.param]


@pytest.mark.parametrize(("leave", "fate"), STATES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("reset", [None, "discard"])
def test_the_next_user_gets_a_fresh_session(
    make_pool: MakePool, outside: Outside, factory: Any, leave: Any, fate: bool, reset: Any
) -> None:
    pool = make_pool(factory, 0, 1, idle_timeout=60, reset=reset)
    conn = pool.getconn()
    fresh = fingerprint(conn)
    leave(conn, outside)
    pool.putconn(conn)
    stats = pool.get_stats()
    if leave is not killed:
        assert (stats["pool_size"], stats["pool_available"]) == (int(fate), int(fate))
        assert bool(conn.closed) == (not fate)
    conn = pool.getconn()
    assert fingerprint(conn) == fresh
    pool.putconn(conn)
    assert pool.get_stats()["pool_size"] == 1
    assert len(outside.backends()) == 1


def told(conn: Any, outside: Outside) -> None:
    run(conn, "ROLLBACK")  # there is no transaction, as the server warns
    assert conn.notices


def autocommit_left_off(conn: Any, outside: Outside) -> None:
    conn.autocommit = False
    open_transaction(conn, outside)


SET_TEMPORARILY: list[tuple[Callable[[Any, Outside], None], bool]] = [
    (nothing, PARKED),
    (committed_work, PARKED),
    (told, PARKED),
    (failed_transaction, PARKED),
    (autocommit_left_on, PARKED),
    (autocommit_left_off, PARKED),
    (isolation_changed, PARKED),
    (readonly, PARKED),
    (autocommit_and_isolation, PARKED),
    (encoding_changed, PARKED),
    (cursor_factory_changed, PARKED),
    (copy_out_aborted, CLOSED),
    (autocommit_and_begin, PARKED),
    (closed_by_the_user, CLOSED),
]


@pytest.mark.parametrize(("leave", "fate"), SET_TEMPORARILY, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize(
    "options",
    [{}, {"reset": "discard"}, {"isolation_level": "serializable"}, {"autocommit": True}, {"readonly": True}],
    ids=str,
)
def test_autocommit_for_one_request_is_unset(
    make_pool: MakePool, outside: Outside, factory: Any, leave: Any, fate: bool, options: Any
) -> None:
    if "readonly" in options and leave in (autocommit_left_off, autocommit_and_begin):
        leave = readonly  # they write
    pool = make_pool(factory, 0, 1, idle_timeout=60, **options)
    conn = pool.getconn()
    fresh = fingerprint(conn)
    set_temporarily(conn, {"autocommit": True})
    assert conn.autocommit
    leave(conn, outside)
    pool.putconn(conn)
    assert pool.get_stats()["pool_size"] == int(fate)
    conn = pool.getconn()
    assert fingerprint(conn) == fresh
    assert conn.notices == []
    pool.putconn(conn)


def test_a_reset_of_the_users_finds_the_session_as_configured(make_pool: MakePool, factory: Any) -> None:
    seen: list[bool] = []
    pool = make_pool(factory, 0, 1, idle_timeout=60, reset=lambda conn: seen.append(conn.autocommit))
    conn = pool.getconn()
    set_temporarily(conn, {"autocommit": True})
    pool.putconn(conn)
    assert seen == [False]


def test_what_a_user_has_changed_before_is_restored_as_well(make_pool: MakePool, factory: Any) -> None:
    pool = make_pool(factory, 0, 1, idle_timeout=60)
    conn = pool.getconn()
    fresh = fingerprint(conn)
    conn.set_client_encoding("LATIN1")
    set_temporarily(conn, {"autocommit": True})
    pool.putconn(conn)
    conn = pool.getconn()
    assert fingerprint(conn) == fresh
    pool.putconn(conn)


@pytest.mark.parametrize("leave", DISCARDED, ids=lambda value: value.__name__)
def test_discard_undoes_what_is_not_seen_from_here(make_pool: MakePool, outside: Outside, leave: Any) -> None:
    pool = make_pool(
        zpgpool.PersistentConnectionPool,
        0,
        1,
        idle_timeout=60,
        reset="discard",
        isolation_level="repeatable read",
        configure=lambda conn: (run(conn, "SET search_path = pg_catalog"), conn.commit()),
    )
    conn = pool.getconn()
    pid = conn.info.backend_pid
    fresh = fingerprint(conn)
    leave(conn, outside)
    pool.putconn(conn)
    conn = pool.getconn()
    assert conn.info.backend_pid == pid
    assert fingerprint(conn) == fresh
    assert run(conn, "SHOW search_path") == "pg_catalog"
    assert run(conn, "SHOW transaction_isolation") == "repeatable read"
    pool.putconn(conn)


def test_a_prepared_transaction_is_left_to_its_manager(make_pool: MakePool, own_server: Any, factory: Any) -> None:
    pool = make_pool(factory, 0, 1, idle_timeout=60, dsn=own_server.dsn)
    conn = pool.getconn()
    conn.tpc_begin(conn.xid(1, "zpgpool-test", "prepared"))
    run(conn, "SELECT 1")
    conn.tpc_prepare()
    pool.putconn(conn)
    assert conn.closed
    assert pool.get_stats()["pool_size"] == 0
    outside = Outside(own_server.dsn)
    [(gid,)] = outside.query("SELECT gid FROM pg_prepared_xacts")
    outside.query(f"ROLLBACK PREPARED '{gid}'")
    outside.conn.close()


@pytest.mark.parametrize("option", ["autocommit", "readonly"])
def test_the_configured_session_is_what_each_user_gets(make_pool: MakePool, outside: Outside, option: str) -> None:
    pool = make_pool(minconn=0, maxconn=1, idle_timeout=60, **{option: True})
    conn = pool.getconn()
    assert getattr(conn, option)
    setattr(conn, option, False)
    pool.putconn(conn)
    assert getattr(pool.getconn(), option)
    pool.putconn()
    assert pool.get_stats()["connections_num"] == 1


def test_a_reset_hook_runs_at_each_return_and_may_refuse(make_pool: MakePool, outside: Outside) -> None:
    seen = []

    def reset(conn: Any) -> None:
        seen.append(run(conn, "SELECT 1"))
        conn.rollback()
        if len(seen) == 2:
            raise RuntimeError("enough")

    pool = make_pool(minconn=0, maxconn=1, idle_timeout=60, reset=reset)
    for _ in range(3):
        pool.getconn()
        pool.putconn()
    assert seen == [1, 1, 1]
    assert pool.get_stats()["connections_num"] == 2
    assert pool.get_stats()["returns_bad"] == 1


def test_a_reset_hook_that_leaves_a_transaction_has_its_connection_closed(make_pool: MakePool) -> None:
    pool = make_pool(minconn=0, maxconn=1, idle_timeout=60, reset=lambda conn: run(conn, "SELECT 1"))
    conn = pool.getconn()
    pool.putconn()
    assert conn.closed


def test_a_configure_hook_must_leave_no_transaction(make_pool: MakePool, outside: Outside) -> None:
    pool = make_pool(minconn=0, maxconn=1, configure=lambda conn: run(conn, "SELECT 1"))
    with pytest.raises(zpgpool.PoolError, match="must commit"):
        pool.getconn()
    assert pool.get_stats()["pool_size"] == 0
    eventually(lambda: outside.backends() == set())


def test_an_unchanged_idle_connection_costs_no_round_trip(own_server: Any) -> None:
    from proxy import Proxy

    sent: list[bytes] = []
    proxy = Proxy(own_server.port)
    pool = zpgpool.PersistentConnectionPool(1, 1, proxy.dsn(own_server.dsn), idle_timeout=60, autocommit=True)
    proxy.tap = sent.append
    for _ in range(5):
        run(pool.getconn(), "SELECT 1")
        pool.putconn()
    assert len(sent) == 5  # one round trip for each read-only request with autocommit, and none of ours
    pool.closeall()
    proxy.close()


@pytest.mark.usefixtures("nobody_observes")
def test_a_return_that_is_interrupted_closes_the_connection(
    make_pool: MakePool, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(ext.connection):
        def rollback(self) -> None:
            raise KeyboardInterrupt

    pool = make_pool(minconn=0, maxconn=1, idle_timeout=60, connection_factory=Interrupted)
    for is_touched in (False, True):
        conn = pool.getconn()
        run(conn, "SELECT 1")
        if is_touched:
            conn.cursor_factory = None
        with pytest.raises(KeyboardInterrupt):
            pool.putconn(conn)
        assert conn.closed
    monkeypatch.setattr(Interrupted, "rollback", ext.connection.rollback)
    conn = pool.getconn()
    assert conn.info.transaction_status == ext.TRANSACTION_STATUS_IDLE
    pool.putconn(conn)


def test_the_configured_isolation_level_is_what_each_user_gets(make_pool: MakePool) -> None:
    pool = make_pool(minconn=0, maxconn=1, idle_timeout=60, isolation_level="SERIALIZABLE")
    for _ in range(2):
        conn = pool.getconn()
        assert conn.isolation_level == ext.ISOLATION_LEVEL_SERIALIZABLE
        conn.isolation_level = "READ COMMITTED"
        pool.putconn(conn)
    assert pool.get_stats()["connections_num"] == 1
