"""A primary and its standby, real ones: the pool leaves a server that takes no writes, and moves as a whole."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from benchmarks.harness import free_port
from benchmarks.pair import OPTIONS
from benchmarks.pair import Pair

import zpgpool
from conftest import eventually
from conftest import is_within
from conftest import run
from serving import waitress
from zpgpool.core import is_demoted
from zpgpool.demo.server import EmbeddedServer
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


CLIENTS = 8


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.stop()


def make_app(pool: Any) -> PoolMiddleware:
    """Store the number that the path names."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        conn = get_connection(environ)
        run(conn, "INSERT INTO numbers VALUES (%s)", int(environ["PATH_INFO"].strip("/")))
        conn.commit()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        return [b"ok"]

    return PoolMiddleware(app, pool)


class Clients:
    """Threads that store one number after another, and note what they are answered, and when."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = itertools.count()
        self._is_over = False
        self.answers: list[tuple[float, float, int, int]] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while not self._is_over:
            number, start = next(self._numbers), time.monotonic()
            try:
                with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as conn:
                    conn.request("POST", f"/{number}")
                    response = conn.getresponse()
                    response.read()
                    status = response.status
            except OSError:
                status = 0
            self.answers.append((start, time.monotonic(), status, number))
            time.sleep(0.005 if status == 200 else 0.02)

    def stop(self) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("failovers", [2, pytest.param(10, marks=pytest.mark.slow)])  # four seconds each
def test_failovers_under_load(pair: Pair, caplog: pytest.LogCaptureFixture, failovers: int) -> None:
    """No acknowledged row is lost or doubled; errors only while there is no primary."""
    caplog.set_level("CRITICAL", "zpgpool")
    caplog.set_level("CRITICAL", "waitress")
    pair.ask(pair.primary, "CREATE TABLE numbers (number int PRIMARY KEY)")
    pair.attach()
    pool = zpgpool.PersistentConnectionPool(
        0, CLIENTS, f"{pair.dsn} connect_timeout=5", idle_timeout=60, timeout=10, prune_interval=0.5
    )
    outages: list[tuple[float, float]] = []
    first_successes: list[float] = []
    with waitress(make_app(pool), threads=CLIENTS) as port:
        clients = Clients(port)
        try:
            for _ in range(failovers):
                before = len(clients.answers)
                eventually(lambda: sum(answer[2] == 200 for answer in clients.answers[before:]) > 50, 20)  # noqa: B023
                began = time.monotonic()
                visible = pair.fail_over()
                eventually(lambda: [each for each in clients.answers if each[2] == 200 and each[1] > visible], 20)  # noqa: B023
                first = min(end for _, end, status, _ in clients.answers if status == 200 and end > visible)
                first_successes.append(first - visible)
                outages.append((began, max(first, visible) + 1.0))
                time.sleep(1.0)  # real time
                ports = {entry.conn.info.port for entry in pool._connections.handoff.slots if hasattr(entry, "conn")}
                assert ports <= {pair.primary.port}
                pair.attach()
        finally:
            clients.stop()
    assert is_within(max(first_successes), 1.0), first_successes
    stored = {number for (number,) in _rows(pair)}
    acknowledged = [number for _, _, status, number in clients.answers if status == 200]
    assert len(acknowledged) == len(set(acknowledged))
    assert set(acknowledged) <= stored
    for start, end, status, _ in clients.answers:
        if status != 200:
            assert any(start <= until and end >= began for began, until in outages), (status, start, end)
    pool.closeall()


def _rows(pair: Pair) -> list[tuple[int]]:
    with closing(psycopg2.connect(pair.primary.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT number FROM numbers")
        rows: list[tuple[int]] = cursor.fetchall()
        return rows


def test_a_server_that_refuses_writes_is_left_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By SQLSTATE 25006: sessions that live on while their server is made read-only, as before a planned move."""
    servers = [EmbeddedServer(tmp_path / name, port=free_port(), options=OPTIONS) for name in ("a", "b")]
    for server in servers:
        server.start()
        with closing(psycopg2.connect(server.dsn)) as conn:
            conn.autocommit = True
            run(conn, "CREATE TABLE numbers (number int PRIMARY KEY)")
    ports = ",".join(str(server.port) for server in servers)
    dsn = f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres target_session_attrs=read-write"
    pool = zpgpool.ThreadedConnectionPool(3, 4, dsn, idle_timeout=60)
    app = make_app(pool)

    def store(number: int) -> Any:
        return app({"REQUEST_METHOD": "POST", "PATH_INFO": f"/{number}"}, lambda *args: lambda data: None)

    try:
        store(1)
        with closing(psycopg2.connect(servers[0].dsn)) as conn:
            conn.autocommit = True
            run(conn, "ALTER SYSTEM SET default_transaction_read_only = on")
            run(conn, "SELECT pg_reload_conf()")
            eventually(lambda: run(conn, "SHOW default_transaction_read_only") == "on")
        time.sleep(0.1)  # real time: the other sessions read the file, too
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            store(2)
        assert "takes no writes any more" in caplog.text
        for number in (3, 4, 5):
            store(number)
        pool.run_maintenance(time.monotonic())
        eventually(lambda: pool.get_stats()["pool_available"] >= 3)
        assert {entry.conn.info.port for entry in pool._parked.values()} == {servers[1].port}
    finally:
        pool.closeall()
        for server in servers:
            server.stop()


@pytest.mark.parametrize("session", [{"readonly": True}, {"readonly": True, "autocommit": "safe"}, {}])
@pytest.mark.parametrize("sql", ["SET TRANSACTION READ ONLY", "SET default_transaction_read_only = on; COMMIT", None])
def test_who_forbade_writes_himself_leaves_nothing(
    make_pool: Callable[..., Any], session: dict[str, Any], sql: str | None
) -> None:
    """The server is asked whether it is a primary no longer: nobody else's connections are replaced."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 1, 2, idle_timeout=60, **session)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        conn = get_connection(environ)
        if sql is None:
            conn.readonly = True
        else:
            run(conn, sql)
        run(conn, "CREATE TABLE nowhere (number int)")
        return []

    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        PoolMiddleware(app, pool)({"REQUEST_METHOD": "POST"}, lambda *args: lambda data: None)
    assert pool.get_stats()["connections_num"] == 1
    assert pool.get_stats()["pool_size"] == 1


def test_a_connection_that_is_lost_tells_nothing(make_pool: Callable[..., Any]) -> None:
    with make_pool().connection() as conn:
        conn.close()
        assert is_demoted(conn) is False
