"""The files of docs/deploy are run as they are, with other ports and folders."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from benchmarks.harness import free_port

from bouncer import deployed
from bouncer import PgBouncer
from conftest import Call
from conftest import eventually
from conftest import missing
from conftest import open_to_all
from conftest import Outside
from serving import end
from zpgpool.demo.server import EmbeddedServer


BIN = Path(sys.executable).parent

#: The reader's site.
SHOP = """
import os
from pyramid.config import Configurator
from pyramid.response import Response

def alive(request):
    return Response("alive")

def where(request):
    with request.pgconn.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return Response(f"{os.getpid()} {cursor.fetchone()[0]}")

def main(global_conf, **settings):
    config = Configurator(settings=settings)
    config.add_route("alive", "/alive")
    config.add_view(alive, route_name="alive")
    config.add_route("where", "/")
    config.add_view(where, route_name="where")
    return config.make_wsgi_app()
"""


#: The same with Flask.
FLASK_SHOP = """
import os
from flask import Flask
from zpgpool.flask import get_connection, init_app

def create_app():
    app = Flask(__name__)
    app.config["ZPGPOOL"] = {"dsn": "ENV:APP_DSN", "maxconn": 8}
    init_app(app)

    @app.get("/")
    def where():
        with get_connection().cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return f"{os.getpid()} {cursor.fetchone()[0]}"

    return app
"""


class Site:
    """A folder as /srv/shop is, and what is started there."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        (folder / "shop.py").write_text(SHOP)
        (folder / "flask_shop.py").write_text(FLASK_SHOP)
        (folder / "production.ini").write_text(deployed("production.ini"))
        self.environ = os.environ | {"APP_DSN": dsn, "PYTHONPATH": str(folder)}

    @contextmanager
    def running(self, command: list[str], port: int, path: str = "/", how: signal.Signals = signal.SIGINT) -> Any:
        """Run a server, and give it once it answers."""
        log = self.folder / f"{port}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environ, stdout=stream, stderr=stream)
        try:
            eventually(lambda: process.poll() is not None or answers(port, path), 60)
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            end(process, how)


def fetch(port: int, path: str = "/") -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as conn:
        conn.request("GET", path)
        response = conn.getresponse()
        return response.status, response.read().decode()


def answers(port: int, path: str) -> bool:
    with suppress(OSError, http.client.HTTPException):
        return fetch(port, path)[0] == 200
    return False


@pytest.fixture
def site(tmp_path: Path, dsn: str) -> Site:
    return Site(tmp_path, dsn)


def unit(name: str = "shop@.service") -> dict[str, str]:
    """Return the settings of a systemd unit."""
    lines = (line.partition("=") for line in deployed(name).splitlines() if re.match(r"\w+=", line))
    return {key: value for key, _, value in lines}


def exec_start(port: int) -> list[str]:
    """Return what the unit starts for a port."""
    program, *args = unit()["ExecStart"].split()
    return [sys.executable, str(BIN / Path(program).name), *(arg.replace("%i", str(port)) for arg in args)]


def test_pyramid(site: Site, outside: Outside) -> None:
    port = free_port()
    with site.running(exec_start(port), port):
        assert fetch(port)[0] == 200
        [(options,)] = outside.query(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", outside.application_name
        )
        assert options in (1, 2)  # a first connect that takes more than a second has company
    assert "ERROR" not in (site.folder / f"{port}.log").read_text()


@pytest.mark.parametrize("named", [["--paste", "production.ini"], ["flask_shop:create_app()"]], ids=["paste", "flask"])
def test_gunicorn(site: Site, named: list[str]) -> None:
    port = free_port()
    (site.folder / "gunicorn.conf.py").write_text(deployed("gunicorn.conf.py", bind=f'"127.0.0.1:{port}"'))
    command = [sys.executable, "-m", "gunicorn", *named, "--no-control-socket"]
    with site.running(command, port, how=signal.SIGTERM):
        pids = set()

        def both_answered() -> bool:
            status, text = fetch(port)
            assert status == 200
            pids.add(text.split()[0])
            return len(pids) == 2

        eventually(both_answered, 20)
    settings: dict[str, Any] = {}
    exec(deployed("gunicorn.conf.py"), settings)
    assert re.search(rf"^zpgpool.maxconn = {settings['threads']}$", deployed("production.ini"), re.MULTILINE)


def test_zope(site: Site, outside: Outside) -> None:
    port = free_port()
    instance = site.folder / "instance"
    command = [sys.executable, str(BIN / "mkwsgiinstance"), "-d", str(instance), "-u", "admin:admin"]
    subprocess.run(command, check=True, capture_output=True, env=site.environ)
    (instance / "etc" / "zope.ini").write_text(deployed("zope.ini"))
    command = [sys.executable, str(BIN / "runwsgi"), str(instance / "etc" / "zope.ini"), f"http_port={port}"]
    with site.running(command, port):
        assert fetch(port)[0] == 200
        status, text = fetch(port, "/status/json")
        assert status == 200
        assert '"name": "main"' in text
        assert '"max": 4' in text


