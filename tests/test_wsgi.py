"""The middleware: every request ends, and its connection is free. Servers are real, or play one badly."""

from __future__ import annotations

import gc
import http.client
import io
import logging
import socket
import socketserver
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.simple_server import WSGIServer
from wsgiref.validate import validator

import psycopg2
import pytest
import transaction
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS
from waitress.buffers import ReadOnlyFileBasedBuffer
from webob import Request
from webtest import TestApp
from webtest.lint import middleware as lint
from zope.component import getUtility
from zope.interface.interfaces import ComponentLookupError
from zope.interface.registry import Components

import zpgpool
import zpgpool.request.lease
from conftest import Call
from conftest import DEFAULTS
from conftest import Environ
from conftest import eventually
from conftest import in_thread
from conftest import KINDS
from conftest import Outside
from conftest import run
from serving import waitress
from zpgpool.core import tasks
from zpgpool.core.timer import MaintenanceTimer
from zpgpool.datamanager import get_connection as get_transactions_connection
from zpgpool.interfaces import IConnectionPool
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


MakePool = Callable[..., Any]

TestApp.__test__ = False  # it is not a test

SHARED = ["threaded", "persistent"]

#: Copied for each response: servers add to the list that they get.
TEXT = (("Content-Type", "text/plain"),)


MULTITHREAD: dict[str, Any] = {"wsgi.multithread": True}

RUN_ONCE: dict[str, Any] = {"wsgi.run_once": True}


@pytest.fixture
def kind() -> str:
    """The kind of pool, where a test does not say which."""
    return "persistent"


@pytest.fixture
def pool(make_pool: MakePool, kind: str) -> Any:
    return make_pool(KINDS[kind], 0, 4, idle_timeout=60)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """However a request ended, this package remembers nothing of it."""
    leases = zpgpool.request.local.state.leases
    before = {*tasks.values(), *leases.values()}  # of bodies that another module's test client has not closed
    yield
    gc.collect()
    assert {*tasks.values(), *leases.values()} <= before


every_kind = pytest.mark.parametrize("kind", KINDS)
shared_kinds = pytest.mark.parametrize("kind", SHARED)


def make_environ(path: str = "/page", method: str = "GET", **more: Any) -> dict[str, Any]:
    """Return an environ as a server makes it."""
    environ: dict[str, Any] = Request.blank(path, method=method).environ
    return environ | more


class Start:
    """A server's `start_response`: remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.written: list[bytes] = []

    def __call__(self, *args: Any) -> Callable[[bytes], object]:
        self.calls.append(args)
        return self.written.append

    @property
    def status(self) -> str:
        status: str = self.calls[-1][0]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.calls[-1][1])


def backend(environ: Any, name: str = "") -> int:
    """Use the request's connection, and return the number of its backend."""
    pid: int = run(get_connection(environ, name), "SELECT pg_backend_pid()")
    return pid


def page(environ: Any, start_response: Any) -> list[bytes]:
    """An ordinary application."""
    pid = backend(environ)
    start_response("200 OK", [*TEXT])
    return [str(pid).encode()]


class Body:
    """A body that is no list: notes the backend of each chunk, and its close."""

    def __init__(self, environ: Any, chunks: int = 3, fails_at_close: bool = False) -> None:
        self.environ = environ
        self.chunks = chunks
        self.fails_at_close = fails_at_close
        self.backends: list[int] = []
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if len(self.backends) == self.chunks:
            raise StopIteration
        self.backends.append(backend(self.environ))
        return b"chunk"

    def close(self) -> None:
        self.closed += 1
        if self.fails_at_close:
            raise RuntimeError("close failed")


