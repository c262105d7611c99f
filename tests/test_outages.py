"""The server goes away, and comes back: what a site's clients notice of it."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg2
import pytest
import zope.event
from benchmarks.harness import free_port
from benchmarks.pair import OPTIONS
from benchmarks.pair import Pair
from psycopg2.extensions import make_dsn
from pyramid.config import Configurator
from pyramid.response import Response
from webtest import TestApp

import books
import outages
import zpgpool
from bouncer import PgBouncer
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import open_to_all
from conftest import run
from outages import Load
from proxy import Proxy
from serving import waitress
from test_zope import CONFIGURE
from test_zope import OVERRIDES
from test_zope import SCRIPT
from zope_instance import Instance
from zpgpool.core.outage import diagnose
from zpgpool.core.outage import Diagnosis
from zpgpool.core.outage import is_temporary
from zpgpool.core.probe import ask_why
from zpgpool.core.probe import NoAnswer
from zpgpool.demo.server import EmbeddedServer
from zpgpool.events import OutageBegan
from zpgpool.events import OutageEnded
from zpgpool.paste import filter_app_factory
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


THREADS = 4

#: How often each fault comes.
TIMES = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("outages") / "data", port=free_port(), options=OPTIONS) as server:
        yield server


@pytest.fixture
def server(made: EmbeddedServer) -> EmbeddedServer:
    """A server that runs, whatever a test before did to it, with an empty table."""
    if not made.is_running:
        made.launch()
    with closing(psycopg2.connect(made.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(f"{outages.TABLE}; TRUNCATE written; ALTER DATABASE postgres RESET ALL")
        conn.commit()
    return made


@pytest.fixture
def make_site(server: EmbeddedServer) -> Iterator[Callable[..., Any]]:
    """Make applications behind the filter with its defaults."""
    names: list[str] = []

    def make(make_app: Callable[[str], Any], **options: str) -> Any:
        names.append(f"site {len(names)}")
        return filter_app_factory(make_app(names[-1]), {}, dsn=server.dsn, name=names[-1], **options)

    yield make
    for name in names:
        zpgpool.get_pool(name).close(0)
        zpgpool.unregister_pool(name)


# Faults ---------------------------------------------------------------------------------------------------------------


def restart(server: EmbeddedServer, how: signal.Signals, seconds: float) -> None:
    server.halt(how)
    time.sleep(seconds)  # real time: for so long it is down
    server.launch()


def kill_a_backend(server: EmbeddedServer) -> None:
    """Kill one session's process: the server then ends all of them, and recovers."""
    with closing(psycopg2.connect(server.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid != pg_backend_pid()"
        )
        [(pid,), *_] = cursor.fetchall()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    eventually(server._answers)  # it is down until it has recovered


FAULTS: dict[str, Callable[[EmbeddedServer], None]] = {
    "restarted": lambda server: restart(server, signal.SIGINT, 3),
    "crashed": lambda server: restart(server, signal.SIGQUIT, 0),
    "backend killed": kill_a_backend,
}


def do(
    fault: str,
    server: EmbeddedServer,
    load: Load,
    times: int = TIMES,
    faults: dict[str, Callable[[EmbeddedServer], None]] = FAULTS,
    patience: float = 1.5,
) -> None:
    """Let the fault come under load, several times; no answer takes `patience` longer than it."""
    for _ in range(times):
        load.wait_for(50)
        began = time.monotonic()
        faults[fault](server)
        down = time.monotonic() - began
        load.wait_for(20)
        longest = max(request.seconds for request in load.requests if request.ended > began)
        assert is_within(longest, down + patience), (longest, down)


# Sites ----------------------------------------------------------------------------------------------------------------


def plain(name: str) -> Any:
    """An application that knows nothing of outages."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        conn, path = get_connection(environ, name), environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "GET":
            outages.read(conn, path)
        else:
            outages.write(conn, path)
            conn.commit()
        return outages.answer(start_response)

    return app


def with_run_transaction(name: str) -> Any:
    """An application that writes by `run_transaction`."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "GET":
            outages.read(get_connection(environ, name), path)
        else:
            zpgpool.get_pool(name).run_transaction(lambda conn: outages.write(conn, path))
        return outages.answer(start_response)

    return app


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["persistent", "threaded"])
@pytest.mark.parametrize("fault", FAULTS)
class TestASite:
    def test_loses_no_get(self, make_site: Any, server: EmbeddedServer, fault: str, kind: str) -> None:
        with waitress(make_site(plain, pool=kind), threads=THREADS) as port, Load(port) as load:
            do(fault, server, load)
        load.check_rows(server.dsn)
        assert load.failed("GET") == []
        assert len(load.failed("POST")) <= TIMES * THREADS

    def test_loses_nothing_with_run_transaction(
        self, make_site: Any, server: EmbeddedServer, fault: str, kind: str
    ) -> None:
        site = make_site(with_run_transaction, pool=kind, verify_commit="true")
        with waitress(site, threads=THREADS) as port, Load(port) as load:
            do(fault, server, load)
        load.check_rows(server.dsn)
        assert load.failed("GET") == load.failed("POST") == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_pyramid_site_loses_nothing(server: EmbeddedServer, fault: str) -> None:
    config = Configurator(
        settings={
            "zpgpool.dsn": server.dsn,
            "zpgpool.verify_commit": "true",
            "tm.manager_hook": "pyramid_tm.explicit_manager",
            "retry.attempts": 3,
        }
    )
    for each in ("pyramid_retry", "pyramid_tm", "zpgpool"):
        config.include(each)

    def view(request: Any) -> Response:
        (outages.read if request.method == "GET" else outages.write)(request.pgconn, request.path)
        return Response("done")

    config.add_route("all", "/*path")
    config.add_view(view, route_name="all")
    with waitress(config.make_wsgi_app(), threads=THREADS) as port, Load(port) as load:
        do(fault, server, load)
    load.check_rows(server.dsn)
    assert load.failed("GET") == load.failed("POST") == []
    zpgpool.get_pool("", config.registry).close(0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_zope_site_loses_nothing(server: EmbeddedServer, tmp_path: Path, fault: str) -> None:
    with closing(psycopg2.connect(server.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(books.SCHEMA)
        conn.commit()
    zope = Instance(tmp_path / "zope", server.dsn, CONFIGURE, OVERRIDES)
    zope.run_script(SCRIPT)
    zope.start()
    try:
        with Load(zope.port, "/outage") as load:
            do(fault, server, load)
    finally:
        zope.stop()
    load.check_rows(server.dsn)
    assert load.failed("GET") == load.failed("POST") == []


def test_a_backend_is_killed_once(make_site: Any, server: EmbeddedServer) -> None:
    """What the slow tests do five times each."""
    with waitress(make_site(plain), threads=THREADS) as port, Load(port) as load:
        do("backend killed", server, load, 1)
    load.check_rows(server.dsn)
    assert load.failed("GET") == []


@pytest.mark.slow
@pytest.mark.parametrize("make_app", [plain, with_run_transaction])
@pytest.mark.parametrize("fault", [*FAULTS, "PgBouncer restarted"])
def test_behind_pgbouncer(server: EmbeddedServer, tmp_path: Path, fault: str, make_app: Any) -> None:
    """It lets clients connect while it has no server: what a new connection says after a loss is not believed."""
    folder = tmp_path / "bouncer"
    folder.mkdir()
    open_to_all(folder)
    bouncer = PgBouncer(folder, server, "transaction")

    def restart_it(server: EmbeddedServer) -> None:
        bouncer.stop()
        bouncer.start()

    name = f"behind {fault}"
    site = filter_app_factory(make_app(name), {}, dsn=bouncer.dsn, name=name, verify_commit="true")
    try:
        with waitress(site, threads=THREADS) as port, Load(port) as load:
            do(fault, server, load, faults={**FAULTS, "PgBouncer restarted": restart_it}, patience=2.5)
        load.check_rows(server.dsn)
        assert load.failed("GET") == []
        assert len(load.failed("POST")) <= (TIMES * THREADS if make_app is plain else 0)
    finally:
        zpgpool.get_pool(name).close(0)
        zpgpool.unregister_pool(name)
        bouncer.stop()


@pytest.mark.slow
def test_a_failover_loses_no_get(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.ask(pair.primary, outages.TABLE)
    pair.attach()
    site = filter_app_factory(plain("failover"), {}, dsn=f"{pair.dsn} connect_timeout=5", name="failover")
    try:
        with waitress(site, threads=THREADS) as port, Load(port) as load:
            for _ in range(TIMES):
                load.wait_for(50)
                pair.fail_over()
                load.wait_for(20)
                pair.attach()
        load.check_rows(pair.primary.dsn)
        assert load.failed("GET") == []
    finally:
        zpgpool.get_pool("failover").close(0)
        zpgpool.unregister_pool("failover")
        pair.stop()


# Outages that go on ---------------------------------------------------------------------------------------------------


@pytest.fixture
def few_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Keep no records of thousands of failed requests: each keeps its frames, and the collector takes half a second."""
    caplog.set_level("CRITICAL", "zpgpool")
    caplog.set_level("CRITICAL", "waitress")


@pytest.mark.slow
@pytest.mark.usefixtures("few_logs")
def test_an_outage_of_forty_seconds(make_site: Any, server: EmbeddedServer, tmp_path: Path) -> None:
    """Real time: requests wait at its beginning, then they are refused at once."""

    def app(name: str) -> Any:
        serve = plain(name)

        def either(environ: Any, start_response: Any) -> Any:
            if environ["PATH_INFO"].startswith("/static"):
                return outages.answer(start_response)
            return serve(environ, start_response)

        return either

    site = make_site(app, outage_wait="5", max_waiting=str(THREADS - 1))
    static: list[float] = []
    with waitress(site, threads=THREADS) as port, Load(port) as load:
        load.wait_for(50)
        server.halt()
        gone = time.monotonic()
        listener = Listener(server)
        while time.monotonic() < gone + 40:
            begun = time.monotonic()
            assert load.ask("GET", "/static") == 200
            static.append(time.monotonic() - begun)
            time.sleep(0.05)
        listener.close()
        server.launch()
        back = time.monotonic()
        eventually(lambda: any(each.status == 200 and each.ended > back for each in list(load.requests)))
    late = [each for each in load.requests if gone + 6 < each.begun < back - 1]
    assert {each.status for each in late} == {503}
    times = sorted(each.seconds for each in late)
    assert is_within(times[len(times) * 99 // 100], 0.1)
    assert is_within(max(times[-1], *static), 1.0)  # the machine may stand still for a moment in these 40 seconds
    first = min(each.ended for each in load.requests if each.status == 200 and each.ended > back)
    assert is_within(first - back, 1.5)
    assert len([at for at in listener.connects if at > gone + 10]) <= 31


class Listener:
    """Counts the connects to a server that is down."""

    def __init__(self, server: EmbeddedServer) -> None:

        self.connects: list[float] = []
        self._path = server.sockets / f".s.PGSQL.{server.port}"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._path))
        self._socket.listen()
        os.chmod(self._path, 0o777)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.connects.append(time.monotonic())
            client.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        self._path.unlink()


def use(pool: Any) -> Any:
    with pool.connection() as conn:
        return run(conn, "SELECT 1")


def connects(dsn: str) -> bool:
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError:
        return False
    return True


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    events: list[Any] = []
    monkeypatch.setattr(zope.event, "subscribers", [events.append])
    return events


def test_what_is_no_outage_is_refused_at_once(server: EmbeddedServer) -> None:
    rules = server.data / "pg_hba.conf"
    rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    with closing(psycopg2.connect(server.dsn)) as conn:
        conn.autocommit = True
        run(conn, "CREATE ROLE guarded LOGIN PASSWORD 'right'")
        run(conn, "SELECT pg_reload_conf()")
    guarded = "host=127.0.0.1 user=guarded"
    eventually(lambda: not connects(f"{server.dsn} {guarded} password=wrong"))
    for wrong in (
        "dbname=nosuch",
        "user=nobody_here",
        "sslmode=require host=127.0.0.1",
        f"{guarded} password=wrong",
        guarded,
    ):
        with zpgpool.ThreadedConnectionPool(0, 2, f"{server.dsn} {wrong}", timeout=30, outage_wait=10) as pool:
            begun = time.monotonic()
            for _ in range(3):
                with pytest.raises(psycopg2.OperationalError):
                    pool.getconn()
            assert is_within(time.monotonic() - begun, 3)
            assert pool.outage_seconds is None


def test_a_server_with_too_many_clients_makes_wait(tmp_path: Path) -> None:
    few = OPTIONS | {"max_connections": "6", "superuser_reserved_connections": "0", "max_wal_senders": "0"}
    with EmbeddedServer(tmp_path / "data", port=free_port(), options=few) as server:
        with closing(psycopg2.connect(server.dsn)) as conn, conn.cursor() as cursor:
            cursor.execute("CREATE ROLE guest LOGIN")
            conn.commit()
        guest = server.dsn.replace("user=postgres", "user=guest")
        with zpgpool.ThreadedConnectionPool(0, 20, guest, timeout=30, idle_timeout=60) as pool:
            failed: list[BaseException] = []

            def work() -> None:
                for _ in range(20):
                    try:
                        with pool.connection() as conn:
                            run(conn, "SELECT pg_sleep(0.01)")
                    except psycopg2.Error as error:
                        failed.append(error)

            threads = [threading.Thread(target=work) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failed == []
            assert pool.get_stats()["connections_errors"] > 0
        held = [psycopg2.connect(guest) for _ in range(6)]
        with zpgpool.ThreadedConnectionPool(0, 2, guest, timeout=0.3) as pool:
            with pytest.raises(psycopg2.OperationalError, match="too many clients"):
                pool.getconn(timeout=0)  # first: it stays until the reason is known, however long that takes
            with pytest.raises(zpgpool.PoolTimeout, match=r"The server has too many clients \(53300\)"):
                pool.getconn()
        with zpgpool.ThreadedConnectionPool(0, 2, guest) as pool:
            with pytest.raises(psycopg2.OperationalError, match="too many clients"):
                pool.getconn()
        for conn in held:
            conn.close()


def test_a_refusal_that_is_over_when_it_is_asked_for_makes_wait(dsn: str) -> None:
    """Of a server with too many clients, one may leave before the connect that asks for the SQLSTATE."""
    with zpgpool.ThreadedConnectionPool(0, 2, dsn, timeout=20, idle_timeout=60) as pool:
        opener, refusals = pool._connections.opener, ["FATAL:  sorry, too many clients already"] * 3
        connect = opener._connect

        def refuse() -> Any:
            if refusals:
                raise psycopg2.OperationalError(refusals.pop())
            return connect()

        opener._connect = refuse
        pool.putconn(pool.getconn())
        assert pool.get_stats()["connections_errors"] == 3


@pytest.mark.parametrize("kind", [zpgpool.PersistentConnectionPool, zpgpool.SimpleConnectionPool])
def test_an_outage_is_told_of(
    server: EmbeddedServer, kind: Any, events: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    pool = kind(0, 2, server.dsn, timeout=1, outage_wait=60, idle_timeout=60)
    with pool.connection(timeout=20):
        assert pool.outage_seconds is None
    server.halt()
    with pytest.raises(zpgpool.PoolTimeout, match=r"The server cannot be reached for \d\.\d s\. Held by nobody"):
        pool.getconn()
    assert (pool.outage_seconds or 0) > 0.5
    assert "checkouts now wait for the server, up to 60 s" in caplog.text
    server.launch()
    with pool.connection(timeout=30):
        assert pool.outage_seconds is None
    assert "the server is back after " in caplog.text
    [began] = [event for event in events if isinstance(event, OutageBegan)]
    [ended] = [event for event in events if isinstance(event, OutageEnded)]
    assert began.pool is ended.pool is pool
    assert ended.seconds > 0.5
    pool.closeall()


def test_who_may_not_wait_for_others_waits_for_the_server(server: EmbeddedServer) -> None:
    with zpgpool.ThreadedConnectionPool(0, 2, server.dsn, outage_wait=60) as pool:
        server.halt()
        user = Call(use, pool)
        eventually(lambda: pool.outage_seconds is not None)
        assert user.is_running
        server.launch()
        assert user.result() == 1


def test_who_may_not_wait_is_told_the_servers_error_in_the_end(server: EmbeddedServer) -> None:
    with zpgpool.ThreadedConnectionPool(0, 2, server.dsn, outage_wait=0.2) as pool:
        server.halt()
        with pytest.raises(psycopg2.OperationalError, match="connection to server"):
            pool.getconn()
        server.launch()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('connection to server at "db" (10.0.0.1), port 5432 failed: Connection refused', Diagnosis.OUTAGE),
        ('could not translate host name "db" to address: Name or service not known', Diagnosis.OUTAGE),
        ("timeout expired", Diagnosis.OUTAGE),
        ("session is read-only", Diagnosis.OUTAGE),
        ("SSL SYSCALL error: EOF detected", Diagnosis.OUTAGE),
        ("FATAL:  57P03: the database system is starting up\nLOCATION:  x", Diagnosis.OUTAGE),
        ("FATAL:  08P01: server login has been failing, try again later (server_login_retry)", Diagnosis.OUTAGE),
        ("FATAL:  53300: sorry, too many clients already", Diagnosis.FULL),
        ("connection to server on socket failed: Resource temporarily unavailable", Diagnosis.FULL),
        ("FATAL:  28P01: password authentication failed", Diagnosis.REFUSAL),
        ("FATAL:  3D000: database does not exist", Diagnosis.REFUSAL),
        ("FATAL:  08P01: no such database: shop", Diagnosis.REFUSAL),
        ("server does not support SSL, but SSL was required", Diagnosis.REFUSAL),
        ("SSL error: certificate verify failed", Diagnosis.REFUSAL),
        ("fe_sendauth: no password supplied", Diagnosis.REFUSAL),
    ],
)
def test_what_a_failed_connect_says(text: str, expected: Diagnosis) -> None:
    assert diagnose(text) is expected


# A request begins again -----------------------------------------------------------------------------------------------


def lose(conn: Any) -> None:
    """End the session from within."""
    run(conn, "SELECT pg_terminate_backend(pg_backend_pid())")


def make_pages(name: str) -> Any:
    """Pages that lose their connection the first time, each in its way."""
    calls: Counter[str] = Counter()

    def app(environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        calls[path] += 1
        environ["PATH_INFO"] = "/changed"
        is_first = calls[path] == 1 or path.startswith("/always")

        def chunks() -> Iterator[bytes]:
            if path == "/late":
                yield b"begun, "
            if is_first:
                lose(get_connection(environ, name))
            yield b"done"

        if path in ("/late", "/stream"):
            start_response("200 OK", [])
            return chunks()
        if path == "/page":  # an application that makes a page of every error, as Flask does
            try:
                return [b"".join(chunks())] if outages.answer(start_response) else []
            except psycopg2.Error as error:
                start_response("500 Internal Server Error", [], (type(error), error, None))
                return [b"sorry"]
        if path == "/wrapped":
            try:
                list(chunks())
            except psycopg2.Error as error:
                raise RuntimeError("an ORM's") from error
        elif path == "/block" and is_first:
            with zpgpool.get_pool(name).connection() as conn:
                lose(conn)
        elif path == "/page of its own" or path == "/not lost":
            start_response("500 Internal Server Error", [])
            return [b"its own"]
        else:
            list(chunks())
        return outages.answer(start_response)

    app.calls = calls  # type: ignore[attr-defined]  # what the test looks at
    return app


class TestBeginAgain:
    @pytest.fixture(params=["persistent", "threaded"])
    def site(self, make_site: Any, request: pytest.FixtureRequest) -> Any:
        return TestApp(make_site(make_pages, pool=request.param))

    @pytest.mark.parametrize("path", ["/", "/stream", "/page", "/wrapped", "/block"])
    def test_before_anything_was_sent(self, site: Any, path: str) -> None:
        assert site.get(path).text == "done"
        assert site.app.app.calls[path] == 2

    def test_of_head_and_options(self, site: Any) -> None:
        assert site.head("/").status_int == 200
        assert site.options("/options").status_int == 200

    @pytest.mark.parametrize("path", ["/late", "/always"])
    def test_not_after_that_and_not_twice(self, site: Any, path: str) -> None:
        with pytest.raises(psycopg2.OperationalError):
            site.get(path)
        assert site.app.app.calls[path] == (1 if path == "/late" else 2)

    def test_not_of_a_page_that_is_an_error_for_another_reason(self, site: Any) -> None:
        assert site.get("/not lost", status=500).text == "its own"
        assert site.app.app.calls["/not lost"] == 1

    def test_not_of_other_methods_nor_with_a_body(self, site: Any) -> None:
        with pytest.raises(psycopg2.OperationalError):
            site.post("/")
        with pytest.raises(psycopg2.OperationalError):
            site.request("/body", method="GET", body=b"x")
        assert site.post("/page", status=500).text == "sorry"

    def test_not_where_it_is_off(self, make_site: Any) -> None:
        site = TestApp(make_site(make_pages, retry_safe="false"))
        with pytest.raises(psycopg2.OperationalError):
            site.get("/")

    def test_not_after_hold_limit(self, make_site: Any, server: EmbeddedServer) -> None:
        calls = []

        def app(name: str) -> Any:
            def wait(environ: Any, start_response: Any) -> Any:
                calls.append(run(get_connection(environ, name), "SELECT pg_sleep(60)"))

            return wait

        site = TestApp(make_site(app, hold_limit="0.2"))
        with pytest.raises(psycopg2.Error):
            site.get("/")


class Relay:
    """Between clients and a unix socket; ends all connections as a server does of which a backend has crashed."""

    body = b"SWARNING\0VWARNING\0C57P02\0Mterminating connection because of crash of another server process\0\0"
    WARNING = b"N" + struct.pack("!I", len(body) + 4) + body

    def __init__(self, folder: Path, server: EmbeddedServer) -> None:
        self._target = str(server.sockets / f".s.PGSQL.{server.port or 5432}")
        self._clients: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, there = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                there.connect(self._target)
                self._clients.append(client)
                for pair in ((client, there), (there, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for sock in (source, target):
            sock.close()

    def crash(self) -> None:
        while self._clients:
            client = self._clients.pop()
            client.sendall(self.WARNING)
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(server: EmbeddedServer) -> Iterator[tuple[Relay, str]]:
    with TemporaryDirectory(prefix="zpgpool-") as folder, closing(Relay(Path(folder), server)) as relay:
        yield relay, make_dsn(server.dsn, host=folder, port=5432)


@pytest.mark.parametrize("autocommit", [None, True])
@pytest.mark.parametrize("factory", [zpgpool.PersistentConnectionPool, zpgpool.ThreadedConnectionPool])
def test_a_loss_that_psycopg2_has_not_noticed(
    make_pool: Any, relay: tuple[Relay, str], factory: Any, autocommit: bool | None
) -> None:
    """A write fails while a warning of the server waits: libpq tells before it has read the end."""
    between, dsn = relay
    pool = make_pool(factory, 0, 2, dsn=dsn, idle_timeout=60, autocommit=autocommit)
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        conn = get_connection(environ)
        seen.append(conn)
        if len(seen) == 1:
            between.crash()
        try:
            run(conn, "SELECT 1")
        except psycopg2.Error as error:
            seen.append((type(error), error.pgcode, conn.closed))
            raise
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    pool.putconn(pool.getconn())
    assert TestApp(PoolMiddleware(app, pool)).get("/").text == "done"
    first, told, second = seen
    assert told == (psycopg2.DatabaseError, None, 0)
    assert first is not second
    eventually(lambda: pool.get_stats()["pool_size"] == 1)


def test_a_page_of_an_application_that_hides_the_errors_of_the_pool(make_site: Any) -> None:
    def make_app(name: str) -> Any:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            try:
                get_connection(environ, name)
            except psycopg2.Error:
                start_response("500 Internal Server Error", [])
                return [b"sorry"]
            return outages.answer(start_response)

        return app

    site = TestApp(make_site(make_app, pool="threaded", maxconn="1", timeout="0.1"))
    name = site.app.name
    zpgpool.get_pool(name).putconn(zpgpool.get_pool(name).getconn(timeout=20))  # a connect may take longer than 0.1 s
    assert site.get("/").text == "done"
    with zpgpool.get_pool(name).connection():
        response = site.get("/", status=503)
    assert response.headers["Retry-After"] == "5"
    assert "not available" in response.text


def unavailable(environ: Any, start_response: Any) -> list[bytes]:
    start_response("503 Service Unavailable", [("Content-Type", "text/plain"), ("Retry-After", "7")])
    return [b"Back soon."]


def test_an_answer_of_the_user_s_own(make_site: Any, server: EmbeddedServer) -> None:
    site = TestApp(make_site(plain, outage_wait="0", unavailable="test_outages:unavailable"))
    server.halt()
    response = site.get("/", status=503)
    assert (response.text, response.headers["Retry-After"]) == ("Back soon.", "7")
    server.launch()


# Transactions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(server: EmbeddedServer) -> Iterator[Proxy]:
    assert server.port is not None
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


class Cut:
    """Cuts a connection around its COMMIT: before it reaches the server, or at a moment after."""

    def __init__(self, proxy: Proxy, delay: float | None) -> None:
        self._proxy = proxy
        self._delay = delay
        self.timer = threading.Timer(delay or 0.0, proxy.fin)
        self.has_come = False
        proxy.tap = self

    def __call__(self, data: bytes) -> None:
        if b"COMMIT" in data and b"SELECT" not in data:
            self._proxy.tap = lambda data: None
            self.has_come = True
            if self._delay is None:
                self._proxy.fin()  # what it has read goes nowhere
            else:
                self.timer.start()


@pytest.mark.slow
@pytest.mark.parametrize("is_verified", [True, False])
def test_a_commit_whose_answer_is_lost(server: EmbeddedServer, proxy: Proxy, is_verified: bool) -> None:
    dice = random.Random(15)
    with closing(psycopg2.connect(server.dsn)) as outside:
        outside.autocommit = True
        run(outside, "ALTER DATABASE postgres SET commit_delay = 5000; ALTER DATABASE postgres SET commit_siblings = 0")
        outcomes: Counter[str] = Counter()
        pool = zpgpool.ThreadedConnectionPool(
            0, 4, proxy.dsn(server.dsn), verify_commit=is_verified, timeout=10, idle_timeout=60, outage_wait=10
        )
        for number in range(200):
            with suppress(psycopg2.Error):  # the last cut may have come after its commit
                use(pool)
            cut = Cut(proxy, dice.choice([None, 0.0, 0.001, 0.002, 0.004, 0.008]))
            try:
                pool.run_transaction(lambda conn: run(conn, "INSERT INTO written VALUES (%s)", str(number)), attempts=1)  # noqa: B023
                believed = "committed"
            except zpgpool.CommitInDoubt as error:
                believed = f"in doubt{error.xid}"
            except psycopg2.Error:
                believed = "aborted"
            assert cut.has_come
            if cut.timer.is_alive():
                cut.timer.join()
            outcomes[believed] += 1
            is_there = bool(run(outside, "SELECT count(*) FROM written WHERE id = %s", str(number)))
            assert believed == "in doubt" or is_there is (believed == "committed"), (number, believed, is_there)
        print(outcomes)
        assert outcomes.keys() == {"committed", "aborted" if is_verified else "in doubt"}
        assert min(outcomes.values()) > 20
        pool.closeall()


def test_a_commit_before_a_promotion_is_in_doubt(tmp_path: Path) -> None:
    """The standby may lack it, or have given its number to another transaction: nobody asks there."""
    pair = Pair(tmp_path)
    proxy = None
    try:
        pair.ask(pair.primary, outages.TABLE)
        pair.attach(is_synchronous=False)
        assert pair.primary.port is not None
        proxy = Proxy(pair.primary.port)
        both = pair.dsn.replace(f"{pair.primary.port}", f"{proxy.port}")
        with zpgpool.ThreadedConnectionPool(0, 4, both, verify_commit=True, timeout=60) as pool:

            def promote(data: bytes) -> None:
                if b"COMMIT" in data and b"SELECT" not in data:
                    proxy.tap = lambda data: None
                    pair.fail_over()
                    proxy.refuse()
                    proxy.fin()

            proxy.tap = promote
            with pytest.raises(zpgpool.CommitInDoubt, match=r"COMMIT of transaction \d+ was lost") as caught:
                pool.run_transaction(lambda conn: run(conn, "INSERT INTO written VALUES ('x')"))
            assert "a standby that was promoted" in str(caught.value)
            assert caught.value.xid in str(caught.value)
    finally:
        if proxy is not None:
            proxy.close()
        pair.stop()


class TestRunTransaction:
    @pytest.fixture
    def pool(self, make_pool: Any) -> Any:
        return make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60, timeout=10)

    def test_commits_and_returns(self, pool: Any, outside: Any) -> None:
        name = f"t{os.getpid()}"
        try:
            pool.run_transaction(lambda conn: run(conn, f"CREATE TABLE {name} (id int)"))
            assert pool.run_transaction(lambda conn: run(conn, f"INSERT INTO {name} VALUES (1) RETURNING id")) == 1
            assert outside.query(f"SELECT id FROM {name}") == [(1,)]
        finally:
            outside.query(f"DROP TABLE IF EXISTS {name}")

    @pytest.mark.parametrize("code", ["40001", "40P01"])
    def test_runs_again_what_may_succeed(self, pool: Any, code: str) -> None:
        tries: list[Any] = []

        def function(conn: Any) -> str:
            tries.append(conn)
            if len(tries) < 3:
                run(conn, f"DO $$ BEGIN RAISE SQLSTATE '{code}'; END $$")
            return "done"

        assert pool.run_transaction(function) == "done"
        assert len(tries) == 3

    def test_runs_again_after_a_loss_with_another_connection(self, pool: Any) -> None:
        tries: list[int] = []

        def function(conn: Any) -> int:
            tries.append(conn.info.backend_pid)
            if len(tries) == 1:
                lose(conn)
            return int(run(conn, "SELECT pg_backend_pid()"))

        assert pool.run_transaction(function) == tries[1] != tries[0]

    def test_raises_the_last_error(self, pool: Any) -> None:
        tries: list[Any] = []

        def function(conn: Any) -> None:
            tries.append(conn)
            lose(conn)

        with pytest.raises(psycopg2.OperationalError):
            pool.run_transaction(function, attempts=2)
        assert len(tries) == 2

    @pytest.mark.parametrize("sql", ["SELECT 1 / 0", "SELECT nothing"])
    def test_does_not_run_again_what_would_fail_again(self, pool: Any, sql: str) -> None:
        tries: list[Any] = []

        def function(conn: Any) -> None:
            tries.append(conn)
            run(conn, sql)

        with pytest.raises(psycopg2.Error):
            pool.run_transaction(function)
        assert len(tries) == 1
        with pool.connection() as conn:
            assert conn.get_transaction_status() == psycopg2.extensions.TRANSACTION_STATUS_IDLE

    def test_is_refused_in_a_transaction(self, pool: Any) -> None:
        with pool.connection() as conn:
            run(conn, "SELECT 1")
            with pytest.raises(zpgpool.PoolError, match="was called in a transaction, which it would commit"):
                pool.run_transaction(lambda conn: None)
            conn.rollback()
            assert pool.run_transaction(lambda conn: run(conn, "SELECT 2")) == 2

    def test_is_a_transaction_where_sessions_commit_at_once(self, make_pool: Any) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, autocommit=True, idle_timeout=60)
        with pool.connection() as conn:
            status = pool.run_transaction(lambda conn: run(conn, "SELECT 1") and conn.get_transaction_status())
            assert status == psycopg2.extensions.TRANSACTION_STATUS_INTRANS
            assert conn.autocommit is True

    def test_asks_for_nothing_when_nothing_was_written(self, make_pool: Any) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, verify_commit=True, idle_timeout=60)
        assert pool.run_transaction(lambda conn: "nothing at all") == "nothing at all"
        assert pool.run_transaction(lambda conn: run(conn, "SELECT 1")) == 1


class LosesItsCommit(psycopg2.extensions.connection):
    """Loses the answer to each COMMIT, which is not done: the session ends first."""

    def commit(self) -> None:
        lose(self)


class TestWhatBecameOfACommit:
    """What is done with each answer: the server's are real in the tests above."""

    @pytest.fixture
    def pool(self, make_pool: Any) -> Any:
        return make_pool(
            zpgpool.ThreadedConnectionPool,
            connection_factory=LosesItsCommit,
            verify_commit=True,
            timeout=5,
            configure=lambda conn: None,
        )

    def believe(self, pool: Any, monkeypatch: pytest.MonkeyPatch, *answers: Any, sql: str = "") -> str:
        """Return what the caller is told, when the server answers so, one after the other."""
        left = list(answers)

        def query(*args: Any) -> Any:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, Exception):
                raise answer
            return [(answer,)], 1

        monkeypatch.setattr("zpgpool.core.transactions.query", query)
        monkeypatch.setattr("zpgpool.core.transactions.sleep", lambda seconds: None)
        try:
            pool.run_transaction(lambda conn: run(conn, sql or "CREATE TEMP TABLE x (y int)"), attempts=1)
        except psycopg2.Error as error:
            return f"{type(error).__name__}: {error}"
        return "committed"

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [
            (["committed"], "committed"),
            (["in progress", "in recovery", NoAnswer("silent"), "committed"], "committed"),
            (["in progress", "aborted"], "OperationalError: "),
            (["elsewhere"], "CommitInDoubt: "),
            ([None], "CommitInDoubt: "),
        ],
    )
    def test_is_believed(self, pool: Any, monkeypatch: pytest.MonkeyPatch, answers: list[Any], expected: str) -> None:
        told = self.believe(pool, monkeypatch, *answers)
        assert told.startswith(expected)
        if answers == [None]:
            assert told.endswith("it has forgotten that number")

    def test_is_not_known_when_time_is_up(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([0.0, 0.0, 1.0, 1.0, 100.0])
        monkeypatch.setattr("zpgpool.core.transactions.monotonic", lambda: next(times, 100.0))
        told = self.believe(pool, monkeypatch, NoAnswer("the server is silent"))
        assert told.startswith("CommitInDoubt: ")
        assert told.endswith("the server is silent")

    def test_is_not_asked_when_nothing_was_written(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.believe(pool, monkeypatch, AssertionError("asked"), sql="SELECT 1").startswith("OperationalError: ")

    def test_without_verify_commit_it_is_in_doubt(self, make_pool: Any) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, connection_factory=LosesItsCommit)
        with pytest.raises(zpgpool.CommitInDoubt, match="it is not known whether it was done") as caught:
            pool.run_transaction(lambda conn: run(conn, "SELECT 1"))
        assert caught.value.xid == ""

    def test_what_the_server_refuses_is_known(self, make_pool: Any) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, verify_commit=True)

        def write(conn: Any) -> None:
            run(conn, "CREATE TEMP TABLE once (y int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
            run(conn, "INSERT INTO once VALUES (1), (1)")

        with pytest.raises(psycopg2.errors.UniqueViolation):
            pool.run_transaction(write)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg2.OperationalError("server closed the connection unexpectedly"), True),
        (psycopg2.DatabaseError("error with status PGRES_TUPLES_OK and no message from the libpq"), True),
        (psycopg2.InterfaceError("connection already closed"), True),
        (psycopg2.IntegrityError("a subclass of DatabaseError"), False),
        (psycopg2.errors.LockNotAvailable(), False),
        (psycopg2.ProgrammingError("no results to fetch"), False),
        (zpgpool.PoolTimeout("no connection came free"), False),
    ],
)
def test_errors_that_pass(error: psycopg2.Error, expected: bool) -> None:
    assert is_temporary(error) is expected