def test_the_unit(tmp_path: Path) -> None:
    """As systemd reads it; that it starts is shown by the others."""
    settings = unit()
    assert settings["KillSignal"] == "SIGINT"  # what waitress ends by in order
    program = shutil.which("systemd-analyze")
    if program is None:
        missing("systemd-analyze", "apt-get install systemd")
    text = deployed("shop@.service").replace("/srv/shop/bin/pserve", sys.executable).replace("User=shop", "User=root")
    path = tmp_path / "shop@8081.service"
    path.write_text(text)
    result = subprocess.run([program, "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60)
    assert "shop@8081" not in result.stderr, result.stderr
    assert result.returncode == 0, result.stderr


class HAProxy:
    """Debian's, before two processes."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            missing("HAProxy", "apt-get install haproxy")
        self.port = free_port()
        self.socket = folder / "admin.sock"
        text = deployed("haproxy.cfg").replace("bind 127.0.0.1:80", f"bind 127.0.0.1:{self.port}")
        for own, port in zip(("8081", "8082"), ports, strict=True):
            assert text.count(f"127.0.0.1:{own}") == 1
            text = text.replace(f"127.0.0.1:{own}", f"127.0.0.1:{port}")
        path = folder / "haproxy.cfg"
        path.write_text(f"global\n    stats socket {self.socket} mode 600 level admin\n\n{text}")
        subprocess.run([program, "-c", "-f", str(path)], check=True, capture_output=True)
        self.command = [program, "-db", "-f", str(path)]


@contextmanager
def restarting(start: Callable[[], subprocess.Popen[bytes]], pid_file: Path) -> Iterator[None]:
    """Start a process again whenever it has ended, as systemd does."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            process = start()
            pid_file.write_text(str(process.pid))
            while process.poll() is None and not is_over.wait(0.02):
                pass
            process.send_signal(signal.SIGINT)
            process.wait(20)

    supervisor = Call(run)
    try:
        yield
    finally:
        is_over.set()
        supervisor.result(30)


@pytest.fixture
def fleet(site: Site) -> Iterator[tuple[Site, HAProxy, list[int]]]:
    """Two processes, as the unit starts them, behind HAProxy."""
    ports = [free_port(), free_port()]
    haproxy = HAProxy(site.folder, ports)
    log = (site.folder / "fleet.log").open("ab")

    def start(port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(exec_start(port), cwd=site.folder, env=site.environ, stdout=log, stderr=log)

    with (
        restarting(lambda: start(ports[0]), site.folder / f"{ports[0]}.pid"),
        restarting(lambda: start(ports[1]), site.folder / f"{ports[1]}.pid"),
    ):
        for port in ports:
            eventually(lambda: answers(port, "/"), 60)  # noqa: B023
        with site.running(haproxy.command, haproxy.port, how=signal.SIGTERM):
            yield site, haproxy, ports
    log.close()


@pytest.mark.slow
def test_a_rolling_restart_fails_no_request(fleet: tuple[Site, HAProxy, list[int]], outside: Outside) -> None:
    site, haproxy, _ = fleet
    is_over = threading.Event()
    seen: list[tuple[int, str]] = []

    def visit() -> None:
        while not is_over.is_set():
            seen.append(fetch(haproxy.port))

    assert fetch(haproxy.port, "/status")[0] == 403
    visitors = [Call(visit) for _ in range(4)]
    eventually(lambda: len(seen) > 50)
    before = {pid for _, text in seen for pid in text.split()[:1]}
    # As `systemctl restart` does, it returns when the old process has gone.
    command = f"old=$(cat {site.folder}/{{port}}.pid); kill -INT $old; while kill -0 $old; do sleep 0.05; done"
    script = [sys.executable, "rolling_restart.py", str(haproxy.socket), "shop", command]
    (site.folder / "rolling_restart.py").write_text(deployed("rolling_restart.py"))
    result = subprocess.run(script, cwd=site.folder, capture_output=True, text=True, timeout=100)
    count = len(seen)
    eventually(lambda: len(seen) > count + 50)
    is_over.set()
    for visitor in visitors:
        visitor.result(30)
    assert result.returncode == 0, result.stderr
    assert {status for status, _ in seen} == {200}
    after = {text.split()[0] for _, text in seen[count:]}
    assert len(before) == len(after) == 2
    assert not before & after
    assert len(outside.backends()) <= 16


def test_through_pgbouncer(own_server: EmbeddedServer, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    bouncer = PgBouncer(tmp_path, own_server, "transaction")
    folder = tmp_path / "site"
    folder.mkdir()
    site = Site(folder, bouncer.dsn)
    ini = site.folder / "production.ini"
    ini.write_text(ini.read_text().replace("\nzpgpool.", "\nzpgpool.pooler = pgbouncer-transaction\nzpgpool.", 1))
    try:
        port = free_port()
        with site.running(exec_start(port), port):
            assert fetch(port)[0] == 200
    finally:
        bouncer.stop()


def test_every_file_is_on_the_page() -> None:
    folder = Path(__file__).parent.parent / "docs"
    page = (folder / "deploy.rst").read_text()
    names = {path.name for path in (folder / "deploy").iterdir() if path.is_file()}
    assert names == set(re.findall(r"literalinclude:: deploy/(\S+)", page))
