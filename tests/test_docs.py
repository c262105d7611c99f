"""What README.rst and docs/ show is run, block by block, on the real server; what the code has is on a page.

A comment before a block says how it is run: `.. file: NAME` saves it, `.. serve: COMMAND` starts a server first, which
must answer, `.. serve` says that the block's own command is one, `.. fresh` forgets the blocks before,
`.. not run: REASON` leaves it out, `.. walk only: REASON` leaves it to tests/test_walks.py.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import gc
import html
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import transaction
from benchmarks.harness import free_port
from readme_renderer import rst
from zope.component import getGlobalSiteManager
from zope.interface.interface import InterfaceClass

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import made_once
from conftest import missing
from conftest import NO_PSYCOPG_3
from conftest import Outside
from conftest import ROOT
from zpgpool import interfaces
from zpgpool import metrics
from zpgpool import paste
from zpgpool import pyramid
from zpgpool.__main__ import main
from zpgpool.core import base
from zpgpool.demo.server import EmbeddedServer
from zpgpool.interfaces import IConnectionPool
from zpgpool.monitor import history
from zpgpool.settings import TABLE


DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "zpgpool"

PAGES = {
    str(path.relative_to(ROOT)): path for path in [ROOT / "README.rst", *DOCS.glob("*.rst"), *DOCS.glob("howto/*.rst")]
}

#: What is run, and what is shown only.
RUN = {"python", "ini", "xml", "console", "sql"}
SHOWN = {"apache", "nginx", "text", "yaml"}

#: How many blocks of the former cannot be run. Think twice before you add one.
NOT_RUN = 7

TABLES = """
DROP TABLE IF EXISTS accounts, keys, orders;
CREATE TABLE accounts (name text PRIMARY KEY, balance int);
INSERT INTO accounts VALUES ('a', 30), ('b', 12);
CREATE TABLE keys (key text);
CREATE TABLE orders (id int PRIMARY KEY, paid bool, at timestamptz);
"""

#: The reader's own application, where a page speaks of one.
YOUR_APP = """
from zpgpool.wsgi import get_connection

def app(environ, start_response):
    name = "main" if "zpgpool.lease.main" in environ else ""
    with get_connection(environ, name).cursor() as cursor:
        cursor.execute("SELECT 41 + 1")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(cursor.fetchone()[0]).encode()]

def app_factory(global_conf):
    return app
"""


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A block of code on a page, with the comments before it."""

    path: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    blocks: list[Block] = []
    marks: dict[str, str] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if mark := re.match(r"\s*\.\. (file|serve|fresh|not run|repeat|walk only)(?:: (.*))?$", line):
            marks[mark[1]] = mark[2] or ""
        elif found := re.match(r"( *)\.\. code-block:: (\w+)$", line):
            body = []
            for each in lines[number:]:
                if each.strip() and len(each) - len(each.lstrip()) <= len(found[1]):
                    break
                body.append(each)
            text = textwrap.dedent("\n".join(body)).strip("\n") + "\n"
            blocks.append(Block(path, number + 1, found[2], text, marks))
            marks = {}
    return blocks


BLOCKS = {name: read_blocks(path) for name, path in PAGES.items()}
ALL = [block for blocks in BLOCKS.values() for block in blocks]


def test_every_block_is_of_a_known_language() -> None:
    assert not [str(block) for block in ALL if block.language not in RUN | SHOWN]


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    left_out = [block for block in ALL if "not run" in block.marks and block.language in RUN]
    assert [str(block) for block in left_out if not block.marks["not run"]] == []
    assert len(left_out) == NOT_RUN, [str(block) for block in left_out]


# Running -------------------------------------------------------------------------------------------------------------


