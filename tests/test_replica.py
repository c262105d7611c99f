"""Requests that only read get a real standby; whatever happens to that, they are answered."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import signal
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
import transaction
from benchmarks.harness import free_port
from benchmarks.pair import Pair
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families
from pyramid.config import Configurator
from pyramid.response import Response
from transaction.interfaces import TransientError
from webtest import TestApp
from webtest import TestRequest

import zpgpool
from conftest import Call
from conftest import Environ
from conftest import eventually
from conftest import is_within
from conftest import run
from proxy import Proxy
from serving import waitress
from zpgpool.core import lag
from zpgpool.core.lag import lag_of
from zpgpool.core.lag import NOT_YET
from zpgpool.core.lag import watch
from zpgpool.core.owners import tasks
from zpgpool.core.timer import timer
from zpgpool.datamanager import connection
from zpgpool.metrics import instrument
from zpgpool.monitor.history import history_of
from zpgpool.pyramid import get_connection as connection_of
from zpgpool.request.kinds import OwnLease
from zpgpool.request.lease import Lease
from zpgpool.request.lease import local
from zpgpool.request.replica import has_written
from zpgpool.request.replica import with_write_cookie
from zpgpool.settings import SettingError
from zpgpool.status import StatusApp
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


TestApp.__test__ = False  # it is not a test

KINDS = [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool]

WHERE = "SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END"

HEADER = {"Zpgpool-Primary": "1"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    pair.ask(pair.primary, "CREATE TABLE notes (id serial PRIMARY KEY, text text)")
    pair.attach(is_synchronous=False)
    yield pair
    pair.stop()


@pytest.fixture
def level(pair: Pair) -> Iterator[Pair]:
    """Both servers run, and the standby has all that the primary has, before the test and after it."""
    yield pair
    for server in (pair.primary, pair.standby):
        if not server.is_running:
            server.launch()
    pair.ask(pair.standby, "SELECT pg_wal_replay_resume()")
    # A commit: what is not committed is sent in whole pages, the last record of which cannot be replayed.
    wal = pair.ask(pair.primary, "SELECT pg_logical_emit_message(true, '', '')", "SELECT pg_current_wal_lsn()")
    eventually(lambda: pair.ask(pair.standby, f"SELECT pg_last_wal_replay_lsn() >= '{wal}'"), 60)
    # A standby that has just connected again counts as behind by the age of its last commit, until it streams.
    eventually(lambda: pair.ask(pair.standby, "SELECT status = 'streaming' FROM pg_stat_wal_receiver"), 60)


@pytest.fixture(autouse=True)
def patience_with_standbys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no standby for one that hangs, although this machine may stand still for a second."""
    monkeypatch.setattr(lag, "LOOK", 20.0)
    monkeypatch.setattr(lag, "STALE", 60.0)
    if request.node.get_closest_marker("hangs") is None:
        monkeypatch.setattr(lag, "WAIT", 20.0)


def dsn_of(*servers: Any, attrs: str = "any") -> str:
    ports = ",".join(str(server.port) for server in servers)
    hosts = ",".join("127.0.0.1" for _ in servers)
    return f"host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs={attrs} connect_timeout=5"


@pytest.fixture
def make_main(level: Pair) -> Iterator[Callable[..., Any]]:
    """Make and register `main`, which has a replica, and that; the latter's lag is known then, if it `may_be_read`."""
    pools: list[Any] = []

    def make(
        kind: Any = zpgpool.ThreadedConnectionPool, replica: Any = None, may_be_read: bool = True, **options: Any
    ) -> Any:
        replica = {"dsn": dsn_of(level.standby), "idle_timeout": 60} | (replica or {})
        pools.append(kind(0, **{"maxconn": 8} | replica, name="replica"))
        dsn = dsn_of(level.primary)
        pools.append(kind(0, 8, dsn, idle_timeout=60, timeout=5, name="main", replica="replica", **options))
        for pool in pools:
            zpgpool.register_pool(pool, pool.name)
        eventually(lambda: not may_be_read or not watch(pools[0]).why_not(1, time.monotonic()), 60)
        return pools[1]

    yield make
    for pool in pools:
        pool.close(0)


def app(environ: Any, start_response: Any) -> list[bytes]:
    """Say where the request was served, after what its path asks for."""
    conn = get_connection(environ, "main")
    text = {
        "/write": "INSERT INTO notes (text) VALUES ('x') RETURNING 'written'",
        "/count": "SELECT count(*)::text FROM notes",
        "/slow": f"SELECT pg_sleep(60) WHERE pg_is_in_recovery(); {WHERE}",  # on the standby: until something ends it
    }.get(environ["PATH_INFO"], WHERE)
    answer = run(conn, text).encode()
    conn.commit()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer]


def site(app: Any = app, **options: Any) -> Any:
    return TestApp(PoolMiddleware(app, name="main", **options))


def pools() -> tuple[Any, Any]:
    return zpgpool.get_pool("main"), zpgpool.get_pool("replica")


# Where a request is served -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_safe_methods_read_from_the_standby(make_main: Any, kind: Any) -> None:
    main = make_main(kind)
    assert site().get("/").text == "standby"
    assert site().options("/").text == "standby"
    site().head("/")
    assert main.get_stats()["connections_num"] == 0
    assert site().post("/").text == "primary"
    assert site().delete("/").text == "primary"
    for pool in pools():
        assert pool.holders() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_sees_what_it_wrote(make_main: Any, level: Pair, kind: Any) -> None:
    make_main(kind, max_lag=None, primary_after_write=3)
    client, other = site(), site()
    before = int(other.get("/count").text)
    level.ask(level.standby, "SELECT pg_wal_replay_pause()")
    response = client.post("/write")
    assert response.text == "written"
    assert int(client.get("/count").text) == before + 1
    assert int(other.get("/count").text) == before  # without the cookie it is the standby, which is behind
    assert client.get("/").text == "primary"
    time.sleep(3)  # real time: the deadline
    assert client.get("/").text == "standby"


def test_the_cookie(make_main: Any) -> None:
    make_main(primary_after_write=7)
    [cookie] = site().post("/", extra_environ={"SCRIPT_NAME": "/shop"}).headers.getall("Set-Cookie")
    name, _, value = cookie.partition("=")
    assert name == "zpgpool-written"
    assert abs(float(value.split(";")[0]) - time.time()) < 2
    assert {"Max-Age=7", "HttpOnly", "SameSite=Lax", "Path=/shop"} <= set(cookie.split("; "))
    assert "secure" not in cookie.lower()
    [cookie] = site().post("/", extra_environ={"wsgi.url_scheme": "https"}).headers.getall("Set-Cookie")
    assert {"secure", "Path=/"} <= set(cookie.split("; "))
    assert "Set-Cookie" not in site().get("/").headers