class Streams:
    """An application that answers with a `Body`, and keeps it for the test."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.bodies: list[Body] = []

    def __call__(self, environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [*TEXT])
        self.bodies.append(Body(environ, **self.options))
        return self.bodies[-1]


def serve(app: Any, environ: dict[str, Any] | None = None) -> bytes:
    """Do what a server does with one request."""
    body = app(make_environ() if environ is None else environ, Start())
    try:
        return b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()


@contextmanager
def thread_per_request(app: Any) -> Iterator[int]:
    """Run `app` as Werkzeug's server does: each request in a thread of its own, which ends with it."""

    class Handler(WSGIRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = False

    with Server(("127.0.0.1", 0), Handler) as server:
        server.set_app(app)
        loop = Call(server.serve_forever)
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            loop.result()


def fetch(port: int, path: str = "/page") -> bytes:
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        conn.request("GET", path)
        return conn.getresponse().read()
    finally:
        conn.close()


def is_healthy_and_idle(pool: Any) -> bool:
    """Whether nobody holds a connection, and the one that was held is parked clean and works."""
    eventually(lambda: is_at_rest(pool))  # a connect that took long has another one beside it
    stats = pool.get_stats()
    with pool.connection() as conn:
        was_idle = conn.info.transaction_status == TRANSACTION_STATUS_IDLE
        works = run(conn, "SELECT 1") == 1
    return bool(was_idle and works and stats["pool_available"] == stats["pool_size"] >= 1)


def is_at_rest(pool: Any) -> bool:
    """Whether every connection is parked: for who waits for a server's thread, which holds nothing a moment before."""
    stats = pool.get_stats()
    return bool(pool.holders() == [] and stats["pool_available"] == stats["pool_size"])


class TestConnections:
    @every_kind
    def test_none_is_taken_when_nobody_asks(self, pool: Any, outside: Outside) -> None:
        assert serve(PoolMiddleware(lambda environ, start_response: [b"static"], pool)) == b"static"
        assert outside.backends() == set()
        assert pool.get_stats()["requests_num"] == 0

    @every_kind
    def test_a_request_has_one(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            assert get_connection(environ) is get_connection(environ)
            assert len(pool.holders()) == 1
            return []

        serve(PoolMiddleware(app, pool))
        assert pool.holders() == []

    @every_kind
    def test_what_it_did_not_commit_is_rolled_back(self, pool: Any, outside: Outside) -> None:
        outside.query("CREATE TABLE IF NOT EXISTS request (n int)")

        def app(environ: Any, start_response: Any) -> list[bytes]:
            conn = get_connection(environ)
            run(conn, "INSERT INTO request VALUES (1)")
            conn.commit()
            run(conn, "INSERT INTO request VALUES (2)")
            return []

        serve(PoolMiddleware(app, pool))
        assert outside.query("SELECT n FROM request") == [(1,)]
        assert is_healthy_and_idle(pool)
        outside.query("DROP TABLE request")

    @every_kind
    def test_one_that_the_application_closed_is_replaced(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            first = backend(environ)
            get_connection(environ).close()
            assert backend(environ) != first
            return []

        serve(PoolMiddleware(app, pool))
        assert pool.holders() == []
        assert len(pool._connections.handoff) == 1

    @every_kind
    def test_one_that_the_application_gave_back_is_not_given_back_again(self, pool: Any) -> None:
        """Pitfall 14."""

        def app(environ: Any, start_response: Any) -> list[bytes]:
            pool.putconn(get_connection(environ))
            return []

        serve(PoolMiddleware(app, pool))
        assert pool.holders() == []
        assert pool.get_stats()["pool_available"] == 1

    def test_without_the_middleware_there_is_none(self, pool: Any) -> None:
        with pytest.raises(zpgpool.PoolError, match="no PoolMiddleware serves a pool named '' to this request"):
            get_connection(make_environ())

        def app(environ: Any, start_response: Any) -> list[bytes]:
            with pytest.raises(zpgpool.PoolError, match="no PoolMiddleware serves a pool named 'other'"):
                get_connection(environ, "other")
            return []

        serve(PoolMiddleware(app, pool))

    @every_kind
    def test_eager_puts_it_into_the_environ_and_takes_it_out_at_the_end(self, pool: Any) -> None:
        environ = make_environ()
        seen: list[Any] = []

        def app(environ: Any, start_response: Any) -> Body:
            seen.append(environ["zpgpool.connection"])
            assert get_connection(environ) is seen[0]
            return Body(environ)

        body: Any = PoolMiddleware(app, pool, eager=True)(environ, Start())
        assert len(pool.holders()) == 1
        assert environ["zpgpool.connection"] is seen[0]
        body.close()
        assert "zpgpool.connection" not in environ
        assert pool.holders() == []

    @pytest.mark.parametrize("name", ["", "main"])
    def test_the_utility_of_a_persistent_pool_gives_the_same_one(self, pool: Any, name: str) -> None:
        zpgpool.register_pool(pool, name)

        def app(environ: Any, start_response: Any) -> list[bytes]:
            assert getUtility(IConnectionPool, name).getconn() is get_connection(environ, name)
            return []

        serve(PoolMiddleware(app, name=name))
        assert is_healthy_and_idle(pool)

    def test_and_the_requests_end_returns_it_even_when_only_the_utility_was_asked(self, pool: Any) -> None:
        zpgpool.register_pool(pool)

        def app(environ: Any, start_response: Any) -> Body:
            run(zpgpool.get_pool().getconn(), "SELECT 1")
            return Body(environ, 0)

        body: Any = PoolMiddleware(app)(make_environ(), Start())
        assert len(pool.holders()) == 1
        body.close()
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_holders_show_the_request(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            backend(environ)
            (holder,) = pool.holders()
            assert holder.request == "PUT /site/a page"
            assert "PUT /site/a page" in str(holder)
            return []

        serve(PoolMiddleware(app, pool), make_environ("/a%20page", "PUT", SCRIPT_NAME="/site"))
        with pool.connection() as conn:
            run(conn, "SELECT 1")
            (holder,) = pool.holders()
            assert holder.request == ""


class TestPool:
    def test_is_looked_up_with_the_first_request(self, pool: Any) -> None:
        app = PoolMiddleware(page, name="main")
        with pytest.raises(ComponentLookupError, match="no pool is registered as 'main'"):
            app(make_environ(), Start())
        zpgpool.register_pool(pool, "main")
        assert serve(PoolMiddleware(lambda environ, start_response: [b"%d" % backend(environ, "main")], name="main"))
        assert app.pool is pool

    def test_may_come_from_another_registry(self, pool: Any) -> None:
        registry = Components("own")
        zpgpool.register_pool(pool, "", registry)
        assert PoolMiddleware(page, registry=registry).pool is pool
        with pytest.raises(ComponentLookupError):
            PoolMiddleware(page).pool  # noqa: B018  # the look-up is in the property

    def test_for_one_thread_is_refused_by_a_server_with_several(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.SimpleConnectionPool)
        app = PoolMiddleware(page, pool)
        with pytest.raises(zpgpool.PoolError) as caught:
            app(make_environ(**MULTITHREAD), Start())
        message = str(caught.value)
        assert message.endswith("is for one thread, this server runs several: use 'persistent' or 'threaded'")
        assert "SimpleConnectionPool" in message
        assert pool.get_stats()["requests_num"] == 0
        assert serve(app).isdigit()

    @every_kind
    def test_may_be_closed_during_a_request(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            conn = get_connection(environ)
            pool.closeall()
            assert conn.closed
            with pytest.raises(zpgpool.PoolClosed):
                get_connection(environ)
            yield b"done"

        assert serve(PoolMiddleware(app, pool)) == b"done"

    @every_kind
    def test_may_be_closed_before_its_body_is(self, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
        body: Any = PoolMiddleware(late, pool)(make_environ(), Start())
        next(body)
        pool.closeall()
        body.close()
        assert caplog.records == []

    @every_kind
    def test_that_is_closed_is_no_503(self, pool: Any) -> None:
        pool.closeall()
        with pytest.raises(zpgpool.PoolClosed):
            serve(PoolMiddleware(page, pool))


class TestListsAndTuples:
    @every_kind
    @pytest.mark.parametrize("original", [[b"a", b"b"], (b"a", b"b"), [], ()])
    def test_are_passed_on_as_they_are_and_the_connection_is_back_before_iteration(
        self, pool: Any, original: Any
    ) -> None:
        """Pitfall 1."""

        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)
            return original

        body = PoolMiddleware(app, pool)(make_environ(), Start())
        assert body is original
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_list_of_ones_own_kind_is_no_list(self, pool: Any) -> None:
        """Pitfall 1."""

        class Lazy(list[bytes]):
            def __iter__(self) -> Iterator[bytes]:
                yield b"%d" % backend(environ)

        environ = make_environ()

        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)
            return Lazy([b""])

        body: Any = PoolMiddleware(app, pool)(environ, Start())
        assert len(pool.holders()) == 1
        (chunk,) = body
        assert chunk.isdigit()
        body.close()
        assert is_healthy_and_idle(pool)

    @shared_kinds
    def test_the_connection_is_back_while_a_slow_client_reads_in_waitress(self, pool: Any) -> None:
        """Pitfall 1."""
        whole = b"x" * (8 << 20)

        def app(environ: Any, start_response: Any) -> list[bytes]:
            backend(environ)
            start_response("200 OK", [*TEXT, ("Content-Length", str(len(whole)))])
            return [whole]

        with waitress(PoolMiddleware(app, pool)) as port, slow_client(port) as client:
            assert client.recv(1)
            eventually(lambda: is_at_rest(pool))
            assert is_healthy_and_idle(pool)


class TestOtherBodies:
    @every_kind
    def test_have_one_connection_through_all_chunks_until_close(self, pool: Any) -> None:
        """Pitfall 2."""
        app = Streams()
        wrapped: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        assert list(wrapped) == [b"chunk"] * 3
        (body,) = app.bodies
        assert len(set(body.backends)) == 1
        assert len(pool.holders()) == 1
        wrapped.close()
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_generator_has_too(self, pool: Any) -> None:
        """Pitfall 2."""

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            pids = set()
            for _ in range(3):
                pids.add(backend(environ))
                yield b"chunk"
            assert len(pids) == 1

        assert serve(PoolMiddleware(app, pool)) == b"chunk" * 3
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_an_iterable_that_is_no_iterator_is_iterated_once(self, pool: Any) -> None:
        """Pitfall 2."""

        class Iterable:
            def __iter__(self) -> Iterator[bytes]:
                yield from (b"a", b"b")

        assert serve(PoolMiddleware(lambda environ, start_response: Iterable(), pool)) == b"ab"

    @every_kind
    def test_a_second_close_takes_nothing_from_the_next_user(self, pool: Any) -> None:
        """Pitfalls 2, 3."""
        app = Streams()
        wrapped: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        list(wrapped)
        wrapped.close()
        conn = pool.getconn()
        wrapped.close()
        wrapped.close()
        assert len(pool.holders()) == 1
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)
        assert app.bodies[0].closed == 1

    @every_kind
    def test_close_without_iteration_ends_the_request_and_closes_the_body(self, pool: Any) -> None:
        """Pitfall 3."""

        def app(environ: Any, start_response: Any) -> Body:
            backend(environ)
            return streams(environ, start_response)

        streams = Streams()
        wrapped: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        wrapped.close()
        assert streams.bodies[0].closed == 1
        assert len(streams.bodies[0].backends) == 1  # the first chunk, which the start of the response waits for
        assert is_healthy_and_idle(pool)

    @every_kind
    @pytest.mark.parametrize("how", ["HEAD", "304"])
    def test_a_WebOb_response_outside_that_never_iterates(self, pool: Any, how: str) -> None:
        """Pitfall 3."""

        def app(environ: Any, start_response: Any) -> Body:
            backend(environ)
            start_response("200 OK", [*TEXT, ("ETag", '"1"')])
            return streams(environ, lambda *args: None)

        streams = Streams()
        inner = PoolMiddleware(app, pool)

        def outer(environ: Any, start_response: Any) -> Any:
            response = Request(environ).send(inner)
            response.conditional_response = True
            return response(environ, start_response)

        start = Start()
        environ = make_environ(method="HEAD") if how == "HEAD" else make_environ(HTTP_IF_NONE_MATCH='"1"')
        body = outer(environ, start)
        assert b"".join(body) == b""
        body.close()
        assert start.status == ("200 OK" if how == "HEAD" else "304 Not Modified")
        assert streams.bodies[0].closed == 1
        assert len(streams.bodies[0].backends) == 1
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_close_that_raises_is_raised_and_the_connection_is_back(self, pool: Any) -> None:
        """Pitfall 5."""
        wrapped: Any = PoolMiddleware(Streams(fails_at_close=True), pool)(make_environ(), Start())
        list(wrapped)
        with pytest.raises(RuntimeError, match="close failed"):
            wrapped.close()
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_body_without_close_is_closed_all_the_same(self, pool: Any) -> None:
        """Pitfall 5."""
        environ = make_environ()
        chunks = (b"%d" % backend(environ) for _ in range(2))
        wrapped: Any = PoolMiddleware(lambda environ, start_response: map(bytes.strip, chunks), pool)(environ, Start())
        assert len(set(wrapped)) == 1
        wrapped.close()
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_the_connection_is_still_there_in_the_bodys_own_close(self, pool: Any) -> None:
        seen: list[int] = []

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            try:
                seen.append(backend(environ))
                yield b"chunk"
                yield b"never"
            finally:
                seen.append(backend(environ))

        wrapped: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        assert next(wrapped) == b"chunk"
        wrapped.close()
        assert len(seen) == 2
        assert len(set(seen)) == 1
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_nothing_is_a_body_too(self, pool: Any) -> None:
        """An application that forgot its `return`: the server complains, the pool does not."""

        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)

        assert PoolMiddleware(app, pool)(make_environ(), Start()) is None
        assert is_healthy_and_idle(pool)


class TestExceptions:
    @every_kind
    @pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), GeneratorExit(), KeyboardInterrupt()])
    def test_of_the_application_are_raised_unchanged_and_the_connection_is_kept(
        self, pool: Any, error: BaseException
    ) -> None:
        """Pitfall 6."""

        def app(environ: Any, start_response: Any) -> Any:
            run(get_connection(environ), "CREATE TABLE never_stored (n int)")
            raise error

        environ = make_environ()
        with pytest.raises(type(error)) as caught:
            PoolMiddleware(app, pool)(environ, Start())
        assert caught.value is error
        assert error.__cause__ is None
        assert error.__context__ is None
        assert is_healthy_and_idle(pool)
        with pytest.raises(zpgpool.PoolError, match="has ended"):
            get_connection(environ)

    @every_kind
    @pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3)])
    def test_in_the_middle_of_the_body_too(self, pool: Any, error: BaseException) -> None:
        """Pitfall 7."""

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            run(get_connection(environ), "CREATE TABLE never_stored (n int)")
            yield b"chunk"
            raise error

        with pytest.raises(type(error)) as caught:
            serve(PoolMiddleware(app, pool))
        assert caught.value is error
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_query_that_was_cancelled_is_no_503(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> Any:
            with get_connection(environ).cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = 5")
                cursor.execute("SELECT pg_sleep(20)")

        start = Start()
        with pytest.raises(psycopg2.errors.QueryCanceled):
            PoolMiddleware(app, pool)(make_environ(), start)
        assert start.calls == []
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_connection_that_broke_during_a_query_is_no_503(self, pool: Any, outside: Outside) -> None:
        def app(environ: Any, start_response: Any) -> Any:
            pid = backend(environ)
            outside.terminate(pid)
            backend(environ)

        with pytest.raises(psycopg2.OperationalError):
            serve(PoolMiddleware(app, pool))
        assert pool.holders() == []
        assert serve(PoolMiddleware(page, pool)).isdigit()

    @every_kind
    def test_another_servers_outage_is_no_503(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)
            psycopg2.connect("host=/nowhere")

        with pytest.raises(psycopg2.OperationalError, match="nowhere"):
            serve(PoolMiddleware(app, pool))

    @shared_kinds
    def test_a_client_that_hangs_up_in_waitress(self, pool: Any, outside: Outside) -> None:
        """Pitfall 7: a reset in the middle of an endless body."""
        outside.query("CREATE TABLE IF NOT EXISTS hung_up (n int)")
        is_closed = threading.Event()

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [*TEXT])
            run(get_connection(environ), "INSERT INTO hung_up VALUES (1)")
            try:
                while True:
                    yield b"x" * (1 << 20)
            finally:
                is_closed.set()

        with waitress(PoolMiddleware(app, pool)) as port:
            with slow_client(port) as client:
                client.recv(4096)
                assert len(pool.holders()) == 1
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            eventually(is_closed.is_set)
            eventually(lambda: is_at_rest(pool))
            assert is_healthy_and_idle(pool)
        assert outside.query("SELECT count(*) FROM hung_up") == [(0,)]
        outside.query("DROP TABLE hung_up")

    @shared_kinds
    def test_a_SystemExit_in_a_thread_of_waitress(self, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
        """Pitfall 6."""

        def app(environ: Any, start_response: Any) -> list[bytes]:
            backend(environ)
            if environ["PATH_INFO"] == "/exit":
                raise SystemExit
            return page(environ, start_response)

        with waitress(PoolMiddleware(app, pool), threads=1) as port:
            pid = fetch(port)
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(b"GET /exit HTTP/1.0\r\n\r\n")
            eventually(lambda: "SystemExit" in caplog.text)
            client.close()
            assert fetch(port) == pid
        assert pool.holders() == []


@contextmanager
def slow_client(port: int, path: str = "/page") -> Iterator[socket.socket]:
    """Ask for a page, and read as little as can be until told otherwise."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        yield client


class TestStartResponse:
    @every_kind
    def test_is_called_once_with_what_was_said_last(self, pool: Any) -> None:
        calls: list[Any] = []

        def start(*args: Any) -> Any:
            calls.append(args)

        def app(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [*TEXT, ("X-First", "1")])
            assert calls == []
            try:
                raise ValueError
            except ValueError:
                start_response("500 Oh", [*TEXT], sys.exc_info())
            return [b"sorry"]

        assert PoolMiddleware(app, pool)(make_environ(), start) == [b"sorry"]
        assert calls == [("500 Oh", [*TEXT])]

    @every_kind
    def test_a_second_call_without_a_reason_is_refused(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [*TEXT])
            start_response("201 Created", [*TEXT])
            return []

        with pytest.raises(AssertionError, match="exc_info"):
            PoolMiddleware(app, pool)(make_environ(), Start())

    @every_kind
    def test_what_fails_after_the_first_chunk_is_the_servers_to_judge(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [*TEXT])
            yield b"sent"
            try:
                raise ValueError("too late")
            except ValueError:
                start_response("500 Oh", [*TEXT], sys.exc_info())

        calls: list[Any] = []

        def start(status: str, headers: Any, exc_info: Any = None) -> None:
            calls.append(status)
            if exc_info:
                raise exc_info[1]

        body: Any = PoolMiddleware(app, pool)(make_environ(), start)  # type: ignore[arg-type]
        assert next(iter(body)) == b"sent"
        with pytest.raises(ValueError, match="too late"):
            next(iter(body))
        body.close()
        assert calls == ["200 OK", "500 Oh"]

    @every_kind
    def test_may_come_late(self, pool: Any) -> None:
        """Pitfall 8: with the first chunk, in a real server."""

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("201 Created", [*TEXT])
            yield b"%d" % backend(environ)

        status, body = in_wsgiref(PoolMiddleware(app, pool))
        assert status == "201 Created"
        assert body.isdigit()
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_may_come_twice(self, pool: Any) -> None:
        """Pitfall 8."""

        def app(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [*TEXT])
            try:
                run(get_connection(environ), "SELECT 1/0")
            except psycopg2.Error:
                start_response("500 Oh", [*TEXT], sys.exc_info())
            return [b"sorry"]

        assert in_wsgiref(PoolMiddleware(app, pool)) == ("500 Oh", b"sorry")
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_gives_a_write_that_works(self, pool: Any) -> None:
        """Pitfall 8."""

        def app(environ: Any, start_response: Any) -> list[bytes]:
            write = start_response("200 OK", [*TEXT])
            write(b"%d" % backend(environ))
            write(b" written")
            return [b" and returned"]

        _, body = in_wsgiref(PoolMiddleware(app, pool))
        assert body.split(b" ", 1)[1] == b"written and returned"
        assert is_healthy_and_idle(pool)


def in_wsgiref(app: Any, environ: dict[str, Any] | None = None) -> tuple[str, bytes]:
    """Serve one request by wsgiref, which must not complain, and return status and body."""
    out, err = io.BytesIO(), io.StringIO()
    environ = make_environ() if environ is None else environ
    handler = SimpleHandler(io.BytesIO(), out, err, environ, multithread=False, multiprocess=False)
    handler.run(app)
    gc.collect()  # the validator complains in __del__
    assert err.getvalue() == ""
    head, _, body = out.getvalue().partition(b"\r\n\r\n")
    return head.decode().split("\r\n")[0].removeprefix("HTTP/1.0 "), body


def late(environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [*TEXT])
    for _ in range(3):
        yield b"%d\n" % backend(environ)


def gone(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [*TEXT])
    raise zpgpool.PoolTimeout("none came free")


class TestValidators:
    @every_kind
    @pytest.mark.parametrize("app", [page, late, Streams(), gone], ids=["list", "generator", "object", "503"])
    def test_of_wsgiref_on_both_sides(self, pool: Any, app: Any) -> None:
        """Pitfall 8."""
        environ = make_environ()
        status, _ = in_wsgiref(validator(PoolMiddleware(validator(app), pool)), environ)
        assert status == ("503 Service Unavailable" if app is gone else "200 OK")
        assert pool.holders() == []

    @every_kind
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("app", [page, late, Streams(), gone], ids=["list", "generator", "object", "503"])
    def test_of_webtest_on_both_sides(self, pool: Any, app: Any, method: str) -> None:
        """Pitfall 8."""
        client = TestApp(lint(PoolMiddleware(lint(app), pool)), lint=False)
        response = client.request("/", method=method, status="*")
        assert response.status_int == (503 if app is gone else 200)
        assert pool.holders() == []


class Sequence:
    """A body that is no list, and knows its length."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> bytes:
        return self.chunks[index]


class TestLength:
    @every_kind
    def test_is_told_when_the_body_tells_it(self, pool: Any) -> None:
        """Pitfall 9."""
        body: Any = Sequence(b"a", b"b")
        wrapped: Any = PoolMiddleware(lambda environ, start_response: body, pool)(make_environ(), Start())
        assert len(wrapped) == 2
        assert list(wrapped) == [b"a", b"b"]
        wrapped.close()

    @every_kind
    def test_and_only_then(self, pool: Any) -> None:
        """Pitfall 9."""
        wrapped: Any = PoolMiddleware(Streams(), pool)(make_environ(), Start())
        assert not hasattr(wrapped, "__len__")
        wrapped.close()

    def test_a_body_of_length_1_keeps_the_clients_connection_in_waitress(self, pool: Any) -> None:
        """Pitfall 9."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [*TEXT])
            return Sequence(b"%d" % backend(environ))

        with waitress(PoolMiddleware(app, pool), threads=1) as port:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            for _ in range(2):
                client.request("GET", "/")
                response = client.getresponse()
                assert response.getheader("Content-Length")
                assert not response.will_close
                assert response.read().isdigit()
            client.close()

    def test_a_list_keeps_it_too(self, pool: Any) -> None:
        """Pitfall 1."""
        with waitress(PoolMiddleware(page, pool), threads=1) as port:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            client.request("GET", "/")
            response = client.getresponse()
            assert response.getheader("Content-Length") == str(len(response.read()))
            assert not response.will_close
            client.close()


#: More than the buffers of the sockets between take, so that the server is not done when its client has begun to read.
SIZE = 8 << 20


class TestFiles:
    @shared_kinds
    def test_are_passed_on_as_they_are_in_waitress_and_the_connection_is_back_before(
        self, pool: Any, tmp_path: Path
    ) -> None:
        """Pitfall 10: with a slow reader, so that the main thread closes the file."""
        path = tmp_path / "large"
        path.write_bytes(b"x" * SIZE)
        made: list[Any] = []
        passed: list[Any] = []

        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)
            start_response("200 OK", [*TEXT])
            made.append(environ["wsgi.file_wrapper"](path.open("rb")))
            return made[-1]

        wrapped = PoolMiddleware(app, pool)

        def outer(environ: Any, start_response: Any) -> Any:
            passed.append(wrapped(environ, start_response))
            return passed[-1]

        with waitress(outer) as port, slow_client(port) as client:
            received = client.recv(1)
            assert pool.holders() == []
            assert is_healthy_and_idle(pool)
            assert type(passed[0]) is ReadOnlyFileBasedBuffer
            assert passed[0] is made[0]
            assert not made[0].file.closed
            while chunk := client.recv(1 << 20):
                received += chunk
            assert len(received.partition(b"\r\n\r\n")[2]) == SIZE
            eventually(lambda: made[0].file.closed)
            assert fetch(port)
        assert pool.holders() == []

    def test_a_client_that_hangs_up_during_one_breaks_nothing(self, pool: Any, tmp_path: Path) -> None:
        """Pitfall 10."""
        path = tmp_path / "large"
        path.write_bytes(b"x" * SIZE)
        files: list[Any] = []

        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)
            start_response("200 OK", [*TEXT])
            files.append(path.open("rb"))
            return environ["wsgi.file_wrapper"](files[-1])

        with waitress(PoolMiddleware(app, pool), threads=1) as port:
            with slow_client(port) as client:
                client.recv(1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            eventually(lambda: files and files[0].closed)
            eventually(lambda: is_at_rest(pool))
            assert is_healthy_and_idle(pool)

    @every_kind
    def test_in_wsgiref(self, pool: Any) -> None:
        """Pitfall 10."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [*TEXT])
            backend(environ)
            return environ["wsgi.file_wrapper"](io.BytesIO(b"a file"))

        assert in_wsgiref(PoolMiddleware(app, pool)) == ("200 OK", b"a file")
        assert is_healthy_and_idle(pool)

    @every_kind
    @pytest.mark.parametrize(
        "environ", [{}, {"wsgi.file_wrapper": lambda file: iter(file)}, {"wsgi.file_wrapper": None}]
    )
    def test_a_server_without_a_wrapper_or_with_a_function(self, pool: Any, environ: dict[str, Any]) -> None:
        """Pitfall 10: what the function returned is a body like any other."""

        def app(environ: Any, start_response: Any) -> Any:
            backend(environ)
            wrapper = environ.get("wsgi.file_wrapper") or iter
            return wrapper(io.BytesIO(b"a file"))

        body: Any = PoolMiddleware(app, pool)(make_environ(**environ), Start())
        assert len(pool.holders()) == 1
        assert b"".join(body) == b"a file"
        body.close()
        assert is_healthy_and_idle(pool)


class TestThreads:
    @shared_kinds
    def test_close_may_come_from_another_thread_which_keeps_its_own(self, pool: Any) -> None:
        """Pitfall 11."""
        body: Any = PoolMiddleware(Streams(), pool)(make_environ(), Start())
        assert next(body) == b"chunk"

        def close() -> None:
            mine = pool.getconn()
            run(mine, "CREATE TEMP TABLE mine (n int)")
            body.close()
            assert [holder.thread for holder in pool.holders()] == ["closer"]
            assert run(mine, "SELECT count(*) FROM mine") == 0
            pool.putconn(mine)

        Call(close, name="closer").result()
        assert pool.holders() == []
        assert pool.get_stats()["returns_bad"] == 0
        assert pool.get_stats()["pool_available"] == 2

    @shared_kinds
    def test_close_may_come_after_the_thread_has_begun_another_request(self, pool: Any) -> None:
        """Pitfall 11: of two leases of a thread the right one ends."""
        first, second = PoolMiddleware(Streams(), pool), PoolMiddleware(Streams(), pool)
        early: Any = first(make_environ("/early"), Start())
        next(early)
        late: Any = second(make_environ("/late"), Start())
        next(late)
        in_thread(early.close)
        assert next(late) == b"chunk"
        assert len(pool.holders()) == 1
        late.close()
        assert pool.holders() == []

    @shared_kinds
    def test_the_body_may_be_iterated_in_another_thread(self, pool: Any) -> None:
        """Pitfall 11."""
        app = Streams()
        body: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        next(body)
        in_thread(next, body)
        assert len(set(app.bodies[0].backends)) == 1
        in_thread(body.close)
        assert is_healthy_and_idle(pool)

    @shared_kinds
    def test_even_if_that_asks_first(self, pool: Any) -> None:
        """Pitfall 11."""
        app = Streams()
        body: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        reader_may_end = threading.Event()

        def read() -> None:
            next(body)  # the first, which was taken before the start of the response
            next(body)
            reader_may_end.wait()

        reader = Call(read)
        eventually(lambda: len(app.bodies[0].backends) == 2)
        body.close()
        assert pool.holders() == []
        reader_may_end.set()
        reader.result()
        assert is_healthy_and_idle(pool)

    def test_a_request_is_no_part_of_one_whose_body_another_thread_iterates_just_now(self, make_pool: MakePool) -> None:
        """Pitfall 11: a server that hands bodies to other threads; the threaded pool serves it."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, idle_timeout=60)
        is_inside, go_on = threading.Event(), threading.Event()

        def slow(environ: Any, start_response: Any) -> Iterator[bytes]:
            pid = backend(environ)
            yield b"first"  # which the start of the response waits for
            is_inside.set()
            go_on.wait(20)
            yield b"%d" % pid

        body: Any = PoolMiddleware(slow, pool)(make_environ("/slow"), Start())
        assert next(body) == b"first"
        reader = Call(lambda: next(body))
        is_inside.wait(20)
        pid = serve(PoolMiddleware(page, pool))
        go_on.set()
        others = reader.result()
        body.close()
        assert others != pid
        assert pool.holders() == []

    @shared_kinds
    def test_a_thread_for_each_request_needs_no_connection_for_each(self, pool: Any) -> None:
        """Pitfall 12: a real server; idents are given again, the connection is always clean."""

        def app(environ: Any, start_response: Any) -> list[bytes]:
            conn = get_connection(environ)
            assert conn.info.transaction_status == TRANSACTION_STATUS_IDLE
            run(conn, "CREATE TABLE never_stored (n int)")
            start_response("200 OK", [*TEXT])
            return [b"%d" % threading.get_ident()]

        with thread_per_request(PoolMiddleware(app, pool)) as port:
            for _ in range(50):
                assert fetch(port).isdigit()
            eventually(lambda: is_at_rest(pool))
        stats = pool.get_stats()
        assert stats["requests_num"] == 50
        assert stats["connections_num"] <= 2
        pool.run_maintenance(time.monotonic())
        assert len(pool._owners) <= 1  # nor does anything else grow

    @shared_kinds
    def test_a_thread_that_dies_in_a_request_gives_up_its_connection(
        self, pool: Any, caplog: pytest.LogCaptureFixture, outside: Outside
    ) -> None:
        """Pitfall 13."""
        pool._timer = None  # by the test: the timer's thread would see it a moment before it has said so
        bodies: list[Any] = []

        def work() -> None:
            bodies.append(PoolMiddleware(Streams(), pool)(make_environ("/unfinished"), Start()))
            next(bodies[0])

        Call(work, name="mortal").result()
        pool.run_maintenance(time.monotonic())
        assert "thread mortal ended while it held a connection, which is closed" in caplog.text
        assert pool.holders() == []
        eventually(lambda: not outside.backends())
        bodies[0].close()  # harmless
        assert serve(PoolMiddleware(page, pool)).isdigit()
        bodies.clear()


class TestNesting:
    def check(self, app: Any, pool: Any) -> None:
        """Serve a streaming request of `app`: one connection, until the outermost body is closed."""
        body: Any = app(make_environ(), Start())
        assert len(set(body)) == 1
        assert len(pool.holders()) == 1
        body.close()
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_the_same_pool_twice(self, pool: Any) -> None:
        """Pitfall 14."""
        self.check(PoolMiddleware(PoolMiddleware(late, pool), pool), pool)

    @every_kind
    def test_the_same_pool_under_two_names(self, pool: Any) -> None:
        """Pitfall 14."""

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            assert get_connection(environ, "a") is get_connection(environ, "b")
            yield b""

        self.check(PoolMiddleware(PoolMiddleware(app, pool, "a"), pool, "b"), pool)

    @every_kind
    def test_the_inner_one_of_the_same_pool_ends_nothing(self, pool: Any) -> None:
        """Pitfall 14: the outer request goes on with its transaction."""
        inner = PoolMiddleware(page, pool)

        def middle(environ: Any, start_response: Any) -> list[bytes]:
            run(get_connection(environ), "CREATE TEMP TABLE mine (n int)")
            body = inner(environ, start_response)
            assert run(get_connection(environ), "SELECT count(*) FROM mine") == 0
            return list(body)

        serve(PoolMiddleware(middle, pool))
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_two_pools_under_one_name(self, make_pool: MakePool, kind: str) -> None:
        """Pitfall 14: the inner one is nearer."""
        outer, inner = (make_pool(KINDS[kind], 0, 2, idle_timeout=60, name=name) for name in ("outer", "inner"))
        serve(PoolMiddleware(PoolMiddleware(page, inner), outer))
        assert outer.get_stats()["requests_num"] == 0
        assert is_healthy_and_idle(inner)

    @every_kind
    @pytest.mark.parametrize("as_list", [True, False])
    def test_two_pools(self, make_pool: MakePool, kind: str, as_list: bool) -> None:
        """Pitfall 14."""
        main, other = (make_pool(KINDS[kind], 0, 2, idle_timeout=60, name=name) for name in ("main", "other"))

        def app(environ: Any, start_response: Any) -> Any:
            assert backend(environ, "main") != backend(environ, "other")
            return [b"x"] if as_list else iter([b"x"])

        body: Any = PoolMiddleware(PoolMiddleware(app, other, "other"), main, "main")(make_environ(), Start())
        if not as_list:
            assert len(main.holders()) == len(other.holders()) == 1
            body.close()
        assert is_healthy_and_idle(main)
        assert is_healthy_and_idle(other)

    @every_kind
    @pytest.mark.parametrize("is_fresh", [True, False], ids=["fresh environ", "copied environ"])
    @pytest.mark.parametrize("when", ["call", "chunk", "close"])
    def test_a_subrequest_has_the_requests_connection_and_does_not_end_it(
        self, pool: Any, is_fresh: bool, when: str
    ) -> None:
        """Pitfall 15."""
        seen: list[bytes] = []

        def subrequest(environ: Any) -> None:
            run(get_connection(environ), "CREATE TEMP TABLE IF NOT EXISTS mine (n int)")
            seen.append(b"%d" % backend(environ))
            copied = {**environ, "PATH_INFO": "/sub"}
            seen.append(serve(wrapped, make_environ("/sub") if is_fresh else copied))
            assert run(get_connection(environ), "SELECT count(*) FROM mine") == 0

        class Chunks(Body):
            def __next__(self) -> bytes:
                if when == "chunk" and not seen:
                    subrequest(self.environ)
                return super().__next__()

            def close(self) -> None:
                if when == "close":
                    subrequest(self.environ)

        def app(environ: Any, start_response: Any) -> Any:
            if environ["PATH_INFO"] == "/sub":
                return page(environ, start_response)
            if when == "call":
                subrequest(environ)
            return Chunks(environ)

        wrapped = PoolMiddleware(app, pool)
        body: Any = wrapped(make_environ(), Start())
        list(body)
        assert len(pool.holders()) == 1
        body.close()
        assert len(set(seen)) == 1
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_a_subrequest_that_raises_does_not_end_it_either(self, pool: Any) -> None:
        """Pitfall 15."""

        def app(environ: Any, start_response: Any) -> list[bytes]:
            if environ["PATH_INFO"] == "/sub":
                raise ZeroDivisionError
            conn = get_connection(environ)
            with pytest.raises(ZeroDivisionError):
                serve(wrapped, make_environ("/sub"))
            assert get_connection(environ) is conn
            assert len(pool.holders()) == 1
            return []

        wrapped = PoolMiddleware(app, pool)
        serve(wrapped)
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_the_next_request_with_the_same_environ_is_another_one(self, pool: Any) -> None:
        """Pitfall 16: a server, or a middleware outside, that uses an environ again."""
        environ = make_environ()
        app = PoolMiddleware(page, pool)
        assert serve(app, environ) == serve(app, environ)
        assert is_healthy_and_idle(pool)


class TestAfterTheEnd:
    @every_kind
    def test_asking_raises(self, pool: Any) -> None:
        """Pitfall 16."""
        environ = make_environ("/over")
        copies: list[Any] = []

        def app(environ: Any, start_response: Any) -> list[bytes]:
            copies.append(dict(environ))
            return page(environ, start_response)

        serve(PoolMiddleware(app, pool), environ)
        for left in (environ, *copies):
            with pytest.raises(zpgpool.PoolError, match="GET /over: the request has ended, and its connection was"):
                get_connection(left)
        assert pool.holders() == []

    def test_a_body_gets_no_connection_of_another_filters(self, make_pool: MakePool) -> None:
        """Pitfall 16: where two filters have one name, `environ` has the outer one's request again in between."""
        outer = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60)
        inner = make_pool(zpgpool.PersistentConnectionPool, 0, 2, idle_timeout=60)
        seen: list[str] = []

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [*TEXT])
            yield b"one"
            with pytest.raises(zpgpool.PoolError) as caught:
                get_connection(environ)
            seen.append(str(caught.value))
            yield b"two"

        body: Any = PoolMiddleware(PoolMiddleware(app, inner), outer)(make_environ("/first"), Start())
        next(body)
        serve(PoolMiddleware(page, inner))  # the thread's next request, which ends what is left of the inner one
        next(body)
        assert seen == ["GET /first: the request has ended, and its connection was returned"]
        body.close()
        assert outer.holders() == inner.holders() == []

    @every_kind
    def test_a_body_that_is_iterated_after_close_gets_none(self, pool: Any) -> None:
        """Pitfall 16."""
        body: Any = PoolMiddleware(late, pool)(make_environ(), Start())
        body.close()
        with pytest.raises((zpgpool.PoolError, StopIteration)):
            next(body)
        assert pool.holders() == []


