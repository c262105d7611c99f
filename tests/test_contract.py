"""The contract of the pools: section 2 of the design, each sentence a test that names it.

It runs over all kinds of pool, and, where psycopg2.pool has what a sentence speaks of, over its classes, too. What
psycopg2.pool does not keep is expected to fail there, strictly: "drop-in, but strict" is measured, not said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2
import psycopg2.pool
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from psycopg2.extras import DictCursor

import zpgpool
import zpgpool.core.keyed
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import is_within
from conftest import KINDS
from conftest import Outside
from conftest import run
from zpgpool.core.entry import Entry


OURS = ["simple", "threaded", "persistent"]
KEYED = ["simple", "threaded"]
SHARED = ["threaded", "persistent"]
THEIRS = {
    "psycopg2-simple": psycopg2.pool.SimpleConnectionPool,
    "psycopg2-threaded": psycopg2.pool.ThreadedConnectionPool,
}
FACTORIES: dict[str, Any] = {**KINDS, **THEIRS}

MakePool = Callable[..., Any]


def over(kinds: list[str], theirs: str = "") -> pytest.MarkDecorator:
    """Run a test over our `kinds`, and over psycopg2's: which "keep" the sentence, or do not ("break")."""
    params: list[Any] = list(kinds)
    for name in THEIRS if theirs else ():
        is_broken = theirs == "break"
        marks = [pytest.mark.xfail(strict=True, reason="psycopg2.pool does not keep this")] if is_broken else []
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("kind", params)


@pytest.fixture
def make(make_pool: MakePool, kind: str) -> MakePool:
    def make(minconn: int = 0, maxconn: int = 4, **options: Any) -> Any:
        return make_pool(FACTORIES[kind], minconn, maxconn, **options)

    return make


def getconn(pool: Any, key: Any) -> Any:
    """Take a connection under `key`, or for a persistent pool, whose key is the thread, in this thread."""
    return pool.getconn() if isinstance(pool, zpgpool.PersistentConnectionPool) else pool.getconn(key)


class TestConstructor:
    @over(OURS, "keep")
    def test_minconn_connections_are_opened_by_the_constructor(self, make: MakePool, outside: Outside) -> None:
        make(3, 5)
        assert len(outside.backends()) == 3

    @over(OURS)
    def test_open_false_defers_that_to_first_use(self, make: MakePool, outside: Outside) -> None:
        pool = make(3, 5, open=False)
        assert outside.backends() == set()
        pool.putconn(pool.getconn())
        pool.prune()
        eventually(lambda: len(outside.backends()) == 3)  # the timer may be opening one of them

    @over(OURS, "keep")
    def test_further_arguments_go_to_connect(self, make: MakePool) -> None:
        pool = make(1, 1, cursor_factory=DictCursor, options="-c work_mem=123kB")
        conn = pool.getconn()
        assert conn.cursor_factory is DictCursor
        assert run(conn, "SHOW work_mem") == "123kB"
        pool.putconn(conn)

    @pytest.mark.parametrize("kind", FACTORIES)
    def test_the_dsn_may_be_positional(self, kind: str, dsn: str) -> None:
        pool = FACTORIES[kind](1, 2, dsn)
        conn = pool.getconn()
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)
        pool.closeall()

    @over(OURS, "keep")
    def test_an_unreachable_server_raises_its_own_error(self, make: MakePool) -> None:
        with pytest.raises(psycopg2.OperationalError):
            make(1, 2, dsn="host=/nowhere dbname=x")

    @over(OURS)
    def test_a_constructor_that_fails_half_way_leaves_nothing_open(self, make: MakePool, outside: Outside) -> None:
        opened = []

        def fail_at_third(conn: Any) -> None:
            opened.append(conn)
            if len(opened) == 3:
                raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            make(3, 5, configure=fail_at_third)
        eventually(lambda: outside.backends() == set())

    @over(OURS, "break")
    def test_minconn_above_maxconn_is_a_ValueError(self, make: MakePool) -> None:
        with pytest.raises(ValueError, match="minconn"):
            make(6, 2)

    @over(OURS)
    def test_an_unknown_option_is_a_ValueError_that_names_it(self, make: MakePool) -> None:
        with pytest.raises(ValueError, match="'idle_timout', did you mean 'idle_timeout'"):
            make(0, 2, idle_timout=3)

    def test_the_base_class_cannot_be_used_itself(self, dsn: str) -> None:
        with pytest.raises(TypeError, match="abstract"):
            zpgpool.AbstractConnectionPool(0, 1, dsn)  # type: ignore[abstract]  # what the test is about

    @over(OURS, "keep")
    def test_attributes(self, make: MakePool) -> None:
        pool = make(1, 3)
        assert (pool.minconn, pool.maxconn, pool.closed) == (1, 3, False)
        pool.closeall()
        assert pool.closed is True


