"""What an adversary, and the suites of other pools, broke once: each was seen to fail before it was repaired."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
import transaction
from psycopg2.extensions import make_dsn

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import is_within
from conftest import Outside
from conftest import run
from proxy import Proxy
from zpgpool.core import timer
from zpgpool.core.handoff import CONNECTING
from zpgpool.core.lines import current_lines
from zpgpool.core.lines import UNKNOWN
from zpgpool.core.owners import tasks
from zpgpool.core.timer import MaintenanceTimer
from zpgpool.core.watchdog import RETURN_LIMIT
from zpgpool.core.workers import closers
from zpgpool.core.workers import Gate
from zpgpool.core.workers import start
from zpgpool.core.workers import Workers
from zpgpool.datamanager import get_connection as get_transactions_connection
from zpgpool.demo.server import EmbeddedServer
from zpgpool.dsn import resolve
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


MakePool = Callable[..., Any]

SHARED = [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool]

both = pytest.mark.parametrize("factory", SHARED)


@pytest.fixture
def wall() -> Iterator[socket.socket]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as wall:
        yield wall


@pytest.fixture
def proxy(own_server: EmbeddedServer) -> Iterator[Proxy]:
    proxy = Proxy(own_server.port or 0)
    yield proxy
    proxy.is_forwarding = True
    proxy.close()


class TestOneDeadline:
    def test_a_connect_that_hangs_is_given_up_in_time(self, wall: socket.socket) -> None:
        """Real time."""
        pool = zpgpool.ThreadedConnectionPool(0, 2, host="127.0.0.1", port=wall.getsockname()[1], timeout=0.5)
        start = time.monotonic()
        with pytest.raises(zpgpool.PoolTimeout, match=r"within \d+\.\d s"):
            pool.getconn()
        assert is_within(time.monotonic() - start, 1.0)
        states = [slot.state for slot in pool._connections.handoff.slots]
        assert states == [CONNECTING]  # it goes on, and counts
        pool.close(0)

    @pytest.mark.hangs
    def test_one_that_hangs_stops_nobody_else(self, own_server: EmbeddedServer, proxy: Proxy) -> None:
        """Real time: the network loses one connect; the others, and a second one, work."""
        pool = zpgpool.ThreadedConnectionPool(0, 5, proxy.dsn(own_server.dsn), timeout=10, idle_timeout=60)
        proxy.is_forwarding = False
        first = Call(pool.getconn)
        eventually(lambda: proxy.accepted == 1)
        lost, proxy._pairs = proxy._pairs, []
        proxy.is_forwarding = True
        start = time.monotonic()
        conns = [call.result() for call in [Call(pool.getconn) for _ in range(3)]]
        assert is_within(time.monotonic() - start, 2.5)
        first.result()
        for conn in conns:
            pool.putconn(conn)
        proxy._pairs += lost
        eventually(lambda: CONNECTING not in [slot.state for slot in pool._connections.handoff.slots])
        pool.close(0)

    def test_a_connect_that_outlives_its_waiter_is_parked(self, make_pool: MakePool) -> None:
        go = threading.Event()
        pool = make_pool(
            zpgpool.ThreadedConnectionPool, 0, 2, timeout=0.05, idle_timeout=60, configure=lambda conn: go.wait(10)
        )
        with pytest.raises(zpgpool.PoolTimeout):
            pool.getconn()
        go.set()
        eventually(lambda: pool.get_stats()["pool_available"] == 1)

    def test_a_waiter_is_served_by_whatever_comes_first(self, make_pool: MakePool) -> None:
        slow, go = threading.Event(), threading.Event()
        pool = make_pool(
            zpgpool.ThreadedConnectionPool,
            *(1, 2),
            timeout=20,
            idle_timeout=60,
            configure=lambda conn: slow.is_set() and go.wait(10),
        )
        conn = pool.getconn()
        slow.set()
        waiter = Call(pool.getconn)
        eventually(lambda: pool.get_stats()["pool_size"] == 2)
        pool.putconn(conn)
        assert waiter.result() is conn  # although its own connect is under way
        go.set()
        pool.putconn(conn)

    def test_silent_idle_connections_and_a_short_timeout(self, own_server: EmbeddedServer, proxy: Proxy) -> None:
        """Real time: the ping has the caller's deadline."""
        pool = zpgpool.ThreadedConnectionPool(2, 2, proxy.dsn(own_server.dsn), timeout=0.5, check_idle=0, timer=None)
        proxy.is_forwarding = False
        start = time.monotonic()
        with pytest.raises(zpgpool.PoolTimeout):
            pool.getconn()
        assert is_within(time.monotonic() - start, 1.0)
        pool.close(0)

    def test_an_impatient_user_proves_nothing_about_the_others(self, own_server: EmbeddedServer, proxy: Proxy) -> None:
        """A ping that had too little time costs its own connection, not all that rested as long."""
        pool = zpgpool.ThreadedConnectionPool(3, 3, proxy.dsn(own_server.dsn), timeout=30, check_idle=0, timer=None)
        proxy.is_forwarding = False
        with pytest.raises(zpgpool.PoolTimeout):
            pool.getconn(timeout=0.05)
        proxy.is_forwarding = True
        assert pool.get_stats()["pool_available"] == 2
        pool.close(0)

    def test_a_timeout_for_each_call(self, make_pool: MakePool) -> None:
        for factory in SHARED:
            pool = make_pool(factory, 0, 1, timeout=30)
            taken = threading.Event()
            release = threading.Event()

            def hold(pool: Any = pool, taken: Any = taken, release: Any = release) -> None:
                with pool.connection():
                    taken.set()
                    release.wait(20)

            holder = Call(hold)
            taken.wait(10)
            start = time.monotonic()
            for ask in (pool.getconn, lambda timeout, pool=pool: pool.connection(timeout=timeout).__enter__()):
                with pytest.raises(zpgpool.PoolTimeout):
                    ask(timeout=0.05)
            with pytest.raises(ValueError, match="timeout"):
                pool.getconn(timeout=-1)
            assert is_within(time.monotonic() - start, 1.0)
            release.set()
            holder.result()

    def test_a_rollback_that_hangs_is_seen_and_bounded(
        self, own_server: EmbeddedServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = zpgpool.ThreadedConnectionPool(0, 1, proxy.dsn(own_server.dsn), idle_timeout=60, timer=None)
        conn = pool.getconn()
        run(conn, "SELECT 1")
        proxy.is_forwarding = False
        returning = Call(pool.putconn, conn)
        [holder] = eventually(lambda: [each for each in pool.holders() if each.status == "returning"])
        assert holder.backend_pid
        pool.run_maintenance(time.monotonic() + RETURN_LIMIT + 1)
        returning.result(5)
        assert "and ended" in caplog.text
        assert pool.holders() == []
        pool.close(0)

    def test_the_timer_waits_for_no_server(self, own_server: EmbeddedServer, proxy: Proxy) -> None:
        """Real time: thirty silent connections expire."""
        pool = zpgpool.ThreadedConnectionPool(0, 30, proxy.dsn(own_server.dsn), idle_timeout=5, timer=None)
        for conn in [pool.getconn() for _ in range(30)]:
            pool.putconn(conn)
        proxy.is_forwarding = False
        start = time.monotonic()
        pool.run_maintenance(time.monotonic() + 6)
        assert is_within(time.monotonic() - start, 0.5)
        eventually(lambda: pool.get_stats()["pool_size"] == 0, 60)
        pool.close(0)

    @pytest.mark.parametrize("timeout", ["inf", "nan", "-1", "x"])
    def test_odd_timeouts_are_refused(self, dsn: str, timeout: str) -> None:
        with pytest.raises(ValueError, match="option 'timeout'"):
            zpgpool.ThreadedConnectionPool(0, 1, dsn, timeout=timeout, open=False)

    def test_huge_ones_work(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, timeout=1e10)
        pool._comers["key"] = found = Gate()
        # It returns its connection itself: the timer reclaims what an ended thread holds.
        waiter = Call(lambda: pool.putconn(pool.getconn("key"), "key"))
        del pool._comers["key"]
        found.open()
        waiter.result()

    def test_a_tiny_prune_interval_is_no_busy_loop(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, prune_interval=1e-9, timer=None)
        timer = MaintenanceTimer(lambda: 100.0)
        timer._thread = threading.current_thread()  # so that none is started: this test calls `run_due`
        timer.watch(pool)
        assert (timer.run_due(100.0) or 0) >= 100.01

    def test_a_slow_network_condemns_nobody(self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
        slow = psycopg2.connect

        def connect(*args: Any, **keywords: Any) -> Any:
            conn = slow(*args, **keywords)
            time.sleep(0.05)
            return conn

        monkeypatch.setattr("psycopg2.connect", connect)
        monkeypatch.setattr("zpgpool.core.entry.PING", 0.0)
        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        pool.putconn(pool.getconn())
        [entry] = pool._connections.handoff.slots
        assert entry.patience >= 0.05


class TestStarting:
    def test_open_and_wait(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 3, 4, open=False, idle_timeout=60)
        assert pool.get_stats()["pool_size"] == 0
        pool.open()
        pool.wait(20)
        assert pool.get_stats()["pool_size"] == 3
        eventually(lambda: pool.get_stats()["pool_available"] == 3)

    def test_wait_shows_that_the_server_is_there_also_where_none_is_kept(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, open=False)
        pool.wait(20)
        assert pool.get_stats()["connections_num"] == 1
        eventually(lambda: pool.get_stats()["pool_size"] == 0)

    def test_wait_fails_with_the_error_of_the_connect(self, dsn: str) -> None:
        pool = zpgpool.ThreadedConnectionPool(1, 2, make_dsn(dsn, dbname="nowhere"), open=False)
        with pytest.raises(zpgpool.PoolTimeout, match="no 1 connections") as caught:
            pool.wait(3)  # the reason is known when two connects have failed
        assert "nowhere" in str(caught.value.__cause__)
        pool.close()

    def test_wait_raises_what_a_hook_raises(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 1, 2, open=False, configure=lambda conn: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pool.wait(20)

    def test_minconn_is_opened_in_parallel(self, make_pool: MakePool) -> None:
        """After the first, which shows that the server is there."""
        first, others = [True], threading.Barrier(7)

        def configure(conn: Any) -> None:
            if first:
                first.clear()
            else:
                others.wait(10)  # or BrokenBarrierError, unless all seven come here

        pool = make_pool(zpgpool.ThreadedConnectionPool, 8, 8, configure=configure)
        assert pool.get_stats()["connections_num"] == 8

    def test_a_pool_without_a_name_has_one_and_a_registered_one_that(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool)
        assert pool.name.startswith("pool-")
        zpgpool.register_pool(pool, "main")
        assert pool.name == "main"
        assert "'main'" in repr(pool)
        named = make_pool(zpgpool.ThreadedConnectionPool, name="mine")
        zpgpool.register_pool(named, "theirs")
        assert named.name == "mine"

    def test_a_pool_that_is_dropped_while_it_connects(self, dsn: str, outside: Outside) -> None:
        go = threading.Event()
        pool: Any = zpgpool.ThreadedConnectionPool(1, 2, dsn, open=False, configure=lambda conn: go.wait(10))
        opener, is_gone = pool._connections.opener, weakref.ref(pool)
        opener.open_missing(1)
        eventually(outside.backends)
        del pool
        eventually(lambda: is_gone() is None)
        opener.backoff.succeeded()
        assert opener.open_missing(2)[0].has_ended.wait(10)  # the next one finds no pool
        go.set()
        del opener
        eventually(lambda: not outside.backends())


class TestHooks:
    @both
    def test_check_sees_each_user_and_the_first_one(self, make_pool: MakePool, factory: Any) -> None:
        checks: list[object] = []
        pool = make_pool(factory, idle_timeout=60, check=checks.append)
        for _ in range(200):
            pool.putconn(pool.getconn())
        assert len(checks) == 200

    def test_a_check_that_ends_in_an_exit_frees_the_slot(self, make_pool: MakePool) -> None:
        def check(conn: Any) -> None:
            if len(kept) == 0:
                raise SystemExit

        kept: list[BaseException] = []
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=5, check=check)
        with pytest.raises(SystemExit) as caught:
            pool.getconn()
        kept.append(caught.value)  # with its traceback
        pool.putconn(pool.getconn())

    @pytest.mark.parametrize("kind", [*SHARED, zpgpool.SimpleConnectionPool])
    @pytest.mark.parametrize("timeout", [0, 0.2])
    def test_a_check_that_refuses_all_gives_an_error_in_time_and_its_reason(
        self, make_pool: MakePool, kind: Any, timeout: float
    ) -> None:
        """With a pause after each connect; without a timeout the first refusal is the error."""

        def check(conn: Any) -> None:
            checks.append(conn)
            if not is_well:
                raise RuntimeError("a standby")

        checks: list[object] = []
        is_well = False
        pool = make_pool(kind, 0, 2, timeout=timeout, idle_timeout=60, check=check)
        with pytest.raises((zpgpool.PoolTimeout, psycopg2.OperationalError)):
            pool.getconn(timeout=0)  # for as long as its connect takes, which may be more than 0.2 s
        for _ in range(9):
            # The refusal itself, where that came when the time was up.
            kinds = (zpgpool.PoolTimeout, psycopg2.OperationalError) if timeout else psycopg2.OperationalError
            with pytest.raises(kinds) as caught:
                pool.getconn()
            told = caught.value.__cause__ if isinstance(caught.value, zpgpool.PoolTimeout) else caught.value
            assert str(told) == "check refused a new connection: a standby"
        eventually(lambda: pool.get_stats()["pool_size"] == 0)
        stats = pool.get_stats()
        assert len(checks) == stats["connections_num"]
        assert (stats["requests_num"], stats["requests_errors"], stats["connections_lost"]) == (10, 10, 0)
        assert stats["requests_queued"] == (9 if timeout else 0)
        is_well = True
        eventually(lambda: not pool._connections.backoff.is_on)
        pool.putconn(pool.getconn(timeout=20))

    @both
    def test_a_timeout_waits_for_a_check_that_passes(self, make_pool: MakePool, factory: Any) -> None:
        checks: list[object] = []

        def check(conn: Any) -> None:
            checks.append(conn)
            if len(checks) < 4:
                raise RuntimeError("still a standby")

        pool = make_pool(factory, 0, 2, timeout=20, idle_timeout=60, check=check)
        pool.putconn(pool.getconn())
        assert len(checks) == 4

    def test_a_check_that_takes_long_is_no_idle_time(self, make_pool: MakePool) -> None:
        checks: list[object] = []

        def check(conn: Any) -> None:
            checks.append(conn)
            run(conn, "SELECT pg_sleep(1.2)")

        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=20, idle_timeout=1, check=check)
        pool.putconn(pool.getconn())
        assert len(checks) == 1

    def test_an_idle_connection_that_check_refuses_is_not_lost(self, make_pool: MakePool) -> None:
        refused: list[object] = []
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60, check=lambda conn: refused and 1 / 0)
        pool.putconn(pool.getconn())
        refused.append(1)
        with pytest.raises(psycopg2.OperationalError, match="division by zero"):
            pool.getconn()
        assert pool.get_stats()["connections_lost"] == 0

    @pytest.mark.parametrize("error", [RuntimeError, SystemExit])
    def test_a_checkout_that_a_hook_fails_is_counted(self, make_pool: MakePool, error: Any) -> None:
        def configure(conn: Any) -> None:
            raise error("no")

        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, configure=configure)
        for _ in range(3):
            with pytest.raises(error):
                pool.getconn()
        stats = pool.get_stats()
        assert (stats["requests_num"], stats["requests_errors"]) == (3, 3)
        eventually(lambda: pool.get_stats()["pool_size"] == 0)  # the waiter is told first

    def test_a_hook_that_fails_again_and_again_is_told_once(
        self, make_pool: MakePool, caplog: pytest.LogCaptureFixture
    ) -> None:
        def configure(conn: Any) -> None:
            if calls:
                raise RuntimeError("no")
            calls.append(conn)

        calls: list[object] = []
        pool = make_pool(zpgpool.ThreadedConnectionPool, 1, 2, idle_timeout=60, configure=configure)
        pool.putconn(pool.getconn(), close=True)
        eventually(lambda: pool._connections.opener.failures >= 3)  # the timer opens what is missing
        assert sum("cannot connect: no" in record.getMessage() for record in caplog.records) == 1

    @pytest.mark.parametrize("how", ["hook", "copy"])
    def test_what_cannot_be_made_clean_is_told_with_the_request(
        self, make_pool: MakePool, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        def reset(conn: Any) -> None:
            run(conn, "SELECT 1")  # and no commit

        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60, reset=reset if how == "hook" else None)

        class Full:
            def write(self, data: bytes) -> None:
                raise OSError(errno.ENOSPC, "no space left")

        with zpgpool.task("nightly report"):
            conn = pool.getconn()
            if how == "copy":
                with pytest.raises(OSError, match="no space left"):
                    conn.cursor().copy_expert("COPY (SELECT 1) TO STDOUT", Full())
            pool.putconn(conn)
        [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "could not be made clean" in record.getMessage()
        assert "nightly report" in record.getMessage()

    def test_messages_of_the_server_are_not_for_the_next_user(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, 1, 1, idle_timeout=60, autocommit=True)
        conn = pool.getconn()
        run(conn, "DO $$ BEGIN RAISE NOTICE 'mine'; END $$")
        run(conn, "LISTEN news")
        run(conn, "NOTIFY news")
        conn.poll()
        assert conn.notices
        assert conn.notifies
        pool.putconn(conn)
        assert pool.getconn() is conn
        assert (conn.notices, conn.notifies) == ([], [])
        conn.notices = conn.notifies = None  # which would break psycopg2 for the next one
        pool.putconn()
        assert (pool.getconn().notices, conn.notifies) == ([], [])
        pool.putconn()


class TestOneOwner:
    def test_a_connection_without_a_key_is_whose_refers_to_it(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, timer=None)
        conn = in_thread(pool.getconn)
        pool.run_maintenance(time.monotonic())
        assert run(conn, "SELECT 1") == 1  # its first thread has ended
        [holder] = pool.holders()
        assert holder.line == "(its thread has ended)"
        pool.putconn(conn)

    @both
    def test_a_block_whose_end_was_broken_off_leaves_nothing_to_the_next(
        self, make_pool: MakePool, factory: Any
    ) -> None:
        pool = make_pool(factory, idle_timeout=60)
        block = pool.connection()
        conn = block.__enter__()
        run(conn, "SELECT 1")
        pool._end_block = lambda key, conn: None  # an exception between two bytecodes of the end
        block.__exit__(None, None, None)
        del pool._end_block, block
        assert len(pool.holders()) == 1
        with pool.connection() as next_conn:
            assert next_conn.get_transaction_status() == psycopg2.extensions.TRANSACTION_STATUS_IDLE
        assert pool.holders() == []

    def test_tasks_are_nested_and_forgotten(self) -> None:
        with zpgpool.task("outer"):
            with zpgpool.task("inner"):
                assert tasks[threading.get_ident()] == "inner"
            assert tasks[threading.get_ident()] == "outer"
        assert threading.get_ident() not in tasks

    def test_callers_of_a_pool_that_was_never_used_do_not_pile_up(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, open=False)
        for _ in range(500):
            in_thread(pool.owner)
        assert len(pool._owners) < 200

    def test_an_error_names_ten_holders_and_counts_the_others(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 12)
        conns = [pool.getconn() for _ in range(12)]
        with pytest.raises(zpgpool.PoolTimeout) as caught:
            pool.getconn()
        assert str(caught.value).count("thread MainThread") == 10
        assert str(caught.value).endswith("; and 2 more")
        for conn in conns:
            pool.putconn(conn)


#: Until all other threads sleep, and stay asleep. A fork while one has a lock, or wants the interpreter's, leaves
#: the child a lock that nobody gives back.
AT_REST = """
def asleep():
    try:
        told = [open(f"/proc/self/task/{task}/status").read() for task in os.listdir("/proc/self/task")]
    except (FileNotFoundError, ProcessLookupError):  # one has ended before it was opened, or before it was read
        return None
    mine = f"Pid:\\t{threading.get_native_id()}\\n"
    told = [text[text.index("State:"):].splitlines() for text in told if mine not in text]
    states = [(lines[0][7], lines[-2:]) for lines in told]  # the last two count how often it has run
    return None if any(state != "S" for state, _ in states) else states
seen = None
while seen is None or asleep() != seen:
    seen = asleep()
    threading.Event().wait(0.2)
"""

C_FORK = """
import ctypes, os, sys, threading
import zpgpool
pool = getattr(zpgpool, {kind!r})(1, 2, {dsn!r}, idle_timeout=60)
conn = pool.getconn()
before = conn.info.backend_pid
pool.putconn(conn)
{at_rest}
pid = ctypes.PyDLL(None).fork()  # as C code does: Python's hooks do not run
if pid == 0:
    conn = pool.getconn()
    with conn.cursor() as cursor:
        cursor.execute("SELECT 1")
    ok = conn.info.backend_pid != before and zpgpool.core.timer._process == os.getpid()
    pool.putconn(conn)
    assert pool.run_maintenance(0.0) is not None
    os._exit(0 if ok else 1)
_, status = os.waitpid(pid, 0)
conn = pool.getconn()
with conn.cursor() as cursor:
    cursor.execute("SELECT 1")
sys.exit(status != 0 or conn.info.backend_pid != before)
"""


REPORT_IN_C_FORK = """
import ctypes, os, sys, threading
import zpgpool
pool = zpgpool.ThreadedConnectionPool(1, 2, {dsn!r}, idle_timeout=60)
pool.putconn(pool.getconn())
{at_rest}
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    def use_stack(depth):
        return sum(map(use_stack, [depth - 1])) if depth else 0
    threads = [threading.Thread(target=use_stack, args=(99,)) for _ in range(4)]  # their stacks were the parent's
    for thread in threads:
        thread.start()
    conn = pool.getconn()
    [holder] = pool.holders()
    zpgpool.core.owners.forget_tasks([threading.get_ident()])
    os._exit(0)
sys.exit(os.waitpid(pid, 0)[1] != 0)
"""


class TestOwnProcess:
    def test_where_the_threads_are_is_not_looked_for_on_stacks_of_others(self, dsn: str) -> None:
        """CPython since 3.11: SIGSEGV, in a child of C code, of whatever lists holders or waiters."""
        result = subprocess.run([sys.executable, "-c", REPORT_IN_C_FORK.format(dsn=dsn, at_rest=AT_REST)], timeout=60)
        assert result.returncode == 0

    def test_a_line_that_is_not_known_is_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Here in the parent, on any version."""
        monkeypatch.setattr("zpgpool.core.lines.HAS_FRAMES_ON_STACKS", True)
        assert "test_attack" in current_lines()[threading.get_ident()]
        monkeypatch.setattr("zpgpool.core.lines._process", -1)
        assert current_lines()[threading.get_ident()] == UNKNOWN

    @pytest.mark.parametrize("factory", SHARED)
    def test_a_fork_that_runs_no_hooks(self, dsn: str, factory: Any) -> None:
        script = C_FORK.format(kind=factory.__name__, dsn=dsn, at_rest=AT_REST)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr

    def test_each_part_notices_it(self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Here in the parent, for what the child does."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 1, 2, idle_timeout=60, timer=None)
        finders: list[Callable[[], object]] = [
            lambda: pool.run_maintenance(time.monotonic()),
            lambda: pool.putconn(pool.getconn()),
        ]
        for find in finders:
            [entry] = pool._connections.handoff.slots
            entry.look_at = float("-inf")
            pool._pid = -1
            find()
            assert pool._pid == os.getpid()
            assert entry not in pool._connections.handoff.slots
            pool.prune()
        workers = Workers("test-worker", 1)
        workers._process = -1
        workers.run(lambda: None)
        assert workers._process == os.getpid()
        own = MaintenanceTimer()
        own._process = -1
        own.watch(pool)
        assert own._process == os.getpid()
        pool.closeall()
        eventually(lambda: not own.is_running)


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


class TestCheckouts:
    @pytest.mark.parametrize("method", ["putconn", "putconn_of"])
    @pytest.mark.parametrize("line", range(1, 14))
    def test_two_threads_return_one_connection_once(self, make_pool: MakePool, method: str, line: int) -> None:
        """The home thread, after so many lines of its return, and who ends the checkout, and takes what is there."""
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 2, idle_timeout=60, timer=None)
        conn = pool.getconn()
        checkout, code = pool.checkout(conn), getattr(type(pool), method).__code__
        theirs: list[Any] = []
        lines = 0

        def end() -> None:
            checkout.putconn()
            theirs.append(pool.getconn())

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal lines
            lines += event == "line" and frame.f_code is code
            if lines == line and not theirs and not pool._connections.lock._is_owned():
                Call(end).result()
            return trace if frame.f_code is code else None

        before = sys.gettrace()
        with contextlib.suppress(zpgpool.PoolError):  # it was ended before the first look
            try:
                sys.settrace(trace)
                pool.putconn(conn) if method == "putconn" else pool.putconn_of(pool.owner())
            finally:
                sys.settrace(before)
        assert pool.getconn() is not next(iter(theirs), None)

    def test_who_finds_at_the_second_look_that_it_was_returned_leaves_it(self, make_pool: MakePool) -> None:
        """The same two lines, where a tracer of the test's own does not hide them from the measurement of coverage."""
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 2, idle_timeout=60, timer=None)
        conn = pool.getconn()
        here, held = pool.here, pool.owner().entry

        class Owner:
            looks = iter([held, None, held, None])

            @property
            def entry(self) -> Any:
                return next(self.looks)

        pool.here = SimpleNamespace(owner=Owner())
        pool.putconn(conn)
        assert not pool.putconn_of(pool.owner())
        pool.here = here
        assert pool.getconn() is conn
        pool.putconn(conn)

    @pytest.mark.parametrize("name", ["Checkout", "CheckoutOwner"])
    def test_an_interrupted_one_leaves_the_connection_to_its_thread(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 1, idle_timeout=60, timer=None)
        conn = pool.getconn()
        monkeypatch.setattr(f"zpgpool.core.persistent.{name}", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            pool.checkout(conn)
        assert kept.value.__traceback__ is not None
        pool.putconn(conn)
        assert pool.getconn() is conn

    def test_the_state_of_what_came_back_meanwhile_is_its_next_users(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the reaper's look at the users and its claim: it must not write what it has read before."""
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 1, idle_timeout=60, timer=None)
        conn = pool.getconn()
        pool.checkout(conn)  # and lost at once
        [(owner, entry)] = [(owner, entry) for owner, entry in pool._users() if not owner.is_alive]
        written: list[object] = []

        class Returned:
            """In the place of the entry: says what is written to it."""

            state = entry.state

            def __setattr__(self, name: str, value: object) -> None:
                written.append(value)

        pool.putconn(conn)
        users, looks = pool._users, iter([[(owner, Returned())]])
        monkeypatch.setattr(pool, "_users", lambda: next(looks, None) or users())
        pool._reap()
        assert not written
        assert pool.getconn() is conn
        assert not conn.closed


class TestWorkers:
    def test_where_no_thread_can_be_started_the_caller_does_it(self, monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
        """At exit, and at a limit of processes."""

        def fail(*args: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", fail)
        done = threading.Event()
        assert start(done.set, "test")  # in the one that was to start it
        assert done.wait(10)
        monkeypatch.setattr("_thread.start_new_thread", fail)
        assert not start(done.set, "test")
        ran: list[int] = []
        Workers("no-workers", 1).run(lambda: ran.append(1))
        assert ran == [1]
        pool = zpgpool.ThreadedConnectionPool(0, 1, dsn, idle_timeout=60, check_idle=0)
        for _ in range(2):  # the second time it is to be pinged
            pool.putconn(pool.getconn())
        pool.close()
        assert not timer.is_running or timer._thread is not None

    def test_are_few_and_survive_what_a_task_raises(self, caplog: pytest.LogCaptureFixture) -> None:
        workers, go = Workers("two-workers", 2), threading.Event()
        ran: list[int] = []
        assert workers.try_run(go.wait)
        assert workers.try_run(go.wait)
        eventually(lambda: len(workers._threads) == 2 and not workers._idle)
        assert not workers.try_run(lambda: None)

        def fail() -> None:
            raise SystemExit("no")

        for number in range(3):
            workers.run(fail)
            workers.run(partial(ran.append, number))
        # A third one may have been started, and ends at once.
        eventually(lambda: len([each for each in threading.enumerate() if each.name == "two-workers"]) == 2)
        go.set()
        eventually(lambda: len(ran) == 3)
        eventually(lambda: caplog.text.count("failed") >= 3)  # the other thread may not have logged its own yet

    def test_end_when_there_is_nothing_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Real time."""
        monkeypatch.setattr("zpgpool.core.workers.IDLE", 0.05)
        workers = Workers("test-worker", 2)
        workers.run(lambda: None)
        eventually(lambda: not workers._threads)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_task_that_comes_while_the_last_thread_goes(self, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        """Real time. After its look at the queue: nobody did it, until the next task came."""
        monkeypatch.setattr("zpgpool.core.workers.IDLE", 0.05)
        workers, done = Workers("test-worker", 1), threading.Event()

        class Tasks(SimpleQueue[Any]):
            def empty(self) -> bool:
                is_empty = super().empty()
                if done.is_set():
                    return is_empty
                workers.run(done.set)
                return is_empty if when == "after" else super().empty()

        workers._tasks = Tasks()
        workers.run(lambda: None)
        assert done.wait(10)
        eventually(lambda: not workers._threads and not workers._idle)

    def test_a_task_that_comes_while_the_other_is_begun(self) -> None:
        """It waited for the end of that one, which may hang, although there was room for a thread."""
        workers, go, done = Workers("test-worker", 2), threading.Event(), threading.Event()

        class Tasks(SimpleQueue[Any]):
            def get(self, *args: Any, **keywords: Any) -> Any:
                task = super().get(*args, **keywords)
                if task == go.wait:
                    workers.run(done.set)
                return task

        workers._tasks = Tasks()
        workers.run(go.wait)
        try:
            assert done.wait(10)
        finally:
            go.set()


class TestCancels:
    def test_nobody_but_its_user_is_cancelled(self, make_pool: MakePool, outside: Outside) -> None:
        """A thousand short queries, each of them cancelled at a time of its own, and the next user's never."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 2, 2, timeout=20, idle_timeout=60)
        end = threading.Event()
        victims: list[BaseException] = []
        conns: list[Any] = [None]

        def be_cancelled() -> None:
            while not end.is_set():
                with pool.connection() as conn:
                    conns[0] = conn
                    try:
                        run(conn, "SELECT pg_sleep(0.002)")
                    except psycopg2.errors.QueryCanceled:
                        pass

        def be_left_alone() -> None:
            while not end.is_set():
                with pool.connection() as conn:
                    if conn is conns[0]:
                        continue
                    try:
                        run(conn, "SELECT pg_sleep(0.001)")
                    except psycopg2.Error as error:
                        if conn is not conns[0]:
                            victims.append(error)

        calls = [Call(be_cancelled), Call(be_left_alone)]
        for _ in range(300):
            if conns[0] is not None:
                pool.cancel(conns[0])
        end.set()
        for call in calls:
            call.result()
        assert victims == []

    def test_a_connection_that_is_freed_while_it_is_cancelled(self, make_pool: MakePool) -> None:
        """The handle is a copy: libpq's own would be read while it is freed (SIGSEGV, in 3 of 9 runs of 30 s)."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        for _ in range(50):
            conn = pool.getconn()
            [(_, entry)] = pool._users()
            sending = Call(entry.cancel_handle.send)
            conn.close()
            pool.putconn(conn)
            sending.result()

    def test_one_at_a_time(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool)
        conn = pool.getconn()
        [(_, entry)] = pool._users()
        with entry.cancel_handle._lock:
            entry.cancel_handle.send()  # another thread does that just now
        assert not pool.cancel(conn)  # no query runs
        pool.putconn(conn)


class TestSecrets:
    @pytest.mark.parametrize(
        "dsn",
        [
            "postgresql://app:hunter@ALPHA@host/db",
            "postgresql://app:123456/ALPHA@host/db",
            "postgres://app:ALPHA@x@host",
        ],
    )
    def test_a_password_that_libpq_would_split_is_refused_and_not_shown(
        self, dsn: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ValueError, match="%40") as caught:
            zpgpool.ThreadedConnectionPool(0, 1, dsn, open=False)
        assert "ALPHA" not in str(caught.value) + caplog.text

    @pytest.mark.parametrize("dsn", ["postgresql://app:a%40b@host/db", "postgresql:///db?host=/tmp&user=a@b", "host=a"])
    def test_others_are_read(self, dsn: str) -> None:
        zpgpool.ThreadedConnectionPool(0, 1, dsn, open=False)

    def test_the_traceback_of_a_failed_connect_does_not_show_the_connection_string(self, dsn: str) -> None:
        pool = zpgpool.ThreadedConnectionPool(0, 1, make_dsn(dsn, dbname="nowhere", password="hunter2"), open=False)
        with pytest.raises(psycopg2.OperationalError) as caught:
            pool.getconn()
        trace = caught.value.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename != __file__:
                assert "hunter2" not in repr(trace.tb_frame.f_locals)
            trace = trace.tb_next


class TestServerBack:
    def test_minconn_is_refilled_within_a_second_in_real_time(self, own_server: EmbeddedServer) -> None:
        pool = zpgpool.ThreadedConnectionPool(2, 4, own_server.dsn, idle_timeout=60)
        own_server.halt()
        eventually(lambda: pool.get_stats()["pool_size"] == 0)
        own_server.launch()
        back = time.monotonic()
        eventually(lambda: pool.get_stats()["pool_available"] == 2)
        assert is_within(time.monotonic() - back, 2.0)
        pool.close()


def test_statistics_count_attempts_and_failures(make_pool: MakePool, dsn: str) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=0)
    conn = pool.getconn()
    with pytest.raises(zpgpool.PoolTimeout):
        pool.getconn()
    stats = pool.get_stats()
    assert (stats["requests_num"], stats["requests_errors"], stats["connections_num"]) == (2, 1, 1)
    pool.putconn(conn)
    down = zpgpool.ThreadedConnectionPool(0, 1, make_dsn(dsn, dbname="nowhere"), open=False)
    with pytest.raises(psycopg2.OperationalError):
        down.getconn()
    stats = down.get_stats()
    assert (stats["requests_num"], stats["requests_errors"]) == (1, 1)
    assert (stats["connections_num"], stats["connections_errors"]) == (1, 1)


def test_settings_cannot_be_changed_behind_the_pools_back(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1)
    with pytest.raises(AttributeError):
        pool.settings.maxconn = 99
    pool.resize(0, 2)
    assert pool.settings.maxconn == pool.maxconn == 2


class TestWhatAReviewerBroke:
    @both
    def test_a_pool_whose_connections_cannot_be_watched_may_be_resized(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(
            factory, 0, 4, idle_timeout=60, connection_factory=lambda *args: psycopg2.extensions.connection(*args)
        )
        for size in (5, 6):
            pool.putconn(pool.getconn())
            pool.resize(0, size)
        pool.putconn(pool.getconn())

    def test_a_key_that_another_thread_is_getting_is_waited_for_in_time(self, make_pool: MakePool) -> None:
        """Real time."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1)
        pool._comers["key"] = Gate()
        start = time.monotonic()
        with pytest.raises(zpgpool.PoolTimeout):
            pool.getconn("key", timeout=0.1)
        assert is_within(time.monotonic() - start, 1.0)

    @both
    def test_a_block_that_was_interrupted_before_it_knew_its_connection(
        self, make_pool: MakePool, factory: Any
    ) -> None:
        pool = make_pool(factory, idle_timeout=60)
        getconn = pool.getconn

        def interrupted(*args: Any, **keywords: Any) -> Any:
            run(getconn(*args, **keywords), "SELECT 1")
            raise KeyboardInterrupt

        pool.getconn = interrupted
        with pytest.raises(KeyboardInterrupt):
            with pool.connection():
                pass
        del pool.getconn
        assert pool.holders() == []

    def test_a_checkout_that_was_interrupted_leaves_the_connection_to_its_thread(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60)
        conn = pool.getconn()

        pool._owners, owners = Interrupting(pool._owners), pool._owners
        with pytest.raises(KeyboardInterrupt) as kept:  # its frames have the token of the checkout's life
            pool.checkout(conn)
        pool._owners = owners
        pool.putconn(conn)
        assert pool.holders() == []
        assert pool.get_stats()["pool_available"] == 1
        del kept

    @pytest.mark.parametrize("how", ["putconn", "putconn_of", "detach", "checkout"])
    def test_a_lost_checkout_is_not_reaped_from_the_next_users_hands(self, make_pool: MakePool, how: str) -> None:
        """The thread had given it back, and so to the next user; the pool closed it, as the lost checkout's."""
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 1, idle_timeout=60, timer=None)
        conn = pool.getconn()
        pool.checkout(conn)  # and lost at once
        if how == "detach":
            pool.detach(conn)
        elif how == "checkout":
            checkout = pool.checkout(conn)
        else:
            pool.putconn(conn) if how == "putconn" else pool.putconn_of(pool.owner())
            assert pool.holders() == []
            assert pool.getconn() is conn
        pool.run_maintenance(time.monotonic())
        eventually(lambda: not closers._tasks.qsize())
        assert run(conn, "SELECT 1") == 1
        if how == "checkout":
            checkout.putconn()
        conn.close()

    def test_a_lost_checkout_that_was_reaped_is_not_parked(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 1, idle_timeout=60, timer=None)
        conn = pool.getconn()
        pool.checkout(conn)
        pool._reap()
        pool.putconn(conn)
        assert pool.get_stats()["pool_available"] == 0
        eventually(lambda: conn.closed)
        assert run(pool.getconn(), "SELECT 1") == 1
        pool.putconn()

    def test_an_old_error_is_not_raised_when_the_server_is_there(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, timeout=20, configure=lambda conn: time.sleep(0.05))
        backoff = pool._connections.backoff
        backoff.failed(psycopg2.OperationalError("too many, once"))
        backoff._failed_at -= 60
        backoff._retry_at = float("-inf")
        for call in [Call(pool.getconn) for _ in range(3)]:
            call.result()

    @pytest.mark.parametrize("factory", [*SHARED])
    def test_an_end_that_was_interrupted_is_finished_by_the_threads_next_request(
        self, make_pool: MakePool, factory: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make_pool(factory, 0, 1, idle_timeout=60)

        def app(environ: Any, start_response: Any) -> list[bytes]:
            run(get_connection(environ), "SELECT 1")
            start_response("200 OK", [])
            return [b""]

        def interrupted(*args: Any, **keywords: Any) -> None:
            raise KeyboardInterrupt

        site: Any = PoolMiddleware(app, pool)
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
        with monkeypatch.context() as patch:
            patch.setattr(pool, "putconn" if factory is zpgpool.ThreadedConnectionPool else "putconn_of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                site(dict(environ), lambda *args: None)
        assert len(pool.holders()) == 1
        site(dict(environ), lambda *args: None)
        assert pool.holders() == []
        assert "its end was interrupted" in caplog.text

    def test_a_connection_that_has_another_user_by_now_is_not_reclaimed(self, make_pool: MakePool) -> None:
        """Its user of before has returned it, and ended, while another thread looked for ended ones."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, idle_timeout=60, timer=None)
        seen: list[Any] = []

        def use() -> None:
            conn = pool.getconn("first")
            seen.extend(pool._users())
            pool.putconn(conn, "first")

        in_thread(use)
        conn = pool.getconn("second")
        pool._users = lambda: seen
        pool._reap()
        del pool._users
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn, "second")

    @both
    def test_a_slot_that_was_lost_in_a_cycle_is_room_before_a_garbage_collection(
        self, make_pool: MakePool, factory: Any
    ) -> None:
        """Real time: an exception that somebody's code has made part of a cycle keeps it, with its frames."""
        pool = make_pool(factory, 1, 1, idle_timeout=60, timeout=10, timer=None)
        gc.disable()
        try:
            cycle: list[Any] = [pool._connections.handoff.take()]
            cycle.append(cycle)
            del cycle
            start = time.monotonic()
            pool.putconn(pool.getconn())
            assert is_within(time.monotonic() - start, 4.0)
        finally:
            gc.enable()

    def test_one_that_a_thread_has_in_its_hands_costs_one_collection(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 1, 1, idle_timeout=60, timer=None)
        collections: list[None] = []
        monkeypatch.setattr("gc.collect", lambda: collections.append(None))
        slot = pool._connections.handoff.take()
        for now in (100.0, 100.1, 101.0, 102.0, 103.0):
            pool._collect_astray(now)
        assert len(collections) == 1
        slot.since += 1  # another user
        pool._collect_astray(104.0)
        assert len(collections) == 1
        pool._collect_astray(105.0)
        assert len(collections) == 2
        pool._connections.handoff.park(slot, slot)

    @pytest.mark.parametrize("how", ["application", "timeout", "connect", "500"])
    def test_an_error_keeps_none_of_the_frames_of_its_traceback(self, make_pool: MakePool, how: str, dsn: str) -> None:
        """Not even until the next garbage collection: a frame may have a connection, or a slot that was lost."""
        options = {"dsn": make_dsn(dsn, dbname="nowhere"), "open": False} if how == "connect" else {}
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, **options)
        kept: list[weakref.ref[Any]] = []
        conn = pool.getconn() if how in ("timeout", "500") else None

        def use() -> None:
            gate = threading.Event()
            kept.append(weakref.ref(gate))
            if how == "application":
                raise ZeroDivisionError
            pool.getconn()

        def app(environ: Any, start_response: Any) -> list[bytes]:
            if how == "500":
                with contextlib.suppress(zpgpool.PoolTimeout):
                    use()
                start_response("500 Internal Server Error", [])
                return []
            use()
            return []

        site: Any = PoolMiddleware(app, pool)
        logging.getLogger("zpgpool").disabled = True  # pytest keeps what is logged, with the traceback
        gc.disable()
        try:
            with contextlib.suppress(ZeroDivisionError):
                site({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *args: None)
            eventually(lambda: kept[0]() is None)  # a thread that has connected has its error until it ends
        finally:
            gc.enable()
        if conn is not None:
            pool.putconn(conn)

    def test_a_request_that_was_interrupted_before_it_knew_its_connection(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        getconn = pool.getconn

        def interrupted(*args: Any, **keywords: Any) -> Any:
            run(getconn(*args, **keywords), "SELECT 1")
            raise KeyboardInterrupt

        monkeypatch.setattr(pool, "getconn", interrupted)
        app: Any = get_connection  # which is called with the environ, and raises
        site: Any = PoolMiddleware(lambda environ, start_response: app(environ), pool)
        with pytest.raises(KeyboardInterrupt):
            site({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *args: None)
        assert pool.holders() == []

    @both
    @pytest.mark.parametrize("keeps_body", [True, False])
    def test_the_end_of_a_streamed_body_that_was_interrupted(
        self, make_pool: MakePool, factory: Any, keeps_body: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The body's own end finishes it, or the thread's next request."""
        pool = make_pool(factory, 0, 1, idle_timeout=60)

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            run(get_connection(environ), "SELECT 1")
            start_response("200 OK", [])
            yield b""

        def interrupted(*args: Any, **keywords: Any) -> None:
            raise KeyboardInterrupt

        site: Any = PoolMiddleware(app, pool)
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
        body = site(dict(environ), lambda *args: None)
        assert list(body) == [b""]
        with monkeypatch.context() as patch:
            patch.setattr(pool, "putconn" if factory is zpgpool.ThreadedConnectionPool else "putconn_of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                body.close()
        assert len(pool.holders()) == 1
        if keeps_body:
            site(dict(environ), lambda *args: None).close()
        else:
            del body
        assert pool.holders() == []

    @both
    @pytest.mark.parametrize("where", ["share", "take", "release", "abandon"])
    def test_a_transaction_whose_end_was_interrupted_keeps_no_connection(
        self, make_pool: MakePool, factory: Any, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its traceback, which somebody may keep, kept the connection, until a garbage collection."""
        pool = make_pool(factory, 0, 1, idle_timeout=60)
        zpgpool.register_pool(pool)

        def app(environ: Any, start_response: Any) -> list[bytes]:
            get_transactions_connection().cursor().execute("SELECT 1")
            if where == "release":
                transaction.commit()
            start_response("200 OK", [])
            return [b""]

        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        site: Any = PoolMiddleware(app, pool)
        idle: Any = PoolMiddleware(lambda environ, start_response: [b""], pool)
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
        target = {
            "share": "zpgpool.request.lease.SharedCheckout",
            "take": "zpgpool.onephase.transient_cursor",
            "release": "zpgpool.request.SharedCheckout.let_go",
            "abandon": "zpgpool.onephase.DataManager.abandon",
        }[where]
        if where == "abandon":
            site(dict(environ), lambda *args: None)
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupted)
            with pytest.raises(KeyboardInterrupt) as kept:
                (idle if where == "abandon" else site)(dict(environ), lambda *args: None)
        idle(dict(environ), lambda *args: None)
        assert pool.holders() == []
        del kept
        transaction.abort()

    @pytest.mark.parametrize("what", ["connect", "close"])
    def test_what_was_interrupted_before_its_thread_is_not_under_way(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """It was counted for ever, and as many idle connections never expired."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, idle_timeout=60, max_lifetime=600, timer=None)
        conns = [pool.getconn() for _ in range(2)]

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("zpgpool.core.opener.start", interrupted)
            patch.setattr("zpgpool.core.workers.Workers.run", interrupted)
            if what == "close":
                pool.putconn(conns.pop())
                next(iter(pool._parked.values())).expire_now()
            with pytest.raises(KeyboardInterrupt):
                pool.getconn()
        for conn in conns:
            pool.putconn(conn)
        pool.run_maintenance(time.monotonic() + 61)

        def size() -> int:
            gc.collect()  # the interrupt's traceback, which pytest has, may be part of a cycle
            pool._reap()  # and where that has kept the slot until now, this pool has no timer that finds it lost
            return int(pool.get_stats()["pool_size"])

        eventually(lambda: size() == 0)

    @both
    def test_what_a_transaction_does_after_its_savepoint_is_no_other_requests(
        self, make_pool: MakePool, outside: Outside, factory: Any
    ) -> None:
        outside.query("CREATE TABLE rejoined (number int)")
        pool = make_pool(factory, 0, 2, idle_timeout=60)
        zpgpool.register_pool(pool)

        def first(environ: Any, start_response: Any) -> list[bytes]:
            savepoint = transaction.savepoint()
            run(get_transactions_connection(), "SELECT 1")
            savepoint.rollback()
            run(get_transactions_connection(), "INSERT INTO rejoined VALUES (1)")
            start_response("200 OK", [])
            return [b""]

        def second(environ: Any, start_response: Any) -> list[bytes]:
            transaction.commit()
            start_response("200 OK", [])
            return [b""]

        for app in (first, second):
            site: Any = PoolMiddleware(app, pool)
            site({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *args: None)
        transaction.abort()
        assert outside.query("SELECT count(*) FROM rejoined") == [(0,)]
        assert pool.holders() == []
        outside.query("DROP TABLE rejoined")

    def test_credentials_that_rotate_are_asked_for_at_each_connect(self, dsn: str) -> None:
        asked: list[str] = []

        def password() -> str:
            asked.append("password")
            return "secret"

        def connection_string() -> str:
            asked.append("dsn")
            return dsn

        pool = zpgpool.ThreadedConnectionPool(0, 1, connection_string, password=password)
        for _ in range(2):
            pool.putconn(pool.getconn(), close=True)
        assert asked == ["dsn", "password"] * 2
        assert "secret" not in repr(vars(pool))
        pool.close()

    def test_a_connect_has_a_limit_where_nobody_sets_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)
        assert resolve({"host": "a"})["connect_timeout"] == 10
        assert "connect_timeout" not in resolve({"dsn": "host=a connect_timeout=3"})
        assert "connect_timeout" not in resolve({"dsn": "service=a"})
        assert "connect_timeout" not in resolve({"service": "a"})
        assert resolve({"dsn": "host=db-service dbname=connect_timeout"})["connect_timeout"] == 10
        assert resolve({"dsn": lambda: {"host": "a", "connect_timeout": 3}})["connect_timeout"] == 3
        monkeypatch.setenv("PGCONNECT_TIMEOUT", "4")
        assert "connect_timeout" not in resolve({"host": "a"})


class Interrupting(set[Any]):
    def add(self, item: Any) -> None:
        raise KeyboardInterrupt
