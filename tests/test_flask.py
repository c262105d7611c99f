"""Flask: the use of a connection begins and ends with the request, under Flask's own client and a real server."""

from __future__ import annotations

import asyncio
import http.client
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from benchmarks.harness import free_port
from flask import abort
from flask import Flask
from flask import request
from flask import Response
from flask import stream_with_context
from zope.component import getGlobalSiteManager
from zope.interface.interfaces import ComponentLookupError
from zope.interface.registry import Components

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import KINDS
from conftest import Outside
from conftest import run
from serving import waitress
from zpgpool.flask import ConnectFailed
from zpgpool.flask import get_connection
from zpgpool.flask import init_app
from zpgpool.interfaces import IConnectionPool
from zpgpool.settings import SettingError


#: Stands in no message.
SECRET = "hunter2"

MakeApp = Callable[..., Flask]


@pytest.fixture
def make_app(dsn: str) -> Iterator[MakeApp]:
    """An application factory, as Flask's documentation has it: may be called several times."""
    apps: list[Flask] = []

    def make(name: str = "shop", *, config: Any = None, **more: Any) -> Flask:
        app = Flask(name)
        app.config["ZPGPOOL"] = {"dsn": dsn, "maxconn": 2, "timeout": 20} if config is None else config
        app.config.update(more)
        init_app(app)
        apps.append(app)

        @app.route("/add/<int:n>")
        def add(n: int) -> str:
            run(get_connection(), "INSERT INTO numbers VALUES (%s)", n)
            return "added"

        @app.route("/pid")
        def pid() -> str:
            return str(run(get_connection(), "SELECT pg_backend_pid()"))

        return app

    yield make
    for app in apps:
        for _, pool in app.extensions["zpgpool"].getUtilitiesFor(IConnectionPool):
            pool.close(0)


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app()


@pytest.fixture
def exhausted(make_app: MakeApp, dsn: str) -> Iterator[Flask]:
    """An application whose two connections others have."""
    app = make_app(config={"dsn": dsn, "maxconn": 2, "timeout": 0.1})
    pool = pool_of(app)
    conns = [pool.getconn(timeout=20) for _ in range(2)]
    yield app
    for conn in conns:
        pool.putconn(conn)


