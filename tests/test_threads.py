"""Threads that wait, that end, and that are interrupted; processes that fork."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import Outside
from conftest import run
from serving import end
from zpgpool.core.handoff import CONNECTING


MakePool = Callable[..., Any]

SHARED = [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool]


def jain(counts: list[int]) -> float:
    """Return Jain's fairness index: 1 when all got the same."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


@pytest.mark.parametrize("factory", SHARED)
class TestOverload:
    def test_32_threads_over_4_connections_are_served_in_turn(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 4, 4, idle_timeout=60, timeout=30)
        counts = [0] * 32
        end, start = threading.Event(), threading.Barrier(32)  # on a busy machine they begin long after one another

        def work(number: int) -> None:
            start.wait()
            while not end.is_set():
                with pool.connection() as conn:
                    run(conn, "SELECT pg_sleep(0.005)")
                    conn.rollback()
                    counts[number] += 1

        calls = [Call(work, number) for number in range(32)]
        eventually(lambda: sum(counts) >= 600, 30)
        end.set()
        for call in calls:
            call.result()
        assert jain(counts) >= 0.99
        assert pool.get_stats()["requests_errors"] == 0

    def test_one_more_than_max_waiting_is_refused_at_once(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 0, 4, idle_timeout=60, timeout=30, max_waiting=28)
        end = threading.Event()

        def hold() -> None:
            with pool.connection():
                end.wait()

        calls = [Call(hold) for _ in range(4)]
        eventually(lambda: len(pool.holders()) == 4)  # before the others: each of these waits for its connect
        calls += [Call(hold) for _ in range(28)]
        eventually(lambda: pool.get_stats()["requests_waiting"] == 28)
        with pytest.raises(zpgpool.TooManyRequests, match="28 threads"):
            pool.getconn()
        end.set()
        for call in calls:
            call.result()

    def test_a_slow_connect_delays_nobodys_return(self, make_pool: MakePool, factory: Any) -> None:
        slow, go_on = threading.Event(), threading.Event()

        def configure(conn: Any) -> None:
            if slow.is_set():
                go_on.wait()

        pool = make_pool(factory, 1, 2, idle_timeout=60, timeout=30, configure=configure)
        with pool.connection():
            slow.set()
            connecting = Call(lambda: pool.connection().__enter__())
            eventually(lambda: pool.get_stats()["pool_size"] == 2)
        with pool.connection() as conn:  # returned, and taken again, while the other thread connects
            assert run(conn, "SELECT 1") == 1
        connecting.result()  # served by a return, too, while the connect goes on
        assert [slot.state for slot in pool._connections.handoff.slots].count(CONNECTING) == 1
        go_on.set()
        eventually(lambda: pool.get_stats()["pool_available"] == 2)

    def test_the_timer_does_not_get_in_the_way_of_users(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 2, 2, idle_timeout=60)
        end = threading.Event()

        def run_maintenance() -> None:
            while not end.is_set():
                pool.run_maintenance(time.monotonic())

        def work() -> int:
            for _ in range(500):
                with pool.connection():
                    for entry in pool._connections.handoff.slots:
                        entry.look_at = -math.inf
            return 500

        timer = Call(run_maintenance)
        try:
            calls = [Call(work), Call(work)]
            assert [call.result(60) for call in calls] == [500, 500]
        finally:
            end.set()
            timer.result()

    def test_a_waiter_is_served_by_a_return(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 0, 1, idle_timeout=60, timeout=30)
        conn = pool.getconn()
        waiter = Call(lambda: pool.getconn().info.backend_pid)
        eventually(lambda: pool.get_stats()["requests_waiting"])
        pid = conn.info.backend_pid
        pool.putconn(conn)
        assert waiter.result() == pid
        assert pool.get_stats()["requests_queued"] == 2  # the first for its connect

    def test_a_timeout_comes_in_time(self, make_pool: MakePool, factory: Any) -> None:
        """Real time."""
        pool = make_pool(factory, 0, 1, timeout=0.2)
        conn = pool.getconn(timeout=20)
        start = time.monotonic()
        with pytest.raises(zpgpool.PoolTimeout, match=r"within \d+\.\d s"):
            Call(pool.getconn).result()
        seconds = time.monotonic() - start
        assert seconds >= 0.2
        assert is_within(seconds, 0.7)
        pool.putconn(conn)


@pytest.mark.parametrize("factory", SHARED)
class TestEndedThreads:
    def test_who_waits_gets_the_place_of_a_thread_that_has_ended(self, make_pool: MakePool, factory: Any) -> None:
        """At once, not in the timer's next round."""
        pool = make_pool(factory, 0, 1)
        kept: list[Any] = []
        # With a key, where there are any: without one it would belong to whoever refers to it.
        keys = ["key"] if factory is zpgpool.ThreadedConnectionPool else []
        Call(lambda: kept.append(pool.getconn(*keys))).result()
        conn = pool.getconn()
        assert conn is not kept[0]
        assert kept[0].closed
        pool.putconn(conn)

    def test_a_thread_for_each_request_uses_few_connections(
        self, make_pool: MakePool, outside: Outside, factory: Any
    ) -> None:
        pool = make_pool(factory, 0, 4, idle_timeout=60)

        def request() -> None:
            with pool.connection() as conn:
                run(conn, "SELECT 1")

        for _ in range(50):
            Call(request).result()
        assert len(outside.backends()) == 1
        pool.run_maintenance(time.monotonic())
        assert pool.get_stats()["requests_num"] == 50
        assert len(pool._owners) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("factory", SHARED)
