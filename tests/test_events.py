"""Events: what is told, once each, under no lock, and to whom nothing is lost."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
import zope.event
from psycopg2.extensions import make_dsn
from zope.component import adapter
from zope.component import provideHandler
from zope.interface.verify import verifyObject

import zpgpool
from conftest import eventually
from conftest import in_thread
from conftest import KINDS
from conftest import Outside
from conftest import run
from zpgpool import interfaces
from zpgpool.events import PoolEvent


MakePool = Callable[..., Any]


@pytest.fixture
def told() -> Iterator[list[Any]]:
    """The pool events of this test."""
    events: list[Any] = []

    def note(event: object) -> None:
        if isinstance(event, PoolEvent):
            events.append(event)

    zope.event.subscribers.append(note)
    yield events
    zope.event.subscribers.remove(note)


def of(events: list[Any], interface: Any) -> list[Any]:
    found = [event for event in events if interface.providedBy(event)]
    assert all(verifyObject(interface, event) for event in found)
    return found


def test_a_connection_opens_and_closes_once(make_pool: MakePool, told: list[Any]) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
    for _ in range(10):
        conn = pool.getconn()
        pid = conn.info.backend_pid
        pool.putconn(conn)
    [opened] = told
    assert of(told, interfaces.IConnectionOpened) == [opened]
    assert (opened.pool, opened.backend_pid) == (pool, pid)
    assert 0 < opened.seconds < 20
    pool.close()
    [closed] = of(told, interfaces.IConnectionClosed)
    assert (closed.pool, closed.backend_pid, closed.reason) == (pool, pid, "the pool is closed")


@pytest.mark.parametrize("factory", [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool])
def test_each_has_its_reason(factory: Any, make_pool: MakePool, told: list[Any], outside: Outside) -> None:
    # With a key, where there are any: without one it would belong to whoever refers to it.
    keys = ["key"] if factory is zpgpool.ThreadedConnectionPool else []
    pool = make_pool(factory, idle_timeout=60, max_lifetime=3600)
    pool._timer = None
    pool.putconn(pool.getconn(), close=True)
    pool.putconn(pool.getconn())
    outside.terminate()
    pool.putconn(pool.getconn())
    pool.run_maintenance(time.monotonic() + 61)
    eventually(lambda: len(of(told, interfaces.IConnectionClosed)) == 3)
    conn = pool.getconn()
    conn.close()
    pool.putconn(conn)
    pool.putconn(pool.getconn())
    pool.drain()
    in_thread(lambda: setattr(pool, "kept", pool.getconn(*keys)))
    pool.run_maintenance(time.monotonic())
    eventually(lambda: len(of(told, interfaces.IConnectionClosed)) == 6)
    conn = pool.getconn()
    pool.detach(conn)
    conn.close()
    assert [event.reason for event in of(told, interfaces.IConnectionClosed)] == [
        "its user asked for it",
        "the server has gone",
        "idle for too long",
        "it could not be made clean",
        "drained",
        "its thread has ended",
        "its user detached it",
    ]
    assert len(of(told, interfaces.IConnectionOpened)) == 7


def test_a_connect_that_fails(dsn: str, told: list[Any]) -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, make_dsn(dsn, dbname="nowhere"), open=False)
    with pytest.raises(psycopg2.OperationalError) as caught:
        pool.getconn()
    [event] = of(told, interfaces.IConnectFailed)
    assert event.error is caught.value
    assert 0 < event.seconds < 20
    eventually(lambda: pool.get_stats()["pool_size"] == 0)  # the waiter is told first


def test_who_may_not_wait_waits_for_those_who_are_told_first(make_pool: MakePool) -> None:
    """Real time: a slow subscriber, and a connection that is open already, but nobody's yet."""

    def take_time(event: object) -> None:
        if interfaces.IConnectionOpened.providedBy(event):
            time.sleep(0.3)

    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=0)
    zope.event.subscribers.append(take_time)
    try:
        pool.putconn(pool.getconn())
    finally:
        zope.event.subscribers.remove(take_time)


def test_a_hook_that_fails_is_no_connect_that_does(make_pool: MakePool, told: list[Any]) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, configure=lambda conn: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.getconn()
    assert told == []


def test_a_request_that_waited_too_long(make_pool: MakePool, told: list[Any]) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=0.05)
    conn = pool.getconn(timeout=20)
    with pytest.raises(zpgpool.PoolTimeout) as caught:
        pool.getconn()
    [event] = of(told, interfaces.IRequestTimedOut)
    assert event.error is caught.value
    assert event.seconds >= 0.05
    pool.putconn(conn)


def test_a_request_that_finds_too_many_waiting(make_pool: MakePool, told: list[Any]) -> None:
    """The holders are looked up once a second: an overload refuses thousands in that time."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=5, max_waiting=0)
    with pool.connection(), zpgpool.task("the import"):
        for _ in range(2):
            with pytest.raises(zpgpool.TooManyRequests, match=r"Held by .* \(the import, ") as caught:
                pool.getconn()
        until = pool._held_until
        with pytest.raises(zpgpool.TooManyRequests):
            pool.getconn()
        assert pool._held_until == until
    assert of(told, interfaces.IRequestRefused)[1].error is caught.value


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("close", [False, True])
def test_a_connection_that_is_lost_in_use(
    make_pool: MakePool, told: list[Any], outside: Outside, kind: Any, close: bool
) -> None:
    pool = make_pool(kind, 0, 1, idle_timeout=60)
    conn = pool.getconn()
    outside.terminate(conn.info.backend_pid)
    with pytest.raises(psycopg2.Error):
        run(conn, "SELECT 1")
    pool.putconn(conn, close=close)
    [event] = of(told, interfaces.IConnectionClosed)
    assert event.reason == "the server has gone"
    stats = pool.get_stats()
    assert (stats["returns_bad"], stats["connections_lost"]) == (1, 0)


def test_each_of_several_that_are_lost_is_told(make_pool: MakePool, told: list[Any], outside: Outside) -> None:
    """The first drains the pool; the others were lost all the same."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 3, idle_timeout=60)
    conns = [pool.getconn() for _ in range(3)]
    outside.terminate(*(conn.info.backend_pid for conn in conns))
    for conn in conns:
        with pytest.raises(psycopg2.Error):
            run(conn, "SELECT 1")
        pool.putconn(conn)
    assert [event.reason for event in of(told, interfaces.IConnectionClosed)] == ["the server has gone"] * 3
    assert pool.get_stats()["returns_bad"] == 3