def forgetful(environ: Any, start_response: Any) -> Any:
    """Stream, and keep nothing."""
    return Streams()(environ, start_response)


def loses_once() -> Callable[..., Any]:
    """Return an application whose first request loses its connection, so that it begins again."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        calls.append(len(calls))
        if len(calls) == 1:
            run(get_connection(environ), "SELECT pg_terminate_backend(pg_backend_pid())")
        return page(environ, start_response)

    return app


class TestNothingWaitsForTheCollector:
    """An environ has the request's body, and an upload may be large: it goes when the request has ended."""

    @pytest.fixture(autouse=True)
    def no_collections(self) -> Iterator[None]:
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def is_left(self, site: Any) -> bool:
        environ = Environ(make_environ())
        ref = weakref.ref(environ)
        serve(site, environ)
        del environ
        return ref() is not None

    @every_kind
    @pytest.mark.parametrize("eager", [False, True])
    @pytest.mark.parametrize("app", [page, forgetful, late])
    def test_a_request(self, pool: Any, eager: bool, app: Any) -> None:
        assert not self.is_left(PoolMiddleware(app, pool, eager=eager))
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_one_that_begins_again(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("zpgpool.wsgi.log.disabled", True)  # a test's log keeps each error, with its frames
        assert not self.is_left(PoolMiddleware(loses_once(), pool))
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_one_within_another(self, pool: Any) -> None:
        assert not self.is_left(PoolMiddleware(PoolMiddleware(page, pool), pool))


class TestAbandonedBodies:
    def test_one_that_is_never_closed_is_ended_by_the_threads_next_request(
        self, pool: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Pitfall 4."""
        app = Streams()
        wrapped = PoolMiddleware(app, pool)
        abandoned: Any = wrapped(make_environ("/abandoned"), Start())
        list(abandoned)
        assert serve(PoolMiddleware(page, pool)) == b"%d" % app.bodies[0].backends[0]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            "GET /abandoned: its body was not closed before the thread's next request; ended now"
        )
        assert is_healthy_and_idle(pool)
        abandoned.close()

    def test_a_late_close_ends_nothing_else_but_still_closes_the_applications_body(self, pool: Any) -> None:
        """Pitfall 4."""
        first, second = Streams(), Streams()
        abandoned: Any = PoolMiddleware(first, pool)(make_environ("/abandoned"), Start())
        next(abandoned)
        body: Any = PoolMiddleware(second, pool)(make_environ(), Start())
        next(body)
        abandoned.close()
        assert len(pool.holders()) == 1
        next(body)
        body.close()
        assert second.bodies[0].closed == 1
        assert is_healthy_and_idle(pool)
        assert first.bodies[0].closed == 1

    def test_one_that_is_dropped_after_that_is_closed_without_another_word(
        self, pool: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Pitfall 4."""
        app = Streams()
        abandoned: Any = PoolMiddleware(app, pool)(make_environ("/abandoned"), Start())
        next(abandoned)
        serve(PoolMiddleware(page, pool))
        del abandoned
        gc.collect()
        assert app.bodies[0].closed == 1
        assert len(caplog.records) == 1
        assert is_healthy_and_idle(pool)

    def test_with_the_threaded_pool_the_next_request_has_one_of_its_own(self, make_pool: MakePool) -> None:
        """Pitfall 4: there the connection is the request's, not the thread's."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, idle_timeout=60)
        app = Streams()
        abandoned: Any = PoolMiddleware(app, pool)(make_environ(), Start())
        next(abandoned)
        serve(PoolMiddleware(page, pool))
        next(abandoned)
        assert len(set(app.bodies[0].backends)) == 1
        abandoned.close()
        assert pool.holders() == []
        assert app.bodies[0].closed == 1

    @every_kind
    def test_one_that_is_dropped_is_ended(self, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
        """Pitfall 4."""
        body: Any = PoolMiddleware(Streams(), pool)(make_environ("/dropped"), Start())
        next(body)
        del body
        gc.collect()
        assert [record.getMessage() for record in caplog.records] == [
            "GET /dropped: the server dropped its body without closing it (PEP 3333)"
        ]
        assert is_healthy_and_idle(pool)

    @every_kind
    def test_what_its_body_still_does_then_is_done_before_another_has_the_connection(self, pool: Any) -> None:
        """Pitfall 4: the `finally` of a generator."""
        seen: list[int] = []

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            conn = get_connection(environ)
            try:
                yield b"chunk"
                yield b"never"
            finally:
                seen.append(len(pool.holders()))
                conn.rollback()

        body: Any = PoolMiddleware(app, pool)(make_environ("/dropped"), Start())
        next(body)
        del body
        gc.collect()
        assert seen == [1]
        assert is_healthy_and_idle(pool)

    @shared_kinds
    def test_one_that_is_dropped_by_another_thread_is_ended_too(self, pool: Any) -> None:
        """Pitfall 4."""
        bodies: list[Any] = [PoolMiddleware(Streams(), pool)(make_environ("/dropped"), Start())]
        next(bodies[0])
        in_thread(bodies.clear)
        gc.collect()
        assert is_healthy_and_idle(pool)


class TestRunOnce:
    @pytest.fixture(autouse=True)
    def timer(self, monkeypatch: pytest.MonkeyPatch) -> MaintenanceTimer:
        """A timer that no other pool knows."""
        timer = MaintenanceTimer()
        monkeypatch.setitem(DEFAULTS, "timer", timer)
        return timer

    @every_kind
    @pytest.mark.parametrize("app", [page, late], ids=["list", "generator"])
    def test_there_is_no_timer_and_the_connection_is_closed_at_the_end(
        self, pool: Any, app: Any, timer: MaintenanceTimer, outside: Outside
    ) -> None:
        """Pitfall 17."""
        assert serve(PoolMiddleware(app, pool), make_environ(**RUN_ONCE))
        assert not timer.is_running
        assert outside.backends() == set()
        assert pool.holders() == []

    def test_other_servers_have_both(self, pool: Any, timer: MaintenanceTimer, outside: Outside) -> None:
        """Pitfall 17."""
        serve(PoolMiddleware(page, pool), make_environ())
        eventually(lambda: timer.is_running)
        assert len(outside.backends()) == 1


@contextmanager
def exhausted(pool: Any) -> Iterator[None]:
    """Let another thread hold all connections of `pool`."""
    has_checkout, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.connection(timeout=20) as conn:  # the test's own timeout may be shorter than a connect
            run(conn, "SELECT 1")
            has_checkout.set()
            release.wait(20)

    holder = Call(hold, name="greedy")
    has_checkout.wait(20)
    yield
    release.set()
    holder.result()


def started(environ: Any, start_response: Any) -> list[bytes]:
    """An application that starts its response before it asks for its connection."""
    start_response("200 OK", [*TEXT, ("X-Mine", "1")])
    return [b"%d" % backend(environ)]


class TestUnavailable:
    def check(self, app: Any, caplog: pytest.LogCaptureFixture, retry_after: str = "5") -> logging.LogRecord:
        """Serve a request that gets a 503, and return what was logged."""
        start = Start()
        environ = make_environ("/busy")
        (text,) = app(environ, start)
        assert start.status == "503 Service Unavailable"
        assert start.headers["Retry-After"] == retry_after
        assert start.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert start.headers["Content-Length"] == str(len(text))
        assert start.headers["Cache-Control"] == "no-store"
        assert "X-Mine" not in start.headers
        assert text == b"The database is not available just now. Please try again in a moment.\n"
        (record,) = [record for record in caplog.records if record.name == "zpgpool"]
        assert record.levelno == logging.ERROR
        assert record.getMessage().startswith("GET /busy: 503 Service Unavailable: ")
        assert record.exc_info is not None
        with pytest.raises(zpgpool.PoolError, match="has ended"):
            get_connection(environ)
        return record

    @shared_kinds
    @pytest.mark.parametrize("app", [page, started])
    def test_no_connection_came_free(
        self, make_pool: MakePool, kind: str, app: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = make_pool(KINDS[kind], 0, 1, timeout=0.05)
        with exhausted(pool):
            record = self.check(PoolMiddleware(app, pool, retry_after=7), caplog, "7")
        assert "thread greedy for" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[0] is zpgpool.PoolTimeout
        eventually(lambda: serve(PoolMiddleware(app, pool)).isdigit())

    @shared_kinds
    @pytest.mark.parametrize("app", [page, started])
    def test_too_many_wait_for_one(
        self, make_pool: MakePool, kind: str, app: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = make_pool(KINDS[kind], 0, 1, timeout=20, max_waiting=0)
        with exhausted(pool):
            record = self.check(PoolMiddleware(app, pool), caplog)
        assert record.exc_info is not None
        assert record.exc_info[0] is zpgpool.TooManyRequests

    @every_kind
    @pytest.mark.parametrize("app", [page, started])
    def test_the_server_is_down(
        self, make_pool: MakePool, kind: str, app: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = make_pool(KINDS[kind], 0, 2, dsn="host=/nowhere", open=False)
        record = self.check(PoolMiddleware(app, pool), caplog)
        assert "/nowhere" in record.getMessage()

    @every_kind
    def test_the_server_is_down_for_an_eager_filter(
        self, make_pool: MakePool, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def app(environ: Any, start_response: Any) -> Any:
            raise AssertionError("must not be called")

        pool = make_pool(KINDS[kind], 0, 2, dsn="host=/nowhere", open=False)
        self.check(PoolMiddleware(app, pool, eager=True), caplog)

    def test_once_more_while_the_pool_waits_before_it_tries_again(
        self, make_pool: MakePool, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = make_pool(dsn="host=/nowhere", open=False)
        for _ in range(3):
            caplog.clear()
            self.check(PoolMiddleware(page, pool), caplog)

    @pytest.mark.parametrize("wait_for_first", [True, False], ids=["first chunk", "call"])
    def test_a_generator_that_has_sent_nothing_yet(
        self, make_pool: MakePool, wait_for_first: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The application asks at its first chunk: a real server can still answer otherwise."""
        pool = make_pool(dsn="host=/nowhere", open=False)

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [*TEXT])
            if not wait_for_first:
                backend(environ)
            return late(environ, lambda *args: None)

        status, body = in_wsgiref(PoolMiddleware(app, pool))
        assert status == "503 Service Unavailable"
        assert body.startswith(b"The database is not available")

    def test_later_it_is_too_late(self, pool: Any, make_pool: MakePool) -> None:
        """The error is raised unchanged after the first chunk, and so is any other error with it."""
        down = make_pool(dsn="host=/nowhere", open=False)

        def late_asker(environ: Any, start_response: Any) -> Iterator[bytes]:
            yield b"chunk"
            backend(environ)

        def failing(environ: Any, start_response: Any) -> Iterator[bytes]:
            run(get_connection(environ), "SELECT 1/0")
            yield b"never"

        start = Start()
        body: Any = PoolMiddleware(late_asker, down)(make_environ(), start)
        assert next(body) == b"chunk"
        with pytest.raises(psycopg2.OperationalError, match="nowhere"):
            next(body)
        body.close()
        with pytest.raises(psycopg2.errors.DivisionByZero) as caught:
            serve(PoolMiddleware(failing, pool))
        assert caught.value.__context__ is None
        assert start.calls == []
        assert is_healthy_and_idle(pool)

    def test_an_answer_to_HEAD_has_no_body(self, make_pool: MakePool) -> None:
        pool = make_pool(dsn="host=/nowhere", open=False)
        start = Start()
        assert list(PoolMiddleware(page, pool)(make_environ(method="HEAD"), start)) == []
        assert start.status == "503 Service Unavailable"

    def test_when_something_was_sent_already_the_error_is_the_servers(self, make_pool: MakePool) -> None:
        """A real server: it raises what it is given with `exc_info` after the headers have gone (PEP 3333)."""
        pool = make_pool(dsn="host=/nowhere", open=False)

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [*TEXT])(b"begun")
            backend(environ)

        out = io.BytesIO()
        handler: Any = SimpleHandler(io.BytesIO(), out, io.StringIO(), make_environ())
        handler.setup_environ()
        with pytest.raises(psycopg2.OperationalError, match="nowhere"):
            PoolMiddleware(app, pool)(handler.environ, handler.start_response)
        assert out.getvalue().endswith(b"\r\n\r\nbegun")

    def test_in_waitress(self, make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
        pool = make_pool(dsn="host=/nowhere", open=False)
        with waitress(PoolMiddleware(started, pool)) as port:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            client.request("GET", "/")
            response = client.getresponse()
            assert (response.status, response.getheader("Retry-After")) == (503, "5")
            assert response.read().startswith(b"The database is not available")
            client.close()


class TestAutocommitSafe:
    """`autocommit = safe`: requests that only read commit at once, the others have a transaction."""

    @pytest.fixture(params=["persistent", "threaded"])
    def pool(self, make_pool: MakePool, request: pytest.FixtureRequest) -> Any:
        return make_pool(KINDS[request.param], 0, 2, autocommit="safe", idle_timeout=60)

    @staticmethod
    def ask(pool: Any, method: str, use: Any = lambda conn: None) -> bool:
        """Return whether the request's connection is in a transaction after its query."""
        seen: list[bool] = []

        def app(environ: Any, start_response: Any) -> list[bytes]:
            conn = get_connection(environ)
            use(conn)
            run(get_connection(environ), "SELECT 1")
            seen.append(conn.get_transaction_status() != TRANSACTION_STATUS_IDLE)
            start_response("200 OK", [*TEXT])
            return [b""]

        getattr(TestApp(PoolMiddleware(app, pool)), method.lower())("/")
        return seen[0]

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    def test_requests_that_read(self, pool: Any, method: str) -> None:
        assert not self.ask(pool, method)

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
    def test_requests_that_write(self, pool: Any, method: str) -> None:
        assert self.ask(pool, method)

    def test_the_next_user_finds_the_session_as_configured(self, pool: Any) -> None:
        for method in ("GET", "POST", "GET", "POST"):
            assert self.ask(pool, method) is (method == "POST")
        with pool.connection() as conn:
            assert conn.autocommit is False

    def test_the_user_may_change_it(self, pool: Any) -> None:
        def begin(conn: Any) -> None:
            conn.autocommit = False

        assert self.ask(pool, "GET", begin)

    def test_a_transaction_is_one(self, pool: Any) -> None:
        zpgpool.register_pool(pool)
        seen: list[int] = []

        def app(environ: Any, start_response: Any) -> list[bytes]:
            assert get_connection(environ).autocommit is True
            conn = get_transactions_connection()
            run(conn, "SELECT 1")
            seen.append(conn.get_transaction_status())
            transaction.abort()
            start_response("200 OK", [*TEXT])
            return [b""]

        TestApp(PoolMiddleware(app)).get("/")
        assert seen == [TRANSACTION_STATUS_INTRANS]


class TestAutocommitRests:
    """A connection keeps autocommit after a request that reads, for the next one; nobody else finds it so."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {}

    @pytest.fixture
    def pool(self, make_pool: MakePool, kind: str, options: dict[str, Any]) -> Any:
        return make_pool(KINDS[kind], 0, 1, autocommit="safe", idle_timeout=60, timeout=20, **options)

    @pytest.fixture
    def site(self, pool: Any) -> PoolMiddleware:
        return PoolMiddleware(self.app, pool)

    @staticmethod
    def app(environ: Any, start_response: Any) -> list[bytes]:
        pid = backend(environ)
        conn = get_connection(environ)
        is_reading = environ["REQUEST_METHOD"] == "GET"
        assert conn.autocommit is is_reading
        assert conn.get_transaction_status() == (TRANSACTION_STATUS_IDLE if is_reading else TRANSACTION_STATUS_INTRANS)
        start_response("200 OK", [*TEXT])
        return [str(pid).encode()]

    @every_kind
    def test_the_next_request_sets_nothing(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        first = serve(site)

        class Refused:
            def __set__(self, conn: Any, value: bool) -> None:
                raise AssertionError("autocommit was set")

        monkeypatch.setattr("zpgpool.core.session._AUTOCOMMIT", Refused())
        assert [serve(site) for _ in range(3)] == [first] * 3

    @every_kind
    @pytest.mark.parametrize("methods", ["GPG", "GGPPGG", "PGGP"])
    def test_requests_that_read_and_that_write(self, site: Any, methods: str) -> None:
        pids = {serve(site, make_environ(method={"G": "GET", "P": "POST"}[each])) for each in methods}
        assert len(pids) == 1

    @every_kind
    @pytest.mark.parametrize("way", ["getconn", "connection", "checkout"])
    def test_the_threads_own_use(self, pool: Any, site: Any, way: str) -> None:
        pid = int(serve(site))
        with {"getconn": got, "connection": lambda pool: pool.connection(), "checkout": checked_out}[way](pool) as conn:
            assert (conn.info.backend_pid, conn.autocommit, conn.is_touched) == (pid, False, False)

    @shared_kinds
    @pytest.mark.parametrize("waits", [True, False])
    def test_another_threads_use(self, pool: Any, waits: bool) -> None:
        others: list[Call] = []

        def use() -> int:
            with pool.connection() as conn:
                assert (conn.autocommit, conn.is_touched) == (False, False)
                return int(conn.info.backend_pid)

        def app(environ: Any, start_response: Any) -> list[bytes]:
            body = self.app(environ, start_response)
            if waits:
                others.append(Call(use))
                eventually(lambda: pool.get_stats()["requests_waiting"] == 1)
            return body

        pid = int(serve(PoolMiddleware(app, pool)))
        other = others[0] if waits else Call(use)
        assert other.result() == pid

    @every_kind
    @pytest.mark.parametrize("options", [{"check_idle": 0.0}, {"check": lambda conn: None}], ids=list)
    def test_it_is_judged_as_any_other(self, site: Any) -> None:
        assert len({serve(site) for _ in range(3)}) == 1

    @every_kind
    def test_one_that_the_server_has_ended(self, pool: Any, site: Any, outside: Outside) -> None:
        pid = int(serve(site))
        outside.terminate(pid)
        for entry in pool._connections.handoff.slots:
            entry.look_at = float("-inf")
        assert int(serve(site)) != pid
        assert pool.get_stats()["connections_lost"] == 1

    @every_kind
    def test_one_that_is_old(self, pool: Any, site: Any) -> None:
        pid = int(serve(site))
        pool.drain()
        assert int(serve(site)) != pid

    @every_kind
    @pytest.mark.parametrize("options", [{"isolation_level": "serializable"}, {"reset": "discard"}], ids=str)
    def test_with_these_it_rests_as_configured(self, pool: Any, site: Any) -> None:
        serve(site)
        [entry] = pool._connections.handoff.slots
        assert not entry.conn.autocommit
        with pool.connection() as conn:
            level = pool.settings.isolation_level or "read committed"
            assert run(conn, "SHOW transaction_isolation") == level.lower()

    @every_kind
    def test_what_the_user_changed_too(self, pool: Any) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            get_connection(environ).set_client_encoding("LATIN1")
            return self.app(environ, start_response)

        serve(PoolMiddleware(app, pool))
        with pool.connection() as conn:
            assert (conn.encoding, conn.autocommit) == ("UTF8", False)

    @shared_kinds
    @pytest.mark.parametrize("use", ["write", "getconn", "another thread"])
    def test_one_to_which_the_server_tells_something_meanwhile(self, pool: Any, outside: Outside, use: str) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            run(get_connection(environ), "LISTEN news")
            return self.app(environ, start_response)

        site = PoolMiddleware(app, pool)
        pid = int(serve(site))
        outside.query("NOTIFY news")
        [entry] = pool._connections.handoff.slots
        eventually(lambda: pool._connections.look_at_all() or entry.conn.notifies)

        def plain() -> int:
            with pool.connection() as conn:
                assert not conn.autocommit
                return int(conn.info.backend_pid)

        def write() -> int:
            return int(serve(site, make_environ(method="POST")))

        uses: dict[str, Callable[[], int]] = {
            "write": write,
            "getconn": plain,
            "another thread": lambda: int(in_thread(plain)),
        }
        assert uses[use]() == pid

    @every_kind
    def test_the_pool_closes(self, pool: Any, site: Any, outside: Outside) -> None:
        serve(site)
        assert pool.get_stats()["pool_available"] == 1
        pool.close()
        assert not outside.backends()


@contextmanager
def got(pool: Any) -> Iterator[Any]:
    conn = pool.getconn()
    yield conn
    pool.putconn(conn)


@contextmanager
def checked_out(pool: Any) -> Iterator[Any]:
    checkout = pool.checkout()
    yield checkout.conn
    checkout.putconn()


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("eager", [True, False])
def test_two_filters_with_one_name_have_a_database_each(
    make_pool: MakePool, kind: str, streams: bool, eager: bool
) -> None:
    """One environ: what is mounted has that of its request, and restores what it has found there."""
    pools = [make_pool(KINDS[kind], idle_timeout=60, application_name=name) for name in ("outer", "inner")]

    def who(environ: Any) -> Any:
        if eager and not streams:
            assert environ["zpgpool.connection"] is get_connection(environ)
        return run(get_connection(environ), "SELECT current_setting('application_name')")

    def inner(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        body = (f" {who(environ)} ".encode() for _ in range(2))
        return body if streams else list(body)

    mounted = PoolMiddleware(inner, pools[1], eager=eager)

    def outer(environ: Any, start_response: Any) -> Any:
        def body() -> Iterator[bytes]:
            assert who(environ) == "outer"
            parts = mounted(environ, start_response)
            for part in parts:
                yield who(environ).encode() + part
            getattr(parts, "close", list)()
            yield who(environ).encode()

        return body() if streams else list(body())

    assert serve(PoolMiddleware(outer, pools[0], eager=eager)) == b"outer inner outer inner outer"
    assert [pool.holders() for pool in pools] == [[], []]


def test_an_inner_call_leaves_the_connection_in_environ_as_it_was(make_pool: MakePool, kind: str) -> None:
    """The innermost filter is a part of the outermost's request, and shows that one's connection while it runs."""
    outer, middle = [make_pool(KINDS[kind], idle_timeout=60, application_name=name) for name in ("outer", "middle")]
    shown: list[Any] = []

    def show(environ: Any, start_response: Any) -> list[bytes]:
        shown.append(run(environ["zpgpool.connection"], "SELECT current_setting('application_name')"))
        start_response("200 OK", [])
        return []

    def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield from show(environ, start_response)
        yield b""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        show(environ, lambda *args: print)
        PoolMiddleware(show, outer, eager=True)(environ, lambda *args: print)
        show(environ, lambda *args: print)
        list(PoolMiddleware(stream, outer, eager=True)(environ, lambda *args: print))
        return show(environ, start_response)

    serve(PoolMiddleware(PoolMiddleware(app, middle, eager=True), outer, eager=True))
    assert shown == ["middle", "outer", "middle", "outer", "middle"]


@pytest.mark.parametrize("ends", ["iterated", "closed"])
def test_a_filter_within_one_of_another_pool_streams_from_its_own(make_pool: MakePool, kind: str, ends: str) -> None:
    """Three with one name: the innermost is a part of the outermost's request, its body, too."""
    pools = [make_pool(KINDS[kind], idle_timeout=60, application_name=name) for name in ("outer", "inner")]
    closed: list[str] = []

    class Rows:
        def __init__(self, environ: Any) -> None:
            self.environ = environ
            self.left = 2

        def who(self) -> str:
            return str(run(get_connection(self.environ), "SELECT current_setting('application_name')"))

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> bytes:
            if self.left == 0 or ends == "closed":
                raise StopIteration
            self.left -= 1
            return f"{self.who()} ".encode()

        def close(self) -> None:
            closed.append(self.who())

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Rows(environ)

    filters = PoolMiddleware(PoolMiddleware(PoolMiddleware(app, pools[0]), pools[1]), pools[0])
    assert serve(filters) == (b"outer outer " if ends == "iterated" else b"")
    assert closed == ["outer"]
    assert [pool.holders() for pool in pools] == [[], []]
