"""The page beside the site, at `listen`; and the pages of other machines, `peers`."""

from __future__ import annotations

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
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import closing
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request
from urllib.request import urlopen

import pytest
from benchmarks.harness import free_port

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import missing
from conftest import run
from serving import waitress
from test_proxies import find
from test_site import APP
from test_site import folder as folder
from test_site import serving
from test_site import share as share
from test_status import ask
from zpgpool.__main__ import main
from zpgpool.errors import SettingError
from zpgpool.monitor import Beside
from zpgpool.monitor import Folder
from zpgpool.monitor import Peers
from zpgpool.monitor.beside import read_address
from zpgpool.status import StatusApp


pytestmark = pytest.mark.usefixtures("measured")


def look(port: int, path: str = "/json", token: str = "") -> dict[str, Any]:
    """Return the JSON that is at `port`; nothing while nobody answers there."""
    request = Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"})
    with suppress(OSError), urlopen(request, timeout=5) as answer:
        return dict(json.loads(answer.read()))
    return {}


def report(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


def has(port: int) -> bool:
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
        return bool(answer.read() == str(os.getpid()).encode())
    return False


# `listen` ------------------------------------------------------------------------------------------------------------


def test_it_answers_while_all_threads_of_the_site_wait_and_another_process_takes_over(folder: Path, dsn: str) -> None:
    port = free_port()
    with serving(folder, dsn, "--threads=2", workers=2, maxconn=1, LISTEN=f"127.0.0.1:{port}") as site:
        calls = [Call(site.get, "/hold?sql=SELECT+pg_sleep(600)") for _ in range(8)]
        seen = eventually(lambda: (seen := look(port)) and seen["waiting"] and seen["pools"][0]["holders"] and seen, 20)
        assert {each["request"] for each in seen["pools"][0]["holders"]} == {"GET /hold"}
        eventually(lambda: len(look(port).get("processes", [])) == 2)
        os.kill(seen["process"], signal.SIGKILL)
        eventually(lambda: look(port).get("process") not in (None, seen["process"]), 10)
        site.stop()
        for call in calls:
            with suppress(Exception):
                call.result()


def test_a_port_that_another_has_is_got_when_that_ends() -> None:
    port = free_port()
    with closing(socket.create_server(("127.0.0.1", port))) as other:
        beside = Beside(f"127.0.0.1:{port}", report)
        beside.start()
        try:
            other.close()
            eventually(lambda: has(port))
        finally:
            beside.close()
    eventually(lambda: not has(port))


def test_a_client_that_says_nothing_leaves_a_thread_for_the_next_one() -> None:
    port = free_port()
    beside = Beside(f"127.0.0.1:{port}", report)
    beside.start()
    try:
        eventually(lambda: has(port))
        with closing(socket.create_connection(("127.0.0.1", port))):
            assert has(port)
        with closing(socket.create_connection(("127.0.0.1", port))) as client:
            client.sendall(b"\x00\xff nonsense\r\n\r\n")
            client.recv(1000)
        assert has(port)
    finally:
        beside.close()


def test_a_client_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them would keep both threads for as long as they like, if each byte had its own time."""
    monkeypatch.setattr("zpgpool.monitor.beside.PATIENCE", 0.3)
    port, is_over = free_port(), threading.Event()
    beside = Beside(f"127.0.0.1:{port}", report)
    beside.start()
    try:
        eventually(lambda: has(port))
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]

        def drip() -> None:
            while not is_over.wait(0.05):
                for client in clients:
                    with suppress(OSError):
                        client.send(b"x")

        dripping = Call(drip)
        eventually(lambda: has(port))
        is_over.set()
        dripping.result()
        for client in clients:
            client.close()
        with closing(socket.create_connection(("127.0.0.1", port))) as client, suppress(OSError):
            client.sendall(b"x" * 200_000)
            assert client.recv(1) == b""
    finally:
        beside.close()


def test_root_leaves_the_port_to_the_sites_user(share: Path) -> None:
    if os.getuid() != 0:
        missing("a second user", "run the tests as root, as CI does")
    os.chown(share, 65534, 65534)
    beside = Beside(f"127.0.0.1:{free_port()}", report, Folder(str(share)))
    before = threading.enumerate()
    beside.start()
    assert not [each for each in threading.enumerate() if each not in before]
    beside.close()


def test_an_application_that_fails_ends_no_thread(capfd: Any) -> None:
    def fail(environ: Any, start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/":
            raise RuntimeError("not today")
        return report(environ, start_response)

    port = free_port()
    beside = Beside(f"127.0.0.1:{port}", fail)
    beside.start()
    try:
        eventually(lambda: has(port))
        for _ in range(5):
            with suppress(OSError):
                urlopen(f"http://127.0.0.1:{port}/fail", timeout=5)
        assert has(port)
    finally:
        beside.close()


def test_a_forked_child_takes_the_port_over_when_its_parent_ends_to_serve() -> None:
    port = free_port()
    beside = Beside(f"127.0.0.1:{port}", report)
    beside.start()
    eventually(lambda: has(port))
    if (pid := os.fork()) == 0:
        with suppress(BaseException):
            signal.pause()
        os._exit(0)
    try:
        beside.close()
        assert eventually(lambda: not has(port))
        with urlopen(eventually(lambda: _answers(port)), timeout=5) as answer:
            assert answer.read() == str(pid).encode()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _answers(port: int) -> str:
    url = f"http://127.0.0.1:{port}/"
    with suppress(OSError), urlopen(url, timeout=5):
        return url
    return ""


def test_an_address_that_cannot_be_had_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    beside = Beside("192.0.2.1:80", report)
    beside.start()
    eventually(lambda: "the status page at 192.0.2.1:80 cannot be served: " in caplog.text)
    beside.close()


@pytest.mark.parametrize(
    ("text", "expected"), [("127.0.0.1:8091", ("127.0.0.1", 8091)), (" [::1]:80 ", ("::1", 80)), ("db:1", ("db", 1))]
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert read_address(text) == expected


@pytest.mark.parametrize("text", ["", "8091", ":8091", "localhost", "localhost:", "localhost:0", "x:65536", "x:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(SettingError, match=r"option 'listen': expected HOST:PORT, as 127\.0\.0\.1:8091, got"):
        StatusApp(listen=text)


# `peers` -------------------------------------------------------------------------------------------------------------

TOKEN = "a-token-of-the-test"


def test_two_sites_without_a_common_folder_are_one_page(
    folder: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}/status" for port in ports]
    with (
        serving(folder / "a", dsn, "--threads=4", workers=1, port=ports[0], PEERS=urls[1], TOKEN=TOKEN) as one,
        serving(folder / "b", dsn, "--threads=4", workers=1, port=ports[1], PEERS=urls[0], TOKEN=TOKEN) as two,
    ):
        calls = [Call(site.get, f"/hold/{n}?sql=SELECT+pg_sleep(600)") for n, site in enumerate((one, two))]

        def seen(port: int) -> Any:
            site = look(port, "/status/json", TOKEN)
            # A third connection may be under way: a connect that takes more than a second has company.
            return site if len(site["pools"][0]["holders"]) == site["used"] == 2 else None

        pages = [eventually(partial(seen, port)) for port in ports]
        for page in pages:
            assert (page["used"], page["max"], len(page["processes"])) == (2, 8, 2)
            holders = page["pools"][0]["holders"]
            assert {each["request"] for each in holders} == {"GET /hold/0", "GET /hold/1"}
            assert all(each["server"] for each in holders)  # what the server says is known of both
        assert len({page["process"] for page in pages}) == 2
        monkeypatch.setenv("COLUMNS", "250")
        monkeypatch.setenv("STATUS_TOKEN", TOKEN)

        def both_shown() -> bool:
            assert main(["top", *urls, "--once", "--token=ENV:STATUS_TOKEN"]) == 0
            text = capsys.readouterr().out
            return "GET /hold/0" in text and "GET /hold/1" in text

        eventually(both_shown)
        two.stop()
        start = time.monotonic()
        page = eventually(lambda: (page := look(ports[0], "/status/json", TOKEN))["used"] == 1 and page)
        assert is_within(time.monotonic() - start, 3)
        [lost] = [each for each in page["processes"] if each["trouble"]]
        assert lost["host"] == f"127.0.0.1:{ports[1]}"
        assert "no answer" in lost["trouble"]
        one.stop()
        for call in calls:
            with suppress(Exception):
                call.result()


def test_a_site_that_is_among_its_own_peers_counts_once(
    folder: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/status"
    with serving(folder, dsn, "--threads=8", workers=2, port=port, PEERS=url) as site:
        call = Call(site.get, "/hold?sql=SELECT+pg_sleep(600)")
        eventually(lambda: site.whole()["pools"][0]["holders"])
        for _ in range(5):  # whichever worker asks, and whichever answers
            seen = site.whole()
            assert (seen["used"], seen["max"], len(seen["processes"])) == (1, 8, 2)
            assert len({each["id"] for each in seen["processes"]}) == 2
        monkeypatch.setenv("COLUMNS", "250")

        def whole() -> str:
            assert main(["top", url, url.replace("127.0.0.1", "localhost"), "--once"]) == 0
            text = str(capsys.readouterr().out)
            return "" if "no answer within" in text else text

        text = eventually(whole)
        # A second connection may be open: a first connect that takes more than a second has company.
        assert re.search(r"1 in use, [01] idle: [12] open of 8 at most", text), text
        assert text.count("GET /hold") == 1
        site.stop()
        with suppress(Exception):
            call.result()


HAPROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
frontend web
    bind 127.0.0.1:{port}
    default_backend shop
backend shop
    balance roundrobin
"""


@pytest.mark.slow
def test_three_processes_of_waitress_behind_haproxy(folder: Path, dsn: str) -> None:
    """Each has a port, and the page is the same through whichever."""
    (share := folder / "share").mkdir(0o700)
    (folder / "shop.py").write_text(APP)
    ports = [free_port() for _ in range(3)]
    front = free_port()
    servers = "".join(f"    server shop{port} 127.0.0.1:{port}\n" for port in ports)
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=front) + servers)
    serve = "import shop, sys, waitress; waitress.serve(shop.application, listen=sys.argv[1], threads=4)"
    commands = [[sys.executable, "-c", serve, f"127.0.0.1:{port}"] for port in ports]
    commands.append([find("haproxy", "haproxy"), "-db", "-f", str(folder / "haproxy.cfg")])
    environ = {**os.environ, "DSN": dsn, "SHARE": str(share), "MAXCONN": "4", "TOKEN": TOKEN}
    with (folder / "log").open("w") as log:
        started = [subprocess.Popen(each, cwd=folder, env=environ, stdout=log, stderr=log) for each in commands]
    try:

        def site(path: str = "/status/json") -> dict[str, Any]:
            seen = look(front, path, TOKEN)
            return seen if seen and not any(each["trouble"] for each in seen["processes"]) else {}

        eventually(lambda: len(site().get("processes", [])) == 3, 30)
        held = Call(urlopen, f"http://127.0.0.1:{front}/hold?sql=SELECT+pg_sleep(600)")
        eventually(lambda: (seen := site()) and seen["pools"][0]["holders"])
        asked = set()
        for _ in range(12):
            seen = eventually(site)
            asked.add(seen["process"])
            assert {each["process"] for each in seen["processes"]} == {each.pid for each in started[:3]}
            assert [each["request"] for each in seen["pools"][0]["holders"]] == ["GET /hold"]
        assert len(asked) == 3
    finally:
        for process in started:
            process.kill()
            process.wait(20)
    with suppress(Exception):
        held.result()


