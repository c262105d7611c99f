"""`zpgpool top`: the status page of a real site, in a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from benchmarks.harness import free_port

import zpgpool
from conftest import eventually
from serving import waitress
from zpgpool.__main__ import main
from zpgpool.core import tasks
from zpgpool.status import StatusApp


pytestmark = pytest.mark.usefixtures("measured")


SECRET = "hunter2"


@pytest.fixture
def pool(make_pool: Callable[..., Any]) -> Any:
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 4, idle_timeout=600, timeout=20, name="main")
    zpgpool.register_pool(pool, "main")
    return pool


@pytest.fixture
def url(pool: Any) -> Iterator[str]:
    with waitress(StatusApp()) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def request_name() -> Iterator[str]:
    """What this thread works on: with markup, and what a terminal would obey."""
    tasks[threading.get_ident()] = "GET /[bold]x[/]\x1b[2J"
    yield "GET /[bold]x[/]\ufffd[2J"
    del tasks[threading.get_ident()]


def answering(body: bytes, status: str = "200 OK", headers: tuple[tuple[str, str], ...] = ()) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response(status, [("Content-Type", "application/json"), *headers])
        return [body]

    return app


class TestOnce:
    def test_an_idle_pool(self, url: str, pool: Any, capsys: Any) -> None:
        assert main(["top", url, "--once"]) == 0
        text = capsys.readouterr().out
        assert "main  PersistentConnectionPool" in text
        assert "0 of 4 connections in use, 0 idle; nobody waits." in text

    def test_who_holds_what(self, url: str, pool: Any, request_name: str, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("zpgpool.monitor.snapshot.LOOK", 20.0)
        conn = pool.getconn()
        assert main(["top", url + "json?x#y", "--once"]) == 0
        text = capsys.readouterr().out
        assert request_name in text
        assert "\x1b[2J" not in text
        assert f"{conn.info.backend_pid} idle" in text
        pool.putconn()

    def test_no_pool(self, capsys: Any) -> None:
        with waitress(StatusApp()) as port:
            assert main(["top", f"http://127.0.0.1:{port}", "--once"]) == 0
        assert "No pool is registered." in capsys.readouterr().out

    def test_waiters_tales_and_what_the_server_does_not_say(self, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        holder = {"seconds": 3.0, "request": "", "thread": "T-1", "status": "lost", "backend_pid": 7, "line": "x:1"}
        server = {"state": "active", "wait_event_type": "Lock", "wait_event": "advisory", "blocked_by": [8]}
        pool = {
            "name": "",
            "kind": "K",
            "is_closed": False,
            "last_connect_error": "",
            "outage_seconds": None,
            "used": 2,
            "idle": 0,
            "max": 2,
            "waiting": 1,
            "lag": {"seconds": 2.5, "ago": 1.0, "trouble": ""},
            "samples": [{"used": number % 3, "waiting": number, "wait": number / 9} for number in range(9)],
            "server_note": "it is silent",
            "holders": [{**holder, "server": None}, {**holder, "server": server}],
            "waiters": [{"seconds": 1.0, "request": "GET /late", "thread": "T-2"}],
            "incidents": [{"at": "now", "kind": "server gone", "text": "why", "count": 3}],
        }
        body = json.dumps({"pools": [pool], "process": 1, "at": "now"}).encode()
        with waitress(answering(body)) as port:
            assert main(["top", f"http://127.0.0.1:{port}", "--once"]) == 0
        text = capsys.readouterr().out
        for each in (
            "1 request waits, for 1.0 s",
            "GET /late",
            "behind the primary: 2.5 s",
            "server gone (3)",
            "without what the server says: it is silent",
            "7 active Lock/advisory blocked by backend 8",
            " ▁▂▃▄▅▆▇█",
        ):
            assert each in text


class TestRefusesInOneLine:
    def fails(self, capsys: Any, *args: str) -> str:
        assert main(["top", *args, "--once"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("zpgpool top: ")
        return str(err)

    def test_nobody_there(self, capsys: Any) -> None:
        assert "no answer: " in self.fails(capsys, f"http://127.0.0.1:{free_port()}/")

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8080", "http://", "ftp://x/"])
    def test_no_address(self, capsys: Any, url: str) -> None:
        assert "expected the URL of a status page" in self.fails(capsys, url)

    @pytest.mark.parametrize("body", ["", "<html>", "[]", "{}", '{"pools": 1}', '{"pools": [{}]}', '{"pools": [1]}'])
    def test_no_status_page(self, capsys: Any, body: str) -> None:
        with waitress(answering(body.encode())) as port:
            assert "no status page of zpgpool" in self.fails(capsys, f"http://127.0.0.1:{port}/")

    def test_a_page_that_is_closed(self, capsys: Any) -> None:
        with waitress(answering(b"", "404 Not Found")) as port:
            assert "the server answers 404: is this its address" in self.fails(capsys, f"http://127.0.0.1:{port}/")

    def test_a_redirect_gets_no_token(self, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("TOP_TOKEN", SECRET)
        with waitress(StatusApp()) as other:
            away = (("Location", f"http://127.0.0.1:{other}/json"),)
            with waitress(answering(b"", "302 Found", away)) as port:
                text = self.fails(capsys, f"http://127.0.0.1:{port}/", "--token", "ENV:TOP_TOKEN")
        assert "the server answers 302" in text

    @pytest.mark.parametrize("token", [SECRET, "ENV:NOT_THERE", "ENV:"])
    def test_a_token_that_is_not_in_the_environment(self, capsys: Any, token: str) -> None:
        assert SECRET not in self.fails(capsys, "http://localhost/", "--token", token)

    def test_without_rich(self, capsys: Any, monkeypatch: Any) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich.console", None)
        assert "pip install 'zpgpool[cli]'" in self.fails(capsys, "http://localhost/")


def test_a_token_opens(pool: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TOP_TOKEN", SECRET)
    status = StatusApp(token=SECRET)

    def app(environ: Any, start_response: Any) -> Any:
        return status({**environ, "REMOTE_ADDR": "10.0.0.1"}, start_response)

    with waitress(app) as port:
        assert main(["top", f"http://127.0.0.1:{port}/", "--once", "--token", "ENV:TOP_TOKEN"]) == 0
        assert "nobody waits" in capsys.readouterr().out
        assert main(["top", f"http://127.0.0.1:{port}/", "--once"]) == 1


def test_it_is_live_until_it_is_interrupted(pool: Any) -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    seen: list[bytes] = []

    def text() -> str:
        seen.append(os.read(ours, 1 << 16))
        return b"".join(seen).decode(errors="replace")

    with waitress(StatusApp()) as port:
        command = [sys.executable, "-m", "zpgpool", "top", f"http://127.0.0.1:{port}/", "--every", "0.1"]
        process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env={**os.environ, "TERM": "xterm"})
        os.close(its)
        try:
            eventually(lambda: "0 of 4 connections in use" in text())
            pool.getconn()
            eventually(lambda: "1 of 4 connections in use" in text())
            pool.putconn()
        except BaseException:
            process.kill()
            raise
    eventually(lambda: "no answer" in text())
    process.send_signal(signal.SIGINT)

    def has_ended() -> bool:
        """Read on meanwhile: who writes to a terminal that nobody reads must wait."""
        with suppress(OSError):
            if select.select([ours], [], [], 0)[0]:
                os.read(ours, 1 << 16)
        return process.poll() is not None

    eventually(has_ended)
    assert process.returncode == 0
    os.close(ours)
