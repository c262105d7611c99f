"""The status page: what it shows, to whom, of whatever state; as HTML, as data, for Prometheus and OpenTelemetry."""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from paste.deploy import loadapp
from prometheus_client.parser import text_string_to_metric_families
from psycopg2.extensions import make_dsn
from psycopg2.extensions import parse_dsn

import zpgpool
from browser import Browser
from browser import chromium
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import Outside
from conftest import run
from serving import waitress
from zpgpool.core import tasks
from zpgpool.demo.server import EmbeddedServer
from zpgpool.metrics import instrument
from zpgpool.monitor.history import history_of
from zpgpool.monitor.page import seconds
from zpgpool.monitor.page import verdict
from zpgpool.monitor.snapshot import ask_server
from zpgpool.monitor.snapshot import list_pools
from zpgpool.monitor.snapshot import readable
from zpgpool.monitor.snapshot import take
from zpgpool.settings import SettingError
from zpgpool.status import StatusApp
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


MakePool = Callable[..., Any]

SECRET = "hunter2"

BUILD = Path(__file__).parent.parent / "build" / "status"

STATUS = "/status"

#: In the place of the question to the server.
SLOW = "SET LOCAL statement_timeout='50ms'; SELECT pg_sleep(9)"


class Answer:
    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = int(status.split()[0])
        self.headers = {name.lower(): value for name, value in headers}
        self.body = body

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def pool(self) -> dict[str, Any]:
        """The only pool of the JSON."""
        [pool] = json.loads(self.body)["pools"]
        assert isinstance(pool, dict)
        return pool


def ask(app: Any, path: str = "/", method: str = "GET", peer: str | None = "127.0.0.1", **environ: Any) -> Answer:
    """Call the application as a server does."""
    told: list[tuple[str, list[tuple[str, str]]]] = []
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": STATUS,
        "PATH_INFO": path,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "HTTP_HOST": "localhost",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        **environ,
    }
    if peer is not None:
        environ["REMOTE_ADDR"] = peer
    body = app(environ, lambda status, headers, exc_info=None: told.append((status, headers)))
    answer = Answer(*told[0], b"".join(body))
    if hasattr(body, "close"):
        body.close()
    return answer