class TestKeys:
    @over(KEYED, "keep")
    def test_without_a_key_each_getconn_gives_another_connection(self, make: MakePool) -> None:
        pool = make()
        first, second = pool.getconn(), pool.getconn()
        assert first is not second
        pool.putconn(first)
        pool.putconn(second)

    @over(OURS, "keep")
    def test_the_same_key_gives_the_same_connection_until_it_is_put_away(self, make: MakePool) -> None:
        pool = make()
        conn = getconn(pool, "a")
        assert getconn(pool, "a") is conn
        pool.putconn(conn)

    @over(KEYED, "keep")
    def test_keys_have_connections_of_their_own(self, make: MakePool) -> None:
        pool = make()
        a, b = pool.getconn("a"), pool.getconn("b")
        assert a is not b
        pool.putconn(a, "a")
        pool.putconn(b, "b")

    @over(KEYED, "keep")
    def test_putconn_finds_the_key_of_a_connection(self, make: MakePool) -> None:
        pool = make()
        conn = pool.getconn("a")
        pool.putconn(conn)
        other = pool.getconn("b")
        assert other is not None
        pool.putconn(other)

    @over(KEYED)
    def test_putconn_by_the_key_alone(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 1, idle_timeout=60)
        pool.getconn("a")
        pool.putconn(key="a")
        pool.putconn(pool.getconn("b"))
        assert len(outside.backends()) == 1

    @pytest.mark.parametrize("kind", ["threaded"])
    def test_the_key_of_a_persistent_connection_is_the_calling_thread(self, make_pool: MakePool, kind: str) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool)
        mine = pool.getconn()

        def other() -> Any:
            conn = pool.getconn()
            assert pool.getconn() is conn
            pool.putconn()
            return conn

        assert in_thread(other) is not mine
        assert pool.getconn() is mine
        pool.putconn(mine)

    @over(["threaded"])
    def test_a_callers_integer_key_never_collides_with_a_thread(self, make: MakePool) -> None:
        pool = make()
        by_number = pool.getconn(threading.get_ident())
        with pool.connection() as by_thread:
            assert by_thread is not by_number
        pool.putconn(by_number, threading.get_ident())

    @over(["threaded"])
    def test_two_threads_that_ask_for_one_key_at_once_get_one_connection(self, make: MakePool) -> None:
        pool = make(0, 4, idle_timeout=60)
        barrier = threading.Barrier(3)
        conns: list[Any] = []

        def ask() -> None:
            barrier.wait()
            conns.append(pool.getconn("key"))
            barrier.wait()  # what a thread holds goes with it

        for _ in range(20):
            calls = Call(ask), Call(ask)
            barrier.wait()
            eventually(lambda: len(conns) == 2)
            assert conns[0] is conns[1]
            pool.putconn(conns[0], "key")
            conns.clear()
            barrier.wait()
            for call in calls:
                call.result()
        assert pool.get_stats()["pool_size"] == pool.get_stats()["pool_available"]

    @over(OURS, "keep")
    def test_two_getconn_and_one_putconn_by_the_same_key_return_it(self, make: MakePool) -> None:
        pool = make(0, 1)
        conn = getconn(pool, "a")
        getconn(pool, "a")
        pool.putconn(conn)
        with pytest.raises(psycopg2.pool.PoolError):
            pool.putconn(conn)

    @over(OURS)
    def test_with_connection_blocks_nest_and_the_outermost_returns_it(self, make: MakePool) -> None:
        pool = make(0, 1)
        with pool.connection() as outer:
            with pool.connection() as inner:
                assert inner is outer
            assert run(outer, "SELECT 1") == 1
            assert len(pool.holders()) == 1
        assert pool.holders() == []

    @over(OURS)
    def test_a_connection_block_returns_it_after_an_exception(self, make: MakePool) -> None:
        pool = make(0, 1)
        with pytest.raises(ZeroDivisionError):
            with pool.connection() as conn:
                run(conn, "SELECT 1")
                raise ZeroDivisionError
        with pool.connection() as conn:
            assert conn.info.transaction_status == TRANSACTION_STATUS_IDLE

    @over(OURS)
    def test_a_block_within_one_whose_connection_was_closed_returns_its_own(self, make: MakePool) -> None:
        pool = make(0, 1)
        with pool.connection() as outer:
            outer.close()
            with pool.connection() as inner:
                assert run(inner, "SELECT 1") == 1
        assert pool.holders() == []

    @over(SHARED)
    def test_a_block_may_end_in_another_thread(self, make: MakePool) -> None:
        pool = make(0, 1)
        block = pool.connection()
        block.__enter__()
        in_thread(block.__exit__, None, None, None)
        assert pool.holders() == []

    @over(OURS)
    def test_a_connection_block_lets_its_user_return_it_early(self, make: MakePool) -> None:
        pool = make(0, 1)
        with pool.connection() as conn:
            pool.putconn(conn)
        assert pool.holders() == []

    @over(OURS)
    def test_a_connection_block_commits_nothing(self, make: MakePool, outside: Outside) -> None:
        outside.query("CREATE TABLE IF NOT EXISTS block (n int)")
        pool = make(0, 1)
        with pool.connection() as conn:
            run(conn, "INSERT INTO block VALUES (1)")
        with pool.connection() as conn:
            run(conn, "INSERT INTO block VALUES (2)")
            conn.commit()
        assert outside.query("SELECT n FROM block") == [(2,)]
        outside.query("DROP TABLE block")

    @over(OURS, "break")
    def test_a_connection_that_its_user_closed_is_replaced_at_the_next_getconn_of_its_key(self, make: MakePool) -> None:
        pool = make(0, 1)
        getconn(pool, "a").close()
        conn = getconn(pool, "a")
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)


