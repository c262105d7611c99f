"""`zpgpool demo`, as a process of its own: what it serves, how it ends, and what it says when it cannot run."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from html import unescape
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg2
import pytest
from benchmarks.harness import free_port
from psycopg2.extensions import make_dsn

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import run
from zpgpool.demo import load


pytestmark = pytest.mark.usefixtures("measured")


#: How long the demo may take to begin, with a new database on a slow machine, and to end, in seconds.
BEGIN = 15.0
END = 5.0

SECRET = "hunter2"


class Answer:
    """What the demo answered."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def text(self) -> str:
        return self.body.decode()


class Demo:
    """A running `zpgpool demo`."""

    def __init__(self, folder: Path, *args: object, port: int = 0, **environ: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        environ = {**os.environ, "TMPDIR": str(self.temporary), "XDG_DATA_HOME": str(folder), **environ}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, "-m", "zpgpool", "demo", "--port", str(port), *map(str, args)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ)

    def begin(self) -> Demo:
        """Wait until it serves."""
        eventually(lambda: "Serving on" in self.out.read_text() or self.process.poll() is not None, BEGIN)
        assert self.process.poll() is None, self.err.read_text()
        return self

    @property
    def address(self) -> tuple[str, int]:
        found = re.search(r"Serving on http://(\S+):(\d+)/ ", self.out.read_text())
        assert found is not None
        return found[1].strip("[]"), int(found[2])

    def ask(self, path: str = "/", method: str = "GET", body: str | None = None, **headers: str) -> Answer:
        conn = http.client.HTTPConnection(*self.address, timeout=20)
        try:
            conn.request(method, path, body, headers)
            return Answer(conn.getresponse())
        finally:
            conn.close()

    def post(self, note: str) -> Answer:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.ask("/", "POST", urlencode({"note": note}), **form)

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = END) -> int:
        """Send a signal and return the exit status."""
        start = time.monotonic()
        self.process.send_signal(how)
        status = self.process.wait(10 * seconds)
        assert is_within(time.monotonic() - start, seconds)
        return status

    def notes(self) -> list[str]:
        """Return the notes on the page, the newest first."""
        return [unescape(note) for note in re.findall(r"<li>(.*?)<time>", self.ask().text, re.DOTALL)]


@contextlib.contextmanager
def running(folder: Path, *args: object, **options: Any) -> Iterator[Demo]:
    demo = Demo(folder, *args, **options)
    try:
        yield demo
    finally:
        demo.process.kill()
        demo.process.wait()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Demo]:
    """Run one on new data in `folder`, and see to it that it ends well."""
    with running(folder, "--data", folder / "data") as demo:
        yield demo.begin()
        assert demo.end() == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The one that the tests of the pages share."""
    with serving(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Another one, for the tests that put it under load: that goes on for a while, and a lock lets nobody in."""
    with serving(tmp_path_factory.mktemp("busy")) as demo:
        yield demo


@pytest.fixture
def busy(loaded: Demo) -> Demo:
    """That, when the crowd and the lock of the test before have gone."""

    def are_left() -> set[str]:
        [pool] = status_of(loaded)["pools"]
        return {each["request"] for each in [*pool["holders"], *pool["waiters"]]} & {"GET /sale", "POST /import"}

    eventually(lambda: not are_left(), 30)
    return loaded


@pytest.fixture(scope="module")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that was used before: making one takes seconds."""
    folder = tmp_path_factory.mktemp("made")
    with serving(folder):
        return folder / "data"


@pytest.fixture
def database(server_dsn: str) -> Iterator[str]:
    """An empty database on the server that all tests share: its connection string."""
    conn = psycopg2.connect(server_dsn)
    conn.autocommit = True
    name = f"demo_{os.getpid()}"
    with conn.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        cursor.execute(f"CREATE DATABASE {name}")
        yield make_dsn(server_dsn, dbname=name)
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    conn.close()


def servers_of(data: Path) -> list[str]:
    """Return the processes that have to do with a data folder: named in their command, or at work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            is_named = str(data).encode() in command and b"zpgpool\0demo" not in command
            if is_named or (process / "cwd").readlink() == data:
                found.append(command.decode())
    return found


