"""A pool that was written from `zpgpool.interfaces` alone: the doors work with it, and type checkers accept it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
import transaction
from psycopg2.extensions import connection as Connection
from webtest import TestApp
from zope.interface import implementer
from zope.interface.interface import InterfaceClass
from zope.interface.interface import Method
from zope.interface.verify import verifyObject

import zpgpool
from conftest import run
from zpgpool import interfaces
from zpgpool import types
from zpgpool.datamanager import get_connection as get_transactions_connection
from zpgpool.interfaces import ICheckout
from zpgpool.interfaces import IConnectionPool
from zpgpool.metrics import PoolCollector
from zpgpool.status import StatusApp
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


@implementer(ICheckout)
class PlainCheckout:
    def __init__(self, pool: PlainPool, conn: Connection) -> None:
        self.conn = conn
        self._pool = pool
        self._is_back = False

    def putconn(self, close: bool = False) -> None:
        if not self._is_back:
            self._is_back = True
            self._pool.give_back(self.conn, close)


@implementer(IConnectionPool)
class PlainPool:
    """A stack of connections behind a lock. It knows nothing of this package but the interface."""

    name = "plain"
    minconn = 0
    maxconn = 4

    def __init__(self, dsn: str) -> None:
        self.closed = False
        self._dsn = dsn
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._used: list[Connection] = []
        self._checked_out: list[Connection] = []

    def getconn(self, *, timeout: float | None = None) -> Connection:
        with self._lock:
            conn = self._idle.pop() if self._idle else psycopg2.connect(self._dsn)
            self._used.append(conn)
            return conn

    def putconn(self, conn: Connection, *, close: bool = False) -> None:
        if any(conn is each for each in self._checked_out):
            return
        self.give_back(conn, close)

    def give_back(self, conn: Connection, close: bool) -> None:
        with self._lock:
            self._used = [each for each in self._used if each is not conn]
            self._checked_out = [each for each in self._checked_out if each is not conn]
            if close or conn.closed:
                conn.close()
            else:
                conn.rollback()
                self._idle.append(conn)

    @contextmanager
    def connection(self, *, timeout: float | None = None) -> Iterator[Connection]:
        conn = self.getconn(timeout=timeout)
        try:
            yield conn
        finally:
            self.putconn(conn)

    def checkout(self, conn: Connection | None = None) -> PlainCheckout:
        conn = self.getconn() if conn is None else conn
        self._checked_out.append(conn)
        return PlainCheckout(self, conn)

    def open(self) -> None:
        pass

    def wait(self, timeout: float = 30.0) -> None:
        self.putconn(self.getconn())

    def prune(self) -> None:
        pass

    def closeall(self) -> None:
        self.close(0)

    def close(self, timeout: float = 5.0) -> None:
        self.closed = True
        for conn in [*self._idle, *self._used]:
            conn.close()

    def get_stats(self) -> dict[str, int]:
        sizes = {"pool_min": 0, "pool_max": 4, "pool_size": len(self._idle) + len(self._used)}
        counters = ["requests_num", "requests_queued", "requests_wait_ms", "requests_errors", "requests_waiting"]
        counters += ["returns_bad", "connections_num", "connections_ms", "connections_errors", "connections_lost"]
        return {**dict.fromkeys(counters, 0), **sizes, "pool_available": len(self._idle)}


@pytest.fixture
def pool(dsn: str) -> Iterator[PlainPool]:
    pool = PlainPool(dsn)
    zpgpool.register_pool(pool)
    yield pool
    pool.close()


def test_provides_what_users_need(pool: PlainPool) -> None:
    assert verifyObject(IConnectionPool, pool)
    assert verifyObject(ICheckout, pool.checkout())
    found: object = zpgpool.get_pool()
    assert found is pool


def test_with_the_middleware(pool: PlainPool) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"%d" % run(get_connection(environ), "SELECT 41 + 1")]

    client = TestApp(PoolMiddleware(app, cancel_on_disconnect=True))
    assert client.get("/").text == client.get("/").text == "42"
    assert pool.get_stats()["pool_size"] == pool.get_stats()["pool_available"] == 1


def test_is_left_out_as_a_replica(
    pool: PlainPool, make_pool: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    zpgpool.register_pool(pool, "plain")
    main = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, replica="plain", application_name="main")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [run(get_connection(environ), "SELECT current_setting('application_name')").encode()]

    assert TestApp(PoolMiddleware(app, main)).get("/").text == "main"
    assert "PlainPool does not provide IPoolInternals, as a replica's pool must" in caplog.text


def test_with_the_data_manager_in_a_request_and_without(pool: PlainPool) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        with transaction.manager:
            conn = get_transactions_connection()
            assert get_connection(environ) is conn
            run(conn, "CREATE TEMPORARY TABLE theirs AS SELECT 1")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"%d" % run(conn, "SELECT count(*) FROM theirs")]

    assert TestApp(PoolMiddleware(app)).get("/").text == "1"
    with transaction.manager:
        run(get_transactions_connection(), "SELECT 1")
    assert pool.get_stats()["pool_size"] == pool.get_stats()["pool_available"] == 1


def test_with_the_status_page_and_the_metrics(pool: PlainPool) -> None:
    pool.putconn(pool.getconn())
    page = TestApp(StatusApp(), extra_environ={"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost"})
    assert "PlainPool" in page.get("/", headers={"Accept": "text/html"}).text
    [shown] = page.get("/json").json["pools"]
    assert (shown["kind"], shown["size"], shown["idle"], shown["holders"]) == ("PlainPool", 1, 1, [])
    assert {metric.name for metric in PoolCollector().collect()} >= {"db_client_connection_count"}


def test_a_type_checker_accepts_it(pool: PlainPool) -> None:
    accepted: types.Pool = pool
    ours: list[types.ObservedPool] = [zpgpool.PersistentConnectionPool(0, 1, open=False)]
    kept: list[types.PersistentPool] = [zpgpool.PersistentConnectionPool(0, 1, open=False)]
    assert len([accepted, *ours, *kept]) == 3


PAIRS = [
    (interfaces.IConnectionPool, types.Pool),
    (interfaces.ICheckout, types.Checkout),
    (interfaces.IPersistentConnectionPool, types.PersistentPool),
    (interfaces.IPoolManagement, types.ManagedPool),
    (interfaces.IPoolInternals, types.ObservedPool),
    (interfaces.IHolder, types.Holder),
    (interfaces.IWaiter, types.Waiter),
]


@pytest.mark.parametrize(("interface", "protocol"), PAIRS)
def test_the_contracts_for_type_checkers_are_those_of_the_interfaces(interface: InterfaceClass, protocol: type) -> None:
    for name, element in interface.namesAndDescriptions():
        member = inspect.getattr_static(protocol, name)
        if isinstance(element, Method):
            parameters = list(inspect.signature(member).parameters)
            assert [each for each in parameters if each in element.positional] == list(element.positional), name
        else:
            assert isinstance(member, property), name


def test_what_is_private_to_transaction_is_as_we_know_it() -> None:
    """A canary: `zpgpool.datamanager` reads these two, which `transaction` gives no other way to tell."""

    class Resource:
        transaction_manager = None

        def sortKey(self) -> str:
            return "x"

        def tpc_begin(self, txn: Any) -> None:
            pass

        commit = tpc_finish = tpc_abort = abort = tpc_begin

        def tpc_vote(self, txn: Any) -> None:
            seen.append((list(txn._resources), dict(txn._voted)))

    seen: list[Any] = []
    first, second = Resource(), Resource()
    with transaction.TransactionManager() as txn:
        txn.join(first)
        txn.join(second)
    assert [set(map(id, resources)) for resources, _ in seen] == [{id(first), id(second)}] * 2
    assert [sum(votes.values()) for _, votes in seen] == [0, 1]