class TestPutconn:
    @over(OURS, "keep")
    def test_close_true_frees_its_place_at_once(self, make: MakePool, outside: Outside) -> None:
        pool = make(1, 1)
        first = pool.getconn()
        pid = first.info.backend_pid
        pool.putconn(first, close=True)
        assert first.closed
        if not isinstance(pool, tuple(THEIRS.values())):
            assert outside.state(pid) is None  # at once, also as the server counts
        second = pool.getconn()
        assert second.info.backend_pid != pid
        pool.putconn(second)

    @over(OURS, "keep")
    def test_putconn_of_a_foreign_connection_raises_and_changes_nothing(self, make: MakePool, dsn: str) -> None:
        pool = make(1, 1)
        foreign = psycopg2.connect(dsn)
        with pytest.raises(psycopg2.pool.PoolError):
            pool.putconn(foreign)
        assert not foreign.closed
        conn = pool.getconn()
        with pytest.raises(psycopg2.pool.PoolError):
            pool.putconn(foreign)
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)
        foreign.close()

    @over(KEYED, "break")
    def test_putconn_with_another_keys_connection_raises_and_changes_nothing(self, make: MakePool) -> None:
        pool = make(0, 2)
        a, b = pool.getconn("a"), pool.getconn("b")
        for wrong in ("b", "c"):
            with pytest.raises(psycopg2.pool.PoolError):
                pool.putconn(a, wrong)
        assert pool.getconn("a") is a
        assert pool.getconn("b") is b
        pool.putconn(a, "a")
        pool.putconn(b, "b")

    @over(["persistent"])
    def test_putconn_of_another_threads_connection_raises_and_changes_nothing(self, make: MakePool) -> None:
        pool = make(0, 2)
        conn = pool.getconn()
        with pytest.raises(zpgpool.PoolError):
            in_thread(pool.putconn, conn)
        assert pool.getconn() is conn
        pool.putconn(conn)

    @over(OURS, "keep")
    def test_putconn_twice_raises(self, make: MakePool) -> None:
        pool = make(1, 1)
        conn = pool.getconn()
        pool.putconn(conn)
        with pytest.raises(psycopg2.pool.PoolError):
            pool.putconn(conn)

    @over(OURS)
    def test_putconn_of_nothing_raises(self, make: MakePool) -> None:
        with pytest.raises(zpgpool.PoolError):
            make().putconn(None)

    @over(OURS, "break")
    def test_putconn_never_raises_for_what_the_server_did(self, make: MakePool, outside: Outside) -> None:
        pool = make(1, 1)
        conn = pool.getconn()
        run(conn, "SELECT 1")
        outside.terminate(conn.info.backend_pid)
        pool.putconn(conn)
        conn = pool.getconn()
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)


