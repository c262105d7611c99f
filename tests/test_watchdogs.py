"""Watchdogs: who holds a connection too long loses it, and a query that nobody waits for is cancelled."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
import transaction
import zope.event

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import is_within
from conftest import Outside
from conftest import run
from serving import waitress
from zpgpool.core.watchdog import end_held_too_long
from zpgpool.datamanager import connection
from zpgpool.events import ConnectionLeaked
from zpgpool.request import Disconnects
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


MakePool = Callable[..., Any]

SHARED = [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool]


@pytest.fixture(params=SHARED)
def pool(request: pytest.FixtureRequest, make_pool: MakePool) -> Any:
    pool = make_pool(request.param, 0, 1, idle_timeout=60, hold_limit=10, timeout=5)
    pool._timer = None  # by the test
    return pool


class TestHoldLimit:
    def test_a_stuck_request_is_ended_and_the_pool_serves_on(
        self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        def sleep() -> None:
            with pool.connection() as conn:
                run(conn, "SELECT pg_sleep(60)")

        stuck = Call(sleep)
        eventually(lambda: outside.runs("SELECT pg_sleep(60)"))
        now = time.monotonic()
        assert pool.run_maintenance(now) <= now + 10  # comes again in time
        pool.run_maintenance(now + 9)
        assert stuck.is_running
        before = outside.backends()
        pool.run_maintenance(now + 11)
        with pytest.raises(psycopg2.Error):
            stuck.result(5)
        assert "held for over 10 s, and ended: thread" in caplog.text
        with pool.connection() as conn:
            assert run(conn, "SELECT 1") == 1
        eventually(lambda: not outside.backends() & before)

    def test_an_idle_holder_loses_its_connection_once(self, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
        conn = pool.getconn()
        now = time.monotonic()
        for seconds in (11, 12, 13):
            due = pool.run_maintenance(now + seconds)
            assert due > now + seconds  # it does not come again at once
        assert caplog.text.count("and ended") == 1
        with pytest.raises(psycopg2.Error):
            run(conn, "SELECT 1")
        pool.putconn(conn)
        with pool.connection() as other:
            assert run(other, "SELECT 1") == 1

    def test_whatever_a_subscriber_of_leaks_raises(self, pool: Any) -> None:
        def leave(event: object) -> None:
            if isinstance(event, ConnectionLeaked):
                raise SystemExit

        pool._apply(dataclasses.replace(pool.settings, leak_after=5.0))
        zope.event.subscribers.append(leave)
        conn = pool.getconn()
        with pytest.raises(SystemExit):
            pool.run_maintenance(time.monotonic() + 11)
        with pytest.raises(psycopg2.Error):
            run(conn, "SELECT 1")
        pool.putconn(conn)

    def test_a_drained_one_is_ended_too(self, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
        conn = pool.getconn()
        pool.drain()
        pool.run_maintenance(time.monotonic() + 11)
        assert "and ended" in caplog.text
        pool.putconn(conn)

    def test_who_returned_it_meanwhile_is_left_alone(
        self, pool: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        conn = pool.getconn()
        [(owner, entry)] = pool._users()
        expire_now = type(entry).expire_now

        def return_meanwhile(entry: Any) -> None:
            entry.since += 1
            expire_now(entry)

        monkeypatch.setattr(type(entry), "expire_now", return_meanwhile)
        end_held_too_long([(owner, entry)], pool.settings, pool._notifier, time.monotonic() + 11)
        assert "and ended" not in caplog.text
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)

    def test_a_joined_transaction_fails_its_vote(self, pool: Any) -> None:
        zpgpool.register_pool(pool)
        run(connection(), "SELECT 1")
        pool.run_maintenance(time.monotonic() + 11)
        with pytest.raises(psycopg2.Error):
            transaction.commit()
        transaction.abort()
        assert pool.holders() == []


class TestDisconnect:
    def leave(self, port: int) -> None:
        """Ask, and go without waiting for the answer."""
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.3)  # real time: the query runs by then

    @pytest.mark.parametrize("factory", SHARED)
    @pytest.mark.parametrize("is_joined", [False, True])
    def test_a_client_that_leaves_frees_the_backend(
        self, make_pool: MakePool, outside: Outside, factory: Any, is_joined: bool
    ) -> None:
        pool = make_pool(factory, 0, 2, idle_timeout=60)
        zpgpool.register_pool(pool)
        ended: list[Any] = []

        def app(environ: Any, start_response: Any) -> list[bytes]:
            conn = connection() if is_joined else get_connection(environ)
            try:
                run(conn, "SELECT pg_sleep(60)")
            except psycopg2.Error as error:
                ended.append(error)
            transaction.abort()
            start_response("200 OK", [])
            return []

        middleware = PoolMiddleware(app, pool, cancel_on_disconnect=True)
        with waitress(middleware, threads=2, channel_request_lookahead=1) as port:
            self.leave(port)
            left = time.monotonic()
            eventually(lambda: ended, 5)
            assert is_within(time.monotonic() - left, 2)
            eventually(lambda: not [pid for pid in outside.backends() if outside.state(pid) == "active"])
            eventually(lambda: pool.holders() == [])
        assert isinstance(ended[0], psycopg2.errors.QueryCanceled)
        with pool.connection() as conn:
            assert run(conn, "SELECT 1") == 1

    def test_who_stays_is_answered(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60)
        has_gone: list[bool] = []

        def app(environ: Any, start_response: Any) -> list[bytes]:
            middleware._disconnects.run_maintenance(0.0)  # type: ignore[union-attr]
            has_gone.append(environ["waitress.client_disconnected"]())
            start_response("200 OK", [])
            return [str(run(get_connection(environ), "SELECT 1")).encode()]

        middleware = PoolMiddleware(app, pool, cancel_on_disconnect=True)
        environ = {"REQUEST_METHOD": "GET", "waitress.client_disconnected": lambda: False}
        assert middleware(environ, lambda *args: lambda data: None) == [b"1"]
        assert middleware(environ, lambda *args: lambda data: None) == [b"1"]
        assert has_gone == [False, False]
        disconnects = middleware._disconnects
        assert isinstance(disconnects, Disconnects)
        disconnects.run_maintenance(0.0)
        assert not disconnects._leases

    def test_a_server_that_cannot_tell(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60)
        middleware = PoolMiddleware(lambda environ, start: [b"ok"], pool, cancel_on_disconnect=True)
        assert middleware({"REQUEST_METHOD": "GET"}, lambda *args: lambda data: None) == [b"ok"]

    def test_a_connection_that_is_not_in_use(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        conn = pool.getconn()
        assert pool.cancel(conn) is False
        pool.putconn(conn)
        assert in_thread(pool.cancel, conn) is False