class Reader(HTMLParser):
    """Reads a page: its elements, its text, and that each element ends."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def pool(make_pool: MakePool) -> Any:
    """A registered pool for four users."""
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 4, idle_timeout=600, timeout=20)
    zpgpool.register_pool(pool)
    return pool


@pytest.fixture
def app(pool: Any) -> StatusApp:
    return StatusApp()


class Busy:
    """Requests that hold a connection in a query, under their paths, and others that wait for one."""

    def __init__(self, pool: Any, *paths: str, waiting: tuple[str, ...] = (), sql: str = "SELECT pg_sleep(30)") -> None:
        def application(environ: Any, start_response: Any) -> list[bytes]:
            conn = get_connection(environ)
            start_response("200 OK", [])
            run(conn, sql)
            return []

        site = PoolMiddleware(application, pool)

        def request(path: str) -> None:
            with suppress(psycopg2.Error):
                ask(site, path, SCRIPT_NAME="")

        self.pool = pool
        self.calls = [Call(request, path) for path in paths]
        eventually(lambda: self._run(sql) == len(paths))
        for number, path in enumerate(waiting, 1):
            self.calls.append(Call(request, path))
            eventually(partial(self._has_waiters, number))

    def _run(self, sql: str) -> int:
        """Return how many wait in it, as the server says: a holder is "in a query" in the BEGIN before, too."""
        pids = [holder.backend_pid for holder in self.pool.holders()]
        sessions = ask_server(self.pool, pids, time.monotonic() + 20, show_sql=True).sessions if pids else {}
        return sum(
            session["wait_event"] is not None and session["query"].startswith(sql[:12]) for session in sessions.values()
        )

    def _has_waiters(self, number: int) -> bool:
        return len(self.pool.waiters()) == number

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.pool.close(0)
        for call in self.calls:
            call.result()


PATHS = ("/a", "/b", "/c", "/d")


class TestShows:
    def test_an_exhausted_pool(self, app: StatusApp, pool: Any, outside: Outside) -> None:
        with Busy(pool, *PATHS, waiting=("/late", "/later")):
            took = []
            for _ in range(3):
                start = time.monotonic()
                page = ask(app)
                took.append(time.monotonic() - start)
            assert is_within(min(took), 0.2)
            shown = ask(app, "/json").pool
            assert pool.get_stats()["pool_size"] == 4
            assert (shown["used"], shown["idle"], shown["waiting"], shown["max"]) == (4, 0, 2, 4)
            assert {holder["request"] for holder in shown["holders"]} == {f"GET {path}" for path in PATHS}
            assert {holder["backend_pid"] for holder in shown["holders"]} == outside.backends()
            assert [waiter["request"] for waiter in shown["waiters"]] == ["GET /late", "GET /later"]
            for holder in shown["holders"]:
                assert holder["status"] == "in a query"
                assert holder["server"]["state"] == "active"
                assert holder["server"]["wait_event"] == "PgSleep"
                assert 0 <= holder["server"]["seconds"] < 20
                assert holder["server"]["query"] is None
                assert "test_status.py" in holder["line"] or "conftest.py" in holder["line"]
            text = Reader(page.text).text
            for each in ("GET /a", "GET /d", "GET /late", "PgSleep", "4 of 4 connections in use; 2 requests wait"):
                assert each in text
            for pid in outside.backends():
                assert f"backend {pid}" in text
            assert "pg_sleep(30)" not in page.text

    def test_who_blocks_whom(self, app: StatusApp, pool: Any, outside: Outside) -> None:
        outside.query("SELECT pg_advisory_lock(815)")
        pid = outside.conn.info.backend_pid
        with Busy(pool, "/blocked", sql="SELECT pg_advisory_lock(815)"):
            eventually(lambda: ask(app, "/json").pool["holders"][0]["server"]["blocked_by"] == [pid])
            assert f"waits for a lock of backend {pid}" in ask(app).text
        outside.query("SELECT pg_advisory_unlock(815)")

    def test_queries_only_where_that_is_wanted(self, pool: Any) -> None:
        with Busy(pool, "/", sql="SELECT pg_sleep(30) /* <b> */"):
            assert "&lt;b&gt;" in ask(StatusApp(show_sql=True)).text
            text = ask(StatusApp()).text
            assert "pg_sleep" not in text
            [pid] = [holder.backend_pid for holder in pool.holders()]
            assert f"SELECT pg_cancel_backend({pid})" in text

    def test_no_pool(self) -> None:
        answer = ask(StatusApp())
        assert "No pool is registered." in Reader(answer.text).text
        assert json.loads(ask(StatusApp(), "/json").body)["pools"] == []

    def test_each_of_several_pools(self, make_pool: MakePool) -> None:
        for name in ("reports", "", "größer <b>"):
            zpgpool.register_pool(make_pool(zpgpool.ThreadedConnectionPool, 0, 2, name=name), name)
        text = ask(StatusApp()).text
        assert Reader(text).text.count("nobody waits") == 3
        assert "größer <b>" in Reader(text).text

    def test_a_closed_pool(self, app: StatusApp, pool: Any) -> None:
        pool.close()
        assert "The pool is closed." in ask(app).text
        assert ask(app, "/json").pool["is_closed"] is True

    def test_what_happened(self, app: StatusApp, pool: Any, outside: Outside) -> None:
        pool._timer = None
        pool.putconn(pool.getconn() and None)
        outside.terminate()
        pool.run_maintenance(time.monotonic())
        text = Reader(ask(app).text).text
        assert "server gone" in text
        [incident] = ask(app, "/json").pool["incidents"]
        assert (incident["kind"], incident["count"]) == ("server gone", 1)

    def test_ten_minutes_drawn(self, app: StatusApp, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = history_of(pool)
        for number in range(120):
            kept.maintain(number * 5)
        monkeypatch.setattr("zpgpool.status.monotonic", lambda: 600.0)
        pages = Reader(ask(app).text)
        charts = [attrs for tag, attrs in pages.elements if tag == "svg"]
        assert [chart["role"] for chart in charts] == ["img"] * 3
        assert all(chart["aria-label"] for chart in charts)
        paths = [attrs["d"] or "" for tag, attrs in pages.elements if tag == "path"]
        assert [path.count("M") for path in paths] == [1, 1, 1, 1]
        assert all(path.count("H") >= 120 for path in paths)

    def test_a_gap_in_the_samples_as_one(self, app: StatusApp, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for ago in (500, 495, 100, 95):
            history_of(pool).maintain(600 - ago)
        monkeypatch.setattr("zpgpool.status.monotonic", lambda: 600.0)
        paths = [attrs["d"] or "" for tag, attrs in Reader(ask(app).text).elements if tag == "path"]
        assert [path.count("M") for path in paths] == [3, 3, 3, 3]

    def test_tables_that_can_be_read_aloud(self, app: StatusApp, pool: Any) -> None:
        with Busy(pool, "/a"):
            elements = Reader(ask(app).text).elements
        cells = [attrs for tag, attrs in elements if tag == "td"]
        heads = [attrs for tag, attrs in elements if tag == "th"]
        assert cells
        assert {head["scope"] for head in heads} == {"col"}
        assert all(cell["data-label"] and cell["role"] == "cell" for cell in cells)

    def test_it_takes_no_connection_of_the_pool(self, app: StatusApp, pool: Any) -> None:
        for path in ("/", "/json", "/metrics"):
            assert ask(app, path).status == 200
        assert pool.get_stats()["requests_num"] == 0
        assert pool.get_stats()["connections_num"] == 0


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 s"), (0.0004, "0 ms"), (0.05, "50 ms"), (3.14, "3.1 s"), (61, "1 min 1 s"), (7200, "2.0 h")],
)
def test_seconds_for_people(number: float, text: str) -> None:
    assert seconds(number) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET /plain", "GET /plain"),
        ("GET /gr\xc3\xb6\xc3\x9fer", "GET /größer"),
        ("GET /\xff\xfe", "GET /ÿþ"),
        ("größer", "größer"),
        ("x" * 299 + "\xc3\xb6", "x" * 299 + "ö"),
        ("GET /\x00\x1b[31m\n", "GET /\ufffd\ufffd[31m\ufffd"),
        ("thread 鳥", "thread 鳥"),
        ("\u202eevil", "\ufffdevil"),
        ("x" * 400, "x" * 300 + "…"),
    ],
)
def test_text_of_others_is_made_fit_to_read(text: str, shown: str) -> None:
    assert readable(text) == shown


@pytest.mark.parametrize(
    ("changes", "mood", "words"),
    [
        ({}, "good", "1 of 4 connections in use, 2 idle; nobody waits."),
        ({"used": 4}, "warn", "All 4 connections are in use; nobody waits yet."),
        (
            {"waiting": 1, "waiters": [{"seconds": 3.0}]},
            "bad",
            "1 of 4 connections in use; 1 request waits, for 3.0 s.",
        ),
        ({"last_connect_error": "gone"}, "bad", "The last connect failed: gone"),
        (
            {"last_connect_error": "gone", "outage_seconds": 3.2, "waiting": 2},
            "bad",
            "The server cannot be reached for 3.2 s; 2 wait for it: gone",
        ),
        ({"is_closed": True, "last_connect_error": "gone"}, "bad", "The pool is closed."),
        ({"lag": {"trouble": "gone"}}, "warn", "The replica is lost: gone"),
    ],
)
def test_a_pool_in_one_sentence(changes: dict[str, Any], mood: str, words: str) -> None:
    pool = {
        "is_closed": False,
        "last_connect_error": "",
        "outage_seconds": None,
        "lag": None,
        "used": 1,
        "idle": 2,
        "max": 4,
        "waiting": 0,
        "waiters": [],
    }
    assert verdict({**pool, **changes}) == (mood, words)


class TestWithoutTheServer:
    def test_that_is_stopped(self, own_server: EmbeddedServer, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, 0, 4, dsn=own_server.dsn, idle_timeout=600, timeout=20)
        zpgpool.register_pool(pool)
        app = StatusApp()
        is_over = threading.Event()
        calls = [Call(hold_until, is_over, pool, path) for path in PATHS]
        eventually(lambda: len(pool.holders()) == 4)
        waiter = Call(hold_until, is_over, pool, "/late")
        eventually(pool.waiters)
        own_server.halt()
        try:
            start = time.monotonic()
            shown = ask(app, "/json").pool
            assert is_within(time.monotonic() - start, 2.5)
            assert {holder["request"] for holder in shown["holders"]} == {f"GET {path}" for path in PATHS}
            assert [waiter["request"] for waiter in shown["waiters"]] == ["GET /late"]
            assert {holder["server"] for holder in shown["holders"]} == {None}
            assert shown["server_note"]
            assert str(own_server.sockets) not in json.dumps(shown)
            text = Reader(ask(app).text).text
            assert "Without what the server says" in text
            assert "GET /a" in text
        finally:
            is_over.set()
            own_server.launch()
            for call in [*calls, waiter]:
                call.result()

    def test_that_is_silent(self, make_pool: MakePool, outside: Outside) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool)
        zpgpool.register_pool(pool)
        pool.getconn()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            there = {"host": "127.0.0.1", "port": silent.getsockname()[1], "dbname": "postgres", "user": "postgres"}
            pool._open_connection = lambda more: psycopg2.connect(**there, **more)
            start = time.monotonic()
            shown = ask(StatusApp(), "/json").pool
            seconds = time.monotonic() - start
            assert seconds >= 1.9
            assert is_within(seconds, 3)
        assert shown["server_note"] == "the server does not answer"
        assert len(shown["holders"]) == 1
        pool.putconn()

    def test_that_is_slow_to_say(self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A statement_timeout of the connection's own ends the question on the server, too."""
        pool = make_pool()
        zpgpool.register_pool(pool)
        pool.getconn()
        monkeypatch.setattr("zpgpool.monitor.snapshot.ACTIVITY", SLOW)
        start = time.monotonic()
        assert "statement timeout" in ask(StatusApp(), "/json").pool["server_note"]
        assert is_within(time.monotonic() - start, 2)
        pool.putconn()

    def test_behind_a_pooler_that_numbers_backends_its_own_way(
        self, pool: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool.getconn()
        sql = "SELECT pid, false FROM pg_stat_activity WHERE pid = ANY(%(held)s)"
        monkeypatch.setattr("zpgpool.monitor.snapshot.ACTIVITY", sql)
        assert "a pooler is in between" in ask(StatusApp(), "/json").pool["server_note"]
        pool.putconn()

    def test_whose_users_have_factories_of_their_own(self, make_pool: MakePool) -> None:
        class Mine(psycopg2.extensions.connection):
            def __init__(self, dsn: str, async_: int = 0) -> None:
                assert not async_
                super().__init__(dsn)

        pool = make_pool(connection_factory=Mine, cursor_factory=psycopg2.extras.DictCursor)
        zpgpool.register_pool(pool)
        pool.getconn()
        [holder] = ask(StatusApp(), "/json").pool["holders"]
        assert holder["server"]["state"] == "idle"
        pool.putconn()


def hold_until(is_over: threading.Event, pool: Any, path: str) -> None:
    def application(environ: Any, start_response: Any) -> list[bytes]:
        get_connection(environ)
        start_response("200 OK", [])
        is_over.wait(60)
        return []

    try:
        ask(PoolMiddleware(application, pool), path, SCRIPT_NAME="")
    except psycopg2.Error:
        pass


class TestAccess:
    @pytest.mark.parametrize(
        ("peer", "status"),
        [
            ("127.0.0.1", 200),
            ("127.8.9.10", 200),
            ("::1", 200),
            ("::ffff:127.0.0.1", 200),
            ("::ffff:10.0.0.1", 404),
            ("10.0.0.1", 404),
            ("192.168.0.1", 404),
            ("0.0.0.0", 404),
            ("::", 404),
            ("", 404),
            (None, 404),
            ("localhost", 404),
            ("127.0.0.1, 10.0.0.1", 404),
            ("unix:", 404),
        ],
    )
    def test_is_for_this_machine(self, app: StatusApp, peer: str | None, status: int) -> None:
        for path in ("/", "/json", "/metrics", "/status.css", "/status.js", "/icon.svg"):
            assert ask(app, path, peer=peer).status == status

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            *[("localhost", 200), ("LOCALHOST:8080", 200), ("127.0.0.1:8080", 200), ("[::1]", 200), ("[::1]:80", 200)],
            *[("", 404), ("shop.example", 404), ("localhost.example:80", 404), ("10.0.0.1", 404), ("[::2]:80", 404)],
            *[("127.0.0.1.example", 404), ("user@localhost", 404), ("localhost, x", 404), ("[", 404)],
        ],
    )
    def test_and_for_its_own_names(self, app: StatusApp, host: str, status: int) -> None:
        """A proxy that adds no header passes on the site's name; so does a browser that was told a foreign one."""
        assert ask(app, HTTP_HOST=host).status == status

    @pytest.mark.parametrize("header", ["X_FORWARDED_FOR", "FORWARDED", "X_REAL_IP", "VIA", "X_FORWARDED_HOST"])
    def test_is_not_for_whom_a_proxy_on_this_machine_brings(self, app: StatusApp, header: str) -> None:
        assert ask(app, **{f"HTTP_{header}": "127.0.0.1"}).status == 404
        assert ask(app, peer="10.0.0.1", **{f"HTTP_{header}": "127.0.0.1"}).status == 404

    @pytest.mark.parametrize(
        ("header", "status"),
        [
            ("Bearer open sesame", 200),
            ("bearer  open sesame ", 200),
            ("Bearer open sesam", 404),
            ("Bearer open sesamee", 404),
            ("Bearer Open sesame", 404),
            ("Bearer", 404),
            ("Bearer ", 404),
            ("Basic open sesame", 404),
            ("open sesame", 404),
            ("Bearer \xff\udcff", 404),
            ("", 404),
        ],
    )
    def test_is_for_who_has_the_token(self, pool: Any, header: str, status: int) -> None:
        app = StatusApp(token="open sesame")
        assert ask(app, peer="10.0.0.1", HTTP_AUTHORIZATION=header).status == status
        assert ask(app, peer="10.0.0.1", HTTP_AUTHORIZATION=header, HTTP_X_FORWARDED_FOR="::1").status == status
        assert ask(StatusApp(), peer="10.0.0.1", HTTP_AUTHORIZATION=header).status == 404

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", ""])
    def test_to_read_only(self, app: StatusApp, method: str) -> None:
        answer = ask(app, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
        assert ask(app, method=method, peer="10.0.0.1").status == 404

    @pytest.mark.parametrize("path", ["/", "", "/json", "/metrics", "/status.css", "/status.js", "/icon.svg"])
    def test_HEAD_has_no_body(self, app: StatusApp, path: str) -> None:
        head, full = ask(app, path, "HEAD"), ask(app, path)
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-type"] == full.headers["content-type"]
        assert full.body

    @pytest.mark.parametrize("path", ["/", "/json", "/metrics", "/status.css", "/nowhere"])
    def test_nothing_is_stored_or_framed(self, app: StatusApp, path: str) -> None:
        headers = ask(app, path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert policy.startswith(
            "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'"
        )
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy

    @pytest.mark.parametrize(
        ("accept", "kind"),
        [
            ("", "text/html"),
            ("*/*", "text/html"),
            ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
            ("application/json", "application/json"),
            ("application/json, text/html;q=0.5", "application/json"),
            ("image/png", "text/html"),
            (";;;not\x00valid", "text/html"),
        ],
    )
    def test_what_is_accepted_decides(self, app: StatusApp, accept: str, kind: str) -> None:
        assert ask(app, HTTP_ACCEPT=accept).headers["content-type"].startswith(kind)

    def test_nothing_comes_from_elsewhere(self, app: StatusApp) -> None:
        elements = Reader(ask(app, SCRIPT_NAME="/a b\xff").text).elements
        links = [attrs.get("href") or attrs.get("src") for _, attrs in elements if "href" in attrs or "src" in attrs]
        assert {link for link in links if link and not link.startswith("/a%20b%FF/")} == {"/"}  # back to the site
        assert len(links) > 3
        assert not [attrs for tag, attrs in elements if "style" in attrs or tag == "style"]
        assert not [name for _, attrs in elements for name in attrs if name.startswith("on")]
        assert [attrs["src"] for tag, attrs in elements if tag == "script"] == ["/a%20b%FF/status.js"]


def test_500_odd_requests(dsn: str, make_pool: MakePool) -> None:
    """Whatever comes: one of three answers, nothing unescaped, no secret."""
    dice = random.Random(5)
    evil = "<script>alert(1)</script>"
    secret_dsn = make_dsn(dsn, password=SECRET, application_name=f"{evil}&\"'")
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 4, dsn=secret_dsn, idle_timeout=600, timeout=20)
    zpgpool.register_pool(pool)
    apps = [StatusApp(), StatusApp(token=f"{SECRET}-token"), StatusApp(token=f"{SECRET}-token", show_sql=True)]
    paths = [
        "/",
        "",
        "/json",
        "/metrics",
        "/status.css",
        "/x",
        f"/{evil}",
        "/" + "a" * 100_000,
        "/\xff\x00\xfe",
        "//",
        "/../",
    ]
    paths += ["/status.css/..", "/pages/status.html", "/%2e%2e", "json"]
    methods = ["GET", "HEAD", "POST", "PUT", "BREW", "", "<b>", "get", "CONNECT"]
    peers = ["127.0.0.1", "::1", "10.0.0.1", "", None, "::ffff:127.0.0.1", "nonsense", "1.2.3.4.5"]
    tokens = [
        "",
        f"Bearer {SECRET}-toke",
        f"Bearer {SECRET}-token",
        f"Bearer {SECRET}-tokenn",
        "Bearer \xff",
        "Basic x",
    ]
    hooks = [f"/{evil}", "/\xff\xfe", "/" + "b" * 5000, "/'\"&"]
    statuses = set()
    with Busy(pool, *hooks, waiting=(f"/late{evil}",), sql=f"SELECT pg_sleep(60) /* {evil} */"):
        for _ in range(500):
            environ: dict[str, Any] = {"SCRIPT_NAME": dice.choice(["", STATUS, f"/{evil}", "/\xff"])}
            if dice.random() < 0.3:
                environ["HTTP_X_FORWARDED_FOR"] = dice.choice(["127.0.0.1", evil, "::1"])
            if dice.random() < 0.4:
                environ["HTTP_AUTHORIZATION"] = dice.choice(tokens)
            if dice.random() < 0.3:
                environ["HTTP_ACCEPT"] = dice.choice(["application/json", evil, "\x00", "a/b;q=x"])
            if dice.random() < 0.3:
                environ["QUERY_STRING"] = dice.choice([evil, "%ff", "a" * 10_000])
            answer = ask(dice.choice(apps), dice.choice(paths), dice.choice(methods), dice.choice(peers), **environ)
            statuses.add(answer.status)
            if answer.headers["content-type"].startswith("text/html"):
                assert evil not in answer.text
                assert "<script>" not in answer.text
                if answer.body:
                    Reader(answer.text)
            assert SECRET not in answer.text
    assert statuses == {200, 404, 405}


def test_500_odd_requests_through_a_socket(dsn: str, make_pool: MakePool) -> None:
    """What no WSGI environ can say: broken request lines, binary headers, through a real waitress."""
    dice = random.Random(7)
    evil = b"<script>alert(1)</script>"
    zpgpool.register_pool(make_pool(dsn=make_dsn(dsn, password=SECRET, application_name=evil.decode())))
    lines = [b"GET", b"HEAD", b"POST", b"BREW", b"get", b"\xff\xfe", b"", evil, b"G" * 9000]
    paths = [b"/", b"/json", b"/metrics", b"/status.css", b"/" + evil, b"/" + b"a" * 70_000, b"/\x00\xff", b"//", b"*"]
    paths += [b"/%3Cscript%3E", b"/../../etc/passwd", b"http://other/", b"/?" + evil, b"", b"/ /"]
    headers = [
        b"X-Forwarded-For: 127.0.0.1",
        b"Authorization: Bearer " + SECRET.encode() + b"-toke",
        b"Authorization: Bearer " + SECRET.encode() + b"-token",
        b"Authorization: Bearer \xff\x00",
        b"Host: " + evil,
        b"Content-Length: 5",
        b"Content-Length: -1",
        b"Transfer-Encoding: chunked",
        b"Accept: " + evil,
        b"\xff\xff: x",
        b"no colon",
    ]
    statuses = set()
    with waitress(StatusApp(token=f"{SECRET}-token"), threads=4) as port:
        for _ in range(500):
            request = (
                dice.choice(lines) + b" " + dice.choice(paths) + dice.choice([b" HTTP/1.1", b" HTTP/1.0", b"", b" x"])
            )
            request += b"".join(b"\r\n" + header for header in dice.sample(headers, dice.randrange(4)))
            with socket.create_connection(("127.0.0.1", port), timeout=20) as conn:
                conn.sendall(request + b"\r\nConnection: close\r\n\r\n")
                conn.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: conn.recv(65536), b""))
            assert SECRET.encode() not in answer
            if b"Content-Type: text/html" in answer:
                assert b"<script>" not in answer
            if b"Server: waitress" in answer.partition(b"\r\n\r\n")[0] and b"Content-Security-Policy" in answer:
                statuses.add(int(answer.split()[1]))
    assert statuses == {200, 404, 405}