class TestDetach:
    @over(OURS)
    def test_the_caller_keeps_the_connection_and_the_pool_has_room(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 1, hold_limit=60)
        conn = pool.getconn()
        run(conn, "CREATE TEMP TABLE mine AS SELECT 1")
        pid = conn.info.backend_pid
        pool.detach(conn)
        other = pool.getconn()
        assert other.info.backend_pid != pid
        assert pool.get_stats()["pool_size"] == 1
        with pytest.raises(zpgpool.PoolError, match=r"not in use|does not hold"):
            pool.detach(conn)
        pool.putconn(other)
        pool.closeall()
        assert run(conn, "SELECT count(*) FROM mine") == 1  # neither rolled back nor closed
        conn.commit()
        assert outside.state(pid) == "idle"
        with pytest.raises(zpgpool.PoolClosed):
            pool.detach(conn)
        conn.close()

    @over(OURS)
    def test_a_thread_that_ends_and_a_user_that_loses_it_do_not_end_it(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 2)
        kept: list[Any] = []

        def detach() -> int:
            conn = getconn(pool, "its")
            pool.detach(conn)
            kept.append(conn)
            return int(conn.info.backend_pid)

        pid = in_thread(detach) if pool._in_background else detach()
        pool.run_maintenance(time.monotonic())
        assert outside.state(pid) == "idle"
        assert pool.get_stats()["pool_size"] == 0
        kept.clear()  # as of psycopg2's own, the last reference closes it
        eventually(lambda: outside.state(pid) is None)

    @over(OURS)
    def test_a_waiter_gets_a_new_one(self, make: MakePool) -> None:
        pool = make(0, 1, timeout=20)
        conn = pool.getconn()
        if not pool._in_background:
            pool.detach(conn)
            assert pool.getconn() is not conn
            return
        waiter = Call(lambda: pool.putconn(pool.getconn()))
        eventually(pool.waiters)
        if isinstance(pool, zpgpool.PersistentConnectionPool):
            with pytest.raises(zpgpool.PoolError, match="this thread does not hold that connection"):
                in_thread(pool.detach, conn)
            pool.detach(conn)
        else:
            in_thread(pool.detach, conn)  # any thread may do so
        waiter.result()
        conn.close()

    @over(OURS)
    def test_a_block_ends_without_it_and_a_checkout_keeps_it(self, make: MakePool) -> None:
        pool = make(0, 2)
        with pool.connection() as conn:
            pool.detach(conn)
        assert not conn.closed
        conn.close()
        checkout = pool.checkout()
        with pytest.raises(zpgpool.PoolError, match="a checkout has it"):
            pool.detach(checkout.conn)
        checkout.putconn()
        assert pool.get_stats()["pool_size"] == pool.get_stats()["pool_available"]