class Desk:
    """A reader's folder and shell, for one page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = str(free_port())
        self.names: dict[str, Any] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._served: tuple[str, str] | None = None

    def do(self, block: Block) -> None:
        """Run a block."""
        text = block.text.replace("8080", self.port)
        if "fresh" in block.marks:
            self.names = {}
        if name := block.marks.get("file"):
            (self.folder / name).write_text(text)
        if command := block.marks.get("serve"):
            self.serve(command.replace("8080", self.port))
        if "serve" in block.marks and not command:
            [(command, expected)] = commands(text)
            self.serve(command, expected)
        elif block.language in RUN and "not run" not in block.marks:
            getattr(self, f"do_{block.language}")(block, text)

    def do_python(self, block: Block, text: str) -> None:
        code = compile("\n" * (block.line - 1) + text, str(block.path), "exec", dont_inherit=True)
        if not block.marks.get("file", "").endswith(".py"):  # a .py is somebody else's to run
            self.names.setdefault("__name__", "__main__")
            exec(code, self.names)

    def do_sql(self, block: Block, text: str) -> None:
        with closing(psycopg2.connect(os.environ["APP_DSN"])) as conn, conn.cursor() as cursor:
            cursor.execute(text)

    def do_xml(self, block: Block, text: str) -> None:
        xmlconfig: Any = import_module("zope.configuration.xmlconfig")
        xmlconfig.string(text)

    def do_ini(self, block: Block, text: str) -> None:
        config = configparser.RawConfigParser()
        if not text.startswith("["):
            config.read_string(f"[settings]\n{text}")
            return self._make_pyramid(dict(config["settings"]))
        config.read_string(text)
        deploy: Any = import_module("paste.deploy")
        path = self.folder / "block.ini"
        path.write_text(text)
        before = {name for name, _ in getGlobalSiteManager().getUtilitiesFor(IConnectionPool)}
        if _is_whole(config):
            app = deploy.loadapp(f"config:{path}")
            if "yourapp" in text:
                environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SERVER_NAME": "x", "SERVER_PORT": "80"}
                environ |= {"wsgi.url_scheme": "http", "SCRIPT_NAME": ""}
                assert list(app(environ, lambda status, headers: None)) == [b"42"]
        else:
            for section in config.sections():
                if section.startswith("filter:"):
                    deploy.loadfilter(f"config:{path}", name=section.removeprefix("filter:"))(object())
        for name, pool in list(getGlobalSiteManager().getUtilitiesFor(IConnectionPool)):
            if name not in before:
                zpgpool.unregister_pool(name)
                pool.close(0)
        return None

    def _make_pyramid(self, settings: dict[str, str]) -> None:
        configurator: Any = import_module("pyramid.config").Configurator(settings=settings)
        if "pyramid.includes" not in settings:
            configurator.include("zpgpool")
        configurator.make_wsgi_app()

    def do_console(self, block: Block, text: str) -> None:
        for command, expected in commands(text):
            for tries in range(5 if "repeat" in block.marks else 1):
                if tries and self._served:
                    self.serve(*self._served)  # what it has counted begins at nothing again
                result = subprocess.run(
                    ["bash", "-c", command],
                    cwd=self.folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=1200,
                )
                got = result.stdout.decode()
                if matches(expected, got):
                    break
            if expected:
                assert matches(expected, got), f"{block}: {command}\n{got}"
            else:
                assert result.returncode == 0, f"{block}: {command}\n{got}"

    def serve(self, command: str, expected: str = "...") -> None:
        """Start a server in the background, instead of the one before, and wait until it answers."""
        self.stop()
        self._served = command, expected
        if "zpgpool demo" in command and "--port" not in command:
            command += f" --port {self.port}"
        path = self.folder / "server.log"
        with path.open("wb") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", command], cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        server = self._server

        def has_answered() -> bool:
            assert server.poll() is None, path.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=10) as answer:
                    return bool(answer.status == 200)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code != 503:  # as is said where a first connect takes long
                    raise
                return False
            except OSError:
                return False

        eventually(has_answered, 60)
        # On a busy machine waitress says that requests wait for a thread.
        said = "".join(line for line in path.read_text().splitlines(True) if "Task queue depth is" not in line)
        assert matches(expected, said), said

    def stop(self) -> None:
        """Stop the server, if there is one."""
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGTERM)
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:  # a worker of gunicorn that was just beginning has missed it
                os.killpg(self._server.pid, signal.SIGKILL)
                self._server.wait(10)
            self._server = None


def commands(text: str) -> list[tuple[str, str]]:
    """Return the commands of a console's block, each with what it prints."""
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)