def test_no_secret_in_what_a_connect_says(dsn: str, make_pool: MakePool) -> None:
    there = parse_dsn(dsn)
    private = {"user": f"{SECRET}user", "password": SECRET, "dbname": f"{SECRET}db"}
    pool = make_pool(dsn=make_dsn(**{**there, **private}), open=False)
    zpgpool.register_pool(pool)
    app = StatusApp()
    with pytest.raises(psycopg2.OperationalError):
        pool.getconn()
    answers = [ask(app, path) for path in ("/", "/json", "/metrics")]
    for answer in answers:
        assert SECRET not in answer.text
        assert there["host"] not in answer.text
    shown = answers[1].pool
    assert "FATAL" in shown["last_connect_error"]
    assert shown["incidents"][0]["kind"] == "connect failed"
    assert "The last connect failed" in answers[0].text


class TestPaste:
    INI = "[app:main]\nuse = egg:zpgpool#status\n"

    @pytest.fixture
    def load(self, tmp_path: Path) -> Callable[[str], Any]:
        def load(options: str) -> Any:
            (tmp_path / "site.ini").write_text(self.INI + options)
            return loadapp(f"config:{tmp_path / 'site.ini'}")

        return load

    def test_options(self, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POOL_TOKEN", "sesame")
        assert ask(load("")).status == 200
        app = load("token = ENV:POOL_TOKEN\nshow-sql = yes\n")
        assert ask(app, peer="10.0.0.1", HTTP_AUTHORIZATION="Bearer sesame").status == 200
        assert app._show_sql
        app = load("token = ENV:POOL_TOKEN\nloopback = no\n")
        assert ask(app).status == 404
        assert ask(app, HTTP_AUTHORIZATION="Bearer sesame").status == 200

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("tokn = x", "unknown option 'tokn' (known: listen, loopback, peers, share, show_sql, token)"),
            ("loopback = no", "option 'loopback': expected true where no token is given: no client could see the page"),
            ("loopback = perhaps", "option 'loopback': expected true or false"),
            ("show_sql = maybe", "option 'show_sql': expected true or false"),
            (f"token = {SECRET}", "option 'token': expected ENV:NAME"),
            ("token = ENV:NOT_THERE", "option 'token': the environment has no variable 'NOT_THERE'"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_file(self, load: Any, options: str, message: str) -> None:
        with pytest.raises(SettingError) as caught:
            load(options)
        assert message in str(caught.value)
        assert str(caught.value).startswith("zpgpool status: ")
        assert "site.ini" in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_under_urlmap_with_the_pool_of_the_filter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dsn: str
    ) -> None:
        monkeypatch.setenv("TEST_DSN", dsn)
        (tmp_path / "site.ini").write_text(
            "[composite:main]\nuse = egg:Paste#urlmap\n/ = site\n/status = status\n"
            "[app:status]\nuse = egg:zpgpool#status\n"
            "[pipeline:site]\npipeline = pool demo\n[app:demo]\nuse = egg:zpgpool#demo\n"
            "[filter:pool]\nuse = egg:zpgpool\ndsn = ENV:TEST_DSN\n"
        )
        app = loadapp(f"config:{tmp_path / 'site.ini'}")
        pool = zpgpool.get_pool()
        try:
            assert ask(app, "/slow", SCRIPT_NAME="", QUERY_STRING="seconds=0").status == 200
            assert ask(app, f"{STATUS}/json", SCRIPT_NAME="").pool["stats"]["requests_num"] == 1
            assert ask(app, STATUS, SCRIPT_NAME="").headers["content-type"].startswith("text/html")
            assert sum(history_of(pool).times["use_time"].read()[0]) == 1
        finally:
            pool.close(0)


class TestMetrics:
    def families(self, app: StatusApp) -> dict[str, Any]:
        answer = ask(app, "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return {family.name: family for family in text_string_to_metric_families(answer.text)}

    def values(self, app: StatusApp) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
            for family in self.families(app).values()
            for sample in family.samples
        }

    def test_agree_with_the_pool(self, app: StatusApp, pool: Any) -> None:
        with Busy(pool, *PATHS, waiting=("/late",)):
            values, stats = self.values(app), pool.get_stats()
        prefix, name = "db_client_connection_", "pool_name="
        assert values[f"{prefix}count", name, "state=used"] == 4
        assert values[f"{prefix}count", name, "state=idle"] == 0
        assert values[f"{prefix}max", name] == 4
        assert values[f"{prefix}idle_min", name] == 0
        assert values[f"{prefix}pending_requests", name] == 1
        assert values[f"{prefix}timeouts_total", name] == 0
        assert values[f"{prefix}create_time_seconds_count", name] == stats["connections_num"] == 4
        assert values[f"{prefix}create_time_seconds_sum", name] * 1000 == pytest.approx(stats["connections_ms"], abs=2)
        assert values["zpgpool_requests_num_total", name] == stats["requests_num"]

    def test_never_go_back_and_their_sums_agree(self, app: StatusApp, pool: Any) -> None:
        pool._timer = None
        stop = time.monotonic() + 1.0

        def use() -> None:
            with pool.connection() as conn:
                run(conn, "SELECT 1")

        def users() -> None:
            while time.monotonic() < stop:
                for call in [Call(use) for _ in range(8)]:  # threads that end: their counts move
                    call.result()
                pool.run_maintenance(time.monotonic())

        load = Call(users)
        before: dict[tuple[str, ...], float] = {}
        while load.is_running:
            values = self.values(app)
            for key, value in before.items():
                if key[0].endswith(("_total", "_count", "_sum", "_bucket")) and key[0] != "db_client_connection_count":
                    assert values[key] >= value, key
            before = values
        load.result()
        values, stats = self.values(app), pool.get_stats()
        assert values["db_client_connection_use_time_seconds_count", "pool_name="] == stats["requests_num"] > 0
        assert values["db_client_connection_wait_time_seconds_count", "pool_name="] == stats["requests_queued"]
        waited = values["db_client_connection_wait_time_seconds_sum", "pool_name="]
        assert waited * 1000 == pytest.approx(stats["requests_wait_ms"], abs=2)
        buckets = [values[key] for key in values if key[0].endswith("use_time_seconds_bucket")]
        assert sorted(buckets) == buckets

    def test_timeouts(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=0.01)
        zpgpool.register_pool(pool)
        app = StatusApp()
        conn = pool.getconn(timeout=20)
        with pytest.raises(zpgpool.PoolTimeout):
            pool.getconn()
        assert self.values(app)["db_client_connection_timeouts_total", "pool_name="] == 1
        pool.putconn(conn)

    def test_without_the_extra_there_are_none(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        app = StatusApp()
        assert ask(app, "/metrics").status == 404
        assert "/metrics" not in ask(app).text

    def test_a_name_with_everything_in_it(self, make_pool: MakePool) -> None:
        name = 'a "quoted" \\ name\nwith <b>'
        zpgpool.register_pool(make_pool(name=name), name)
        assert ("db_client_connection_max", f"pool_name={name}") in self.values(StatusApp())

    def test_for_opentelemetry(self, make_pool: MakePool) -> None:
        reader = InMemoryMetricReader()
        instrument(MeterProvider([reader]))
        pool = make_pool(zpgpool.ThreadedConnectionPool, 1, 4, idle_timeout=60, name="main")
        zpgpool.register_pool(pool, "main")
        conn = pool.getconn()
        pool.putconn(pool.getconn())
        data: Any = reader.get_metrics_data()
        [scope] = data.resource_metrics[0].scope_metrics
        metrics = {metric.name.removeprefix("db.client.connection."): metric for metric in scope.metrics}
        name = {"db.client.connection.pool.name": "main"}
        points = {key: metric.data.data_points for key, metric in metrics.items()}
        assert {point.attributes["db.client.connection.state"]: point.value for point in points["count"]} == {
            "used": 1,
            "idle": 1,
        }
        assert {key: [point.value for point in points[key]] for key in ("max", "idle.min", "pending_requests")} == {
            "max": [4],
            "idle.min": [1],
            "pending_requests": [0],
        }
        [used], [created] = points["use_time"], points["create_time"]
        assert (used.count, dict(used.attributes)) == (1, name)
        assert created.count == 2
        assert (metrics["use_time"].unit, metrics["count"].unit) == ("s", "{connection}")
        assert points["timeouts"][0].value == 0
        pool.putconn(conn)


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def site(make_pool: MakePool) -> Iterator[tuple[str, Callable[[str], Call]]]:
    """A site with the page, and a function that asks it for something."""
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 4, idle_timeout=600, timeout=20)
    zpgpool.register_pool(pool)
    status = StatusApp(show_sql=True)

    def slow(environ: Any, start_response: Any) -> list[bytes]:
        run(get_connection(environ), "SELECT pg_sleep(30) /* <script>alert(1)</script> */")
        return []

    served = PoolMiddleware(slow, pool)

    def app(environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if not path.startswith(STATUS):
            return served(environ, start_response)
        environ |= {"SCRIPT_NAME": STATUS, "PATH_INFO": path.removeprefix(STATUS)}
        return status(environ, start_response)

    calls: list[Call] = []
    with waitress(app, threads=12) as port:

        def get(path: str) -> None:
            conn = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            conn.request("GET", path)
            conn.getresponse().read()
            conn.close()

        def begin(path: str) -> Call:
            calls.append(Call(get, path))
            return calls[-1]

        yield f"http://127.0.0.1:{port}", begin
        pool.close(0)
        for call in calls:
            call.result()


class TestInABrowser:
    TEXT = "document.querySelector('main').textContent"

    def test_it_goes_live_under_load(self, browser: Browser, site: Any) -> None:
        url, begin = site
        browser.forget()
        browser.open(url + STATUS)
        browser.run("window.isSame = true")
        assert "/slow" not in browser.run(self.TEXT)
        browser.shoot(BUILD / "idle-light.png")
        begin("/slow/1")
        eventually(lambda: "GET /slow/1" in browser.run(self.TEXT), 2.0)
        browser.run("document.querySelector('details').open = true")
        for number in range(2, 8):
            begin(f"/slow/{number}")
        eventually(lambda: "3 requests wait" in browser.run(self.TEXT), 4)
        assert browser.run("window.isSame")
        assert browser.run("document.querySelector('details').open")
        assert browser.run("document.getElementById('live').textContent") == "live"
        assert "waiting" in browser.run("document.title")
        browser.shoot(BUILD / "load-light.png")
        browser.resize(360)
        assert browser.run("document.documentElement.scrollWidth") <= 360
        browser.shoot(BUILD / "load-phone.png")
        browser.open(url + STATUS, dark=True)
        browser.shoot(BUILD / "load-dark.png")
        assert browser.complaints == []

    def test_it_rests_in_the_dark(self, browser: Browser, site: Any) -> None:
        url, _ = site
        browser.forget()
        browser.open(url + STATUS, dark=True)
        assert "nobody waits" in browser.run(self.TEXT)
        assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches")
        browser.shoot(BUILD / "idle-dark.png")
        assert browser.complaints == []

    def test_it_is_a_page_without_scripts_too(self, browser: Browser, site: Any) -> None:
        url, begin = site
        begin("/slow/<b>")
        begin("/slow/2")
        eventually(lambda: len(zpgpool.get_pool().holders()) == 2)
        browser.forget()
        browser.open(url + STATUS, width=360, dark=True, script=False)
        assert "GET /slow/2" in browser.run(self.TEXT)
        assert browser.run("document.querySelector('noscript meta')?.content") == "5"
        assert browser.run("document.documentElement.scrollWidth") <= 360
        browser.shoot(BUILD / "load-phone-dark.png")
        assert browser.complaints == []

    def test_it_says_when_the_site_has_gone(self, browser: Browser, pool: Any) -> None:
        with waitress(StatusApp()) as port:
            browser.open(f"http://127.0.0.1:{port}/")
            eventually(lambda: browser.run("document.getElementById('live').textContent") == "live")
        eventually(lambda: "no answer since" in browser.run("document.getElementById('live').textContent"))


def test_nothing_of_requests_stays_behind() -> None:
    assert tasks == {}


def test_pools_are_listed_by_name(make_pool: MakePool) -> None:
    for name in ("b", "", "a"):
        zpgpool.register_pool(make_pool(name=name), name)
    assert [name for name, _ in list_pools()] == ["", "a", "b"]
    assert [pool["name"] for pool in take(list_pools(), time.monotonic())["pools"]] == ["", "a", "b"]
