"""What the tests share: a real PostgreSQL, an outside look at it, and pools that are closed afterwards."""

from __future__ import annotations

import fcntl
import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from typing import NoReturn

import psycopg2
import pytest
import zope.event
from benchmarks.harness import free_port
from psycopg2.extensions import make_dsn
from zope.testing.cleanup import cleanUp

import zpgpool
from waiting import eventually as eventually
from waiting import is_within as is_within
from zpgpool.demo.server import EmbeddedServer


#: Django prefers psycopg 3, which `make bench` installs beside us: here it is hidden, in the processes of tests, too.
NO_PSYCOPG_3 = "raise ImportError('hidden by the tests')\n"
sys.modules["psycopg"] = None  # type: ignore[assignment]  # how Python is told that there is no such module


# What these assert is told as in the tests themselves.
pytest.register_assert_rewrite("books", "bouncer", "browser", "outages", "proxy", "serving")

ROOT = Path(__file__).parent.parent

KINDS = {
    "simple": zpgpool.SimpleConnectionPool,
    "threaded": zpgpool.ThreadedConnectionPool,
    "persistent": zpgpool.PersistentConnectionPool,
}

SERVER_OPTIONS = {"fsync": "off", "max_connections": "150", "max_prepared_transactions": "10"}

#: By this coverage measures the processes that are started, too. Not all: one that asynchronous exceptions are shot at
#: would be hit within coverage's own code, and hang.
_measured: dict[str, str] = {}

#: Between what is missing, and the line that installs it.
MISSING = " is missing: "

_numbers = itertools.count()

#: The defaults of the pools' constructor: a test sets another timer there, or none, for the pools that it makes.
DEFAULTS: dict[str, Any] = zpgpool.AbstractConnectionPool.__init__.__kwdefaults__ or {}


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the tests in the background has them ignore it, and the servers that they end by it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Coverage is kept to this process, unless it only starts the workers of pytest-xdist, which run the tests.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
            _measured[name] = os.environ.pop(name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say once, after all else, what this machine lacks, instead of once for each test that could not run."""
    yield
    lacks: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        what, _, install = reason.partition(MISSING)
        lacks[what, install] += 1
    if lacks:
        terminalreporter.section("this machine lacks")
    for (what, install), count in sorted(lacks.items()):
        terminalreporter.line(f"{what} ({count} of the tests left out): {install}")


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Keep Zope's and Sphinx's objects out of the tests' own collections of garbage, which took a third of the run."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def measured() -> Iterator[None]:
    """The processes that this module starts are measured by coverage."""
    os.environ.update(_measured)
    yield
    for name in _measured:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server_dsn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of the server that all tests share: ZPGPOOL_TEST_DSN, or an embedded one."""
    if dsn := os.environ.get("ZPGPOOL_TEST_DSN"):
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        if worker is None:
            yield dsn
        else:
            with own_database(dsn, f"zpgpool_test_{worker}_{os.getpid()}") as own:
                yield own
        return
    with EmbeddedServer(tmp_path_factory.mktemp("postgres") / "data", options=SERVER_OPTIONS) as server:
        yield server.dsn


@contextmanager
def own_database(dsn: str, name: str) -> Iterator[str]:
    """Make a database for one of several workers: what one counts, or drops, is not another's."""
    with closing(psycopg2.connect(dsn)) as conn:
        conn.autocommit = True
        run(conn, f"CREATE DATABASE {name} TEMPLATE template0")
        yield make_dsn(dsn, dbname=name)
        run(conn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server that the tests of one module may stop, restart and crash; it listens on TCP, too."""
    data = tmp_path_factory.mktemp("own") / "data"
    with EmbeddedServer(data, port=free_port(), options=SERVER_OPTIONS) as server:
        yield server


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` fills: in the first of all workers that asks for it, while the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            making = folder / f"{name}.new"
            making.mkdir()  # fails where another worker has failed
            make(making)
            making.rename(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as users install it."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert result.returncode == 0, result.stderr

    [wheel] = made_once(tmp_path_factory, "wheel", make).glob("zpgpool-*.whl")
    return wheel


def open_to_all(folder: Path) -> None:
    """Let servers that run as another user read in a folder of a test."""
    for each in (folder, *folder.parents):
        if each == Path(tempfile.gettempdir()) or each.stat().st_uid != os.geteuid():
            break
        each.chmod(0o755)


def missing(what: str, install: str) -> NoReturn:
    """End a test that lacks something, with the line that installs it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}{MISSING}{install}")
    pytest.skip(f"{what}{MISSING}{install}")  # a contributor's machine may do without; CI may not


@pytest.fixture
def dsn(server_dsn: str) -> str:
    """The server's connection string, with an application name that only this test uses."""
    return make_dsn(server_dsn, application_name=f"zpgpool-test-{os.getpid()}-{next(_numbers)}")


class Outside:
    """A look at the server that no pool has a part in."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg2.connect(make_dsn(dsn, application_name="outside"))
        self.conn.autocommit = True
        self.application_name = psycopg2.extensions.parse_dsn(dsn).get("application_name")

    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        with self.conn.cursor() as cursor:
            cursor.execute(sql, args or None)
            return cursor.fetchall() if cursor.description else []

    def backends(self) -> set[int]:
        """Return the process ids of the test's sessions, as the server counts them."""
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
        return {pid for (pid,) in self.query(sql, self.application_name)}

    def state(self, pid: int) -> str | None:
        rows = self.query("SELECT state FROM pg_stat_activity WHERE pid = %s", pid)
        return rows[0][0] if rows else None

    def runs(self, sql: str) -> bool:
        """Whether the server runs a query of the test's that begins so: not its BEGIN, which came before."""
        what = (
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND starts_with(query, %s) AND application_name = %s"
        )
        return bool(self.query(what, sql, self.application_name))

    def terminate(self, *pids: int) -> None:
        """End these backends, or all of the test's, and wait until they are gone."""
        doomed = set(pids) or self.backends()
        for pid in doomed:
            self.query("SELECT pg_terminate_backend(%s)", pid)
        eventually(lambda: not self.backends() & doomed)
        # The server's list forgets a backend a moment before its socket ends, with its process.
        time.sleep(0.05)
        if not os.environ.get("ZPGPOOL_TEST_DSN"):
            eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in doomed))