def test_2500_asynchronous_exceptions_lose_nothing(dsn: str, factory: Any, seed: int) -> None:
    """In a process of its own: what measures the coverage of this one does not stand them."""
    script = Path(__file__).parent / "interrupts.py"
    command = [sys.executable, str(script), factory.__name__, str(seed), dsn]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def in_child(function: Callable[[], None]) -> None:
    """Fork, run `function` in the child, and wait for its end, which must be well."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def sockets_to_server() -> int:
    """Count this process's open sockets."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except OSError:
            pass
    return found


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("factory", SHARED)
class TestFork:
    def test_the_child_has_backends_of_its_own_and_the_parents_live_on(
        self, make_pool: MakePool, outside: Outside, factory: Any
    ) -> None:
        pool = make_pool(factory, 2, 4, idle_timeout=60)
        used = pool.getconn()
        run(used, "CREATE TEMPORARY TABLE mine (n int)")
        parents = outside.backends()

        def child() -> None:
            conn = pool.getconn()
            assert conn.info.backend_pid not in parents
            assert run(conn, "SELECT 1") == 1
            with pytest.raises(psycopg2.Error):
                run(used, "SELECT 1")  # the parent's: the child cannot reach it
            used.close()
            pool.putconn(conn)
            pool.closeall()

        in_child(child)
        eventually(lambda: outside.backends() == parents)
        assert run(used, "SELECT count(*) FROM mine") == 0  # still in its transaction
        pool.putconn(used)

    def test_the_childs_descriptors_of_the_parents_sockets_are_closed(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 3, 4, idle_timeout=60)
        before = sockets_to_server()
        used = pool.getconn()

        def child() -> None:
            assert sockets_to_server() == before - 2 * 3  # the connection's descriptor, and ours

        in_child(child)
        pool.putconn(used)

    def test_a_child_that_just_ends_harms_nobody(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 1, 4, idle_timeout=60)
        used = pool.getconn()
        in_child(lambda: None)
        assert run(used, "SELECT 1") == 1
        pool.putconn(used)

    def test_locks_held_at_the_fork_do_not_stay_locked(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 0, 1, idle_timeout=60, timeout=30)
        conn = pool.getconn()
        waiter = Call(pool.getconn)
        eventually(lambda: pool.get_stats()["requests_waiting"])
        with pool._connections.lock:
            in_child(lambda: pool.putconn(pool.getconn()))
        pool.putconn(conn)
        waiter.result()

    def test_the_child_has_a_timer_of_its_own(self, make_pool: MakePool, factory: Any) -> None:
        from zpgpool.core.timer import timer

        pool = make_pool(factory, 1, 4, idle_timeout=60)
        eventually(lambda: timer.is_running)

        def child() -> None:
            assert not timer.is_running
            pool.putconn(pool.getconn())
            eventually(lambda: timer.is_running)

        in_child(child)

    def test_a_closed_pool_stays_closed(self, make_pool: MakePool, factory: Any) -> None:
        pool = make_pool(factory, 1, 4)
        pool.closeall()

        def child() -> None:
            with pytest.raises(zpgpool.PoolClosed):
                pool.getconn()

        in_child(child)


APP = """
import os
import zpgpool
from zpgpool.wsgi import PoolMiddleware, get_connection

pool = zpgpool.PersistentConnectionPool(1, 4, os.environ["DSN"], idle_timeout=60)
conn = pool.getconn()  # used by the master, too
pool.putconn(conn)

def app(environ, start_response):
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        text = f"{os.getpid()} {cursor.fetchone()[0]}"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [text.encode()]

application = PoolMiddleware(app, pool)
"""


def test_gunicorn_with_preload(dsn: str, outside: Outside, tmp_path: Path) -> None:
    """Each worker has backends of its own, and the master's session outlives them."""
    from benchmarks.harness import free_port

    port = free_port()
    (tmp_path / "preloaded.py").write_text(APP)
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers=2", "--threads=2", "--no-control-socket"]
    server = subprocess.Popen(
        [*command, f"--bind=127.0.0.1:{port}", "--chdir", str(tmp_path), "preloaded:application"],
        env={**os.environ, "DSN": dsn},
        stderr=subprocess.DEVNULL,
    )
    try:
        import urllib.request

        def fetch() -> tuple[str, ...]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    return tuple(answer.read().decode().split())
            except OSError:
                return ()

        eventually(fetch, 20)
        [masters] = {pid for pid in outside.backends() if outside.state(pid) == "idle"} and [
            outside.query(
                "SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY backend_start LIMIT 1",
                outside.application_name,
            )[0][0]
        ]
        backends: dict[str, set[str]] = {}

        def both_answered() -> bool:
            if answer := fetch():
                worker, backend = answer
                backends.setdefault(worker, set()).add(backend)
            return len(backends) == 2

        eventually(both_answered, 20)
        first, second = backends.values()
        assert not first & second
        assert str(masters) not in first | second
        for worker in backends:
            os.kill(int(worker), signal.SIGTERM)
        eventually(lambda: (answer := fetch()) and answer[0] not in backends, 20)
        assert masters in outside.backends()
    finally:
        end(server)


class TestLeaks:
    def test_a_holder_is_logged_once_with_thread_and_line(
        self, make_pool: MakePool, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = make_pool(minconn=0, maxconn=1, leak_after=5)
        now = time.monotonic()
        pool.getconn()
        pool.run_maintenance(now + 4)
        assert "held for over" not in caplog.text
        for _ in range(3):
            pool.run_maintenance(now + 10)
        assert caplog.text.count("held for over 5 s by thread MainThread") == 1
        assert f"at {__file__}:" in caplog.text
        pool.putconn()
        pool.getconn()
        pool.run_maintenance(now + 20)
        assert caplog.text.count("held for over") == 2
        pool.putconn()