def test_a_cursor_that_was_closed_is_no_loss_and_a_connection_is(make_pool: Any) -> None:
    with make_pool(zpgpool.ThreadedConnectionPool) as pool, pool.connection() as conn:
        cursor = conn.cursor()
        cursor.close()
        with pytest.raises(psycopg2.InterfaceError) as caught:
            cursor.execute("SELECT 1")
        assert str(caught.value) == "cursor already closed"
        assert not is_temporary(caught.value)
        lost = pool.getconn()
        lost.close()
        with pytest.raises(psycopg2.InterfaceError) as caught:
            lost.cursor()
        assert is_temporary(caught.value)
        pool.putconn(lost)


class TestDiagnoses:
    """What the opener asks, and remembers."""

    @pytest.fixture
    def opener(self, make_pool: Any) -> Any:
        return make_pool(zpgpool.ThreadedConnectionPool, open=False)._connections.opener

    def test_a_text_is_asked_for_once(self, opener: Any) -> None:
        asked: list[float] = []

        def ask_why(until: float) -> str:
            asked.append(until)
            return "FATAL:  28P01: password authentication failed"

        opener._ask_why = ask_why
        for _ in range(3):
            assert opener._diagnose("FATAL:  Passwort-Authentifizierung fehlgeschlagen") is Diagnosis.REFUSAL
        assert len(asked) == 1
        for number in range(100):
            opener._diagnose(f"FATAL:  {number}")
        assert len(opener._diagnoses) < 100

    def test_what_has_changed_meanwhile_is_not_remembered(self, opener: Any) -> None:
        opener._ask_why = lambda until: ""
        assert opener._diagnose("FATAL:  sorry, too many clients already") is Diagnosis.CHANCE
        opener._ask_why = lambda until: "connection refused"
        assert opener._diagnose("FATAL:  sorry, too many clients already") is Diagnosis.OUTAGE
        assert opener._diagnoses == {}

    @pytest.mark.parametrize(("code", "expected"), [("57P01", Diagnosis.OUTAGE), ("42501", Diagnosis.REFUSAL)])
    def test_of_a_session_that_could_not_be_set_up(self, make_pool: Any, code: str, expected: Diagnosis) -> None:
        def configure(conn: Any) -> None:
            error = "insufficient_privilege" if code == "42501" else "admin_shutdown"
            run(conn, f"DO $$ BEGIN RAISE {error}; END $$")

        pool = make_pool(zpgpool.ThreadedConnectionPool, configure=configure, open=False)
        with pytest.raises(psycopg2.Error):
            pool.getconn()
        assert (pool.outage_seconds is not None) is (expected is Diagnosis.OUTAGE)

    def test_a_pool_that_has_gone_asks_nobody(self) -> None:
        assert ask_why(lambda **keywords: None, 0.0) == ""

    def test_a_server_that_is_silent_is_not_waited_for(self) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as silent:
            port = silent.getsockname()[1]
            dsn = f"host=127.0.0.1 port={port} dbname=x user=x"
            assert ask_why(lambda **keywords: psycopg2.connect(dsn, **keywords), time.monotonic() + 0.05) == ""


def test_those_behind_max_waiting_are_told_when_an_outage_begins(server: EmbeddedServer) -> None:
    with zpgpool.ThreadedConnectionPool(
        0, 8, server.dsn, timeout=30, outage_wait=20, max_waiting=2, idle_timeout=60
    ) as pool:
        use(pool)
        server.halt()
        calls = [Call(use, pool) for _ in range(6)]
        eventually(lambda: sum(not call.is_running for call in calls) == 4)
        with pytest.raises(zpgpool.TooManyRequests):
            use(pool)
        server.launch()
        results = []
        for call in calls:
            try:
                results.append(call.result())
            except zpgpool.TooManyRequests:
                results.append(None)
        assert sorted(results, key=str) == [1, 1, None, None, None, None]