def test_no_cookie_when_it_is_off(make_main: Any) -> None:
    make_main(primary_after_write=0)
    client = site()
    assert "Set-Cookie" not in client.post("/").headers
    client.set_cookie("zpgpool-written", str(time.time()))
    assert client.get("/").text == "standby"


@pytest.mark.parametrize(
    ("age", "is_trusted"), [(0.0, True), (4.5, True), (-0.5, True), (5.5, False), (-2.0, False), (-1e9, False)]
)
def test_a_cookie_is_trusted_for_as_long_as_the_setting_says(age: float, is_trusted: bool) -> None:
    environ: Any = {"HTTP_COOKIE": f"a=b; zpgpool-written={time.time() - age}"}
    assert has_written(environ, 5.0) is is_trusted


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "-inf", '"', "1e999", "zpgpool-written"])
def test_a_cookie_of_nonsense_is_none(value: str) -> None:
    assert not has_written({"HTTP_COOKIE": f"zpgpool-written={value}"}, 5.0)


def test_a_header_asks_for_the_primary(make_main: Any) -> None:
    make_main()
    assert site().get("/", headers=HEADER).text == "primary"
    assert site().get("/", headers={"Zpgpool-Primary": "0"}).text == "standby"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/", "/write"])
def test_nothing_of_a_request_waits_for_the_collector(make_main: Any, kind: Any, path: str) -> None:
    make_main(kind)
    middleware: Any = PoolMiddleware(app, name="main")
    environ = Environ(TestRequest.blank(path).environ)
    ref = weakref.ref(environ)
    gc.disable()
    try:
        middleware(environ, lambda *args: None)
        del environ
        assert ref() is None
    finally:
        gc.enable()


def test_eager(make_main: Any) -> None:
    make_main()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        assert environ["zpgpool.connection"] is get_connection(environ, "main")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [run(environ["zpgpool.connection"], WHERE).encode()]

    assert site(app, eager=True).get("/").text == "standby"


@pytest.mark.parametrize("order", [["replica", "main"], ["main", "replica"]])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_filter_of_the_replicas_own(make_main: Any, kind: Any, order: list[str]) -> None:
    make_main(kind)

    def inner(environ: Any, start_response: Any) -> Iterator[bytes]:
        assert get_connection(environ, "main") is environ.get("zpgpool.connection", get_connection(environ, "main"))
        assert get_connection(environ, "main") is get_connection(environ, "replica")
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield run(get_connection(environ, "main"), WHERE).encode()

    wrapped: Any = inner
    for name in order:
        wrapped = PoolMiddleware(wrapped, name=name, eager=name == "replica")
    assert TestApp(wrapped).get("/").text == "standby"
    assert [pool.holders() for pool in pools()] == [[], []]


def test_a_subrequest_is_part_of_its_request(make_main: Any) -> None:
    make_main()
    inner = PoolMiddleware(app, name="main")

    def outer(environ: Any, start_response: Any) -> Any:
        conn = get_connection(environ, "main")
        own = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
        [where] = inner(own, lambda *args: lambda data: None)
        assert get_connection(own, "main") is conn
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [where]

    assert site(outer).get("/").text == "standby"


def test_the_settings_are_those_of_every_front_end(level: Pair, tmp_path: Any, monkeypatch: Any) -> None:
    from paste.deploy import loadapp

    (tmp_path / "readers_site.py").write_text("import test_replica\napp = lambda global_conf: test_replica.app\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "site.ini").write_text(
        f"""[pipeline:main]
pipeline = replica main app
[filter:replica]
use = egg:zpgpool
name = replica
dsn = {dsn_of(level.standby)}
[filter:main]
use = egg:zpgpool
name = main
dsn = {dsn_of(level.primary)}
replica = replica
primary_after_write = 30
max_lag = none
[app:app]
paste.app_factory = readers_site:app
"""
    )
    client = TestApp(loadapp(f"config:{tmp_path}/site.ini"))
    assert client.get("/").text == "standby"
    assert "Max-Age=30" in client.post("/").headers["Set-Cookie"]
    for pool in pools():
        pool.close(0)


def test_a_pool_is_not_its_own_replica() -> None:
    with pytest.raises(SettingError, match="option 'replica': 'a' is this pool itself"):
        zpgpool.ThreadedConnectionPool(0, 1, "", open=False, name="a", replica="a")


def test_a_pool_for_one_thread_is_refused_as_a_replica(make_main: Any) -> None:
    make_main(zpgpool.SimpleConnectionPool)
    zpgpool.unregister_pool("main").close(0)
    with zpgpool.ThreadedConnectionPool(0, 1, "dbname=x", open=False, name="main", replica="replica") as main:
        zpgpool.register_pool(main, "main")
        with pytest.raises(zpgpool.PoolError, match="is for one thread"):
            site().get("/", extra_environ={"wsgi.multithread": "1"})
        assert (local.state.leases, tasks.get(threading.get_ident())) == ({}, None)


# The transaction package ---------------------------------------------------------------------------------------------


def test_a_transaction_of_a_safe_request_is_the_replicas(make_main: Any) -> None:
    make_main()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        answers = []
        for attempt in transaction.manager.attempts(2):
            with attempt:
                conn = connection("main")
                assert connection("main") is conn
                answers.append(run(conn, WHERE))
                if environ["PATH_INFO"] == "/write":
                    run(conn, "INSERT INTO notes (text) VALUES ('x')")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [" ".join(answers).encode()]

    assert site(app).get("/").text == "standby"
    assert site(app).post("/").text == "primary"
    assert site(app).get("/write").text == "standby primary"  # the second attempt
    assert [pool.holders() for pool in pools()] == [[], []]


def test_pyramid(level: Pair) -> None:
    settings = {
        "zpgpool.dsn": dsn_of(level.primary),
        "zpgpool.replica": "readers",
        "zpgpool.max_lag": "none",
        "zpgpool.readers.dsn": dsn_of(level.standby),
        "pyramid.includes": "pyramid_tm pyramid_retry zpgpool",
        "tm.manager_hook": "pyramid_tm.explicit_manager",
    }
    config = Configurator(settings=settings)
    config.add_route("where", "/")

    def view(request: Any) -> Any:
        where = run(request.pgconn, WHERE)
        if "write" in request.params:
            run(request.pgconn, "INSERT INTO notes (text) VALUES ('pyramid')")
        return Response(where)

    config.add_view(view, route_name="where")
    client = TestApp(config.make_wsgi_app())
    assert client.get("/").text == "standby"
    assert client.get("/?write").text == "primary"
    client.reset()
    assert client.post("/").text == "primary"
    assert client.get("/").text == "primary"
    for name in ("", "readers"):
        zpgpool.get_pool(name, config.registry).close(0)


