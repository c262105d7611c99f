"""Real WSGI servers, with threads in several processes: each request has its own result, and a 503 is whole.

The pool is used when the application is imported: by the servers that fork after that, in the process that forks.
"""

from __future__ import annotations

import http.client
import os
import pwd
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psycopg2
import pytest
from benchmarks.harness import free_port
from psycopg2.extensions import make_dsn

from conftest import eventually
from conftest import missing
from conftest import open_to_all
from conftest import ROOT
from conftest import run
from serving import end
from zpgpool.demo.server import EmbeddedServer


APP = """
import os
import zpgpool
from zpgpool.wsgi import PoolMiddleware, get_connection

Pool = {"persistent": zpgpool.PersistentConnectionPool, "threaded": zpgpool.ThreadedConnectionPool}[os.environ["KIND"]]
pool = Pool(1, 4, os.environ["DSN"], idle_timeout=600, timeout=20)
with pool.connection() as conn, conn.cursor() as cursor:
    cursor.execute("SELECT 1")

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/late":  # the response is begun before there is a connection
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5"), ("Set-Cookie", "a=b")])
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.002), %s", [path])
        [(_, echo)] = cursor.fetchall()
    if path == "/late":
        return [b"right"]
    if path == "/process":
        echo = str(os.getpid())
    if path == "/rows":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return rows(environ)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(echo)))])
    return [echo.encode()]

def rows(environ):
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT generate_series(1, 2000)")
        for [number] in cursor:
            yield f"{number}\\n".encode()

application = PoolMiddleware(app, pool)
"""

#: The command lines; a `%d` is the port.
SERVERS = {
    "gunicorn": "-m gunicorn --no-control-socket --workers=2 --threads=4 --bind=127.0.0.1:%d shop:application",
    "gunicorn-preload": "-m gunicorn --no-control-socket --preload --workers=2 --threads=4 --bind=127.0.0.1:%d "
    "shop:application",
    "waitress": "-m waitress --listen=127.0.0.1:%d --threads=4 shop:application",
    "cheroot": "-m cheroot --bind=127.0.0.1:%d --threads=4 shop:application",
    "uwsgi": "uwsgi --http=127.0.0.1:%d --master --processes=2 --threads=4 --enable-threads --die-on-term --need-app "
    "--http-timeout=30 --module=shop",
    "mod_wsgi": "",
}

#: How many processes they have, where these are several.
PROCESSES = {"gunicorn": 2, "gunicorn-preload": 2, "uwsgi": 2, "mod_wsgi": 2}

APACHE = """
ServerRoot {folder}
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {folder}/pid
ErrorLog {folder}/log
{user}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
WSGISocketPrefix {folder}/wsgi
"""

#: What docs/howto/modwsgi.rst says of a site.
[SITE] = re.findall(r"code-block:: apache\n\n((?:    .*\n)+)", (ROOT / "docs/howto/modwsgi.rst").read_text())


