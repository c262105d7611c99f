"""Frameworks that make a 500 of every exception: without a connection it is a 503, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import TypeAlias

import bottle
import falcon
import flask
import pytest
from benchmarks.harness import free_port
from psycopg2.extensions import make_dsn
from webtest import TestApp

import zpgpool
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


Count: TypeAlias = Callable[[dict[str, Any]], str]


def count(environ: dict[str, Any]) -> str:
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT 41 + 1")
        [(number,)] = cursor.fetchall()
    return f"{number}"


def plain_app() -> Any:
    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        if environ["PATH_INFO"] not in ("/", "/fails"):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"no such page"]
        if environ["PATH_INFO"] == "/fails":
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"its own page"]
        body = count(environ).encode()
        start_response("200 OK", [("Content-Type", "text/plain"), ("X-Seen", "yes")])
        return [body]

    return app


def bottle_app() -> Any:
    app = bottle.Bottle()

    @app.get("/")  # type: ignore[untyped-decorator]
    def index() -> str:
        bottle.response.set_header("X-Seen", "yes")
        return count(bottle.request.environ)

    @app.get("/fails")  # type: ignore[untyped-decorator]
    def fails() -> Any:
        bottle.abort(500, "its own page")

    return app


def falcon_app() -> Any:
    class Index:
        def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
            response.set_header("X-Seen", "yes")
            response.text = count(request.env)

    class Fails:
        def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
            raise falcon.HTTPInternalServerError(title="its own page")

    app = falcon.App()
    app.add_route("/", Index())
    app.add_route("/fails", Fails())
    return app


def flask_app() -> Any:
    app = flask.Flask("shop")

    @app.get("/")
    def index() -> flask.Response:
        response = flask.make_response(count(flask.request.environ))
        response.headers["X-Seen"] = "yes"
        return response

    @app.get("/fails")
    def fails() -> tuple[str, int]:
        return "its own page", 500

    return app


APPS = {"plain": plain_app, "bottle": bottle_app, "falcon": falcon_app, "flask": flask_app}


@pytest.fixture(params=APPS)
def app(request: pytest.FixtureRequest) -> Any:
    return APPS[request.param]()


@pytest.fixture(params=["persistent", "threaded"])
def factory(request: pytest.FixtureRequest) -> Any:
    return {"persistent": zpgpool.PersistentConnectionPool, "threaded": zpgpool.ThreadedConnectionPool}[request.param]


def check_503(answer: Any) -> None:
    assert answer.status == "503 Service Unavailable"
    assert answer.headers["Retry-After"] == "5"
    assert "X-Seen" not in answer.headers
    assert answer.text.startswith("The database is not available just now.")


def test_a_pool_that_is_exhausted(app: Any, factory: Any, make_pool: Callable[..., Any]) -> None:
    pool = make_pool(factory, 0, 1)
    site = TestApp(PoolMiddleware(app, pool))
    checkout = pool.checkout()
    check_503(site.get("/", expect_errors=True))
    checkout.putconn()
    assert site.get("/").text == "42"


def test_a_server_that_is_down(app: Any, factory: Any, make_pool: Callable[..., Any], dsn: str) -> None:
    site = TestApp(PoolMiddleware(app, make_pool(factory, 0, 1, dsn=make_dsn(dsn, host="127.0.0.1", port=free_port()))))
    check_503(site.get("/", expect_errors=True))


@pytest.mark.parametrize("path", ["/", "/nowhere", "/fails"])
def test_nothing_else_changes(app: Any, factory: Any, make_pool: Callable[..., Any], path: str) -> None:
    pool = make_pool(factory, 0, 1)
    with_filter = TestApp(PoolMiddleware(app, pool)).get(path, expect_errors=True)
    assert pool.holders() == []
    if path == "/":
        assert (with_filter.status_int, with_filter.text, with_filter.headers["X-Seen"]) == (200, "42", "yes")
        return
    without = TestApp(app).get(path, expect_errors=True)
    assert (with_filter.status, with_filter.headerlist, with_filter.text) == (
        without.status,
        without.headerlist,
        without.text,
    )
    assert with_filter.status_int == {"/nowhere": 404, "/fails": 500}[path]