class TestPages:
    def test_the_start_page_is_a_page(self, demo: Demo) -> None:
        answer = demo.ask()
        assert answer.status == 200
        assert answer.headers["Content-Type"].lower() == "text/html; charset=utf-8"
        assert answer.headers["Content-Length"] == str(len(answer.body))
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'self';")
        assert answer.text.startswith("<!DOCTYPE html>")
        assert "<h1>Notes</h1>" in answer.text
        assert re.search(r"Served by thread <code>waitress-\d</code> over backend <code>\d+</code>", answer.text)

    def test_the_links_of_a_page_lead_somewhere(self, demo: Demo) -> None:
        links = set(re.findall(r'href="(/[^"]*)"', demo.ask().text))
        assert links == {"/", "/stream", "/slow?seconds=2", "/fail", "/status", "/style.css"}

    def test_the_style_takes_no_connection(self, demo: Demo) -> None:
        answer = demo.ask("/style.css")
        assert (answer.status, answer.headers["Content-Type"].lower()) == (200, "text/css; charset=utf-8")
        assert "max-age" in answer.headers["Cache-Control"]
        assert "body {" in answer.text

    def test_a_note_is_stored(self, demo: Demo) -> None:
        answer = demo.post("remember the milk")
        assert answer.status == 303
        assert answer.headers["Location"].rstrip("/").endswith(str(demo.address[1]))
        assert demo.notes()[0] == "remember the milk"

    @pytest.mark.parametrize("note", ["<script>alert('x')</script> & \"so\" 'on'", "größer, 鳥 🐘", "  spaced\0  "])
    def test_a_note_is_shown_as_it_was_written(self, demo: Demo, note: str) -> None:
        assert demo.post(note).status == 303
        assert demo.notes()[0] == note.replace("\0", "").strip()
        assert "<script" not in demo.ask().text

    @pytest.mark.parametrize("note", ["", "   ", "\0", "x" * 501])
    def test_no_note_and_a_long_one_are_refused(self, demo: Demo, note: str) -> None:
        before = demo.notes()
        answer = demo.post(note)
        assert answer.status == 400
        assert "A note has 1 to 500 characters." in answer.text
        assert demo.notes() == before

    def test_the_longest_one_is_not(self, demo: Demo) -> None:
        assert demo.post("ä" * 500).status == 303
        assert demo.notes()[0] == "ä" * 500

    def test_a_form_without_the_field_and_a_file_in_it_are_refused(self, demo: Demo) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert demo.ask("/", "POST", "other=x", **form).status == 400
        file = '--b\r\nContent-Disposition: form-data; name="note"; filename="f"\r\n\r\nx\r\n--b--\r\n'
        assert demo.ask("/", "POST", file, **{"Content-Type": "multipart/form-data; boundary=b"}).status == 400

    @pytest.mark.parametrize("path", ["/%ff", "/stream?rows=%ff", "/slow?seconds=%ff"])
    def test_what_is_no_text_is_the_clients_mistake(self, demo: Demo, path: str) -> None:
        assert demo.ask(path).status in (400, 404)

    def test_a_note_that_is_no_text_does_no_harm(self, demo: Demo) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert demo.ask("/", "POST", "note=%ff", **form).status < 500
        assert demo.ask().status == 200

    def test_the_page_shows_the_newest_hundred(self, demo: Demo) -> None:
        for number in range(101):
            demo.post(f"number {number}")
        assert demo.notes() == [f"number {number}" for number in range(100, 0, -1)]

    def test_a_stream_has_its_rows(self, demo: Demo) -> None:
        answer = demo.ask("/stream?rows=5")
        assert (answer.status, answer.headers["Content-Type"].lower()) == (200, "text/plain; charset=utf-8")
        lines = answer.text.splitlines()
        assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
        assert lines[0] == "1 c4ca4238a0b923820dcc509a6f75849b"

    @pytest.mark.parametrize("rows", [0, 1000, 2500])
    def test_of_any_length(self, demo: Demo, rows: int) -> None:
        assert len(demo.ask(f"/stream?rows={rows}").text.splitlines()) == rows

    def test_a_slow_page_takes_its_time(self, demo: Demo) -> None:
        start = time.monotonic()
        answer = demo.ask("/slow?seconds=0.1")
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "The server slept for 0.1 seconds." in answer.text
        assert time.monotonic() - start >= 0.1

    @pytest.mark.parametrize(
        "path", ["/slow?seconds=61", "/slow?seconds=soon", "/slow?seconds=nan", "/stream?rows=-1", "/stream?rows=1e8"]
    )
    def test_a_number_that_cannot_be_is_refused(self, demo: Demo, path: str) -> None:
        answer = demo.ask(path)
        assert answer.status == 400
        assert "is a number from 0 to" in answer.text

    def test_a_page_that_fails_has_stored_nothing(self, demo: Demo) -> None:
        before = demo.notes()
        assert demo.ask("/fail").status == 500
        assert demo.notes() == before
        assert "never stored" not in demo.ask().text

    @pytest.mark.parametrize("path", ["/nowhere", "/style.css/x", "//", "/%3Cscript%3E"])
    def test_another_page_is_not_found(self, demo: Demo, path: str) -> None:
        if path == "//":
            assert demo.ask(path).status == 200  # waitress takes it for "/"
        else:
            answer = demo.ask(path)
            assert answer.status == 404
            assert "<script" not in answer.text

    @pytest.mark.parametrize(
        ("path", "method", "allowed"),
        [
            ("/", "DELETE", "GET, HEAD, POST"),
            ("/", "PUT", "GET, HEAD, POST"),
            ("/stream", "POST", "GET, HEAD"),
            ("/fail", "POST", "GET, HEAD"),
            ("/load", "GET", "POST"),
            ("/lock", "GET", "POST"),
            ("/kill", "GET", "POST"),
            ("/fill", "GET", "POST"),
            ("/restart", "GET", "POST"),
        ],
    )
    def test_another_method_is_not_allowed(self, demo: Demo, path: str, method: str, allowed: str) -> None:
        answer = demo.ask(path, method)
        assert answer.status == 405
        assert answer.headers["Allow"] == allowed

    @pytest.mark.parametrize("path", ["/", "/stream", "/style.css", "/slow?seconds=0"])
    def test_HEAD_has_no_body(self, demo: Demo, path: str) -> None:
        answer = demo.ask(path, "HEAD")
        assert (answer.status, answer.body) == (200, b"")

    def test_the_status_page_shows_the_load(self, busy: Demo) -> None:
        answers = [busy.ask("/load", "POST") for _ in range(3)]
        assert {answer.status for answer in answers} == {303}
        assert answers[0].headers["Location"].endswith("/status")
        # The load begins before the last connections are open.
        [pool] = eventually(
            lambda: [
                pool for pool in status_of(busy)["pools"] if 0 < pool["waiting"] <= 4 and pool["used"] >= pool["max"]
            ]
        )
        assert pool["max"] == pool["used"] == 8
        assert {holder["request"] for holder in pool["holders"]} <= load.REQUESTS.keys()
        assert "8 of 8 connections in use" in busy.ask("/status").text
        assert busy.ask("/status", "POST").status == 405

    def test_the_database_is_restarted_and_nothing_fails(self, busy: Demo) -> None:
        assert "Restart the database" in busy.ask().text
        answer = busy.ask("/restart", "POST")
        assert answer.status == 200
        told = re.search(r"Of (\d+) requests meanwhile <strong>none failed</strong>", answer.text)
        assert told is not None, answer.text
        assert int(told[1]) > 0

    def test_a_backend_is_killed_and_nothing_fails(self, busy: Demo) -> None:
        answer = busy.ask("/kill", "POST")
        assert answer.status == 200
        assert re.search(r"It served <code>(GET|POST) /\S+</code>, which then ran again", answer.text), answer.text
        told = re.search(r"Of (\d+) requests meanwhile <strong>none failed</strong>", answer.text)
        assert told is not None, answer.text
        assert int(told[1]) > 0

    def test_a_lock_shows_who_waits_for_whom(self, busy: Demo) -> None:
        answer = busy.ask("/lock", "POST")
        assert (answer.status, answer.headers["Location"][-7:]) == (303, "/status")
        eventually(lambda: re.search(r"of backend \d+, which is POST /import", busy.ask("/status").text))

    def test_a_full_queue_is_503_with_a_page_that_leads_back(self, busy: Demo) -> None:
        # The queue may have a place again when the request comes to it.
        answer = eventually(lambda: (answer := busy.ask("/fill", "POST")).status == 503 and answer, 30)
        assert answer.headers["Retry-After"] == "5"
        assert '<a href="/">try again</a>' in answer.text
        eventually(lambda: busy.ask("/").status == 200)

    def test_every_page_leads_back(self, demo: Demo) -> None:
        for path in ("/", "/slow?seconds=0", "/fail", "/status"):
            assert 'href="/"' in demo.ask(path).text, path

    def test_a_host_that_a_client_made_up_does_no_harm(self, demo: Demo) -> None:
        assert '"><script>' not in demo.ask("/", Host='"><script>').text