@pytest.fixture(scope="module", params=["persistent", "threaded"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=SERVERS)
def port(
    request: pytest.FixtureRequest, kind: str, own_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The port of a server that serves `APP`; when it has ended, no session of it is left."""
    name, port = str(request.param), free_port()
    folder = tmp_path_factory.mktemp(name)
    open_to_all(folder)
    for each in ("shop.py", "shop.wsgi"):
        (folder / each).write_text(APP)
    dsn = make_dsn(own_server.dsn, host="127.0.0.1", application_name=f"{name}-{kind}")
    if name == "mod_wsgi":
        home: Path = request.getfixturevalue("system_python")
        command = apache(folder, port, home)
    else:
        program, *options = (SERVERS[name] % port).split()
        command = [sys.executable, program] if program == "-m" else [str(Path(sys.executable).parent / program)]
        command += options
    with (folder / "output").open("w") as output:
        environ = {**os.environ, "DSN": dsn, "KIND": kind, "PYTHONPATH": str(folder)}
        server = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=output)

    def is_up() -> bool:
        assert server.poll() is None, (folder / "output").read_text()
        try:
            # Not for long: uWSGI takes a request before it has a process for it, and may lose that.
            status, _, body = ask(port, "/up", 2)
        except OSError:
            return False
        assert status == 200, body
        return True

    processes: set[str] = set()

    def are_all_up() -> bool:
        """Whether each process has made its pool, which none can while PostgreSQL is stopped."""
        with ThreadPoolExecutor(8) as clients, suppress(OSError):
            processes.update(body for _, _, body in clients.map(lambda _: ask(port, "/process", 2), range(8)))
        return len(processes) >= PROCESSES.get(name, 1)

    try:
        eventually(is_up, 60)
        eventually(are_all_up, 60)
        if name == "uwsgi":  # else a worker may wait for ever for a thread that only the master has
            assert len(os.listdir(f"/proc/{server.pid}/task")) == 1
        yield port
    finally:
        end(server)
    eventually(lambda: sessions(own_server, f"{name}-{kind}") == 0)


def apache(folder: Path, port: int, home: Path) -> list[str]:
    modules = Path("/usr/lib/apache2/modules")
    program = shutil.which("apache2", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or not (modules / "mod_wsgi.so").exists():
        missing("mod_wsgi", "apt-get install apache2 libapache2-mod-wsgi-py3")
    owner = pwd.getpwuid(os.geteuid()).pw_name
    user = "User www-data\nGroup www-data" if owner == "root" else ""
    config = APACHE.format(folder=folder, port=port, modules=modules, user=user)
    config += SITE.replace("/srv/shop/venv", str(home)).replace("/srv/shop", str(folder))
    (folder / "apache.conf").write_text(config)
    return [program, "-f", str(folder / "apache.conf"), "-D", "FOREGROUND"]


@pytest.fixture(scope="session")
def system_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel, of the Python that Debian's mod_wsgi has."""
    home = tmp_path_factory.mktemp("python") / "home"
    open_to_all(home.parent)
    if subprocess.run(["/usr/bin/python3", "-c", "import venv, ensurepip"], capture_output=True).returncode:
        missing("Debian's Python with venv", "apt-get install python3-venv")
    subprocess.run(["/usr/bin/python3", "-m", "venv", home], check=True)
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True)
    return home


def ask(port: int, path: str, timeout: float = 30) -> tuple[int, list[tuple[str, str]], str]:
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        conn.request("GET", path)
        answer = conn.getresponse()
        return answer.status, answer.getheaders(), answer.read().decode()
    finally:
        conn.close()


def sessions(server: EmbeddedServer, application_name: str) -> int:
    conn = psycopg2.connect(server.dsn)
    try:
        return int(run(conn, "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", application_name))
    finally:
        conn.close()


pytestmark = pytest.mark.slow  # a dozen servers, and one has Apache's environment installed


def test_each_request_has_its_own_result(port: int) -> None:
    def work(client: int) -> list[tuple[int, str, str]]:
        paths = [f"/{client}/{number}" for number in range(50)]
        return [(answer[0], path, answer[2]) for path in paths if (answer := ask(port, path))]

    with ThreadPoolExecutor(8) as clients:
        answers = [answer for each in clients.map(work, range(8)) for answer in each]
    assert len(answers) == 400
    assert [answer for answer in answers if answer[0] != 200 or answer[1] != answer[2]] == []


def test_a_stream_has_all_its_rows(port: int) -> None:
    status, _, body = ask(port, "/rows")
    assert status == 200
    assert body.split() == [str(number) for number in range(1, 2001)]


def test_a_503_takes_the_place_of_what_was_begun(port: int, own_server: EmbeddedServer) -> None:
    own_server.halt()
    try:
        status, headers, body = ask(port, "/late")
    finally:
        own_server.launch()
    assert status == 503
    named = [name.lower() for name, _ in headers]
    assert "set-cookie" not in named
    assert named.count("content-length") == 1
    assert dict(headers)["Retry-After"] == "5"
    assert body.startswith("The database is not available just now.")
    refused = time.monotonic()

    def is_well() -> bool:
        """Whether none has been refused for two seconds: each process pauses for itself after an outage."""
        nonlocal refused
        status, _, body = ask(port, "/late")
        assert (status, body) == (200, "right") or status == 503
        refused = refused if status == 200 else time.monotonic()
        return time.monotonic() > refused + 2

    eventually(is_well, 30)


# Greenlets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patcher", ["gevent", "eventlet"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_greenlets_in_the_place_of_threads_are_refused(dsn: str, patcher: str, when: str) -> None:
    patch = {
        "gevent": "from gevent.monkey import patch_all as patch",
        "eventlet": "from eventlet import monkey_patch as patch",
    }
    text = f"""
        import sys
        {patch[patcher]}
        if sys.argv[2] == "before":
            patch()
        import zpgpool
        pool = zpgpool.PersistentConnectionPool(0, 2, sys.argv[1])
        patch()
        pool.getconn()
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), dsn, when]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"zpgpool.PoolError: {patcher} has put greenlets in the place of threads"), result.stderr


PYWSGI = """
import os, sys, gevent
from gevent.pywsgi import WSGIServer
import zpgpool
from zpgpool.wsgi import PoolMiddleware, get_connection

Pool = {"persistent": zpgpool.PersistentConnectionPool, "threaded": zpgpool.ThreadedConnectionPool}[os.environ["KIND"]]
pool = Pool(0, 8, os.environ["DSN"], idle_timeout=60)

def app(environ, start_response):
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id()::text")
        [[number]] = cursor.fetchall()
        gevent.sleep(0.05)  # others run in this thread meanwhile
        cursor.execute("SELECT pg_current_xact_id()::text")
        [[again]] = cursor.fetchall()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{number} {again}".encode()]

WSGIServer(("127.0.0.1", int(sys.argv[1])), PoolMiddleware(app, pool), log=None).serve_forever()
"""


@pytest.mark.parametrize("kind", ["persistent", "threaded"])
def test_greenlets_of_one_thread_never_share_a_transaction(dsn: str, tmp_path: Path, kind: str) -> None:
    port = free_port()
    (tmp_path / "site.py").write_text(PYWSGI)
    environ = {**os.environ, "DSN": dsn, "KIND": kind}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, tmp_path / "site.py", str(port)], env=environ, stderr=log)

    def is_up() -> bool:
        try:
            return ask(port, "/")[0] == 200
        except OSError:
            return False

    try:
        eventually(is_up, 30)
        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda number: ask(port, f"/{number}"), range(60)))
    finally:
        end(server)
    good = [body.split() for status, _, body in answers if status == 200]
    assert good
    assert [each for each in good if each[0] != each[1]] == []
    assert len({number for number, _ in good}) == len(good)
    if kind == "threaded":
        assert len(good) == len(answers)
    else:
        assert "use a 'threaded' pool with this server" in (tmp_path / "log").read_text()


# Two applications of Pyramid ------------------------------------------------------------------------------------------


MOUNTED = """
import os
from pyramid.config import Configurator
from pyramid.response import Response

def insert(conn, path):
    with conn.cursor() as cursor:
        cursor.execute("INSERT INTO rows VALUES (%s)", [path])
    conn.commit()

def view(request):
    def body():
        insert(request.pgconn, request.path)
        yield b"done"
    return Response(app_iter=body() if "stream" in request.path else list(body()))

def call_inner(request):
    insert(request.pgconn, request.path)
    return request.get_response(inner)

def make(schema, view):
    settings = {"dsn": "ENV:DSN", "pool": os.environ["KIND"], "maxconn": "4", "timeout": "20"}
    settings["options"] = f"-c search_path={schema}"
    with Configurator(settings={f"zpgpool.{name}": value for name, value in settings.items()}) as config:
        config.include("zpgpool")
        config.add_route("all", "/*path")
        config.add_view(view, route_name="all")
    return config.make_wsgi_app()

inner = make("inside", view)
application = make("outside", call_inner)
"""


@pytest.mark.parametrize("name", ["gunicorn", "waitress"])
def test_two_applications_of_one_process_write_into_their_own(
    own_server: EmbeddedServer, tmp_path: Path, kind: str, name: str
) -> None:
    """The same name of the pool, and the same environ; the inner one's body is a list, or is streamed."""
    schemas = ("inside", "outside")
    admin = psycopg2.connect(own_server.dsn)
    admin.autocommit = True
    for schema in schemas:
        run(
            admin,
            f"DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; CREATE TABLE {schema}.rows (path text)",
        )
    (tmp_path / "shop.py").write_text(MOUNTED)
    port = free_port()
    program, *options = (SERVERS[name] % port).split()
    with (tmp_path / "output").open("w") as output:
        environ = {**os.environ, "DSN": own_server.dsn, "KIND": kind, "PYTHONPATH": str(tmp_path)}
        server = subprocess.Popen([sys.executable, program, *options], cwd=tmp_path, env=environ, stderr=output)

    def is_up() -> bool:
        assert server.poll() is None, (tmp_path / "output").read_text()
        try:
            return ask(port, "/up")[0] == 200
        except OSError:
            return False

    paths = [f"/{way}/{number}" for number in range(100) for way in ("list", "stream")]
    try:
        eventually(is_up, 60)
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda path: ask(port, path), paths))
    finally:
        end(server)
    assert {answer[0] for answer in answers} == {200}
    for schema in schemas:
        found = run(admin, f"SELECT array_agg(path ORDER BY path) FROM {schema}.rows WHERE path <> '/up'")
        assert found == sorted(paths)
    admin.close()