@pytest.fixture
def outside(dsn: str) -> Iterator[Outside]:
    watcher = Outside(dsn)
    yield watcher
    watcher.conn.close()


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no connect for one that hangs, although this machine may stand still for a second."""
    if request.node.get_closest_marker("hangs") is None:
        monkeypatch.setattr("zpgpool.core.backoff.HANGS", float("inf"))


@pytest.fixture
def make_pool(dsn: str) -> Iterator[Callable[..., Any]]:
    """Make pools of the test's server, which are closed when the test ends."""
    pools: list[Any] = []

    def make(
        factory: Any = zpgpool.PersistentConnectionPool, minconn: int = 0, maxconn: int = 4, **options: Any
    ) -> Any:
        options.setdefault("dsn", dsn)
        pool = factory(minconn, maxconn, **options)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        if not pool.closed:
            pool.closeall()


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Undo what a test, or a page of the documentation that it runs, did to its process for good."""
    subscribers = list(zope.event.subscribers)
    loggers = {name: logging.getLogger(name) for name in (None, "zpgpool")}
    before = {name: (logger.level, list(logger.handlers), logger.disabled) for name, logger in loggers.items()}
    yield
    cleanUp()
    zope.event.subscribers[:] = subscribers
    for name, logger in loggers.items():
        level, logger.handlers[:], logger.disabled = before[name]
        logger.setLevel(level)


@pytest.fixture
def nobody_observes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status page of another test has subscribed for good; a return goes the long way then."""
    monkeypatch.setattr(zope.event, "subscribers", [])


def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a thread of its own, which has ended when this returns; return or raise what it did."""
    return Call(function, *args).result()


class Environ(dict[str, Any]):
    """A request's environ that can be referred to weakly."""


class Call:
    """A call that runs in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, name: str | None = None) -> None:
        self._function, self._args = function, args
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._outcome = (self._function(*self._args), None)
        except BaseException as error:
            self._outcome = (None, error)

    @property
    def is_running(self) -> bool:
        return self.thread.is_alive()

    def result(self, seconds: float = 20.0) -> Any:
        start = time.monotonic()
        while self.thread.is_alive():
            assert is_within(time.monotonic() - start, seconds), f"{self._function} has not ended within {seconds} s"
            self.thread.join(seconds)
        value, error = self._outcome
        if error is not None:
            try:
                raise error
            finally:
                self._outcome, error = (None, None), None  # no cycle: it would keep connections alive
        return value


def run(conn: Any, sql: str, *args: object) -> Any:
    """Run one statement on `conn` and return its first value, if it has one."""
    with conn.cursor() as cursor:
        cursor.execute(sql, args or None)
        return cursor.fetchone()[0] if cursor.description else None
