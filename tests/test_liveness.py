"""A connection that is handed out works: whatever happened to the server or the wire while it rested."""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest

import zpgpool
from conftest import Call
from conftest import DEFAULTS
from conftest import eventually
from conftest import is_within
from conftest import Outside
from conftest import run
from proxy import Proxy
from zpgpool.demo.server import EmbeddedServer


IDLE = 8


@pytest.fixture(autouse=True)
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests call `run_maintenance` themselves."""
    monkeypatch.setitem(DEFAULTS, "timer", None)


@pytest.fixture
def full_pool(own_server: EmbeddedServer) -> Iterator[Callable[..., Any]]:
    """Make a pool of IDLE idle connections."""
    pools = []

    def make(dsn: str = own_server.dsn, **options: Any) -> Any:
        pool = zpgpool.ThreadedConnectionPool(IDLE, IDLE, dsn, **{"idle_timeout": 600, "check_idle": None, **options})
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close(0)


@pytest.fixture
def proxy(own_server: EmbeddedServer) -> Iterator[Proxy]:
    assert own_server.port is not None
    proxy = Proxy(own_server.port)
    yield proxy
    proxy.close()


def use_twice(pool: Any) -> None:
    """The next 2 x IDLE checkouts with a query: one at a time, then held together."""
    for _ in range(IDLE):
        conn = pool.getconn()
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)
    conns = [pool.getconn() for _ in range(IDLE)]
    for conn in conns:
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_a_restart_costs_users_of_idle_connections_no_error(
    own_server: EmbeddedServer, full_pool: Any, how: signal.Signals, over: str
) -> None:
    dsn = own_server.dsn if over == "unix" else f"{own_server.dsn} host=127.0.0.1"
    pool = full_pool(dsn)
    own_server.halt(how)
    own_server.launch()
    use_twice(pool)
    assert pool.get_stats()["connections_lost"] == IDLE


@pytest.mark.parametrize("share", [1, 2])
def test_terminated_backends_cost_no_error(own_server: EmbeddedServer, full_pool: Any, share: int) -> None:
    pool = full_pool(f"{own_server.dsn} application_name=shot")
    outside = Outside(f"{own_server.dsn} application_name=shot")
    outside.terminate(*sorted(outside.backends())[: IDLE // share])
    use_twice(pool)
    outside.conn.close()


@pytest.mark.parametrize("fault", ["fin", "rst"])
def test_a_wire_that_breaks_costs_no_error(
    own_server: EmbeddedServer, full_pool: Any, proxy: Proxy, fault: str
) -> None:
    pool = full_pool(proxy.dsn(own_server.dsn))
    getattr(proxy, fault)()
    # A socket ends when the proxy's thread has left its select.
    eventually(lambda: all(entry.look(0) for entry in pool._parked.values()))
    use_twice(pool)


def test_the_first_checkout_after_all_died_takes_little_more_than_a_connect(
    own_server: EmbeddedServer, full_pool: Any
) -> None:
    """Counted, not timed: one connect, no ping, and every dead connection is found at once."""
    pool = full_pool(f"{own_server.dsn} application_name=shot")
    outside = Outside(f"{own_server.dsn} application_name=shot")
    outside.terminate()
    pool.putconn(pool.getconn())
    stats = pool.get_stats()
    assert (stats["connections_num"], stats["connections_lost"]) == (IDLE + 1, IDLE)
    outside.conn.close()


def test_a_notify_that_waits_is_not_death(own_server: EmbeddedServer, full_pool: Any) -> None:
    pool = full_pool()
    conns = [pool.getconn() for _ in range(IDLE)]
    pids = {conn.info.backend_pid for conn in conns}
    for conn in conns:
        run(conn, "LISTEN news")
        conn.commit()
        pool.putconn(conn)
    outside = Outside(own_server.dsn)
    outside.query("NOTIFY news")
    outside.conn.close()
    time.sleep(0.05)  # real time: the notifications travel
    pool.run_maintenance(time.monotonic())
    conns = [pool.getconn() for _ in range(IDLE)]
    assert {conn.info.backend_pid for conn in conns} == pids
    for conn in conns:
        pool.putconn(conn)


def test_the_timer_finds_dead_connections_before_a_user_does(own_server: EmbeddedServer, full_pool: Any) -> None:
    pool = full_pool(f"{own_server.dsn} application_name=shot")
    outside = Outside(f"{own_server.dsn} application_name=shot")
    before = outside.backends()
    outside.terminate()
    eventually(lambda: pool.run_maintenance(time.monotonic()) and len(outside.backends()) == IDLE)
    assert not outside.backends() & before
    outside.conn.close()


def test_a_primary_that_became_a_standby_is_left(own_server: EmbeddedServer, full_pool: Any, proxy: Proxy) -> None:
    """No real server tells this without a restart; a pooler in between passes it on."""
    pool = full_pool(proxy.dsn(own_server.dsn))
    status = b"in_hot_standby\0on\0"
    proxy.inject(b"S" + (4 + len(status)).to_bytes(4, "big") + status)  # ParameterStatus
    time.sleep(0.05)  # real time: the message travels
    use_twice(pool)
    assert pool.get_stats()["connections_lost"] == IDLE


class TestSilence:
    """What the socket does not tell: the ping after `check_idle` finds it, in bounded time."""

    @pytest.fixture(autouse=True)
    def short_ping(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("zpgpool.core.entry.PING", 0.3)

    def test_a_flow_that_the_network_forgot(self, own_server: EmbeddedServer, full_pool: Any, proxy: Proxy) -> None:
        pool = full_pool(proxy.dsn(own_server.dsn), check_idle=0)
        proxy.forget()
        use_twice(pool)

    @pytest.mark.hangs
    def test_a_peer_that_is_silent_for_ever(self, own_server: EmbeddedServer, full_pool: Any, proxy: Proxy) -> None:
        pool = full_pool(f"{proxy.dsn(own_server.dsn)} connect_timeout=2", check_idle=0.05)
        busy = pool.getconn()
        time.sleep(0.06)  # real time: they rest
        proxy.is_forwarding = False
        start = time.monotonic()
        waiter = Call(pool.getconn)
        # Meanwhile others are not delayed.
        assert is_within(time.monotonic() - start, 0.2)
        with pytest.raises(psycopg2.OperationalError):  # the connect's own error: its deadline is the DSN's
            waiter.result()
        seconds = time.monotonic() - start
        assert seconds >= 0.3
        assert is_within(seconds, 4)
        pool.putconn(busy, close=True)
        eventually(lambda: not pool._connections.opener.under_way)  # another connect began while the first one hung
        proxy.is_forwarding = True
        pool._connections.backoff.succeeded()
        use_twice(pool)

    def test_a_peer_that_is_silent_on_old_flows_only(
        self, own_server: EmbeddedServer, full_pool: Any, proxy: Proxy
    ) -> None:
        pool = full_pool(proxy.dsn(own_server.dsn), check_idle=0)
        old, proxy._pairs = proxy._pairs, []
        start = time.monotonic()
        conn = pool.getconn()
        assert run(conn, "SELECT 1") == 1
        assert is_within(time.monotonic() - start, 0.3 + 1)
        pool.putconn(conn)
        use_twice(pool)
        proxy._pairs += old

    def test_a_ping_leaves_the_session_as_configured(
        self, own_server: EmbeddedServer, full_pool: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("zpgpool.core.entry.PING", 20.0)  # none shall fail
        pool = full_pool(check_idle=0, isolation_level="serializable", readonly=True)
        for _ in range(3):
            conn = pool.getconn()
            assert conn.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
            assert not conn.autocommit
            assert run(conn, "SHOW transaction_isolation") == "serializable"
            assert run(conn, "SHOW transaction_read_only") == "on"
            pool.putconn(conn)
        assert pool.get_stats()["connections_num"] == IDLE


class TestCheck:
    def test_a_check_of_the_users_own_refuses_connections(self, own_server: EmbeddedServer, full_pool: Any) -> None:
        refused: list[int] = []

        def check(conn: Any) -> None:
            run(conn, "SELECT 1")
            if is_strict and len(refused) < 3:
                refused.append(conn.info.backend_pid)
                raise RuntimeError("not this one")

        is_strict = False
        pool = full_pool(check=check)
        for conn in [pool.getconn() for _ in range(IDLE)]:  # the first user's check was when it was opened
            pool.putconn(conn)
        is_strict = True
        conn = pool.getconn()
        assert len(refused) == 3
        assert conn.info.backend_pid not in refused
        assert conn.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE  # although check began one
        pool.putconn(conn)


class TestLifetime:
    def test_is_judged_at_checkout_return_and_prune(
        self, own_server: EmbeddedServer, full_pool: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from test_contract import shift_time

        pool = full_pool(max_lifetime=100)
        held = pool.getconn()
        held_pid = held.info.backend_pid
        shift_time(monkeypatch, 94.9)  # jitter takes 5 % at the most
        conn = pool.getconn()
        pool.putconn(conn)
        assert not conn.closed
        shift_time(monkeypatch, 6)
        fresh = pool.getconn()
        assert pool.get_stats()["connections_num"] == IDLE + 1
        pool.putconn(held)
        assert held.closed
        eventually(lambda: pool.get_stats()["pool_size"] == 1)  # other threads close what is too old
        pool.prune()
        assert pool.get_stats()["connections_num"] == IDLE + IDLE  # all but the fresh one
        assert fresh.info.backend_pid != held_pid
        pool.putconn(fresh)

    def test_drain_replaces_all(self, own_server: EmbeddedServer, full_pool: Any) -> None:
        pool = full_pool()
        held = pool.getconn()
        pool.drain()
        assert pool.get_stats()["pool_available"] == 0
        assert run(held, "SELECT 1") == 1
        pool.putconn(held)
        assert held.closed
        use_twice(pool)

    def test_drain_reaches_a_connect_that_is_under_way(self, own_server: EmbeddedServer, full_pool: Any) -> None:
        pools: list[Any] = []

        def drain(conn: Any) -> None:
            if pools:
                pools[0].drain()

        pool = full_pool(configure=drain)
        pool.drain()
        pools.append(pool)
        conn = pool.getconn()
        pool.putconn(conn)
        assert conn.closed

    def test_resize(self, own_server: EmbeddedServer, full_pool: Any) -> None:
        pool = full_pool()
        conns = [pool.getconn() for _ in range(6)]
        pool.resize(1, 3)
        assert pool.get_stats()["pool_size"] == 6  # the two idle ones are gone
        for conn in conns:
            pool.putconn(conn)
        assert pool.get_stats()["pool_size"] == 3
        pool.resize(5, 6)
        assert (pool.minconn, pool.maxconn) == (5, 6)
        assert pool.get_stats()["pool_size"] == 5
        with pytest.raises(ValueError, match="maxconn"):
            pool.resize(2, 1)


def test_more_room_serves_those_who_wait(own_server: EmbeddedServer) -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, own_server.dsn, timeout=20)
    held = pool.getconn()
    waiter = Call(pool.getconn)
    eventually(lambda: pool.get_stats()["requests_waiting"])
    pool.resize(0, 2)
    pool.putconn(waiter.result(5))
    pool.putconn(held)
    pool.closeall()


class TestServerDown:
    @pytest.fixture
    def wall(self) -> Iterator[socket.socket]:
        """A server that takes connections and never says a word."""
        with socket.create_server(("127.0.0.1", 0), backlog=50) as wall:
            yield wall

    @pytest.mark.hangs
    def test_one_thread_connects_at_a_time_the_others_get_the_original_error(self, wall: socket.socket) -> None:
        port = wall.getsockname()[1]
        connects: list[float] = []

        class Counting(psycopg2.extensions.connection):
            def __init__(self, *args: Any) -> None:
                connects.append(time.monotonic())
                super().__init__(*args)

        pool = zpgpool.ThreadedConnectionPool(
            0, 4, host="127.0.0.1", port=port, connect_timeout=2, timeout=30, connection_factory=Counting
        )
        start = time.monotonic()
        errors = []

        def ask() -> float:
            with pytest.raises(psycopg2.OperationalError) as caught:
                pool.getconn()
            errors.append(caught.value)
            return time.monotonic()

        ends = [call.result() for call in [Call(ask) for _ in range(4)]]
        # One at a time; one that hangs holds up the next one for a second.
        assert all(later - earlier > 0.5 for earlier, later in itertools.pairwise(connects))
        assert is_within(max(ends) - min(ends), 0.1)
        assert is_within(max(ends) - start, 3)
        assert len({str(error) for error in errors}) == 1
        assert len({id(error) for error in errors}) == 4
        pool.closeall()

    def test_back_up_it_serves_within_one_backoff_step(self, own_server: EmbeddedServer) -> None:
        pool = zpgpool.ThreadedConnectionPool(2, 4, own_server.dsn, idle_timeout=60, timeout=5)
        own_server.halt()
        for _ in range(20):
            with pytest.raises(psycopg2.OperationalError):
                pool.getconn()
            time.sleep(0.02)  # real time: the pauses between two tries grow
        assert pool.get_stats()["connections_errors"] < 10
        assert "failed" in str(pool.last_connect_error)
        own_server.launch()
        back = time.monotonic()

        def ask() -> Any:
            try:
                return pool.getconn()
            except psycopg2.OperationalError:
                return None

        conn = eventually(ask)
        assert is_within(time.monotonic() - back, 1.2)
        assert pool.last_connect_error is None
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)
        stats = pool.get_stats()
        assert stats["connections_num"] - stats["connections_errors"] <= 2 + 4
        pool.closeall()

    def test_the_timer_refills_when_it_is_back(
        self, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = zpgpool.ThreadedConnectionPool(2, 4, own_server.dsn, idle_timeout=60)
        own_server.halt()
        eventually(lambda: pool.run_maintenance(time.monotonic()) and "cannot connect" in caplog.text)
        eventually(lambda: pool.get_stats()["pool_size"] == 0)
        own_server.launch()
        eventually(lambda: pool.run_maintenance(time.monotonic()) and pool.get_stats()["pool_size"] == 2, 3)
        pool.closeall()

    def test_a_timeout_has_the_last_error_of_a_connect_as_its_cause(self, own_server: EmbeddedServer) -> None:
        pool = zpgpool.ThreadedConnectionPool(0, 2, own_server.dsn, timeout=0.2)
        held = pool.getconn(timeout=20)
        for _ in range(6):  # until the pause between two tries is longer than the timeout
            pool._connections.backoff.failed(psycopg2.OperationalError("no more"))
        with pytest.raises(zpgpool.PoolTimeout) as caught:
            pool.getconn()
        assert str(caught.value.__cause__) == "no more"
        pool.putconn(held)
        pool.closeall()