@pytest.fixture(autouse=True)
def table(outside: Outside) -> Iterator[None]:
    outside.query("DROP TABLE IF EXISTS numbers; CREATE TABLE numbers (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    yield
    outside.query("DROP TABLE numbers")


def pool_of(app: Flask, name: str = "") -> Any:
    return zpgpool.get_pool(name, app.extensions["zpgpool"])


def stored(outside: Outside) -> list[int]:
    return [n for (n,) in outside.query("SELECT n FROM numbers ORDER BY n")]


def get(app: Flask, path: str) -> tuple[int, str]:
    """Answer a request as it comes from a server, whose body is closed."""
    with app.test_client() as client:
        response = client.get(path, buffered=True)
    return response.status_code, response.text


class TestSettings:
    def test_make_one_pool(self, app: Flask, outside: Outside) -> None:
        pool = pool_of(app)
        assert type(pool) is zpgpool.ThreadedConnectionPool
        settings = pool.settings
        assert (settings.minconn, settings.maxconn, settings.idle_timeout, settings.timeout) == (0, 2, 600, 20)
        assert outside.backends() == set()
        assert {int(get(app, "/pid")[1])} == outside.backends()
        assert pool.holders() == []

    @pytest.mark.parametrize("kind", ["threaded", "persistent"])
    def test_make_it_of_the_kind_that_is_wanted(self, make_app: MakeApp, dsn: str, kind: str) -> None:
        app = make_app(config={"dsn": dsn, "pool": kind})
        assert type(pool_of(app)).__name__ == KINDS[kind].__name__

    def test_make_several_pools(self, make_app: MakeApp, dsn: str) -> None:
        app = make_app(config={"": {"dsn": dsn}, "reports": {"dsn": dsn, "readonly": True, "maxconn": 3}})

        @app.route("/both")
        def both() -> list[str]:
            return [run(get_connection(name), "SHOW transaction_read_only") for name in ("", "reports")]

        assert app.test_client().get("/both").json == ["off", "on"]
        assert pool_of(app, "reports").maxconn == 3
        assert pool_of(app, "reports").name == "reports"

    def test_may_name_a_replica(self, make_app: MakeApp, dsn: str) -> None:
        reader = {"dsn": dsn, "readonly": True}
        app = make_app(config={"": {"dsn": dsn, "replica": "reader", "max_lag": None}, "reader": reader})

        @app.route("/where", methods=["GET", "POST"])
        def where() -> str:
            return str(run(get_connection(), "SHOW transaction_read_only"))

        client = app.test_client()
        assert eventually(lambda: client.get("/where").text == "on")
        assert client.post("/where").text == "off"
        assert pool_of(app).holders() == pool_of(app, "reader").holders() == []

    def test_a_replica_that_refuses_a_write_has_the_request_begin_again(self, make_app: MakeApp, dsn: str) -> None:
        """Flask makes a page of the error."""
        app = make_app(config={"": {"dsn": dsn, "replica": "reader", "max_lag": None}, "reader": {"dsn": dsn}})

        @app.route("/write")
        def write() -> str:
            run(get_connection(), "CREATE TEMP SEQUENCE IF NOT EXISTS numbers")
            return str(run(get_connection(), "SELECT txid_current() > 0"))

        with app.test_client() as client:
            response = client.get("/write")
            assert response.text == "True"
            assert "zpgpool-written" in response.headers["Set-Cookie"]

    def test_may_come_as_text(self, make_app: MakeApp, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the environment: Flask makes a mapping of names with two underscores."""
        monkeypatch.setenv("FLASK_ZPGPOOL__dsn", "ENV:APP_DSN")
        monkeypatch.setenv("FLASK_ZPGPOOL__maxconn", "3")
        monkeypatch.setenv("APP_DSN", dsn)
        app = Flask("x")
        app.config.from_prefixed_env()
        app = make_app(config=app.config["ZPGPOOL"])
        assert pool_of(app).maxconn == 3
        assert get(app, "/pid")[0] == 200

    def test_are_the_applications_own(self, make_app: MakeApp, dsn: str) -> None:
        apps = [make_app(), make_app()]
        pools = [pool_of(app) for app in apps]
        assert pools[0] is not pools[1]
        assert get(apps[0], "/pid") != get(apps[1], "/pid")
        assert list(getGlobalSiteManager().getUtilitiesFor(IConnectionPool)) == []
        assert all(isinstance(app.extensions["zpgpool"], Components) for app in apps)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({}, r"app.config\['ZPGPOOL'\]: option 'dsn' is missing \(known: .*pool"),
            ({"maxconn": 3}, r"app.config\['ZPGPOOL'\]: option 'dsn' is missing"),
            ({"dsn": "", "maxcon": 3}, r"app.config\['ZPGPOOL'\]: unknown option 'maxcon', did you mean 'maxconn'"),
            ({"dsn": "", "maxconn": "x"}, r"option 'maxconn': expected a whole number, 0 or more, got 'x'"),
            ({"dsn": "", "pool": "x"}, r"option 'pool': expected one of persistent, simple, threaded, got 'x'"),
            ({"dsn": "", "name": "x"}, r"option 'name': a pool's name is its key"),
            ({"a": {"dsn": "", "maxcon": 3}}, r"app.config\['ZPGPOOL'\]\['a'\]: unknown option 'maxcon'"),
            ({"dsn": SECRET, "a": {"dsn": ""}}, r"option 'ZPGPOOL': expected a mapping of a pool's options, or"),
            (f"dbname=x password={SECRET}", r"option 'ZPGPOOL': expected a mapping of a pool's options, or"),
        ],
    )
    def test_that_cannot_be_are_refused_by_name(self, make_app: MakeApp, config: Any, message: str) -> None:
        with pytest.raises(SettingError, match=message) as info:
            make_app(config=config)
        assert SECRET not in str(info.value)

    def test_of_the_application_that_cannot_be(self, make_app: MakeApp) -> None:
        with pytest.raises(SettingError, match="option 'ZPGPOOL_COMMIT': expected true or false, got 'x'"):
            make_app(ZPGPOOL_COMMIT="x")
        with pytest.raises(SettingError, match="option 'ZPGPOOL_RETRY_AFTER': expected a whole number"):
            make_app(ZPGPOOL_RETRY_AFTER=-1)

    def test_init_app_is_called_once(self, app: Flask) -> None:
        with pytest.raises(SettingError, match="was called for the application 'shop' before"):
            init_app(app)

    def test_init_app_is_called(self) -> None:
        app = Flask("x")
        with app.app_context(), pytest.raises(SettingError, match=r"init_app\(\) was not called for .* 'x'"):
            get_connection()

    def test_no_such_pool(self, app: Flask) -> None:
        with app.app_context(), pytest.raises(ComponentLookupError, match="no pool is registered as 'other'"):
            get_connection("other")


class TestTheEnd:
    def test_commits_what_succeeds(self, app: Flask, outside: Outside) -> None:
        assert get(app, "/add/1") == (200, "added")
        assert stored(outside) == [1]
        assert pool_of(app).holders() == []

    @pytest.mark.parametrize("status", [301, 399, 400, 404, 500, 503])
    def test_rolls_back_from_400_on(self, app: Flask, outside: Outside, status: int) -> None:
        @app.route("/status")
        def answer() -> Any:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            return "", status

        assert get(app, "/status")[0] == status
        assert stored(outside) == ([1] if status < 400 else [])
        assert pool_of(app).holders() == []

    def test_rolls_back_what_is_aborted_or_raises(self, app: Flask, outside: Outside) -> None:
        @app.route("/abort")
        def abort_it() -> str:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            abort(403)

        @app.route("/raise")
        def raise_it() -> str:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            raise LookupError

        assert [get(app, path)[0] for path in ("/abort", "/raise")] == [403, 500]
        app.testing = True
        with pytest.raises(LookupError):
            get(app, "/raise")
        assert stored(outside) == []
        assert pool_of(app).holders() == []

    def test_takes_no_connection_for_a_request_that_uses_none(self, app: Flask, outside: Outside) -> None:
        assert get(app, "/nothing")[0] == 404
        assert pool_of(app).get_stats()["requests_num"] == 0

    def test_a_commit_that_fails_is_an_error_of_the_request(self, app: Flask, outside: Outside) -> None:
        @app.errorhandler(500)
        def tell(error: Any) -> Any:
            return type(error.original_exception).__name__, 500

        assert get(app, "/add/1")[0] == 200
        assert get(app, "/add/1") == (500, "UniqueViolation")  # deferred until the commit
        assert stored(outside) == [1]
        assert pool_of(app).holders() == []

    def test_an_error_that_was_swallowed_is_one_of_the_request(self, app: Flask, outside: Outside) -> None:
        @app.route("/swallow")
        def swallow() -> str:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            try:
                run(get_connection(), "SELECT 1 / 0")
            except psycopg2.Error:
                pass
            return "stored, or not?"

        assert get(app, "/swallow")[0] == 500
        assert stored(outside) == []

    def test_commits_what_functions_after_the_request_add(self, app: Flask, outside: Outside) -> None:
        @app.after_request
        def log_it(response: Response) -> Response:
            run(get_connection(), "INSERT INTO numbers VALUES (2)")
            return response

        get(app, "/add/1")
        assert stored(outside) == [1, 2]

    def test_a_view_may_commit_or_roll_back_itself(self, app: Flask, outside: Outside) -> None:
        @app.route("/itself")
        def itself() -> Any:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            get_connection().commit()
            run(get_connection(), "INSERT INTO numbers VALUES (2)")
            get_connection().rollback()
            run(get_connection(), "INSERT INTO numbers VALUES (3)")
            return "", 400

        get(app, "/itself")
        assert stored(outside) == [1]

    def test_does_not_commit_where_that_is_off(self, make_app: MakeApp, outside: Outside) -> None:
        app = make_app(ZPGPOOL_COMMIT="false")

        @app.route("/itself")
        def itself() -> str:
            run(get_connection(), "INSERT INTO numbers VALUES (2)")
            get_connection().commit()
            return ""

        assert [get(app, path)[0] for path in ("/add/1", "/itself")] == [200, 200]
        assert stored(outside) == [2]

    def test_the_test_client_need_not_close_the_body(
        self, app: Flask, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = app.test_client()
        response = client.get("/add/1")
        assert pool_of(app).holders() == []
        assert stored(outside) == [1]
        del response
        assert [client.get(path).status_code for path in ("/add/2", "/pid", "/none")] == [200, 200, 404]
        assert caplog.records == []

    @pytest.mark.parametrize("how", ["raise", "abort"])
    def test_nor_that_of_an_error_page(self, app: Flask, how: str) -> None:
        @app.route("/fail")
        def fail() -> str:
            run(get_connection(), "SELECT 1")
            abort(404) if how == "abort" else 1 / 0
            return ""

        app.logger.disabled = True
        client = app.test_client()
        kept = [client.get("/fail") for _ in range(3)]
        assert [each.status_code for each in kept] == [404 if how == "abort" else 500] * 3
        [(_, pool)] = app.extensions["zpgpool"].getUtilitiesFor(IConnectionPool)
        assert pool.holders() == []

    def test_functions_at_the_close_of_a_body_run_there(self, app: Flask) -> None:
        calls = []

        @app.route("/later")
        def later() -> Response:
            run(get_connection(), "SELECT 1")
            response = Response("x")
            response.call_on_close(lambda: calls.append("closed"))
            return response

        response = app.test_client().get("/later")
        assert (response.text, calls) == ("x", [])
        response.close()
        assert calls == ["closed"]

    def test_a_preserved_context_does_not_preserve_the_connection(self, app: Flask) -> None:
        with app.test_client() as client:
            client.get("/pid")
            assert request.path == "/pid"
            assert pool_of(app).holders() == []
            with pytest.raises(zpgpool.PoolError, match="the request has ended"):
                get_connection()


class TestStreams:
    @pytest.fixture
    def streamed(self, app: Flask) -> list[str]:
        """What the stream has met."""
        met: list[str] = []

        @app.route("/stream")
        def stream() -> Response:
            pid = run(get_connection(), "INSERT INTO numbers VALUES (1) RETURNING pg_backend_pid()")

            def generate() -> Iterator[str]:
                try:
                    conn = get_connection()
                    met.append("the same" if conn.get_backend_pid() == pid else "another")
                    with conn.cursor("numbers") as cursor:
                        cursor.itersize = 10
                        cursor.execute("SELECT generate_series(1, 100)")
                        for (n,) in cursor:
                            yield f"{n}\n"
                    run(conn, "INSERT INTO numbers VALUES (2)")
                finally:
                    met.append("end")

            return Response(stream_with_context(generate()))

        return met

    def test_keep_the_connection_until_they_end(self, app: Flask, outside: Outside, streamed: list[str]) -> None:
        response = app.test_client().get("/stream")
        assert len(pool_of(app).holders()) == 1
        assert stored(outside) == [1]  # the client may see it with the first line
        assert response.text.split() == [str(n) for n in range(1, 101)]
        response.close()
        assert pool_of(app).holders() == []
        assert streamed == ["the same", "end"]
        assert stored(outside) == [1]  # nobody could be told that the second one failed

    def test_return_it_when_the_client_leaves(self, app: Flask, streamed: list[str]) -> None:
        response = app.test_client().get("/stream")
        assert next(iter(response.response)) == b"1\n"
        response.close()
        assert pool_of(app).holders() == []
        assert streamed == ["the same", "end"]

    def test_under_a_real_server(self, app: Flask, outside: Outside, streamed: list[str]) -> None:
        with waitress(app, threads=3) as port:
            for _ in range(4):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/stream") as answer:
                    assert len(answer.read().split()) == 100
                outside.query("DELETE FROM numbers")
            eventually(lambda: pool_of(app).holders() == [])
        assert streamed == ["the same", "end"] * 4
        assert len(outside.backends()) == 1

    def test_that_get_no_connection_are_503(self, exhausted: Flask) -> None:
        @exhausted.route("/late")
        def late() -> Response:
            return Response(stream_with_context(str(get_connection()) for _ in range(1)))

        assert exhausted.test_client().get("/late").status_code == 503


class TestWithoutAConnection:
    @pytest.mark.parametrize("testing", [False, True])
    def test_an_exhausted_pool_is_503(self, exhausted: Flask, caplog: pytest.LogCaptureFixture, testing: bool) -> None:
        exhausted.testing = testing
        response = exhausted.test_client().get("/pid", buffered=True)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert response.headers["Cache-Control"] == "no-store"
        assert "not available" in response.text
        [record] = caplog.records
        assert record.getMessage().startswith("GET /pid: 503 Service Unavailable: no connection came free within ")

    def test_too_many_requests_are_503(self, make_app: MakeApp, dsn: str) -> None:
        app = make_app(config={"dsn": dsn, "maxconn": 1, "timeout": 20, "max_waiting": 1}, ZPGPOOL_RETRY_AFTER=7)
        pool = pool_of(app)
        conn = pool.getconn()
        waiter = Call(get, app, "/pid")
        eventually(pool.waiters)
        response = app.test_client().get("/pid", buffered=True)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "7")
        pool.putconn(conn)
        assert waiter.result()[0] == 200

    def test_a_server_that_is_down_is_503(self, make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
        dsn = f"host=127.0.0.1 port={free_port()} dbname=x user=x password={SECRET}"
        app = make_app(config={"dsn": dsn, "outage_wait": 0})
        response = app.test_client().get("/pid", buffered=True)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert SECRET not in caplog.text
        assert "Connection refused" in caplog.text

    def test_a_page_of_the_applications_own(self, exhausted: Flask) -> None:
        @exhausted.errorhandler(503)
        def tell(error: Any) -> Any:
            return "back soon", 503

        response = exhausted.test_client().get("/pid", buffered=True)
        assert (response.text, response.headers["Retry-After"]) == ("back soon", "5")

    def test_a_handler_of_the_applications_own(self, exhausted: Flask) -> None:
        @exhausted.errorhandler(zpgpool.PoolTimeout)
        def tell(error: Any) -> str:
            return "from the cache"

        assert get(exhausted, "/pid") == (200, "from the cache")

    def test_a_view_may_handle_it(self, exhausted: Flask) -> None:
        @exhausted.route("/handled")
        def handled() -> str:
            try:
                return str(get_connection())
            except psycopg2.Error:
                return "from the cache"

        assert get(exhausted, "/handled") == (200, "from the cache")

    def test_errors_of_queries_are_the_applications(self, app: Flask) -> None:
        @app.route("/wrong")
        def wrong() -> str:
            run(get_connection(), "SET statement_timeout = '1ms'")
            return str(run(get_connection(), "SELECT pg_sleep(10)"))

        @app.errorhandler(psycopg2.Error)
        def tell(error: Any) -> Any:
            return type(error).__name__, 418

        assert get(app, "/wrong") == (418, "QueryCanceled")

    def test_outside_of_requests_it_is_an_error(self, make_app: MakeApp) -> None:
        app = make_app(config={"dsn": f"host=127.0.0.1 port={free_port()} dbname=x user=x", "outage_wait": 0})
        with app.app_context(), pytest.raises(ConnectFailed, match="Connection refused") as info:
            get_connection()
        assert isinstance(info.value.__cause__, psycopg2.OperationalError)


class TestApplicationContexts:
    def test_have_a_connection_of_their_own(self, app: Flask, outside: Outside) -> None:
        with app.app_context():
            conn = get_connection()
            assert get_connection() is conn
            with app.app_context():
                assert get_connection() is not conn
            assert get_connection() is conn
            run(conn, "INSERT INTO numbers VALUES (1)")
            conn.commit()
            run(conn, "INSERT INTO numbers VALUES (2)")
        assert pool_of(app).holders() == []
        assert stored(outside) == [1]

    @pytest.mark.parametrize("kind", ["threaded", "persistent"])
    def test_within_a_request_have_the_requests(self, make_app: MakeApp, dsn: str, kind: str) -> None:
        app = make_app(config={"dsn": dsn, "pool": kind})

        @app.route("/nested")
        def nested() -> str:
            conn = get_connection()
            with app.app_context():
                assert get_connection() is conn
            run(conn, "SELECT 1")
            return "fine"

        assert get(app, "/nested") == (200, "fine")

    def test_of_a_request_for_tests(self, app: Flask) -> None:
        with app.test_request_context("/"):
            assert run(get_connection(), "SELECT 42") == 42
            assert len(pool_of(app).holders()) == 1
        assert pool_of(app).holders() == []

    def test_replace_a_connection_that_was_closed(self, app: Flask) -> None:
        with app.app_context():
            get_connection().close()
            assert run(get_connection(), "SELECT 42") == 42
        assert pool_of(app).holders() == []

    def test_of_a_command(self, app: Flask, outside: Outside) -> None:
        @app.cli.command("fill")
        def fill() -> None:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            get_connection().commit()
            run(get_connection(), "INSERT INTO numbers VALUES (2)")

        assert app.test_cli_runner().invoke(args=["fill"]).exit_code == 0
        assert stored(outside) == [1]
        assert pool_of(app).holders() == []


class TestNestedApplications:
    def test_each_has_its_own_connection_and_commits_it(self, make_app: MakeApp, outside: Outside) -> None:
        inner, outer = make_app("inner"), make_app("outer")

        @inner.route("/stream/<int:n>")
        def stream(n: int) -> Response:
            run(get_connection(), "INSERT INTO numbers VALUES (%s)", n)
            return Response(stream_with_context(str(get_connection().get_backend_pid()) for _ in range(1)))

        @outer.route("/outer/<path:path>")
        def call(path: str) -> Any:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            environ = {**request.environ, "PATH_INFO": f"/{path}"}
            response = Response.from_app(inner.wsgi_app, environ)
            assert int(response.get_data(as_text=True)) != get_connection().get_backend_pid()
            return response.get_data(), 400

        assert get(outer, "/outer/stream/2")[0] == 400
        assert stored(outside) == [2]
        assert pool_of(inner).holders() == pool_of(outer).holders() == []

    def test_a_request_within_one_of_the_same_application_is_part_of_it(self, app: Flask, outside: Outside) -> None:
        @app.route("/twice")
        def twice() -> Any:
            run(get_connection(), "INSERT INTO numbers VALUES (1)")
            assert app.test_client().get("/add/2").text == "added"
            Response.from_app(app.wsgi_app, {**request.environ, "PATH_INFO": "/add/3"})
            assert stored(outside) == []
            assert run(get_connection(), "SELECT count(*) FROM numbers") == 3
            return "", int(request.args["status"])

        assert get(app, "/twice?status=400")[0] == 400
        assert stored(outside) == []
        assert get(app, "/twice?status=200")[0] == 200
        assert stored(outside) == [1, 2, 3]
        assert pool_of(app).holders() == []

    def test_side_by_side_below_one_server(self, make_app: MakeApp, outside: Outside) -> None:
        from werkzeug.middleware.dispatcher import DispatcherMiddleware

        shop, admin = make_app("shop"), make_app("admin")
        shop.wsgi_app = DispatcherMiddleware(shop.wsgi_app, {"/admin": admin.wsgi_app})  # type: ignore[method-assign]
        assert get(shop, "/admin/add/1") == get(shop, "/add/2") == (200, "added")
        assert stored(outside) == [1, 2]
        assert [pool_of(app).get_stats()["requests_num"] for app in (shop, admin)] == [1, 1]


@pytest.mark.parametrize("kind", ["threaded", "persistent"])
def test_async_views(make_app: MakeApp, dsn: str, outside: Outside, kind: str) -> None:
    app = make_app(config={"dsn": dsn, "pool": kind})

    @app.route("/async/<int:n>")
    async def add_later(n: int) -> str:
        conn = get_connection()
        await asyncio.sleep(0)
        assert get_connection() is conn
        run(get_connection(), "INSERT INTO numbers VALUES (%s)", n)
        if n == 2:
            raise LookupError
        return "added"

    with waitress(app, threads=2) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/async/1") as answer:
            assert answer.read() == b"added"
    assert get(app, "/async/2")[0] == 500
    assert get(app, "/async/3") == (200, "added")
    assert stored(outside) == [1, 3]
    assert pool_of(app).holders() == []


def test_threads_of_a_server_share_the_pool(app: Flask, outside: Outside) -> None:
    with waitress(app, threads=8) as port:

        def ask(start: int) -> None:
            for n in range(start, start + 20):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/add/{n}") as answer:
                    assert answer.read() == b"added"

        calls = [Call(ask, 100 * number) for number in range(8)]
        for call in calls:
            call.result()
    assert len(stored(outside)) == 160
    assert len(outside.backends()) <= 2


RELOADED = """
from flask import Flask
from zpgpool.flask import get_connection, init_app

app = Flask(__name__)
app.config["ZPGPOOL"] = {"dsn": "ENV:APP_DSN", "minconn": 1, "maxconn": 2}
init_app(app)

@app.route("/")
def index():
    with get_connection().cursor() as cursor:
        cursor.execute("SELECT 'VERSION'")
        return cursor.fetchone()[0]
"""


def test_the_reloader_and_the_shell(dsn: str, outside: Outside, tmp_path: Path) -> None:
    path = tmp_path / "shop.py"
    path.write_text(RELOADED.replace("VERSION", "one"))
    environ = {**os.environ, "APP_DSN": dsn, "FLASK_APP": "shop", "FLASK_DEBUG": "1"}
    flask = [sys.executable, "-m", "flask"]
    port = str(free_port())
    server = subprocess.Popen(
        [*flask, "run", "--reload", "--port", port],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def says(text: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                return bool(answer.read().decode() == text)
        except (OSError, http.client.HTTPException):  # it ends in the middle of its answer, to be reloaded
            return False

    try:
        eventually(lambda: says("one"))
        path.write_text(RELOADED.replace("VERSION", "another"))
        eventually(lambda: says("another"))
        eventually(lambda: len(outside.backends()) <= 2)
    finally:
        server.terminate()
        server.communicate(timeout=10)
    code = (
        "from zpgpool.flask import get_connection as c; k = c().cursor(); k.execute('SELECT 42'); print(k.fetchone())"
    )
    shell = subprocess.run([*flask, "shell"], cwd=tmp_path, env=environ, input=code, capture_output=True, text=True)
    assert "(42,)" in shell.stdout, shell.stderr


def test_a_request_that_has_lost_its_connection_begins_again(make_app: MakeApp) -> None:
    """Flask makes a page of the error; the middleware sees that, and serves the request once more."""
    app = make_app()
    calls: list[int] = []

    @app.route("/lose", methods=["GET", "POST"])
    def lose() -> str:
        calls.append(1)
        if len(calls) == 1:
            run(get_connection(), "SELECT pg_terminate_backend(pg_backend_pid())")
        return str(run(get_connection(), "SELECT 42"))

    with app.test_client() as client:
        assert client.get("/lose").text == "42"
        assert len(calls) == 2
        calls.clear()
        assert client.post("/lose").status_code == 500