def test_load_that_is_asked_for_again_lasts_longer(
    make_pool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zpgpool.demo.load._run", lambda conn, **more: run(conn, "SELECT pg_sleep(0.001)"))
    now = 0.0
    pool, made = make_pool(zpgpool.ThreadedConnectionPool), load.Load(lambda: now)

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("demo-load-")}

    made.start(pool)
    started = threads()
    assert len(started) == pool.maxconn + load.MORE
    now = load.SECONDS - 0.1
    made.start(pool)
    now = load.SECONDS + 0.1
    before = made._tally.requests
    eventually(lambda: made._tally.requests > before + 3 * len(started))
    assert threads() == started  # the same, and no more
    now = 2 * load.SECONDS
    eventually(lambda: not threads())
    made.start(pool)
    assert len(threads()) == len(started)
    pool.closeall()
    eventually(lambda: not threads())


def status_of(demo: Demo) -> Any:
    return json.loads(demo.ask("/status/json").body)


class TestEnds:
    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_by_a_signal_and_leaves_nothing_but_its_notes(self, tmp_path: Path, how: signal.Signals) -> None:
        data = tmp_path / "data"
        port = free_port()
        with running(tmp_path, "--data", data, port=port) as demo:
            demo.begin()
            assert demo.address == ("127.0.0.1", port)
            demo.post("still there")
            assert servers_of(data)
            assert demo.end(how) == 0
            assert demo.out.read_text().endswith("Stopped.\n")
            assert "Traceback" not in demo.err.read_text()
        assert servers_of(data) == []
        assert list(demo.temporary.iterdir()) == []
        with running(tmp_path, "--data", data, port=port) as demo:
            assert demo.begin().notes() == ["still there"]
            assert demo.end(how) == 0

    def test_by_SIGKILL_leaves_no_server_and_every_note(self, made_data: Path, tmp_path: Path) -> None:
        with running(tmp_path, "--data", made_data) as demo:
            demo.begin().post("before the kill")
            assert demo.end(signal.SIGKILL) == -signal.SIGKILL
            eventually(lambda: servers_of(made_data) == [])
        with running(tmp_path, "--data", made_data) as demo:
            assert demo.begin().notes()[0] == "before the kill"
            assert demo.end() == 0

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_while_it_makes_its_database_and_may_begin_again(self, tmp_path: Path, how: signal.Signals) -> None:
        data = tmp_path / "data"
        with running(tmp_path, "--data", data) as demo:
            eventually(lambda: list(tmp_path.glob("*/PG_VERSION")), BEGIN)  # wherever it makes it
            assert demo.end(how) == 0
            assert "Traceback" not in demo.err.read_text()
        eventually(lambda: servers_of(data) == [])
        assert list(demo.temporary.iterdir()) == []
        with running(tmp_path, "--data", data) as demo:
            assert demo.begin().ask().status == 200
            assert demo.end() == 0

    def test_during_a_long_query(self, made_data: Path, tmp_path: Path) -> None:
        """The server of the demo waits for its threads, 1 second, then the query is cancelled."""
        with running(tmp_path, "--data", made_data) as demo:
            demo.begin()
            client = Call(demo.ask, "/slow?seconds=60")
            eventually(lambda: [command for command in servers_of(made_data) if "SELECT" in command])
            assert demo.end() == 0
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert client.result().status >= 500
        assert servers_of(made_data) == []

    def test_an_impatient_user_leaves_no_server_either(self, made_data: Path, tmp_path: Path) -> None:
        with running(tmp_path, "--data", made_data) as demo:
            demo.begin()
            while demo.process.poll() is None:
                demo.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    demo.process.wait(0.05)
            said = demo.err.read_text()
            assert "Traceback" not in said or "coverage/control.py" in said  # which is interrupted, too
        eventually(lambda: servers_of(made_data) == [])