def matches(expected: str, got: str) -> bool:
    """Whether a command has printed what the page says, where `...` stands for anything."""
    parts = re.split(r"\s*\.\.\.\s*", " ".join(expected.split()))
    return bool(re.fullmatch(".*?".join(re.escape(part) for part in parts), " ".join(got.split()), re.DOTALL))


def _is_whole(config: configparser.RawConfigParser) -> bool:
    """Whether all parts of the main pipeline stand in the same file."""
    known = {section.partition(":")[2] for section in config.sections()}
    parts = config.get("pipeline:main", "pipeline", fallback="").split()
    return "main" in known and known.issuperset(parts)


@pytest.fixture
def desk(tmp_path: Path, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with closing(psycopg2.connect(own_server.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(TABLES)
        conn.commit()
    (tmp_path / "yourapp.py").write_text(YOUR_APP)
    (tmp_path / "psycopg.py").write_text(NO_PSYCOPG_3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("APP_DSN", own_server.dsn)
    monkeypatch.setenv("ZPGPOOL_DEMO_DSN", own_server.dsn)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the demo keeps its data
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    modules, pools, exporters = set(sys.modules), set(base._pools), list(history._exporters)
    desk = Desk(tmp_path)
    yield desk
    desk.stop()
    transaction.abort()
    history._exporters[:] = exporters
    for pool in set(base._pools) - pools:
        pool.close(0)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    desk.names.clear()
    gc.collect()


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks and "moving" not in name])
def test_a_page_does_what_it_says(name: str, desk: Desk) -> None:
    for block in BLOCKS[name]:
        if "walk only" not in block.marks:
            desk.do(block)
    if name in AFTERWARDS:
        AFTERWARDS[name](desk)


def after_pyramid(desk: Desk) -> None:
    """The page's view, with the page's settings: it commits."""
    text = next(block.text for block in BLOCKS["docs/pyramid.rst"] if block.language == "ini")
    config = configparser.RawConfigParser()
    config.read_string(f"[settings]\n{text}")
    configurator: Any = import_module("pyramid.config").Configurator(settings=dict(config["settings"]))
    configurator.add_route("store", "/store/{key}")
    configurator.add_view(desk.names["store"], route_name="store")
    app: Any = import_module("webtest").TestApp(configurator.make_wsgi_app())
    assert app.get("/store/x").text == "stored"
    with closing(psycopg2.connect(os.environ["APP_DSN"])) as conn, conn.cursor() as cursor:
        cursor.execute("DELETE FROM keys RETURNING key")
        assert cursor.fetchall() == [("x",)]
        conn.commit()


AFTERWARDS: dict[str, Callable[[Desk], None]] = {"docs/pyramid.rst": after_pyramid}


@pytest.mark.parametrize("page", ["docs/moving.rst", "docs/moving-others.rst"])
def test_moving_gives_the_same_before_and_after(page: str, desk: Desk) -> None:
    """Each pair of pools, under eight threads that ask one after the other and at the same time."""
    for block in BLOCKS[page]:
        module = {"psycopg2_pool": "psycopg2-pool", "dbutils": "DBUtils", "sqlalchemy": "SQLAlchemy"}
        for name, package in module.items():
            if name in block.text and not _is_there(name):
                missing(package, f"pip install {package}")
        desk.do(block)
        if "def total" not in block.text:
            continue
        total = desk.names["total"]
        assert total() == 42
        assert [Call(total).result() for _ in range(4)] == [42] * 4
        calls = [Call(total) for _ in range(8)]
        assert [call.result() for call in calls] == [42] * 8


def _is_there(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


# What others do ------------------------------------------------------------------------------------------------------


class Peer:
    """A pool of at most four connections, as its own documentation has it."""

    name = ""

    def __init__(self, dsn: str) -> None:
        raise NotImplementedError

    def get(self) -> Any:
        return self.pool.getconn()

    def put(self, conn: Any) -> None:
        self.pool.putconn(conn)

    def close(self) -> None:
        self.pool.closeall()

    pool: Any
    dsn: str


class Ours(Peer):
    name = "zpgpool"

    def __init__(self, dsn: str) -> None:
        self.pool = zpgpool.ThreadedConnectionPool(0, 4, dsn, idle_timeout=60, timeout=20)


class Psycopg2(Peer):
    name = "psycopg2.pool"

    def __init__(self, dsn: str) -> None:
        self.pool = import_module("psycopg2.pool").ThreadedConnectionPool(4, 4, dsn)


class Psycopg2Pool(Peer):
    name = "psycopg2-pool"

    def __init__(self, dsn: str) -> None:
        self.pool = import_module("psycopg2_pool").ThreadSafeConnectionPool(minconn=1, maxconn=4, dsn=dsn)

    def close(self) -> None:
        self.pool.clear()


class DBUtils(Peer):
    name = "DBUtils"

    def __init__(self, dsn: str) -> None:
        module = import_module("dbutils.pooled_db")
        self.pool = module.PooledDB(psycopg2, maxconnections=4, blocking=True, dsn=dsn)

    def get(self) -> Any:
        return self.pool.connection()

    def put(self, conn: Any) -> None:
        conn.close()

    def close(self) -> None:
        self.pool.close()


class SQLAlchemy(Peer):
    name = "SQLAlchemy"

    def __init__(self, dsn: str) -> None:
        module = import_module("sqlalchemy.pool")
        self.pool = module.QueuePool(lambda: psycopg2.connect(dsn), pool_size=4, max_overflow=0, timeout=1)

    def get(self) -> Any:
        return self.pool.connect()

    def put(self, conn: Any) -> None:
        conn.close()

    def close(self) -> None:
        self.pool.dispose()


PEERS: list[type[Peer]] = [Ours, Psycopg2, Psycopg2Pool, DBUtils, SQLAlchemy]


def _first(conn: Any, sql: str = "SELECT pg_backend_pid()") -> Any:
    cursor = conn.cursor()
    cursor.execute(sql)
    return cursor.fetchone()[0]


def _ask(peer: Peer, sql: str = "SELECT pg_backend_pid()") -> Any:
    conn = peer.get()
    try:
        return _first(conn, sql)
    finally:
        peer.put(conn)


def ended(peer: Peer, outside: Outside) -> str:
    """The backends of four idle connections are ended; then four users come."""
    conns = [peer.get() for _ in range(4)]
    for conn in conns:
        peer.put(conn)
    del conn, conns
    outside.terminate()
    failed, conns = 0, []
    for _ in range(4):
        conns.append(conn := peer.get())
        try:
            conn.cursor().execute("SELECT 1")
        except psycopg2.Error:
            failed += 1
    for conn in conns:
        try:
            peer.put(conn)
        except psycopg2.Error:
            pass
    return f"{failed} errors" if failed else "no error"


def inherited(peer: Peer, outside: Outside) -> str:
    """A user leaves ``autocommit`` on; the next one does not commit."""
    conn = peer.get()
    raw = getattr(conn, "_con", conn)
    raw = getattr(raw, "dbapi_connection", getattr(raw, "_con", raw))
    raw.autocommit = True
    peer.put(conn)
    del conn, raw
    pid = _ask(peer, "INSERT INTO beside_docs VALUES (1) RETURNING 1") and 1
    stored = bool(pid and outside.query("SELECT 1 FROM beside_docs"))
    return "stored all the same" if stored else "not stored"


def threads_end(peer: Peer, outside: Outside) -> str:
    """Four threads end without returning their connections; a user comes."""
    kept: list[Any] = []  # as a reference somewhere in an application does

    def take() -> None:
        conn = peer.get()
        kept.append(conn)

    for _ in range(4):
        Call(take).result()
    kept.clear()
    gc.collect()
    try:
        _ask(peer)
    except Exception:
        return "error"
    return "served"


def waiting(peer: Peer, outside: Outside) -> str:
    """All four are in use, one more user comes, and one is returned."""
    conns = [peer.get() for _ in range(4)]
    known = {_first(conn) for conn in conns}
    timer = threading.Timer(0.2, lambda: peer.put(conns.pop()))
    timer.start()
    try:
        conns.append(peer.get())
        is_new = _first(conns[-1]) not in known
    except Exception:
        return "error at once"
    finally:
        timer.join()
        for conn in conns:
            peer.put(conn)
    return "gets a fifth" if is_new else "waits"


FORK = """
import os, sys
sys.path[:0] = [{tests!r}]
import test_docs
peer = test_docs.{peer}(sys.argv[1])
ours = test_docs._ask(peer)
if (child := os.fork()) == 0:
    print("the parent's" if test_docs._ask(peer) == ours else "its own", flush=True)
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def forked(peer: Peer, outside: Outside) -> str:
    """The process forks; the child's connection is."""
    script = FORK.format(tests=str(Path(__file__).parent), peer=type(peer).__name__)
    result = subprocess.run([sys.executable, "-c", script, peer.dsn], capture_output=True, text=True, timeout=60)
    assert result.stdout, result.stderr
    return result.stdout.strip()


SCENARIOS: list[Callable[[Peer, Any], str]] = [ended, inherited, threads_end, waiting, forked]


@pytest.mark.slow
def test_the_readme_says_what_others_do(dsn: str, outside: Any) -> None:
    for module, package in (("psycopg2_pool", "psycopg2-pool"), ("dbutils", "DBUtils"), ("sqlalchemy", "SQLAlchemy")):
        if not _is_there(module):
            missing(package, f"pip install {package}")
    rows = [["", *(make.name for make in PEERS)]]
    for scenario in SCENARIOS:
        row = [(scenario.__doc__ or "").rstrip(".")]
        for make in PEERS:
            outside.query("DROP TABLE IF EXISTS beside_docs; CREATE TABLE beside_docs (id int)")
            peer = make(dsn)
            peer.dsn = dsn
            try:
                row.append(scenario(peer, outside))
            finally:
                peer.close()
                del peer
                gc.collect()
        rows.append(row)
    outside.query("DROP TABLE beside_docs")
    table = "\n".join("   " + ", ".join(f'"{cell}"' for cell in row) for row in rows)
    assert table in (ROOT / "README.rst").read_text(), f"\n{table}"


# What is on a page ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The built pages, as HTML. Every link within resolves, or Sphinx warns, and fails."""
    if not (_is_there("sphinx") and _is_there("furo") and _is_there("repoze.sphinx.autointerface")):
        missing("Sphinx", "pip install 'zpgpool[docs]'")

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html"]
        result = subprocess.run([*command, str(DOCS), str(folder)], capture_output=True, text=True, timeout=1800)
        assert result.returncode == 0, result.stderr

    folder = made_once(tmp_path_factory, "html", make)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def nothing_is_missing(names: list[str]) -> None:
    assert not names, "no page has:\n" + "\n".join(names)


def test_every_setting_is_on_its_page(built: dict[str, str]) -> None:
    text = text_of(built["settings.html"]) + text_of(built["status.html"])
    names = {*TABLE, *paste.FILTER_OPTIONS, *paste.STATUS_OPTIONS, *pyramid.OWN_OPTIONS, "dsn"}
    nothing_is_missing([name for name in sorted(names) if not re.search(rf"\b{name}\b", text)])


def test_every_public_name_and_interface_is_in_the_reference(built: dict[str, str]) -> None:
    names = [f"zpgpool.{name}" for name in zpgpool.__all__]
    names += [each.__identifier__ for each in vars(interfaces).values() if isinstance(each, InterfaceClass)]
    names.remove("zope.interface.Interface")
    ids = {found for page in built.values() for found in re.findall(r'id="(zpgpool[\w.]*)"', page)}
    nothing_is_missing([name for name in names if name not in ids])


def test_every_event_is_on_its_page(built: dict[str, str]) -> None:
    events = [
        each.__name__
        for each in vars(interfaces).values()
        if isinstance(each, InterfaceClass) and each.extends(interfaces.IPoolEvent)
    ]
    assert len(events) > 4
    nothing_is_missing([name for name in events if name not in text_of(built["events.html"])])


def test_every_metric_is_on_its_page(built: dict[str, str], make_pool: Callable[..., Any]) -> None:
    from prometheus_client import CollectorRegistry
    from prometheus_client import generate_latest

    zpgpool.register_pool(make_pool())
    registry = CollectorRegistry()
    registry.register(metrics.PoolCollector())
    names = re.findall(r"^# TYPE (\w+)", generate_latest(registry).decode(), re.MULTILINE)
    names += [metrics.PREFIX + each for each in (*(number.name for number in metrics.NUMBERS), *metrics.TIMES)]
    zpgpool.unregister_pool()
    assert len(names) > 20
    nothing_is_missing([name for name in names if name not in text_of(built["metrics.html"])])


def test_every_command_and_option_is_on_a_page(
    built: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *args: object) -> Any:
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit):
        main([])
    [subparsers] = [each for each in parsers[0]._actions if isinstance(each, argparse._SubParsersAction)]
    text = text_of(built["commands.html"])
    names = {f"zpgpool {command}" for command in subparsers.choices} | {"--version"}
    for parser in subparsers.choices.values():
        names |= {option for each in parser._actions for option in each.option_strings} - {"-h", "--help"}
    assert len(names) > 15
    nothing_is_missing([name for name in sorted(names) if name not in text])


def _fragments(node: ast.expr) -> list[str]:
    """Return what is always the same in a message: of a format string, an f-string, or a choice between such."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[a-z]|%\.?\d*[a-z]", node.value)
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values if isinstance(value, ast.Constant) for part in [str(value.value)]]
    if isinstance(node, ast.IfExp):
        return _fragments(node.body) + _fragments(node.orelse)
    return []


def _messages() -> Iterator[tuple[str, str]]:
    """Yield where a message is made, and each part of it that is always the same."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            is_log = name.startswith("log.")
            is_error = name.rpartition(".")[2].endswith(("Error", "Timeout", "Requests", "Closed", "Transaction"))
            is_ours = name in ("self._refuse", "NoAnswer") or name.endswith("ArgumentTypeError")
            if is_log or is_error or is_ours:
                for fragment in _fragments(node.args[0]):
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", " ".join(fragment.split())


def test_every_message_is_on_its_page(built: dict[str, str]) -> None:
    pages = [text_of(html) for page, html in built.items() if page.startswith("messages/")]
    text = re.sub(r"[^\w/:.=<>-]+", " ", " ".join(pages))
    found = [(where, part) for where, part in _messages() if len(re.findall(r"\w+", part)) > 1]
    assert len(found) > 100
    nothing_is_missing(
        [
            f"{where}: {part}"
            for where, part in found
            if re.sub(r"[^\w/:.=<>-]+", " ", part).strip(" .:=<>-/") not in text
        ]
    )


def test_each_page_is_short_and_says_first_what_it_is_for() -> None:
    pages = [path for path in [*DOCS.glob("*.rst"), *DOCS.glob("*/*.rst")] if path.parent.name != "benchmarks"]
    nothing_is_missing(
        [f"{path}: an end before its 200th line" for path in pages if path.read_text().count("\n") > 200]
    )
    for path in pages:
        if path.name not in ("index.rst", "changes.rst", "glossary.rst"):
            assert re.match(r"(?:\.\. _.*\n\n)?.*\n=+\n\nThis page ", path.read_text()), path


def test_the_drawings_are_what_their_script_draws() -> None:
    drawings = runpy.run_path(str(ROOT / "docs/drawings.py"))["DRAWINGS"]
    for draw in drawings:
        assert (ROOT / f"docs/images/{draw.__name__}.svg").read_text() == str(draw()), "run: make screenshots"
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.rst"))
    assert [draw.__name__ for draw in drawings if f"images/{draw.__name__}.svg" not in pages] == []


def test_every_file_that_the_readme_names_is_there() -> None:
    names = re.findall(r"https://[^ >]+/zpgpool/(?:blob/)?main/([^ >\n]+)", (ROOT / "README.rst").read_text())
    assert len(names) > 10
    nothing_is_missing([name for name in names if not (ROOT / name).exists()])


def test_the_readme_reads_right_on_the_package_index() -> None:
    """There are neither our files nor Sphinx's directives."""
    text = (ROOT / "README.rst").read_text()
    warnings = io.StringIO()
    html = rst.render(text, stream=warnings)
    assert html is not None, warnings.getvalue()
    assert "Is it for you?" in html
    assert re.findall(r'(?:href|src)="(?!https://|#)', html) == []
    assert len(text.splitlines()) <= 110


def test_configurations_in_the_readme_have_ten_lines_at_most() -> None:
    blocks = [block for block in BLOCKS["README.rst"] if block.language in ("ini", "xml", "python")]
    assert [str(block) for block in blocks if len(block.text.splitlines()) > 10] == []