class TestMaxconn:
    @over(KEYED, "keep")
    def test_maxconn_is_strict(self, make: MakePool) -> None:
        pool = make(0, 2)
        conns = [pool.getconn(), pool.getconn()]
        with pytest.raises(psycopg2.pool.PoolError, match="exhausted"):
            pool.getconn()
        for conn in conns:
            pool.putconn(conn)

    @over(SHARED)
    def test_connections_never_exceed_it_as_the_server_counts_them(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 4, idle_timeout=60, timeout=20)
        is_over = threading.Event()

        def work(seed: int) -> None:
            for turn in range(40):
                conn = pool.getconn()
                run(conn, "SELECT 1")
                pool.putconn(conn, close=(seed + turn) % 3 == 0)

        def watch() -> int:
            most = 0
            while not is_over.is_set():
                most = max(most, len(outside.backends()))
            return most

        watcher = Call(watch)
        for call in [Call(work, seed) for seed in range(12)]:
            call.result()
        is_over.set()
        assert 2 <= watcher.result() <= 4

    @over(SHARED)
    def test_a_timeout_tells_who_holds_the_connections(self, make: MakePool) -> None:
        pool = make(0, 1, name="main")
        held = threading.Event()
        release = threading.Event()

        def hold() -> None:
            with pool.connection() as conn:
                run(conn, "SELECT 1")
                held.set()
                release.wait()

        holder = Call(hold, name="holder-7")
        held.wait(10)
        with pytest.raises(zpgpool.PoolTimeout) as caught:
            pool.getconn()
        release.set()
        holder.result()
        message = str(caught.value)
        assert "exhausted" in message
        assert "'main'" in message
        assert "thread holder-7 for 0." in message
        assert "in a transaction" in message
        assert "threading.py" in message  # where it is now: in release.wait()