class TestCannotRun:
    """Each is one line on stderr, the exit status 1, and no traceback."""

    def refuse(self, folder: Path, *args: object, port: int = 0, **environ: str) -> str:
        with running(folder, *args, port=port, **environ) as demo:
            assert demo.process.wait(20) == 1
            (line,) = demo.err.read_text().splitlines()
            assert line.startswith("zpgpool demo: ")
            assert SECRET not in line + demo.out.read_text()
            assert list(demo.temporary.iterdir()) == []
            return line.removeprefix("zpgpool demo: ")

    def test_on_a_port_that_is_taken(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            message = self.refuse(tmp_path, "--data", tmp_path / "data", port=port)
        assert message.startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use")
        assert message.endswith("; choose another with --port")
        assert not (tmp_path / "data").exists()

    def test_on_a_host_that_is_not_here(self, tmp_path: Path) -> None:
        message = self.refuse(tmp_path, "--host", "192.0.2.1", "--data", tmp_path / "data")
        assert message.startswith("cannot listen on 192.0.2.1:0: ")
        assert self.refuse(tmp_path, "--host", "no.such.host.invalid").startswith("cannot listen on no.such.host")

    def test_on_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        message = self.refuse(tmp_path, "--data", file)
        assert str(file) in message
        assert file.read_text() == "mine"

    def test_in_a_folder_of_others(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir(mode=0o755)
        (folder / "file").write_text("mine")
        before = folder.stat()
        message = self.refuse(tmp_path, "--data", folder)
        assert message == f"{folder} is not empty, and not the data of a PostgreSQL server"
        assert [path.name for path in folder.iterdir()] == ["file"]
        assert (folder.stat().st_mode, folder.stat().st_uid) == (before.st_mode, before.st_uid)

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        message = self.refuse(tmp_path, "--data", tmp_path / "file" / "data")
        assert message.startswith("cannot keep a database in ")

    def test_on_data_of_another_version(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        (data / "PG_VERSION").write_text("9.6\n")
        assert self.refuse(tmp_path, "--data", data).startswith(f"PostgreSQL does not start on {data}: ")

    def test_on_data_that_another_demo_serves(self, demo: Demo, tmp_path: Path) -> None:
        data = demo.err.parent / "data"
        assert self.refuse(tmp_path, "--data", data).startswith(f"{data} is in use by another server")
        assert demo.ask().status == 200

    def test_against_a_server_that_is_not_there(self, tmp_path: Path) -> None:
        message = self.refuse(tmp_path, "--dsn", f"host=/nowhere password={SECRET}")
        assert message.startswith("cannot connect: ")
        assert "/nowhere" in message

    def test_with_a_connection_string_that_libpq_cannot_read(self, tmp_path: Path) -> None:
        message = self.refuse(tmp_path, "--dsn", f"host=/nowhere {SECRET}")
        assert message == "option 'dsn': libpq cannot read this connection string"

    def test_with_a_variable_that_is_not_set(self, tmp_path: Path) -> None:
        message = self.refuse(tmp_path, "--dsn", "ENV:NOT_SET_AT_ALL")
        assert message == "option 'dsn': the environment has no variable 'NOT_SET_AT_ALL'"

    def test_without_its_ini_file(self, tmp_path: Path, database: str) -> None:
        message = self.refuse(tmp_path, "--dsn", database, "--ini", tmp_path / "none.ini")
        assert message == f"there is no file {tmp_path / 'none.ini'}"

    def test_with_an_ini_file_that_knows_too_much(self, tmp_path: Path, database: str) -> None:
        ini = write_ini(tmp_path, "maxcon = 5", f"password = {SECRET}")
        message = self.refuse(tmp_path, "--dsn", database, "--ini", ini)
        assert message.startswith("zpgpool filter: unknown option 'maxcon', did you mean 'maxconn'?")
        assert message.endswith(f"(in {ini})")

    @pytest.mark.parametrize(
        "text",
        [
            "no section",
            "[app:other]\nuse = egg:zpgpool#demo\n",
            "[app:main]\nuse = egg:zpgpool#nothing\n",
            "[app:main]\n",
        ],
        ids=["syntax", "no main", "no such entry point", "no use"],
    )
    def test_with_an_ini_file_that_PasteDeploy_cannot_load(self, tmp_path: Path, database: str, text: str) -> None:
        ini = tmp_path / "bad.ini"
        ini.write_text(text)
        assert str(ini) in self.refuse(tmp_path, "--dsn", database, "--ini", ini)


def write_ini(folder: Path, *options: str) -> Path:
    """Return a copy of the demo's own ini file, with more options for the pool."""
    import zpgpool.demo

    text = (Path(zpgpool.demo.__file__).parent / "demo.ini").read_text()
    ini = folder / "site.ini"
    ini.write_text(text.replace("maxconn = 8\n", "\n".join(["maxconn = 8", *options, ""])))
    return ini


class TestOptions:
    def test_a_temporary_folder_with_a_long_name(self, tmp_path: Path, made_data: Path) -> None:
        """The path of a socket has about a hundred bytes (unix(7))."""
        folder = tmp_path / ("long" * 30)
        folder.mkdir()
        with running(tmp_path, "--data", made_data, TMPDIR=str(folder)) as demo:
            assert demo.begin().ask().status == 200
            assert demo.end() == 0

    def test_another_server(self, tmp_path: Path, database: str) -> None:
        with running(tmp_path, "--dsn", database) as demo:
            demo.begin()
            assert demo.post("elsewhere").status == 303
            with contextlib.closing(psycopg2.connect(database)) as conn, conn.cursor() as cursor:
                cursor.execute("SELECT note FROM notes")
                assert cursor.fetchall() == [("elsewhere",)]
            assert demo.end() == 0
            assert "Starting PostgreSQL" not in demo.out.read_text()

    def test_another_server_is_not_ours_to_restart(self, tmp_path: Path, database: str) -> None:
        with running(tmp_path, "--dsn", database) as demo:
            demo.begin()
            assert "Restart" not in demo.ask().text
            assert demo.ask("/restart", "POST").status == 404
            assert demo.end() == 0

    def test_another_server_by_the_environment(self, tmp_path: Path, database: str) -> None:
        with running(tmp_path, "--dsn", "ENV:SOME_DSN", SOME_DSN=database) as demo:
            assert demo.begin().ask().status == 200
            assert demo.end() == 0

    def test_a_server_that_goes_is_a_503(self, tmp_path: Path, database: str, server_dsn: str) -> None:
        with running(tmp_path, "--dsn", database) as demo:
            assert demo.begin().ask().status == 200
            name = psycopg2.extensions.parse_dsn(database)["dbname"]
            with contextlib.closing(psycopg2.connect(server_dsn)) as conn, conn.cursor() as cursor:
                conn.autocommit = True
                cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
                answer = demo.ask()
                assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
                cursor.execute(f"CREATE DATABASE {name}")
            assert demo.end() == 0

    def test_another_ini_file(self, tmp_path: Path, database: str) -> None:
        ini = write_ini(tmp_path, "minconn = 2")
        with running(tmp_path, "--dsn", database, "--ini", ini) as demo:
            assert demo.begin().ask().status == 200
            assert demo.end() == 0

    def test_another_host(self, made_data: Path, tmp_path: Path) -> None:
        with running(tmp_path, "--host", "::1", "--data", made_data) as demo:
            assert demo.begin().address[0] == "::1"
            assert demo.ask().status == 200
            assert demo.end() == 0

    def test_without_a_folder_it_keeps_its_data_at_home(self, tmp_path: Path) -> None:
        with running(tmp_path) as demo:
            demo.begin()
            assert demo.end() == 0
        assert (tmp_path / "zpgpool" / "demo" / "PG_VERSION").exists()

    def test_the_data_are_nobodys_to_read(self, made_data: Path) -> None:
        assert made_data.stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize(
        ("args", "status", "said"),
        [
            (["--version"], 0, f"zpgpool {version('zpgpool')}"),
            (["--help"], 0, "usage: zpgpool"),
            (["demo", "--help"], 0, "--data DATA"),
            ([], 2, "usage: zpgpool"),
            (["demo", "--port", "65536"], 2, "a port is a number from 0 to 65535"),
            (["demo", "--port", "http"], 2, "argument --port: invalid"),
            (["serve"], 2, "invalid choice: 'serve'"),
        ],
    )
    def test_of_the_command_line(self, args: list[str], status: int, said: str) -> None:
        result = subprocess.run([sys.executable, "-m", "zpgpool", *args], capture_output=True, text=True, timeout=20)
        assert result.returncode == status
        assert said in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