@pytest.mark.parametrize("include", ["pyramid_tm", None])
@pytest.mark.parametrize("is_there", [True, False])
def test_pyramids_page_of_an_error_is_not_the_answer_to_a_write(
    level: Pair, include: str | None, is_there: bool
) -> None:
    """An exception view makes a page of what the replica refuses, or a session of the primary's that only reads."""
    settings = {
        "zpgpool.dsn": dsn_of(level.primary),
        "zpgpool.replica": "readers",
        "zpgpool.max_lag": "none",
        "zpgpool.readers.dsn": dsn_of(level.standby),
        "tm.manager_hook": "pyramid_tm.explicit_manager",
    }
    config = Configurator(settings=settings)
    for each in [include] if include else []:
        config.include(each)
    config.include("zpgpool")
    config.add_route("all", "/*path")

    def view(request: Any) -> Any:
        if "bug" in request.path:
            ran.append("bug")
            run(request.pgconn, "SELECT 1/0")
        return Response(run(request.pgconn, "INSERT INTO notes (text) VALUES ('x') RETURNING 'written'"))

    def page(error: Exception, request: Any) -> Any:
        return Response(type(error).__name__, status=500)

    ran: list[str] = []
    config.add_view(view, route_name="all")
    config.add_exception_view(page, context=psycopg2.Error)
    client = TestApp(config.make_wsgi_app())
    if not is_there:
        watch(zpgpool.get_pool("readers", config.registry)).lost("it is lost")
    assert client.get("/").text == "written"
    assert client.get("/bug", status=500).text == "DivisionByZero"
    assert ran == ["bug"]
    for name in ("", "readers"):
        assert zpgpool.get_pool(name, config.registry).holders() == []
        zpgpool.get_pool(name, config.registry).close(0)


@pytest.mark.parametrize("writes", [True, False])
def test_what_a_transaction_has_committed_is_not_done_again(level: Pair, writes: bool) -> None:
    """Its body's first query loses the replica, after the commit in another pool."""
    level.ask(level.primary, "DROP TABLE IF EXISTS once", "CREATE TABLE once (n int)")
    settings = {
        "zpgpool.dsn": dsn_of(level.primary),
        "zpgpool.replica": "readers",
        "zpgpool.max_lag": "none",
        "zpgpool.readers.dsn": dsn_of(level.standby),
        "zpgpool.other.dsn": dsn_of(level.primary),
        "tm.manager_hook": "pyramid_tm.explicit_manager",
    }
    config = Configurator(settings=settings)
    for each in ("pyramid_tm", "zpgpool"):
        config.include(each)
    config.add_route("all", "/")
    ran: list[str] = []

    def view(request: Any) -> Any:
        ran.append(run(request.pgconn, WHERE))
        if writes:
            run(connection_of(request, "other"), "INSERT INTO once VALUES (1)")
            request.tm.get().addAfterCommitHook(lambda success: ran.append("hook"))

        def body() -> Iterator[bytes]:
            if run(request.pgconn, WHERE) == "standby":
                run(request.pgconn, "SELECT pg_terminate_backend(pg_backend_pid())")
            yield b"x"

        return Response(app_iter=body())

    config.add_view(view, route_name="all")
    client = TestApp(config.make_wsgi_app())
    with pytest.raises(psycopg2.Error):
        client.get("/")
    assert ran == (["standby", "hook"] if writes else ["standby"])
    assert level.ask(level.primary, "SELECT count(*) FROM once") == int(writes)
    for name in ("", "readers", "other"):
        assert zpgpool.get_pool(name, config.registry).holders() == []
        zpgpool.get_pool(name, config.registry).close(0)


# A replica that has gone ---------------------------------------------------------------------------------------------


def load(port: int, is_over: threading.Event, answers: list[tuple[int, str]]) -> None:
    while not is_over.is_set():
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as conn:
            conn.request("GET", "/")
            response = conn.getresponse()
            answers.append((response.status, response.read().decode()))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hosts", ["standby", "both"])
def test_a_replica_that_stops_fails_no_request(make_main: Any, level: Pair, kind: Any, how: Any, hosts: str) -> None:
    dsn = dsn_of(level.primary, level.standby, attrs="prefer-standby")
    make_main(kind, {"dsn": dsn} if hosts == "both" else None)
    is_over = threading.Event()
    answers: list[tuple[int, str]] = []
    with waitress(PoolMiddleware(app, name="main"), threads=4) as port:
        clients = [Call(load, port, is_over, answers) for _ in range(4)]
        try:
            eventually(lambda: answers[-1:] == [(200, "standby")] and len(answers) > 40)
            level.standby.halt(how)
            eventually(lambda: answers[-1:] == [(200, "primary")])
            seen = len(answers)
            eventually(lambda: len(answers) > seen + 100)
            level.standby.launch()
            if hosts == "standby":
                eventually(lambda: answers[-1:] == [(200, "standby")], 60)
        finally:
            is_over.set()
            for client in clients:
                client.result()
    assert {status for status, _ in answers} == {200}


def streamed(environ: Any, start_response: Any) -> Iterator[bytes]:
    answer = app(environ, start_response)
    yield from answer


def streamed_in_the_end(environ: Any, start_response: Any) -> Iterator[bytes]:
    """Fails before it returns a body, or goes on in that with the connection that it has."""
    conn, answer = get_connection(environ, "main"), app(environ, start_response)

    def body() -> Iterator[bytes]:
        assert [len(pool.holders()) for pool in pools()] == [1, 0]
        assert get_connection(environ, "main") is conn
        yield from answer

    return body()


class Opened:
    """A body that must be closed once."""

    closed = 0

    def __init__(self, environ: Any, start_response: Any) -> None:
        self.body: Any = streamed(environ, start_response)
        self.is_closed = False

    def __iter__(self) -> Any:
        return self.body

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True
        Opened.closed += 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [app, streamed, streamed_in_the_end, Opened])