def test_an_outage_goes_on_while_check_refuses_the_server(make_pool: MakePool, told: list[Any], dsn: str) -> None:
    is_well, targets = False, [f"{dsn} port=1", dsn]

    def check(conn: Any) -> None:
        assert is_well, "a standby"

    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, dsn=lambda: targets[0], check=check, open=False)
    for _ in range(2):
        with pytest.raises(psycopg2.OperationalError):
            pool.getconn()
        del targets[:-1]
        eventually(lambda: not pool._connections.backoff.is_on)
    assert len(of(told, interfaces.IOutageBegan)) == 1
    assert of(told, interfaces.IOutageEnded) == []
    is_well = True
    pool.putconn(pool.getconn())
    assert len(of(told, interfaces.IOutageEnded)) == 1


def test_a_leak_is_told_once(make_pool: MakePool, told: list[Any]) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, leak_after=5)
    pool._timer = None
    pid = pool.getconn().info.backend_pid
    for seconds in (4, 6, 8):
        pool.run_maintenance(time.monotonic() + seconds)
    [event] = of(told, interfaces.IConnectionLeaked)
    assert event.holder.backend_pid == pid
    pool.putconn()


def test_a_subscriber_may_use_the_pool_from_any_thread(make_pool: MakePool) -> None:
    """None is told under a lock: another thread takes that during the call."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60, timeout=1, leak_after=1)
    pool._timer = None
    calls: list[str] = []
    is_inner = threading.Event()

    def use(event: object) -> None:
        if not isinstance(event, PoolEvent) or is_inner.is_set():
            return

        def work() -> None:
            pool.get_stats()
            pool.holders()
            pool.resize(0, 3)
            try:
                run(pool.getconn(type(event).__name__), "SELECT 1")
                pool.putconn(key=type(event).__name__)
            except zpgpool.PoolError:
                pass

        is_inner.set()  # what this brings about needs no events of its own, in whichever thread
        in_thread(work)
        is_inner.clear()
        calls.append(type(event).__name__)

    zope.event.subscribers.append(use)
    try:
        held = [pool.getconn(timeout=20) for _ in range(3)]
        with pytest.raises(zpgpool.PoolTimeout):
            pool.getconn()
        pool.run_maintenance(time.monotonic() + 2)
        pool.putconn(held.pop(), close=True)
        pool.close(0)
    finally:
        zope.event.subscribers.remove(use)
    assert set(calls) == {"ConnectionOpened", "RequestTimedOut", "ConnectionLeaked", "ConnectionClosed"}


def test_a_subscriber_that_raises_loses_nothing(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture, outside: Outside
) -> None:
    def fail(event: object) -> None:
        if isinstance(event, PoolEvent):
            raise RuntimeError("not today")

    zope.event.subscribers.append(fail)
    try:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60)
        conns = [pool.getconn() for _ in range(2)]
        for conn in conns:
            pool.putconn(conn)
        pool.close()
    finally:
        zope.event.subscribers.remove(fail)
    assert pool.get_stats()["pool_size"] == 0
    eventually(lambda: not outside.backends())
    assert caplog.text.count("a subscriber of ConnectionOpened failed") == 2
    assert caplog.text.count("a subscriber of ConnectionClosed failed") == 2


def test_subscribers_registered_by_interface(make_pool: MakePool) -> None:
    import zope.component.event  # noqa: F401  (its import joins the registry to zope.event)

    found: list[Any] = []

    @adapter(interfaces.IConnectionOpened)  # type: ignore[untyped-decorator]
    def note(event: Any) -> None:
        found.append(event)

    provideHandler(note)
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    pool.putconn(pool.getconn())
    assert [event.pool for event in found] == [pool]


@pytest.mark.parametrize("factory", [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool])
def test_a_pool_that_closes_under_its_users_tells_it_once(make_pool: MakePool, told: list[Any], factory: Any) -> None:
    pool = make_pool(factory, 0, 3)
    conns = [pool.getconn() for _ in range(3)] if factory is zpgpool.ThreadedConnectionPool else [pool.getconn()]
    pool.closeall()
    for conn in conns:
        with pytest.raises(zpgpool.PoolError):
            pool.putconn(conn)
    assert len(of(told, interfaces.IConnectionClosed)) == len(conns)


def test_nothing_is_told_of_a_pool_that_is_gone(told: list[Any]) -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, open=False)
    notifier = pool._notifier
    del pool
    gc.collect()
    notifier.leaked(None)  # type: ignore[arg-type]
    notifier.cannot_connect(psycopg2.OperationalError(), 0.0)
    assert told == []
    assert str(notifier) == "None"