class TestIdleTimeout:
    @over(KEYED, "keep")
    def test_0_closes_on_return_unless_fewer_than_minconn_are_idle(self, make: MakePool, outside: Outside) -> None:
        pool = make(1, 3)
        conns = [pool.getconn() for _ in range(3)]
        assert len(outside.backends()) == 3
        for conn in conns:
            pool.putconn(conn)
        eventually(lambda: len(outside.backends()) == 1)

    @over(OURS)
    def test_n_keeps_idle_at_most_n_seconds_at_a_checkout(
        self, make: MakePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make(0, 2, idle_timeout=60, check_idle=None)
        pids = []
        for rest in (0, 59, 61):
            shift_time(monkeypatch, rest)
            conn = pool.getconn()
            pids.append(conn.info.backend_pid)
            pool.putconn(conn)
        assert pids[0] == pids[1] != pids[2]  # and its use after 59 seconds restarted the clock

    @over(SHARED)
    def test_n_closes_in_real_time_whether_or_not_anyone_calls_prune(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 3, idle_timeout=1)
        start = time.monotonic()
        for call in [Call(self.borrow, pool) for _ in range(3)]:
            call.result()
        assert outside.backends()
        eventually(lambda: not outside.backends())
        assert time.monotonic() - start >= 1

    @staticmethod
    def borrow(pool: Any) -> None:
        with pool.connection() as conn:
            run(conn, "SELECT 1")

    @over(OURS)
    def test_none_keeps_for_ever(self, make: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = make(0, 2, idle_timeout=None, check_idle=None)
        pids = []
        for rest in (0, 1e9):
            shift_time(monkeypatch, rest)
            conn = pool.getconn()
            pids.append(conn.info.backend_pid)
            pool.putconn(conn)
            pool.prune()
        assert pids[0] == pids[1]


class TestPrune:
    @over(OURS)
    def test_drops_every_connection_idle_longer_than_idle_timeout_then_opens_up_to_minconn(
        self, make: MakePool, outside: Outside, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make(2, 4, idle_timeout=60)
        before = outside.backends()
        pool.prune()
        assert outside.backends() == before
        shift_time(monkeypatch, 61)
        pool.prune()
        after = outside.backends()
        assert len(after) == 2
        assert not after & before

    @over(KEYED)
    def test_leaves_those_in_use(self, make: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = make(0, 2, idle_timeout=60)
        conn = pool.getconn()
        shift_time(monkeypatch, 1000)
        pool.prune()
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)

    @over(OURS)
    def test_with_idle_timeout_0_keeps_minconn(self, make: MakePool, outside: Outside) -> None:
        pool = make(2, 4)
        before = outside.backends()
        pool.prune()
        assert outside.backends() == before

    @over(OURS)
    def test_replaces_what_was_closed_below_minconn(self, make: MakePool, outside: Outside) -> None:
        pool = make(2, 4)
        pool.putconn(pool.getconn(), close=True)
        pool.prune()
        assert len(outside.backends()) == 2


class TestCloseall:
    @over(OURS, "keep")
    def test_closes_every_connection_those_in_use_included(self, make: MakePool, outside: Outside) -> None:
        pool = make(2, 4)
        conn = pool.getconn()
        pool.closeall()
        assert conn.closed
        eventually(lambda: not outside.backends())

    @over(OURS, "keep")
    def test_afterwards_getconn_putconn_and_closeall_raise(self, make: MakePool) -> None:
        pool = make(1, 4)
        conn = pool.getconn()
        pool.closeall()
        for call in (pool.getconn, lambda: pool.putconn(conn), pool.closeall):
            with pytest.raises(psycopg2.pool.PoolError):
                call()

    @over(OURS)
    def test_afterwards_the_error_is_PoolClosed(self, make: MakePool) -> None:
        pool = make(1, 4)
        conn = pool.getconn()
        pool.closeall()
        for call in (pool.getconn, lambda: pool.putconn(conn), pool.closeall, pool.prune, pool.drain):
            with pytest.raises(zpgpool.PoolClosed):
                call()

    @pytest.mark.parametrize("is_seen", [True, False])
    @over(SHARED)
    def test_returns_in_bounded_time_while_another_thread_is_inside_a_query(
        self, make: MakePool, outside: Outside, monkeypatch: pytest.MonkeyPatch, is_seen: bool
    ) -> None:
        """Not seen: a thread that has sent BEGIN, and not yet its query, looks idle in its transaction."""
        pool = make(1, 4)

        def query() -> None:
            with pool.connection() as conn:
                run(conn, "SELECT pg_sleep(60)")

        user = Call(query)
        eventually(lambda: outside.runs("SELECT pg_sleep(60)") or not user.is_running)
        assert user.is_running
        if not is_seen:
            monkeypatch.setattr(Entry, "is_active", False)
        start = time.monotonic()
        pool.closeall()
        assert is_within(time.monotonic() - start, 5)
        with pytest.raises(psycopg2.Error):
            user.result()
        if is_seen:  # else the server notices at the end of the query that its client has gone
            eventually(lambda: not outside.backends(), 2)

    @over(SHARED)
    def test_a_connect_that_is_under_way_ends_closed(self, make: MakePool, outside: Outside) -> None:
        is_connected, go_on = threading.Event(), threading.Event()

        def configure(conn: Any) -> None:
            is_connected.set()
            go_on.wait()

        pool = make(0, 4, configure=configure)
        user = Call(pool.getconn)
        is_connected.wait()
        pool.closeall()
        go_on.set()
        with pytest.raises(zpgpool.PoolClosed):
            user.result()
        eventually(lambda: not outside.backends())

    @over(SHARED)
    def test_wakes_those_who_wait(self, make: MakePool) -> None:
        pool = make(0, 1, timeout=30)
        conn = pool.getconn()
        waiter = Call(pool.getconn)
        eventually(lambda: pool.get_stats()["requests_waiting"])
        pool.closeall()
        with pytest.raises(zpgpool.PoolClosed):
            waiter.result(2)
        assert conn.closed

    @over(SHARED)
    def test_close_lets_users_finish_first(self, make: MakePool, outside: Outside) -> None:
        pool = make(1, 2)
        held, release = threading.Event(), threading.Event()

        def work() -> int:
            with pool.connection() as conn:
                held.set()
                release.wait()
                return int(run(conn, "SELECT 1"))

        user = Call(work)
        held.wait(10)
        closing = Call(pool.close, 20)
        eventually(lambda: pool.closed)
        with pytest.raises(zpgpool.PoolClosed):
            pool.getconn()
        release.set()
        assert user.result() == 1
        closing.result(5)
        eventually(lambda: not outside.backends())
        pool.close()  # may be repeated


class TestDecisions:
    def test_PoolError_subclasses_psycopg2s(self) -> None:
        for error in (zpgpool.PoolClosed, zpgpool.PoolTimeout, zpgpool.TooManyRequests):
            assert issubclass(error, zpgpool.PoolError)
        assert issubclass(zpgpool.PoolError, psycopg2.pool.PoolError)

    @over(SHARED)
    def test_a_dead_threads_connection_is_closed_its_place_freed_its_owner_logged(
        self, make: MakePool, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        outside.query("CREATE TABLE IF NOT EXISTS dead (n int)")
        pool = make(0, 1)
        kept: list[Any] = []

        def die() -> None:
            # With a key, where there are any: without one it would belong to whoever refers to it.
            kept.append(pool.getconn("key") if isinstance(pool, zpgpool.ThreadedConnectionPool) else pool.getconn())
            run(kept[0], "INSERT INTO dead VALUES (1)")

        for _ in range(4):
            dead = threading.Thread(target=die, name="unlucky")
            dead.start()
            dead.join()
            pool.run_maintenance(time.monotonic())
            conn = pool.getconn()
            assert conn is not kept[0]
            assert conn.info.transaction_status == TRANSACTION_STATUS_IDLE
            assert run(conn, "SELECT count(*) FROM dead") == 0
            pool.putconn(conn)
            assert "thread unlucky ended while it held a connection" in caplog.text
            kept.clear()
        outside.query("DROP TABLE dead")

    @over(SHARED)
    def test_a_new_thread_never_inherits_a_dead_ones_connection(self, make: MakePool) -> None:
        pool = make(0, 3, idle_timeout=60)
        seen = {}

        def die() -> None:
            conn = pool.getconn()
            run(conn, "SELECT 1")  # leaves a transaction open
            seen[conn.info.backend_pid] = threading.get_ident()

        for _ in range(3):
            in_thread(die)
            pool.run_maintenance(time.monotonic())
        assert len(seen) == 3  # although the system gives the threads' numbers again

    @over(KEYED)
    def test_a_connection_that_its_user_lost_is_closed_and_its_place_is_free(
        self, make: MakePool, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = make(0, 1)
        for _ in range(3):
            pool.getconn(timeout=20)  # on a busy machine the thread that connected keeps the one before for a moment
        conn = pool.getconn(timeout=20)
        pool.putconn(conn)
        pool.run_maintenance(time.monotonic())
        assert "lost a connection without returning it" in caplog.text

    @over(SHARED)
    def test_a_password_appears_in_no_repr_log_or_error(
        self, make: MakePool, dsn: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG")
        pool = make(0, 1, dsn=f"{dsn} password=hunter2", leak_after=1)
        conn = pool.getconn()
        with pytest.raises(zpgpool.PoolTimeout) as timeout:
            in_thread(pool.getconn)
        pool.run_maintenance(time.monotonic() + 10)
        with pytest.raises(psycopg2.OperationalError) as refused:
            make(1, 1, dsn="host=/nowhere password=hunter2")
        with pytest.raises(ValueError, match="pasword") as unknown:
            make(1, 1, pasword="hunter2")
        texts = [repr(pool), repr(vars(pool)), str(pool.holders()), caplog.text]
        texts += [str(error.value) for error in (timeout, refused, unknown)]
        pool.putconn(conn)
        assert "held for over 1 s" in caplog.text
        assert not [text for text in texts if "hunter2" in text]


def shift_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the pools' clock, not the real one, go on by `seconds`."""
    now = vars(zpgpool.core.keyed)["monotonic"]
    for module in ("base", "persistent", "keyed", "connections", "idle", "opener"):
        monkeypatch.setattr(f"zpgpool.core.{module}.monotonic", lambda: now() + seconds)


class TestWhatTestsOfOtherPoolsSay:
    """Sentences of the suites of psycopg_pool and SQLAlchemy that are kept; docs/moving.rst has those that are not."""

    @over(OURS)
    def test_a_block_of_the_pool_closes_it(self, make: MakePool, outside: Outside) -> None:
        with make(1, 2, idle_timeout=60) as pool:
            pool.putconn(pool.getconn())
        with pytest.raises(ZeroDivisionError), make(1, 2) as other:
            1 / 0  # noqa: B018  # it is to raise
        assert (pool.closed, other.closed) == (True, True)
        eventually(lambda: not outside.backends())

    @over(OURS)
    def test_open_and_wait_of_a_closed_pool_raise(self, make: MakePool) -> None:
        pool = make(1, 2, idle_timeout=60)
        pool.open()
        pool.open()
        pool.wait(0)
        pool.closeall()
        for method in (pool.open, pool.wait):
            with pytest.raises(zpgpool.PoolClosed):
                method()

    @over(OURS)
    def test_a_block_that_outlives_its_pool_ends_quietly(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 2)
        with pool.connection() as conn:
            pool.closeall()
        assert conn.closed
        assert outside.backends() == set()

    @over(OURS)
    def test_another_pools_connection_stays_that_ones(self, make: MakePool) -> None:
        pool, other = make(0, 2, idle_timeout=60), make(0, 2, idle_timeout=60)
        conn = other.getconn()
        with pytest.raises(zpgpool.PoolError, match="was it returned before"):
            pool.putconn(conn)
        assert run(conn, "SELECT 1") == 1
        other.putconn(conn)
        assert [each.get_stats()["pool_available"] for each in (pool, other)] == [0, 1]

    @over(SHARED)
    def test_sizes_at_rest_in_use_and_with_a_queue(self, make: MakePool) -> None:
        names = ("pool_size", "pool_available", "requests_waiting")
        pool = make(2, 4, idle_timeout=60, timeout=20)
        go = threading.Event()
        pool.wait()

        def sizes() -> tuple[int, ...]:
            stats = pool.get_stats()
            return tuple(stats[name] for name in names)

        def use() -> None:
            with pool.connection():
                assert go.wait(20)

        assert sizes() == (2, 2, 0)
        calls = [Call(use) for _ in range(3)]
        eventually(lambda: sizes() == (3, 0, 0))
        calls += [Call(use) for _ in range(4)]
        eventually(lambda: sizes() == (4, 0, 3))
        go.set()
        for call in calls:
            call.result()
        eventually(lambda: sizes()[1:] == (4, 0))

    @over(OURS)
    def test_configure_runs_once_for_each_connection(self, make: MakePool) -> None:
        configured: list[object] = []
        pool = make(0, 2, idle_timeout=60, configure=configured.append)
        for close in (False, False, True, False):
            pool.putconn(pool.getconn(), close=close)
        assert len(configured) == 2

    @over(SHARED)
    def test_one_connection_serves_all_that_wait_before_it_is_closed(self, make: MakePool, outside: Outside) -> None:
        pool = make(0, 1, timeout=20)  # idle_timeout=0: what nobody wants is closed
        conn = pool.getconn()
        calls = [Call(use_and_tell, pool) for _ in range(5)]
        eventually(lambda: len(pool.waiters()) == 5)
        pid = conn.info.backend_pid
        pool.putconn(conn)
        assert [call.result() for call in calls] == [pid] * 5
        eventually(lambda: outside.backends() == set())

    @over(SHARED)
    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    def test_a_configure_that_ends_in_an_exit_gives_its_place_back(self, make: MakePool, error: Any) -> None:
        def configure(conn: Any) -> None:
            if not raised:
                raised.append(error("stop"))
                raise raised[0]

        raised: list[BaseException] = []
        pool = make(0, 1, timeout=20, configure=configure)
        with pytest.raises(error):
            pool.getconn()
        pool.putconn(pool.getconn())

    @over(SHARED)
    def test_a_full_queue_names_the_pool_and_counts(self, make: MakePool) -> None:
        pool = make(0, 1, timeout=20, max_waiting=0, name="main")
        with pool.connection(), pytest.raises(zpgpool.TooManyRequests, match="'main'"):
            in_thread(pool.getconn)
        assert pool.get_stats()["requests_errors"] == 1


def use_and_tell(pool: Any) -> int:
    with pool.connection() as conn:
        return int(conn.info.backend_pid)