def test_a_request_in_flight_begins_again(
    make_main: Any, level: Pair, kind: Any, inner: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_main(kind)
    eventually(lambda: site().get("/").text == "standby")
    Opened.closed = 0
    request = Call(site(inner).get, "/slow")
    eventually(lambda: [holder for holder in pools()[1].holders() if holder.status == "in a query"])
    level.standby.halt(signal.SIGQUIT)
    assert request.result().text == "primary"
    assert "GET /slow: the replica failed: " in caplog.text
    assert Opened.closed == (2 if inner is Opened else 0)
    assert [pool.holders() for pool in pools()] == [[], []]


def test_a_query_in_the_way_of_recovery_begins_again(make_main: Any, level: Pair) -> None:
    make_main()
    level.ask(level.primary, "CREATE TABLE doomed (id int)", "INSERT INTO doomed VALUES (1)")
    eventually(lambda: level.ask(level.standby, "SELECT to_regclass('doomed') IS NOT NULL"))
    is_read = threading.Event()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        conn = get_connection(environ, "main")
        where: str = run(conn, WHERE)
        if where == "standby":
            run(conn, "SELECT * FROM doomed")
            is_read.set()
            run(conn, "SELECT pg_sleep(10)")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [where.encode()]

    level.ask(level.standby, "ALTER SYSTEM SET max_standby_streaming_delay = '100ms'", "SELECT pg_reload_conf()")
    request = Call(site(app).get, "/")
    is_read.wait(5)
    level.ask(level.primary, "DROP TABLE doomed")
    assert request.result().text == "primary"


def test_an_error_of_another_database_is_nobodys_loss(make_main: Any, dsn: str) -> None:
    make_main()
    calls = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        calls.append(run(get_connection(environ, "main"), WHERE))
        psycopg2.connect(f"host=127.0.0.1 port={free_port()}")
        return []

    with pytest.raises(psycopg2.OperationalError):
        site(app).get("/")
    assert calls == ["standby"]


def test_a_body_that_has_begun_is_not_begun_again(make_main: Any, level: Pair) -> None:
    make_main()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"begun"
        run(get_connection(environ, "main"), "INSERT INTO notes (text) VALUES ('x')")

    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        site(app).get("/")


@pytest.mark.hangs
def test_a_busy_replica(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_main(replica={"timeout": 30})
    _, replica = pools()
    conns = [replica.getconn(timeout=20) for _ in range(8)]
    assert site().get("/").text == "primary"
    assert "GET / reads from the primary: no connection came free within 1.0 s" in caplog.text
    for conn in conns:
        replica.putconn(conn)
    assert site().get("/").text == "standby"  # it was not taken for lost


def test_a_replica_that_cannot_be_connected_to(make_main: Any, level: Pair, caplog: pytest.LogCaptureFixture) -> None:
    make_main()
    known = lag_of(pools()[1])
    assert known is not None
    level.standby.halt()
    client = site()
    assert client.get("/").text == "primary"
    eventually(lambda: "Connection refused" in known.trouble)  # a look during the shutdown is told of that
    errors = pools()[1].get_stats()["connections_errors"]
    assert [client.get("/").text for _ in range(3)] == ["primary"] * 3
    assert pools()[1].get_stats()["connections_errors"] == errors  # nobody tries it until the next look
    assert caplog.text.count("is left out") <= 1


def test_a_closed_replica(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_main()
    pools()[1].close(0)
    client = site()
    assert [client.get("/").text for _ in range(2)] == ["primary"] * 2
    assert caplog.text.count("is left out") == 1
    assert lag_of(pools()[1]).run_maintenance(0.0) is None  # type: ignore[union-attr]


def test_a_replica_that_is_not_registered(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_main()
    replica = zpgpool.unregister_pool("replica")
    client = site()
    assert [client.get("/").text for _ in range(2)] == ["primary"] * 2
    assert caplog.text.count("no pool is registered as 'replica'") == 1
    zpgpool.register_pool(replica, "replica")
    assert client.get("/").text == "standby"


def test_a_replica_that_is_the_pool_itself(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    main = make_main()
    zpgpool.unregister_pool("replica")
    zpgpool.register_pool(main, "replica")
    assert site().get("/").text == "primary"
    assert "is left out, <ThreadedConnectionPool 'main'" in caplog.text
    zpgpool.unregister_pool("replica")


def test_an_end_that_is_interrupted_gives_back_what_was_read_from(
    make_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_main()
    eventually(lambda: site().get("/").text == "standby")
    end = Lease.end

    def interrupt(lease: Lease) -> None:
        if isinstance(lease, OwnLease) and lease.pool.name == "main":
            raise KeyboardInterrupt
        end(lease)

    monkeypatch.setattr(Lease, "end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        site().get("/")
    assert [pool.holders() for pool in pools()] == [[], []]


def with_transactions(app: Any, again: bool) -> Any:
    """Return what commits after `app`, and runs it once more where it may be `again`: a filter like repoze.tm2."""

    def filtered(environ: Any, start_response: Any) -> Any:
        for is_last in [False, True] if again else [True]:
            transaction.begin()
            try:
                body = app(environ, start_response)
                transaction.commit()
                return body
            except TransientError:
                transaction.abort()
                if is_last:
                    raise
            except BaseException:
                transaction.abort()
                raise
        raise AssertionError

    return filtered


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("outer", [None, "other"])
def test_a_safe_method_that_writes_in_a_transaction(
    make_main: Any, caplog: pytest.LogCaptureFixture, again: bool, outer: str | None, level: Pair
) -> None:
    """Nobody's pool is left for it, and its client is sent to the primary."""
    main = make_main()
    other = zpgpool.ThreadedConnectionPool(1, 2, dsn_of(level.primary), name="other")
    zpgpool.register_pool(other, "other")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        answer = run(connection("main"), "INSERT INTO notes (text) VALUES ('in tm') RETURNING 'written'")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [answer.encode()]

    try:
        wrapped = PoolMiddleware(with_transactions(app, again), name="main")
        client = TestApp(PoolMiddleware(wrapped, name=outer) if outer else wrapped)
        main.putconn(main.getconn())
        response = client.get("/")
        assert response.text == "written"
        assert "zpgpool-written" in response.headers["Set-Cookie"]
        assert "takes no writes any more" not in caplog.text
        assert main.get_stats()["connections_num"] == 1
        assert other.get_stats()["pool_available"] == 1
        assert [pool.holders() for pool in pools()] == [[], []]
    finally:
        zpgpool.unregister_pool("other").close(0)


def test_what_has_been_sent_is_not_sent_again(make_main: Any) -> None:
    make_main()
    starts = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        starts.append(1)
        start_response("200 OK", [("Content-Type", "text/plain")])(b"some")
        run(get_connection(environ, "main"), "INSERT INTO notes (text) VALUES ('x')")
        return []

    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        site(app).get("/")
    assert starts == [1]


@pytest.mark.parametrize(
    ("ago", "is_asked"),
    [
        ([1], True),
        ([9], False),
        ([9, 1], True),
        ([1, 9], True),
        ([-0.5], True),
        ([-60], False),
    ],
)
def test_the_newest_cookie_counts(ago: list[float], is_asked: bool) -> None:
    cookies = "; ".join(["a=b", *(f"zpgpool-written={time.time() - each:.3f}" for each in ago), "c=d"])
    assert has_written({"HTTP_COOKIE": cookies}, 5) is is_asked
    assert not has_written({"HTTP_COOKIE": cookies.replace("zpgpool", "xzpgpool")}, 5)


def test_the_cookies_path_is_the_browsers(make_main: Any) -> None:
    make_main()
    response = site().post("/", extra_environ={"SCRIPT_NAME": "/caf\xc3\xa9"})
    assert "Path=/caf%C3%A9" in response.headers["Set-Cookie"]


# Read-only sessions -------------------------------------------------------------------------------------------------


@pytest.mark.hangs
@pytest.mark.parametrize("autocommit", [None, True, "safe"])
@pytest.mark.parametrize("kind", KINDS)
def test_sessions_of_a_replicas_pool_are_read_only_whatever_they_find(
    level: Pair, kind: Any, autocommit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kind(1, 2, dsn_of(level.primary), autocommit=autocommit, idle_timeout=60, timeout=5) as pool:
        pool.putconn(pool.getconn())
        watch(pool)
        watch(pool)
        assert pool.settings.timeout == lag.WAIT
        drained = pool.get_stats()["connections_num"]
        pool.serve_readers(lag.WAIT)  # it does already
        assert pool.get_stats()["connections_num"] == drained
        for at_once in (False, True, False, True):
            with pool.connection() as conn:
                conn.autocommit = at_once
                with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                    run(conn, "INSERT INTO notes (text) VALUES ('x')")


def toggle(conn: Any) -> None:
    before = conn.autocommit
    for at_once in (True, False, True, False, before):
        conn.autocommit = at_once


USES = [
    lambda conn: conn.set_session(readonly=True, autocommit=True),
    lambda conn: conn.set_session(readonly="DEFAULT", autocommit=True),
    lambda conn: conn.set_session(readonly=False),
    lambda conn: conn.set_session(readonly=True),
    lambda conn: run(conn, "SET default_transaction_read_only = off; COMMIT"),
    lambda conn: run(conn, "RESET ALL; COMMIT"),
    lambda conn: run(conn, "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE; COMMIT"),
    toggle,
]


@pytest.mark.parametrize("autocommit", [None, True, "safe"])
@pytest.mark.parametrize("hook", [None, "configure", "check", "reset"])
@pytest.mark.parametrize("use", USES)
def test_a_session_that_only_reads_does_so_after_any_use(dsn: str, use: Any, hook: Any, autocommit: Any) -> None:
    """psycopg2 sets the server's own setting, too, and sets it to its default when it leaves autocommit."""
    hooks = {} if hook is None else {hook: toggle}
    options = {"autocommit": autocommit, "readonly": True, "idle_timeout": 60, "check_idle": 0, **hooks}
    with zpgpool.PersistentConnectionPool(1, 1, dsn, **options) as pool:
        with pool.connection() as conn:
            use(conn)
        for at_once in (False, True):
            with pool.connection() as conn:
                conn.autocommit = at_once
                with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                    run(conn, "CREATE TABLE nowhere (number int)")
        assert pool.get_stats()["connections_num"] == 1


def test_who_cannot_read_only_is_left_out(make_main: Any, level: Pair, caplog: pytest.LogCaptureFixture) -> None:
    options = {"pooler": "pgbouncer-transaction", "autocommit": True}
    make_main(replica={"dsn": dsn_of(level.standby), **options}, may_be_read=False)
    assert site().get("/").text == "primary"
    assert "option 'readonly' with autocommit cannot be kept with option 'pooler'" in caplog.text


def test_a_write_on_a_promoted_replica_is_done_on_the_primary(make_main: Any, level: Pair) -> None:
    """Before a look has found out."""
    main = make_main(replica={"dsn": dsn_of(level.primary, level.standby)}, may_be_read=False, max_lag=None)
    client = site()
    response = client.get("/write")
    assert response.text == "written"
    assert "zpgpool-written" in response.headers["Set-Cookie"]
    assert main.get_stats()["connections_num"] == 1


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*)::text FROM unlogged",
        f"SET TRANSACTION READ WRITE; {WHERE}",
        f"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; {WHERE}",
    ],
)
def test_what_a_standby_cannot_do_is_done_on_the_primary(make_main: Any, level: Pair, sql: str) -> None:
    """SQLSTATE 0A000."""
    level.ask(level.primary, "DROP TABLE IF EXISTS unlogged", "CREATE UNLOGGED TABLE unlogged (id int)")
    wal = level.ask(level.primary, "SELECT pg_current_wal_lsn()")
    eventually(lambda: level.ask(level.standby, f"SELECT pg_last_wal_replay_lsn() >= '{wal}'"), 20)
    make_main()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        answer = run(get_connection(environ, "main"), sql)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [answer.encode()]

    assert site(app).get("/").text in ("0", "primary")


# Who gets the cookie --------------------------------------------------------------------------------------------------


def written(response: Any) -> float:
    """Return the time that the response's cookie has; 0.0: it has none."""
    cookies = [each for each in response.headers.getall("Set-Cookie") if each.startswith("zpgpool-written=")]
    return max((float(each.partition("=")[2].split(";")[0]) for each in cookies), default=0.0)


WAYS = ["the replica refuses", "the header", "an older cookie", "left out", "lost", "prefer-standby"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*WAYS, pytest.param("exhausted", marks=pytest.mark.hangs)])
def test_whoever_writes_gets_the_cookie(make_main: Any, level: Pair, kind: Any, way: str) -> None:
    dsn = dsn_of(level.primary, level.standby)
    replica = {"exhausted": {"timeout": 0}, "prefer-standby": {"dsn": dsn}}.get(way)
    make_main(kind, replica, may_be_read=way != "prefer-standby", max_lag=None)
    client, headers, held = site(), {}, []
    if way == "the header":
        headers = HEADER
    elif way == "an older cookie":
        client.set_cookie("zpgpool-written", f"{time.time() - 1:.3f}")
    elif way == "left out":
        watch(pools()[1]).lost("it is lost")
    elif way == "exhausted":
        held = [pools()[1].checkout() for _ in range(8)]
    elif way == "lost":
        level.standby.halt()
    assert not written(client.get("/"))  # who reads does not get it: not for ever a new one
    before = time.time()
    response = client.get("/write", headers=headers)
    assert response.text == "written"
    assert written(response) >= round(before, 3) - 0.001
    assert response.headers.getall("Cache-Control") == ["private"]
    for checkout in held:
        checkout.putconn()
    assert client.get("/").text == "primary"
    assert [pool.holders() for pool in pools()] == [[], []]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_the_cookie_has_the_time_when_the_write_has_ended(make_main: Any, method: str, is_streamed: bool) -> None:
    make_main()
    ended = []

    def app(environ: Any, start_response: Any) -> Any:
        def body() -> Iterator[bytes]:
            conn = get_connection(environ, "main")
            run(conn, "INSERT INTO notes (text) SELECT 'x' FROM pg_sleep(0.2)")
            conn.commit()
            ended.append(time.time())
            yield b"x"

        start_response("200 OK", [("Content-Type", "text/plain")])
        return body() if is_streamed else list(body())

    assert written(site(app).request("/", method=method)) >= ended[0] - 0.001


@pytest.mark.parametrize("kind", KINDS)
def test_a_transaction_that_writes_where_there_is_no_replica_runs_again(make_main: Any, kind: Any) -> None:
    """On the primary, whose session only read until then."""
    make_main(kind)
    watch(pools()[1]).lost("it is lost")
    ran = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        for attempt in transaction.manager.attempts(2):
            with attempt:
                ran.append(run(connection("main"), WHERE))
                run(connection("main"), "INSERT INTO notes (text) VALUES ('x')")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"x"]

    assert written(site(app).get("/"))
    assert ran == ["primary", "primary"]
    with pools()[0].connection() as conn:
        assert run(conn, "SHOW transaction_read_only") == "off"


@pytest.mark.parametrize(
    ("script_name", "expected"),
    [
        ("", "/"),
        ("/a@1", "/a@1"),
        ("/shop:2", "/shop:2"),
        ("/it's(1)!*+=$&~|[]", "/it's(1)!*+=$&~|[]"),
        ("/caf\xc3\xa9 x", "/caf%C3%A9%20x"),
        ('/"<>`{}#?', "/%22%3C%3E%60%7B%7D%23%3F"),
        ("/100%", "/100%25"),
        ("/a/b;c/d", "/a"),
        ("/a,b", "/"),
    ],
)
def test_the_cookies_path_is_as_browsers_compare_it(script_name: str, expected: str) -> None:
    [(_, cookie), _] = with_write_cookie([], {"SCRIPT_NAME": script_name}, 2.5)
    assert f"; Path={expected};" in cookie
    assert "Max-Age=3;" in cookie


def test_two_cookie_headers_are_joined_with_a_comma() -> None:
    now = f"zpgpool-written={time.time():.3f}"
    for cookies in (f"a=b, {now}, c=d", f"{now},a=b", f"a=b,{now}"):
        assert has_written({"HTTP_COOKIE": cookies}, 5)


# A replica that hangs -------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(level: Pair) -> Iterator[Proxy]:
    """On the way to the standby."""
    proxy = Proxy(level.standby.port or 0)
    yield proxy
    proxy.close()


@pytest.mark.hangs
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_for_a_replica_that_hangs(
    make_main: Any, level: Pair, kind: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a query, or in the queue of its pool: they begin again, or read, on the primary, which serves all others."""
    make_main(kind, {"dsn": proxy.dsn(dsn_of(level.standby)), "maxconn": 2})
    known = watch(pools()[1])
    client = site()
    assert client.get("/").text == "standby"
    proxy.is_forwarding = False
    monkeypatch.setattr(lag, "LOOK", 0.75)
    start = time.monotonic()
    calls = [Call(site().get, "/") for _ in range(6)]
    assert [call.result().text for call in calls] == ["primary"] * 6
    assert is_within(time.monotonic() - start, 3)
    assert known.trouble == lag.SILENT
    assert [pool.holders() for pool in pools()] == [[], []]
    monkeypatch.setattr(lag, "LOOK", 20.0)
    proxy.is_forwarding = True
    eventually(lambda: client.get("/").text == "standby", 30)


def test_a_look_that_does_not_end_is_overdue(make_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is looked up may take for ever."""
    make_main()
    known = lag.Lag(pools()[1])
    is_over = threading.Event()
    monkeypatch.setattr(lag, "query", lambda *args: is_over.wait(10) and ([(True, True, None)], 0))
    start = time.monotonic()
    known.run_maintenance(start)
    looker = known._looker
    with pools()[1].connection() as conn:
        known.run_maintenance(start + lag.LOOK)
        assert run(conn, "SELECT 1") == 1
        known.run_maintenance(start + lag.LOOK + lag.STUCK + lag.TICK)
        assert known.trouble == lag.SILENT
        with pytest.raises(psycopg2.Error):
            run(conn, "SELECT 1")
    is_over.set()
    looker.join()


def test_who_waits_long_has_a_look_made_soon(make_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_main()
    known = lag.Lag(pools()[1])
    looks: list[float] = []
    monkeypatch.setattr(known, "look", lambda: looks.append(1))

    def maintain(now: float) -> int:
        known.run_maintenance(now)
        known._looker.join()
        return len(looks)

    start = time.monotonic()
    assert [maintain(start + each) for each in (0, 0.6, 1.5, 2.1)] == [1, 1, 1, 2]
    with pools()[1].connection():
        assert maintain(start + 2.1 + lag.HURRY + 0.01) == 3


def test_a_limit_of_connections_says_nothing_of_the_replica(make_main: Any, level: Pair) -> None:
    """The look goes over a connection of the pool's then, if one is free."""
    level.ask(level.primary, "DROP ROLE IF EXISTS few", "CREATE ROLE few LOGIN CONNECTION LIMIT 2")
    eventually(lambda: level.ask(level.standby, "SELECT count(*) FROM pg_roles WHERE rolname = 'few'"))
    dsn = dsn_of(level.standby).replace("user=postgres", "user=few")
    make_main(replica={"dsn": dsn, "maxconn": 2})
    replica = pools()[1]
    held = [replica.getconn() for _ in range(2)]
    known = watch(replica)
    before = known._looked_at
    known.look()
    assert (known.trouble, known._looked_at) == ("", before)
    replica.putconn(held.pop())
    known.look()
    assert known.trouble == ""
    assert known._looked_at > before
    replica.putconn(held.pop())


def test_a_pool_for_one_thread_is_not_asked_by_another(make_main: Any) -> None:
    make_main(zpgpool.SimpleConnectionPool)
    assert lag._ask_in(pools()[1]) == []


# A safe method that writes -------------------------------------------------------------------------------------------


def test_a_safe_method_that_writes_is_told_of_and_served(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_main()
    client = site()
    assert client.get("/").text == "standby"
    before = pools()[1].get_stats()["connections_num"]
    response = client.get("/write")
    assert response.text == "written"
    assert "zpgpool-written" in response.headers["Set-Cookie"]
    assert "GET /write writes, which its method promises not to" in caplog.text
    assert "Zpgpool-Primary" in caplog.text
    assert "takes no writes any more" not in caplog.text
    client.reset()
    assert client.get("/").text == "standby"
    assert pools()[1].get_stats()["connections_num"] == before


def test_what_has_a_body_cannot_begin_again(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_main()
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        site().request("/write", method="GET", body=b"what was read cannot be read again")
    assert "takes no writes any more" not in caplog.text
    assert pools()[1].get_stats()["pool_size"] == 1


def test_a_replica_that_is_asked_by_its_name_is_not_drained(make_main: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_main()

    def write(environ: Any, start_response: Any) -> list[bytes]:
        run(get_connection(environ, "replica"), "INSERT INTO notes (text) VALUES ('x')")
        return []

    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        TestApp(PoolMiddleware(write, name="replica")).get("/")
    assert "takes no writes any more" not in caplog.text


# How far behind ------------------------------------------------------------------------------------------------------


def test_a_replica_that_is_behind_is_left_out_until_it_is_not(
    make_main: Any, level: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zpgpool")
    make_main(max_lag=1)
    client = site()
    assert client.get("/").text == "standby"
    level.ask(level.standby, "SELECT pg_wal_replay_pause()")
    level.ask(level.primary, "INSERT INTO notes (text) VALUES ('late')")
    eventually(lambda: client.get("/").text == "primary", 20)
    assert "s behind, max_lag is 1" in caplog.text
    level.ask(level.standby, "SELECT pg_wal_replay_resume()")
    eventually(lambda: client.get("/").text == "standby", 20)
    assert "is read from again" in caplog.text


def is_level(known: lag.Lag) -> bool:
    """Whether the standby has all that it was sent: a look may come just between the two."""
    known.look()
    return known.seconds == 0.0


def test_an_idle_primary_is_not_far_ahead(make_main: Any, level: Pair) -> None:
    make_main()
    time.sleep(1.5)  # real time: the last commit grows old
    known = lag_of(pools()[1])
    assert known is not None
    old = "SELECT now() - pg_last_xact_replay_timestamp() > '1s'"
    # A vacuum of the server's own commits, too.
    eventually(lambda: is_level(known) and level.ask(level.standby, old) is not False, 20)


def test_half_a_record_is_not_waited_for(make_main: Any, level: Pair) -> None:
    make_main()
    known = lag_of(pools()[1])
    assert known is not None
    with closing(psycopg2.connect(level.primary.dsn)) as writer, writer.cursor() as cursor:
        cursor.execute("INSERT INTO notes (text) SELECT repeat('x', 1000) FROM generate_series(1, 100)")
        # Its last page is sent when a commit fills it, and nobody commits.
        is_half = "SELECT mod(pg_last_wal_receive_lsn() - '0/0', 8192) = 0"
        is_half += " AND pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()"
        eventually(lambda: level.ask(level.standby, is_half), 20)
        eventually(lambda: is_level(known))
        assert level.ask(level.standby, is_half)


def test_who_no_longer_receives_falls_behind(make_main: Any, level: Pair) -> None:
    make_main()
    known = lag_of(pools()[1])
    assert known is not None
    known.look()
    level.primary.halt()
    eventually(lambda: not level.ask(level.standby, "SELECT count(*) FROM pg_stat_wal_receiver"))
    known.look()
    first = known.seconds
    assert first is not None
    assert 0 < first < 10
    time.sleep(0.2)  # real time
    known.look()
    assert known.seconds is not None
    assert known.seconds >= first + 0.2
    fresh = lag.Lag(pools()[1])  # of a process that has never seen it level
    fresh.look()
    assert fresh.seconds is None or fresh.seconds >= known.seconds


def test_a_role_without_rights_sees_it_too(make_main: Any, level: Pair) -> None:
    level.ask(level.primary, "DROP ROLE IF EXISTS nobody", "CREATE ROLE nobody LOGIN")
    eventually(lambda: level.ask(level.standby, "SELECT count(*) FROM pg_roles WHERE rolname = 'nobody'"))
    make_main(replica={"dsn": dsn_of(level.standby).replace("user=postgres", "user=nobody")})
    known = lag_of(pools()[1])
    assert known is not None
    eventually(lambda: is_level(known))


def test_a_server_that_is_no_standby_is_left_out(
    make_main: Any, level: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its connections are left when a standby is there again, as `prefer-standby` finds one."""
    dsn = dsn_of(level.standby, level.primary, attrs="prefer-standby")
    level.standby.halt()
    main = make_main(replica={"dsn": dsn}, may_be_read=False, max_lag=None)
    replica = pools()[1]
    known = watch(replica)
    eventually(lambda: known.trouble == lag.NO_STANDBY)
    assert site().get("/").text == "primary"
    assert "is left out" in caplog.text
    assert "split brain" in caplog.text
    assert (main.get_stats()["connections_num"], replica.get_stats()["connections_num"]) == (1, 0)
    replica.putconn(replica.getconn())
    level.standby.launch()
    eventually(lambda: not known.why_not(None, 0.0), 60)  # it asks for the log every 5 s, until it is given
    eventually(lambda: site().get("/").text == "standby", 20)
    known.trouble = lag.NO_STANDBY
    known.look()
    assert known.trouble == ""
    replica.close(0)
    known.trouble = lag.NO_STANDBY
    known.look()  # it was closed meanwhile


def test_what_is_not_known_is_not_read(make_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_main()
    known = lag.Lag(pools()[1])
    now = time.monotonic()
    assert known.why_not(3.0, now) is NOT_YET
    assert known.why_not(None, now) == ""
    eventually(lambda: is_level(known))
    now = time.monotonic()
    assert known.why_not(3.0, now) == ""
    assert "no look was answered for" in known.why_not(3.0, now + lag.STALE + 1)
    known.lost("")
    assert known.why_not(None, now) == "it is lost"


def test_a_look_at_a_server_that_is_down(make_main: Any, level: Pair) -> None:
    make_main()
    known = lag.Lag(pools()[1])
    known.look()
    level.standby.halt()
    known.look()
    assert known.seconds is None
    assert "Connection refused" in known.trouble
    assert "127.0.0.1" not in known.trouble
    level.standby.launch()
    known.look()
    assert known.trouble == ""


def test_a_pool_that_is_no_more(make_main: Any) -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, "dbname=x", open=False)
    known = lag.Lag(pool)
    del pool
    known.look()
    assert known.run_maintenance(0.0) is None


def test_a_standby_that_never_replayed_anything(make_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_main()
    known = lag.Lag(pools()[1])
    monkeypatch.setattr(lag, "query", lambda *args: ([(True, False, None)], 0))
    known.look()
    assert known.seconds is None
    assert known.why_not(None, time.monotonic()) == "it has replayed nothing, and receives nothing"


def test_a_silent_server_holds_up_no_timer(make_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_main()
    known = lag.Lag(pools()[1])
    is_over = threading.Event()
    monkeypatch.setattr(lag, "query", lambda *args: is_over.wait(10) and ([(True, True, None)], 0))
    start = time.monotonic()
    assert known.run_maintenance(start) <= start + lag.EVERY  # type: ignore[operator]
    looker = known._looker
    known.run_maintenance(start)
    assert known._looker is looker  # one at a time
    assert is_within(time.monotonic() - start, 1)
    is_over.set()
    looker.join()


def test_the_lag_is_on_the_status_page(make_main: Any, level: Pair) -> None:
    make_main()
    _, replica = pools()
    status = TestApp(StatusApp(), extra_environ={"REMOTE_ADDR": "127.0.0.1"})
    level.ask(level.standby, "SELECT pg_wal_replay_pause()")
    level.ask(level.primary, "INSERT INTO notes (text) VALUES ('late')")
    known = lag_of(replica)
    assert known is not None
    time.sleep(0.3)  # real time
    known.look()
    history_of(replica).maintain(time.monotonic() + 60)
    shown = {pool["name"]: pool for pool in status.get("/json").json["pools"]}
    assert shown["main"]["lag"] is None
    assert shown["replica"]["lag"]["seconds"] >= 0.3
    assert shown["replica"]["samples"][-1]["lag"] >= 0.3
    page = status.get("/", headers={"Accept": "text/html"}).text
    assert page.count("Behind the primary:") == 1
    assert page.count("Behind the primary in the last ten minutes: at most") == 1
    metrics = {each.name: each for each in text_string_to_metric_families(status.get("/metrics").text)}
    [sample] = metrics["zpgpool_replica_lag_seconds"].samples
    assert sample.labels == {"pool_name": "replica"}
    assert sample.value >= 0.3
    known._next = float("inf")  # no look of the timer's finds it again meanwhile
    known._looker.join()
    known.lost("it is <gone>")
    page = status.get("/", headers={"Accept": "text/html"}).text
    assert "The replica is lost: it is &lt;gone&gt;" in page
    assert "Behind the primary: not known" in page
    json.dumps(shown)


def test_the_lag_for_opentelemetry(make_main: Any) -> None:
    make_main()
    reader = InMemoryMetricReader()
    instrument(MeterProvider([reader]))
    data: Any = reader.get_metrics_data()
    metrics = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    [point] = metrics["zpgpool.replica.lag"].data.data_points
    assert point.attributes == {"db.client.connection.pool.name": "replica"}
    assert point.value >= 0


def test_a_query_on_the_standby_is_cancelled_when_its_client_has_gone(make_main: Any) -> None:
    make_main()
    start = time.monotonic()
    environ = {"waitress.client_disconnected": lambda: time.monotonic() > start + 0.2}
    with pytest.raises(psycopg2.errors.QueryCanceled):
        site(cancel_on_disconnect=True).get("/slow", extra_environ=environ)
    assert [pool.get_stats()["connections_num"] for pool in pools()] == [0, 1]  # and it does not begin again


def test_a_forked_child_looks_for_itself(make_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_main()
    watched: list[Any] = []
    monkeypatch.setattr(timer, "watch", watched.append)
    known = watch(pools()[1])
    assert watched == []
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert watch(pools()[1]) is known
    assert watch(pools()[1]) is known
    assert watched == [known]


# All of it at once ----------------------------------------------------------------------------------------------------


#: Requests of each client between two events.
MORE = 40


class Reader:
    """A client that keeps cookies, writes in whatever way, and reads what it has written."""

    def __init__(self, port: int, number: int, kinds: list[str]) -> None:
        self.port, self.number, self.kinds = port, number, kinds
        self.cookie = ""
        self.written = self.asked = 0
        self.slowest = 0.0
        self.faults: list[str] = []

    def ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        start = time.monotonic()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as conn:
            conn.request(method, f"{path}/{self.number}", headers={"Cookie": self.cookie, **headers})
            response = conn.getresponse()
            body = response.read().decode()
        for cookie in response.msg.get_all("Set-Cookie") or []:
            self.cookie = cookie.partition(";")[0]
        self.asked += 1
        self.slowest = max(self.slowest, time.monotonic() - start)
        return response.status, body

    def run(self, is_over: threading.Event) -> None:
        while not is_over.is_set():
            kind = self.kinds[self.asked % len(self.kinds)]
            method, path, *header = kind.split()
            status, body = self.ask(method, path, HEADER if header else {})
            if status != 200:
                self.faults.append(f"{kind}: {status} {body}")
            elif path == "/read":
                if int(body) != self.written:
                    self.faults.append(f"read {body}, written {self.written}")
            else:
                self.written += 1


@pytest.mark.slow
@pytest.mark.hangs
@pytest.mark.parametrize("kind", KINDS)
def test_clients_see_what_they_wrote_whatever_becomes_of_the_standby(
    make_main: Any, level: Pair, proxy: Proxy, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything done twice, and nobody waits long. Behind, killed, frozen, and promoted in the end."""
    monkeypatch.setattr(lag, "LOOK", 0.75)
    level.ask(level.primary, "DROP TABLE IF EXISTS done", "CREATE TABLE done (client int)")

    def app(environ: Any, start_response: Any) -> Any:
        path, _, number = environ["PATH_INFO"].rpartition("/")

        def body() -> Iterator[bytes]:
            conn = get_connection(environ, "main")
            count: Any = 0
            if path != "/read":
                run(conn, "INSERT INTO done VALUES (%s)", number)
            else:
                count = run(conn, "SELECT count(*) FROM done WHERE client = %s", number)
            conn.commit()
            yield str(count).encode()

        start_response("200 OK", [("Content-Type", "text/plain")])
        return body() if "stream" in path else list(body())

    make_main(kind, {"dsn": proxy.dsn(dsn_of(level.standby)), "maxconn": 6}, primary_after_write=8, max_lag=2)
    replica = pools()[1]
    wal = level.ask(level.primary, "SELECT pg_current_wal_lsn()")
    eventually(lambda: level.ask(level.standby, f"SELECT pg_last_wal_replay_lsn() >= '{wal}'"), 20)
    kinds = ["POST /write", "GET /read", "GET /write", "GET /read", "GET /write header", "GET /read"]
    kinds += ["POST /stream", "GET /read", "GET /stream", "GET /read"] + ["GET /read"] * 20
    is_over = threading.Event()
    with waitress(PoolMiddleware(app, name="main"), threads=8) as port:
        clients = [Reader(port, number, kinds[number % 7 :] + kinds[: number % 7]) for number in range(12)]
        lurker = Reader(port, 99, ["GET /read"])  # it never writes: from the replica
        calls = [Call(client.run, is_over) for client in [*clients, lurker]]

        def wait_for_more() -> None:
            seen = [client.asked for client in clients]
            eventually(lambda: all(client.asked > each + MORE for client, each in zip(clients, seen, strict=True)), 60)

        try:
            wait_for_more()
            level.ask(level.standby, "SELECT pg_wal_replay_pause()")
            wait_for_more()
            level.ask(level.standby, "SELECT pg_wal_replay_resume()")
            level.standby.halt(signal.SIGQUIT)
            wait_for_more()
            level.standby.launch()
            wait_for_more()
            proxy.is_forwarding = False
            wait_for_more()
            proxy.is_forwarding = True
            wait_for_more()
            level.ask(level.standby, "SELECT pg_promote()")
            wait_for_more()
            eventually(lambda: watch(replica).trouble in (lag.NO_STANDBY, lag.SILENT), 20)
        finally:
            is_over.set()
            for call in calls:
                call.result()
            level.attach(is_synchronous=False)
    assert [client.faults for client in [*clients, lurker]] == [[]] * 13
    done = "SELECT coalesce(json_object_agg(client, count), '{}') FROM (SELECT client, count(*) FROM done GROUP BY 1) x"
    assert level.ask(level.primary, done) == {str(client.number): client.written for client in clients}
    assert is_within(max(client.slowest for client in clients), 5)
