"""repoze.tm2, which commits after the last chunk: with the filter outside it and, by mistake, inside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
import transaction
from paste.deploy import loadapp
from repoze.tm import TM
from webtest import TestApp

import books
import zpgpool
from books import Planned
from books import rows
from conftest import in_thread
from conftest import KINDS
from conftest import Outside
from conftest import run
from serving import waitress
from zpgpool.datamanager import connection
from zpgpool.wsgi import PoolMiddleware


TestApp.__test__ = False  # it is not a test


@pytest.fixture(autouse=True)
def table(outside: Outside) -> Iterator[None]:
    outside.query("DROP TABLE IF EXISTS rows")
    outside.query(books.SCHEMA)
    yield
    transaction.abort()
    outside.query("DROP TABLE rows")


@pytest.fixture(params=[kind for kind in KINDS if kind != "simple"])
def pool(make_pool: Callable[..., Any], request: Any) -> Any:
    pool = make_pool(KINDS[request.param])
    zpgpool.register_pool(pool)
    return pool


def store(environ: Any, start_response: Any) -> Any:
    """An application that stores its path, and answers with a list, or with chunks, or fails."""
    path = environ["PATH_INFO"]
    books.store_row(connection(), path)
    start_response("200 OK", [("Content-Type", "text/plain")])
    if path == "/fail":
        raise Planned
    return chunks(path) if path == "/chunks" else [b"done"]


def chunks(path: str) -> Iterator[bytes]:
    yield b"do"
    books.store_row(connection(), f"{path} later")
    yield b"ne"


PATHS = {"/list": ["/list"], "/chunks": ["/chunks", "/chunks later"]}


class TestFilterOutside:
    @pytest.mark.parametrize("path", PATHS)
    def test_commits(self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture, path: str) -> None:
        assert TestApp(PoolMiddleware(TM(store), pool)).get(path).text == "done"
        assert rows(outside) == PATHS[path]
        assert pool.holders() == []
        assert caplog.records == []

    def test_rolls_back(self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(Planned):
            TestApp(PoolMiddleware(TM(store), pool)).get("/fail")
        assert rows(outside) == []
        assert pool.holders() == []
        assert caplog.records == []

    def test_an_ini_file_that_is_right(
        self, pool: Any, outside: Outside, tmp_path: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "site.ini"
        path.write_text(
            "[pipeline:main]\npipeline = pool egg:repoze.tm2#tm app\n"
            "[filter:pool]\nuse = egg:zpgpool\n"
            "[app:app]\nuse = call:test_repoze:app_factory\n"
        )
        with waitress(loadapp(f"config:{path}")) as port:
            assert books.get(port, "/list") == (200, b"done")
            assert books.get(port, "/chunks") == (200, b"done")
        assert rows(outside) == ["/chunks", "/chunks later", "/list"]
        assert pool.holders() == []
        # Not waitress's own, of requests that wait for a thread on a busy machine.
        assert [record for record in caplog.records if record.name != "waitress.queue"] == []


def app_factory(global_conf: dict[str, str]) -> Any:
    return store


class TestFilterInside:
    """Pitfall 36: the request ends before its transaction, which keeps the connection, and a warning says why."""

    def warning(self, caplog: pytest.LogCaptureFixture) -> str:
        """Return what is logged, but that repoze.tm2 drops a body without closing it, if there was one to close."""
        (record,) = [each for each in caplog.records if "dropped its body" not in each.getMessage()]
        assert (record.name, record.levelno) == ("zpgpool", logging.WARNING)
        return record.getMessage()

    @pytest.mark.parametrize("path", PATHS)
    def test_loses_nothing_and_says_what_is_wrong(
        self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        assert TestApp(TM(PoolMiddleware(store, pool))).get(path).text == "done"
        assert rows(outside) == PATHS[path]
        assert pool.holders() == []
        message = self.warning(caplog)
        assert message.startswith(f"GET {path} has ended, but its transaction has not")
        assert "must stand left of (outside)" in message

    def test_rolls_back(self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(Planned):
            TestApp(TM(PoolMiddleware(store, pool))).get("/fail")
        assert rows(outside) == []
        assert pool.holders() == []
        assert "must stand left of (outside)" in self.warning(caplog)

    def test_nobody_gets_the_connection_while_the_transaction_has_it(
        self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also this thread's next request has another one."""
        seen: list[int] = []

        def around(environ: Any, start_response: Any) -> Any:
            body = PoolMiddleware(store, pool)(environ, start_response)
            seen.append(run(connection(), "SELECT pg_backend_pid()"))
            seen.append(in_thread(self.backend, pool))
            seen.append(self.backend(pool))
            return body

        TestApp(TM(around)).get("/list")
        assert seen[0] not in seen[1:]
        assert rows(outside) == ["/list"]
        assert pool.holders() == []
        self.warning(caplog)

    def backend(self, pool: Any) -> int:
        with pool.connection() as conn:
            return int(run(conn, "SELECT pg_backend_pid()"))

    def test_an_abandoned_body_leaves_its_transaction_to_the_next_request(
        self, pool: Any, outside: Outside, caplog: pytest.LogCaptureFixture
    ) -> None:
        """repoze.tm2 does nothing when a client leaves: until the thread's next request the connection is nobody's."""
        app = PoolMiddleware(store, pool)

        def abandon() -> None:
            environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/chunks"}
            body: Any = TM(app)(environ, lambda *args: None)
            assert next(iter(body)) == b"do"
            body.close()

        abandon()
        assert rows(outside) == []
        TestApp(TM(app)).get("/list")
        assert rows(outside) == ["/list"]
        assert pool.holders() == []