@pytest.fixture
def pages() -> Iterator[Callable[[Any], str]]:
    """Serve what pretends to be a peer, and return its address."""
    servers: list[Any] = []

    def serve(app: Any) -> str:
        servers.append(waitress(app))
        return f"http://127.0.0.1:{servers[-1].__enter__()}/status"

    yield serve
    for server in servers:
        server.__exit__(None, None, None)


def answering(status: str, body: str, **headers: str) -> Any:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(status, list(headers.items()))
        return [body.encode()]

    return app


ODD = "what answers is no status page of this version of zpgpool"


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        ("404 Not Found", "", "the server answers 404: is this its address, and may this machine see it?"),
        ("302 Found", "", "the server answers 302"),
        ("200 OK", "<html>", "what answers there is no status page of zpgpool"),
        ("200 OK", "[]", "what answers there is no status page of zpgpool"),
        ("200 OK", '{"pools": []}', ODD),
        ("200 OK", '{"pools": [], "processes": [17]}', ODD),
        ("200 OK", '{"pools": [], "processes": [{"process": 1, "host": "x", "zpgpool": "9", "pools": [{}]}]}', ODD),
        ("200 OK", "[" * 100_000, "what answers there is no status page of zpgpool"),
    ],
)
def test_what_a_peer_may_answer(
    pages: Callable[[Any], str], status: str, body: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zpgpool.monitor.remote.DEADLINE", 20.0)
    url = pages(answering(status, body, Location="http://127.0.0.1:1/"))
    [(number, host, trouble)] = Peers([url]).snapshots()[1]
    assert (number, trouble) == (0, why)
    assert host in url


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_a_peer_that_does_not_speak_http(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zpgpool.monitor.remote.DEADLINE", 20.0)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(answer)

        serving = Call(serve)
        [(_, _, why)] = Peers([f"http://127.0.0.1:{server.getsockname()[1]}/status"]).snapshots()[1]
        serving.result()
    assert why == "what answers there is no status page of zpgpool"


def test_one_that_never_answers_is_not_waited_for_and_asked_once_at_a_time() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        peers = Peers([f"http://127.0.0.1:{silent.getsockname()[1]}/status"])
        start = time.monotonic()
        for _ in range(5):
            [(_, _, why)] = peers.snapshots()[1]
            assert why.startswith("no answer")
        assert is_within(time.monotonic() - start, 3)


def test_no_peer_asks_a_peers_peers(
    pages: Callable[[Any], str], make_pool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zpgpool.monitor.remote.FRESH", 60.0)
    asked: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        asked.append(environ["QUERY_STRING"])
        return answering("200 OK", '{"pools": [], "processes": []}')(environ, start_response)  # type: ignore[no-any-return]

    zpgpool.register_pool(make_pool(), "main")
    status = StatusApp(peers=[pages(app)])
    for _ in range(3):
        assert ask(status, "/json").status == 200
    assert asked == ["own=1"]  # cached
    assert json.loads(ask(status, "/json", QUERY_STRING="own=1").body)["processes"]
    assert asked == ["own=1"]


def test_the_page_draws_those_that_do_not_answer(make_pool: Callable[..., Any]) -> None:
    pool = make_pool()
    zpgpool.register_pool(pool, "main")
    run(conn := pool.getconn(), "SELECT 1")
    pool.putconn(conn)
    page = ask(StatusApp(peers=[f"http://127.0.0.1:{free_port()}/status"])).text
    assert "no answer: " in page


@pytest.mark.parametrize("url", ["app2:8081", "ftp://app2/", "http:///status", f"http://user:{TOKEN}@app2/status"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        StatusApp(peers=[url])
    assert str(caught.value) == "option 'peers': expected the URL of a status page, as http://localhost:8080/status"


def test_top_wants_urls_or_one_folder(tmp_path: Path) -> None:
    assert main(["top", str(tmp_path), str(tmp_path), "--once"]) != 0
