"""The site on one page: gunicorn and its workers, which share a folder; what else may be in that; who is silent."""

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
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psycopg2
import pytest
from benchmarks.harness import free_port

import zpgpool
from browser import Browser
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import missing
from conftest import Outside
from conftest import ROOT
from conftest import run
from conftest import SERVER_OPTIONS
from serving import end
from serving import waitress
from test_status import ask
from test_status import browser as browser
from test_status import BUILD
from test_status import Reader
from zpgpool.__main__ import main
from zpgpool.demo.server import EmbeddedServer
from zpgpool.errors import SettingError
from zpgpool.monitor import draw_site
from zpgpool.monitor import history_of
from zpgpool.monitor import merge
from zpgpool.monitor import time_of_day
from zpgpool.monitor import total
from zpgpool.monitor import VERSION
from zpgpool.monitor.ask import ask_all
from zpgpool.monitor.folder import Folder
from zpgpool.monitor.folder import Place
from zpgpool.monitor.share import Share
from zpgpool.status import _shares
from zpgpool.status import StatusApp


pytestmark = pytest.mark.usefixtures("measured")

APP = """
import os
from urllib.parse import parse_qs

from zpgpool import PersistentConnectionPool, register_pool
from zpgpool.status import StatusApp
from zpgpool.wsgi import PoolMiddleware, get_connection

pool = PersistentConnectionPool(0, int(os.environ["MAXCONN"]), os.environ["DSN"], idle_timeout=600, timeout=60)
register_pool(pool, "main")

def app(environ, start_response):
    with get_connection(environ).cursor() as cursor:
        cursor.execute(parse_qs(environ["QUERY_STRING"]).get("sql", ["SELECT 1"])[0])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]

site = PoolMiddleware(app, pool)
status = StatusApp(
    share=os.environ["SHARE"],
    listen=os.environ.get("LISTEN"),
    peers=os.environ.get("PEERS", "").split(),
    token=os.environ.get("TOKEN"),
)

def application(environ, start_response):
    if environ["PATH_INFO"].startswith("/status"):
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = "/status", environ["PATH_INFO"][len("/status"):]
        return status(environ, start_response)
    return site(environ, start_response)
"""


class Site:
    """A gunicorn, its address, and its folder."""

    def __init__(self, folder: Path, dsn: str, *options: str, maxconn: int = 4, port: int = 0, **environ: str) -> None:
        folder.mkdir(exist_ok=True)
        self.share = folder / "share"
        self.share.mkdir(0o700)
        (folder / "shop.py").write_text(APP)
        self.missed = 0
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            "--no-control-socket",
            "--worker-class=gthread",
            "--graceful-timeout=1",
        ]
        with (folder / "log").open("w") as log:
            self.server = subprocess.Popen(
                [*command, *options, f"--bind=127.0.0.1:{self.port}", "--chdir", str(folder), "shop:application"],
                env={**os.environ, "DSN": dsn, "SHARE": str(self.share), "MAXCONN": str(maxconn), **environ},
                stderr=log,
            )

    def get(self, path: str, timeout: float = 30) -> str:
        try:
            with urlopen(f"{self.url}{path}", timeout=timeout) as answer:
                return str(answer.read().decode())
        except HTTPException as error:  # the worker ended in the middle of its answer
            raise ConnectionResetError from error

    def look(self, query: str = "") -> dict[str, Any]:
        return dict(json.loads(self.get(f"/status/json{query}")))

    def whole(self) -> dict[str, Any]:
        """Return what all processes tell: on a busy machine one may miss the deadline."""

        def look() -> dict[str, Any]:
            seen = self.look()
            self.missed += any(each["trouble"] for each in seen["processes"])
            return {} if any(each["trouble"] for each in seen["processes"]) else seen

        return dict(eventually(look))

    def sleepers(self) -> list[dict[str, Any]]:
        """Return the holders whose query sleeps."""
        holders = self.whole()["pools"][0]["holders"]
        return [each for each in holders if (each["server"] or {}).get("wait_event") == "PgSleep"]

    def processes(self) -> list[int]:
        """Return the processes that answer, as the page has them now; none while the server is not up."""
        with suppress(OSError):
            return [each["process"] for each in self.look("?own=1")["processes"] if not each["trouble"]]
        return []

    def metrics(self) -> dict[str, float]:
        lines = re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", self.get("/status/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def counted(self) -> float:
        """Return how many requests it has counted; 0 while the worker that was asked ends."""
        with suppress(OSError):
            return self.metrics()[SUM]
        return 0.0

    def stop(self) -> None:
        end(self.server)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a short path: the address of a unix socket has 107 bytes."""
    with TemporaryDirectory(prefix="zpgpool-") as path:
        yield Path(path)


@contextmanager
def serving(
    folder: Path, dsn: str, *options: str, workers: int = 4, maxconn: int = 4, port: int = 0, **environ: str
) -> Iterator[Site]:
    site = Site(folder, dsn, f"--workers={workers}", *options, maxconn=maxconn, port=port, **environ)
    try:
        eventually(lambda: len(site.processes()) == workers, 30)
        yield site
    finally:
        site.stop()
        # A server hears that a client has gone when it answers: until then a query of his keeps its locks.
        with closing((watcher := Outside(dsn)).conn):
            watcher.terminate()


SUM = 'zpgpool_requests_num_total{pool_name="main"}'


def is_counter(name: str) -> bool:
    return name.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum")) and "connection_count" not in name


@pytest.mark.parametrize(
    "options", [["--threads=4"], pytest.param(["--threads=4", "--preload"], marks=pytest.mark.slow)]
)
def test_four_workers_behind_one_port(folder: Path, dsn: str, options: list[str]) -> None:
    """Whichever answers lists all four, and who holds what; a killed one goes, a stopped one is called silent."""
    with serving(folder, dsn, *options) as site:
        held = [Call(site.get, f"/hold/{number}?sql=SELECT+pg_sleep(600)") for number in range(3)]
        eventually(lambda: len(site.whole()["pools"][0]["holders"]) == 3)
        workers = [each["process"] for each in site.whole()["processes"]]
        asked = set()
        for _ in range(40):
            seen = site.whole()
            asked.add(seen["process"])
            assert [each["process"] for each in seen["processes"]] == workers
            assert {each["request"] for each in seen["pools"][0]["holders"]} == {f"GET /hold/{n}" for n in range(3)}
            assert (seen["used"], seen["max"], seen["open"] >= 3) == (3, 16, True)
        assert len(asked) > 1
        print(f"{site.missed} of {40 + site.missed} answers lacked a process that was too slow")
        text = eventually(lambda: "3 in use" in (text := Reader(site.get("/status/")).text) and text)
        assert all(str(worker) in text for worker in workers)
        holder = seen["pools"][0]["holders"][0]
        [one] = site.look(f"?process={holder['process']}")["processes"]
        assert one["process"] == holder["process"]
        eventually(
            lambda: [each["request"] for each in site.look("?path=/hold/1")["pools"][0]["holders"]] == ["GET /hold/1"]
        )

        free = next(
            worker for worker in workers if worker not in {each["process"] for each in seen["pools"][0]["holders"]}
        )
        os.kill(free, signal.SIGKILL)
        start = time.monotonic()
        eventually(lambda: free not in site.processes() and len(site.processes()) == 4)
        assert is_within(time.monotonic() - start, 5)

        stopped = holder["process"]
        os.kill(stopped, signal.SIGSTOP)
        try:
            took: list[float] = []
            for timeout in [0.6] * 10 + [5.0] * 10:
                if took and timeout > 1:  # the patient ones are for a machine on which none of the others was served
                    break
                start = time.monotonic()
                try:
                    shown = json.loads(site.get("/status/json", timeout))
                except (TimeoutError, URLError):  # the stopped worker had taken it
                    continue
                took.append(time.monotonic() - start)
                assert stopped in [each["process"] for each in shown["processes"] if each["trouble"]]
            assert took
            assert is_within(min(took), 0.5)
        finally:
            os.kill(stopped, signal.SIGCONT)
        site.stop()
        for call in held:
            with suppress(Exception):
                call.result()


def test_who_blocks_whom_across_processes(folder: Path, dsn: str) -> None:
    with serving(folder, dsn, "--threads=16", workers=2) as site:  # enough for the page, too, wherever requests go
        lock = "sql=SELECT+pg_advisory_lock(4711),pg_sleep(600)"
        calls = [Call(site.get, f"/report?{lock}")]
        [holder] = eventually(site.sleepers)  # it has the lock
        os.kill(holder["process"], signal.SIGSTOP)  # requests go where the kernel likes: this one to the other process
        try:
            calls.append(Call(site.get, f"/late?{lock}"))
            eventually(lambda: [each for each in site.look()["pools"][0]["holders"] if each["request"] == "GET /late"])
        finally:
            os.kill(holder["process"], signal.SIGCONT)
        words = (
            f"waits for a lock of backend {holder['backend_pid']}, which is GET /report in process {holder['process']}"
        )
        eventually(lambda: words in Reader(site.get("/status/")).text)
        site.stop()
        for call in calls:
            with suppress(Exception):
                call.result()


@pytest.mark.slow
def test_no_counter_ever_goes_back(folder: Path, dsn: str) -> None:
    """While workers are killed, recycled and added, 300 scrapes only rise; a kill loses what came since the last."""
    options = ["--threads=4", "--max-requests=60", "--max-requests-jitter=30"]
    with serving(folder, dsn, *options, workers=3) as site:
        over, done, lost = threading.Event(), [0] * 4, [0] * 4

        def load(number: int) -> None:
            while not over.is_set():
                try:
                    site.get("/")
                    done[number] += 1
                except OSError:
                    lost[number] += 1

        calls = [Call(load, number) for number in range(4)]
        before: dict[str, float] = {}
        killed = scrapes = at_scrape = may_lack = 0
        while scrapes < 300:
            try:
                at_scrape, now = sum(done), site.metrics()
            except OSError:  # its worker was just killed
                continue
            scrapes += 1
            backwards = {name: (value, now.get(name)) for name, value in before.items() if now.get(name, -1) < value}
            assert not {name for name in backwards if is_counter(name)}, (scrapes, backwards)
            before = now
            if scrapes % 40 == 0:
                os.kill(eventually(site.processes)[0], signal.SIGKILL)
                may_lack += sum(done) - at_scrape + len(calls)  # and what is under way
                killed += 1
            if scrapes == 100:
                site.server.send_signal(signal.SIGTTIN)  # one more
        over.set()
        for call in calls:
            call.result()
        assert killed > 5
        counted = eventually(lambda: site.processes() and site.counted())
        print(f"{scrapes} scrapes, {killed} killed: {counted:.0f} of {sum(done)} counted, {may_lack} may be missing")
        assert sum(done) - may_lack <= counted <= sum(done) + sum(lost)
        assert counted > 300
        assert not re.search("Traceback", (folder / "log").read_text())


@pytest.mark.slow
def test_where_all_ended_in_order_the_sums_are_the_clients(folder: Path, dsn: str) -> None:
    with serving(folder, dsn, "--threads=4", "--max-requests=20", workers=3) as site:
        site.metrics()
        done = 0
        for _ in range(200):
            with suppress(OSError):
                site.get("/")
                done += 1
        eventually(lambda: site.counted() == done)
        site.server.send_signal(signal.SIGHUP)  # new workers in the place of all
        old = set(site.processes())
        eventually(lambda: len(now := set(site.processes())) == 3 and not old & now, 30)
        assert eventually(site.counted) == done  # at the first answer: none is counted late


def test_a_site_that_nobody_asks_writes_nothing(folder: Path, dsn: str) -> None:
    # A worker that is killed before it ends in order leaves its socket to the next reader.
    site = Site(folder, dsn, "--workers=2", "--threads=4", "--max-requests=10", "--graceful-timeout=20")
    try:

        def is_up() -> bool:
            with suppress(OSError):
                return bool(site.get("/"))
            return False

        eventually(is_up, 30)
        for _ in range(30):  # each worker is recycled at least once
            with suppress(OSError):
                site.get("/")
        changes: list[tuple[list[str], float]] = []

        def have_settled() -> bool:
            """Whether two workers are there, and have been for a second: one that has just begun loses the signal."""
            now, names = time.monotonic(), sorted(os.listdir(site.share))
            if not changes or changes[-1][0] != names:
                changes.append((names, now))
            return len(names) == 2 and now > changes[-1][1] + 1

        eventually(have_settled, 30)
    finally:
        site.stop()
    assert os.listdir(site.share) == []


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def share(folder: Path) -> Path:
    (path := folder / "run").mkdir(0o700)
    return path


@pytest.fixture
def app(share: Path) -> Iterator[StatusApp]:
    yield StatusApp(share=str(share))
    _shares.pop((str(share), None)).close()


def test_what_is_no_folder_of_ours_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (folder / "mine").mkdir(0o700)
    for name, words in [
        ("file", "there is no such folder"),
        ("nothing", "there is no such folder"),
        ("open", "others can write to the folder"),
        ("x" * 120, "the path is longer than"),
    ]:
        with pytest.raises(SettingError, match=f"option 'share': {words}"):
            StatusApp(share=str(folder / name))
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 4711)
    with pytest.raises(SettingError, match="option 'share': the folder is of another user"):
        Folder(str(folder / "mine"))


#: A second user, whom each system has.
NOBODY = 65534


def test_a_second_user_is_kept_out(share: Path) -> None:
    """A real one: a folder of the site's is not for him, and into one of his root does not write."""
    if os.getuid() != 0:
        missing("a second user", "run the tests as root, as CI does")
    (his := share / "his").mkdir(0o700)
    os.chown(his, NOBODY, NOBODY)
    for each in (share, share.parent):
        each.chmod(0o755)
    ask(StatusApp())  # he may not read what would be imported
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, _as_nobody(share, his).encode())
        os._exit(0)
    os.close(write)
    with open(read) as told:
        assert told.read() == f"option 'share': the folder is of another user: {str(share)!r} (number 0)"
    os.waitpid(child, 0)
    assert StatusApp(share=str(his))
    assert os.listdir(his) == []
    _shares.pop((str(his), None)).close()


def _as_nobody(share: Path, his: Path) -> str:
    """Become nobody, and return why the folder cannot be shared; one of his own can be."""
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        StatusApp(share=str(his))
        assert len(os.listdir(his)) == 1
        _shares.pop((str(his), None)).close()
        StatusApp(share=str(share))
    except SettingError as error:
        return str(error)
    except BaseException as error:
        return repr(error)
    return "let in"


def test_500_odd_things_are_left_alone(share: Path, make_pool: Callable[..., Any], app: StatusApp) -> None:
    """Nothing hangs, nothing is shown unescaped, and no file that is not ours is read, changed or removed."""
    zpgpool.register_pool(make_pool(name="main"), "main")
    outside = share.parent / "precious"
    outside.write_text("precious")
    silent = []
    for number in range(70):
        token = f"{number:016x}"
        os.mkfifo(share / f"zpgpool-{number + 1}-{token}.sock")
        os.mkfifo(share / f"zpgpool-{number + 1}-{token}.json")
        (share / f"zpgpool-{number + 101}-{token}.sock").symlink_to(outside)
        (share / f"zpgpool-{number + 101}-{token}.json").symlink_to(outside)
        (share / f"zpgpool-{number + 201}-{token}.json").write_text('{"<script>": {"counters": "x"}}' + " " * number)
        (share / f"<script>alert({number})<").write_text("foreign")
        with (share / f"zpgpool-{number + 301}-{token}.json").open("w") as huge:
            huge.truncate(10**9)
        if os.getuid() == 0:  # of somebody else
            (theirs := share / Place(number + 1, f"{number + 8192:016x}").name("json")).write_text("{}")
            os.chown(theirs, NOBODY, NOBODY)
        if number < 40:  # of our own number: they seem to run
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(share / Place(os.getpid(), f"{number + 4096:016x}").name("sock")))
            server.listen(1)
            silent.append(server)
    before = {path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in share.iterdir()}
    assert len(before) > 500
    for path in ("/", "/json", "/metrics"):
        start = time.monotonic()
        answer = ask(app, path)
        assert is_within(time.monotonic() - start, 0.6)
        assert answer.status == 200
        assert b"<script>" not in answer.body
        assert b"precious" not in answer.body
    after = {path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in share.iterdir()}
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert outside.read_text() == "precious"
    shown = json.loads(ask(app, "/json").body)["processes"]
    assert len([each for each in shown if each["trouble"]]) == 40
    for server in silent:
        server.close()


#: What a reader of the JSON may rely on under version 1 (docs/site.rst). More may come; nothing of it may go.
KEYS = {
    "": (
        "asked at host idle longest_wait max open pools process processes unknown unknown_sessions used version waiting"
    ),
    "asked": "path process",
    "unknown_sessions": ("age application_name backend_pid client pool query seconds state wait_event wait_event_type"),
    "processes": "host id idle is_odd longest_wait max open pools process trouble used waiting zpgpool",
    "pools": (
        "backends holders idle incidents is_closed kind lag last_connect_error max min name outage_seconds samples "
        "server_note size stats used waiters waiting"
    ),
    "pools.holders": "backend_pid host line process request seconds server status thread",
    "pools.waiters": "host line process request seconds thread",
    "pools.samples": "ago idle lag used wait waiting",
    "pools.holders.server": ("application_name blocked_by blockers query seconds state wait_event wait_event_type"),
}


def test_the_json_has_the_keys_of_its_version(
    make_pool: Callable[..., Any], app: StatusApp, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert VERSION == 1
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, timeout=20, name="main")
    zpgpool.register_pool(pool, "main")
    monkeypatch.setattr("zpgpool.monitor.snapshot.YOUNG", 0.0)
    conn = pool.getconn()
    waiting = Call(lambda: pool.putconn(pool.getconn()))
    eventually(pool.waiters)
    history_of(pool).maintain(time.monotonic())
    with closing(psycopg2.connect(dsn)):
        snapshot = json.loads(ask(app, "/json").body)
    pool.putconn(conn)
    waiting.result()
    assert snapshot["version"] == VERSION
    page = (ROOT / "docs" / "site.rst").read_text()
    for path, keys in KEYS.items():
        found = snapshot
        for name in path.split(".") if path else []:
            found = found[name][0] if isinstance(found[name], list) else found[name]
        assert set(keys.split()) <= set(found), path
        assert [key for key in keys.split() if f"``{key}``" not in page] == [], path


def test_a_stale_socket_is_removed(share: Path, app: StatusApp) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = share / Place(ended.pid, "0" * 16).name("sock")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(stale))
    server.close()
    assert [each["process"] for each in json.loads(ask(app, "/json").body)["processes"]] == [os.getpid()]
    assert not stale.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"format": 2}',
        b'{"format": 1, "process": "<b>"}',
        b'{"format": 1, "process": 7, "host": "x", "zpgpool": "9", "is_bare": false, "pools": [{"name": "<b>"}]}',
        b'{"format": 1, "process": 7, "host": "x", "zpgpool": "9", "is_bare": false, "pools": NaN}',
    ],
)
def test_an_answer_of_another_version_or_none(share: Path, app: StatusApp, text: bytes) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(share / Place(os.getpid(), "1" * 16).name("sock")))
    server.listen(8)

    def answer() -> None:
        for _ in range(2):
            peer, _ = server.accept()
            with peer:
                with suppress(OSError):  # who asks waits for 0.3 s
                    peer.recv(100)
                    peer.sendall(text)

    call = Call(answer)
    page = ask(app)
    assert page.status == 200
    assert "<b>" not in page.text
    strange = [each for each in json.loads(ask(app, "/json").body)["processes"] if each["trouble"]]
    assert len(strange) == 1
    call.result()
    server.close()


def test_a_full_disk_lets_counters_stand_still(
    make_pool: Callable[..., Any], app: StatusApp, share: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    pool = make_pool(name="main")
    zpgpool.register_pool(pool, "main")

    def count() -> float:
        [line] = re.findall(
            r'^zpgpool_requests_num_total\{pool_name="main"\} (\S+)$', ask(app, "/metrics").text, re.MULTILINE
        )
        return float(line.split()[-1])

    def get() -> None:
        run(pool.getconn(), "SELECT 1")
        pool.putconn()

    get()
    assert count() == 1
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        get()
        assert [count(), count()] == [1, 1]
    assert caplog.text.count("cannot write counters into") == 1
    assert count() == 2
    assert not [name for name in os.listdir(share) if name.endswith(".new")]


def test_many_files_of_ended_processes_become_one(share: Path, make_pool: Callable[..., Any], app: StatusApp) -> None:
    pool = make_pool(name="main")
    zpgpool.register_pool(pool, "main")
    run(pool.getconn(), "SELECT 1")
    pool.putconn()
    ask(app, "/metrics")
    [mine] = share.glob("*.json")
    ended = []
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-S", "-c", ""])
        process.wait()
        ended.append(process.pid)
    for number, pid in enumerate(ended):
        (share / Place(pid, f"{number:016x}").name("json")).write_bytes(mine.read_bytes())
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(share / Place(pid, f"{number:016x}").name("sock")))
        server.close()
    for _ in range(3):
        assert 'zpgpool_requests_num_total{pool_name="main"} 21.0' in ask(app, "/metrics").text
    assert sorted(path.name for path in share.glob("*.json")) == sorted([mine.name, "zpgpool-past.json"])


def test_a_pool_that_is_replaced_stays_counted(make_pool: Callable[..., Any], app: StatusApp) -> None:
    for _ in range(3):
        pool = make_pool(name="main")
        zpgpool.register_pool(pool, "main")
        run(pool.getconn(), "SELECT 1")
        pool.putconn()
        text = ask(app, "/metrics").text
        zpgpool.unregister_pool("main")
    assert 'zpgpool_requests_num_total{pool_name="main"} 3.0' in text


def test_a_site_without_share_starts_no_thread(make_pool: Callable[..., Any]) -> None:
    zpgpool.register_pool(make_pool())
    before = set(threading.enumerate())
    StatusApp()
    assert not [each for each in set(threading.enumerate()) - before if each.name == "zpgpool-share"]


def test_it_ends_with_its_socket(share: Path) -> None:
    mine = Share(Folder(str(share)), list)
    mine.start()
    folder = Folder(str(share))
    eventually(lambda: len(ask_all(folder, "pools").documents) == 1)
    mine.close()
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "zpgpool-share"])
    assert os.listdir(share) == []


# `zpgpool top DIR` ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [20])
def test_an_incident_seen_from_beside(
    folder: Path, dsn: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """All threads wait, and the site cannot serve its own page: the folder tells who holds what, every time."""
    monkeypatch.setenv("COLUMNS", "250")
    beside = f"127.0.0.1:{free_port()}"
    with serving(folder, dsn, "--threads=6", workers=2, maxconn=4, LISTEN=beside) as site:
        calls = [Call(site.get, "/report?sql=SELECT+pg_advisory_lock(815),pg_sleep(600)")]  # it holds the lock
        [holder] = eventually(site.sleepers)
        calls += [Call(site.get, f"/late/{n}?sql=SELECT+pg_advisory_lock(815),pg_sleep(600)") for n in range(30)]
        took = []

        def missed(text: str) -> bool:
            """Whether a process has missed the deadline, as may be on a busy machine."""
            return "no answer within" in text

        def top() -> str:
            start = time.monotonic()
            assert main(["top", str(site.share), "--once"]) == 0
            took.append(time.monotonic() - start)
            text = str(capsys.readouterr().out)
            return "" if missed(text) else text

        def answer_from_beside(path: str) -> str:
            start = time.monotonic()
            with urlopen(f"http://{beside}{path}", timeout=10) as answer:
                text = str(answer.read().decode())
            took.append(time.monotonic() - start)
            return "" if missed(text) else text

        # Four, if the workers have accepted alike; two, if one of them has nearly all.
        eventually(lambda: re.search("[234] wait, the longest for", top()), 20)
        took.clear()
        for _ in range(times):
            text = eventually(top)
            [line] = [line for line in text.splitlines() if "GET /report" in line and str(holder["process"]) in line]
            assert "shop.py:" in line
            page = Reader(eventually(lambda: answer_from_beside("/"))).text
            assert f"GET /report in process {holder['process']}" in page  # for which the others wait
            held = json.loads(eventually(lambda: answer_from_beside("/json")))["pools"][0]["holders"]
            [found] = [each for each in held if each["request"] == "GET /report"]
            assert found["process"] == holder["process"]
            assert "shop.py:" in found["line"]
        assert is_within(max(took), 1)
        print(f"top and the page beside: {sorted(took)[len(took) // 2]:.3f} s, at most {max(took):.3f} s")
        site.stop()
        for call in calls:
            with suppress(Exception):
                call.result()


@pytest.fixture
def large_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "data", options={**SERVER_OPTIONS, "max_connections": "600"}) as server:
        yield server


@pytest.mark.slow
def test_64_processes_with_8_holders_each(
    share: Path, large_server: EmbeddedServer, make_pool: Callable[..., Any], browser: Browser
) -> None:
    """512 sessions: the page within 300 ms on a quiet machine, under 1 MB, and readable on a phone."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 8, name="main", dsn=large_server.dsn)
    zpgpool.register_pool(pool, "main")
    app = StatusApp(share=str(share))
    conns, children = [pool.getconn() for _ in range(8)], []
    read, write = os.pipe()
    try:
        for _ in range(63):
            if (pid := os.fork()) == 0:
                try:
                    signal.alarm(120)  # ends one that hangs
                    theirs = [pool.getconn() for _ in range(8)]
                    signal.alarm(0)
                    os.write(write, f"{len(theirs)} connections\n".encode())
                    os.close(write)
                    signal.pause()
                except BaseException as error:
                    os.write(write, f"{' '.join(str(error).split())}\n".encode())
                finally:
                    os._exit(0)
            children.append(pid)
        os.close(write)
        with os.fdopen(read) as told:  # not asked of the page until it is so: each answer is work for all of them
            assert [told.readline() for _ in children] == ["8 connections\n"] * 63
        eventually(lambda: json.loads(ask(app, "/json").body)["used"] == 512, 60)
        took, sizes = [], []
        for _ in range(10):
            start = time.monotonic()
            page = ask(app)
            took.append(time.monotonic() - start)
            sizes.append(len(page.body))
        print(f"64 processes, 512 holders: {min(took):.3f} s at best, {sorted(took)[5]:.3f} s, {max(sizes)} bytes")
        assert is_within(min(took), 0.3)
        assert max(sizes) < 1_000_000

        def numbers() -> tuple[int, int, int]:
            seen = json.loads(ask(app, "/json").body)
            holders = seen["pools"][0]["holders"]
            return len(seen["processes"]), len(holders), sum(bool(each["server"]) for each in holders)

        eventually(lambda: numbers() == (64, 512, 512), 60)  # one of 63 may miss the deadline
        with waitress(app) as port:
            browser.forget()
            for dark in (False, True):

                def is_whole(dark: bool = dark) -> bool:
                    browser.open(f"http://127.0.0.1:{port}/", width=360, dark=dark)
                    return bool(browser.run("document.querySelectorAll('main table tbody tr').length") >= 64 + 512)

                eventually(is_whole, 60)
                assert browser.run("document.documentElement.scrollWidth") <= 360
                folded = "[...document.querySelectorAll('tbody tr')].filter(each => each.checkVisibility()).length"
                assert browser.run(folded) < 30
                browser.shoot(BUILD / f"site-phone{'-dark' if dark else ''}.png")
            browser.run("document.querySelectorAll('details').forEach(each => { each.open = true })")
            assert browser.run(folded) > 512
            assert browser.run("document.documentElement.scrollWidth") <= 360
            assert browser.complaints == []
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for conn in conns:
            pool.putconn(conn)
        pool.closeall()
        _shares.pop((str(share), None)).close()


def test_of_many_processes_the_odd_ones_and_the_oldest_are_to_be_seen_at_once() -> None:
    def process(number: int, **changes: Any) -> dict[str, Any]:
        holder = {"seconds": float(number), "request": f"GET /{number}", "thread": "T", "line": "x:1 in y"}
        holder |= {"status": "idle", "backend_pid": number, "server": None}
        pool = {"name": "main", "kind": "K", "is_closed": False, "max": 4, "min": 0, "size": 1, "idle": 0, "used": 1}
        pool |= {"waiting": 0, "last_connect_error": "", "outage_seconds": None, "server_note": "", "lag": None}
        pool |= {"backends": [number], "holders": [holder], "waiters": [], "incidents": [], "samples": [], "stats": {}}
        return {"id": str(number), "process": number, "host": "x", "zpgpool": "1", "pools": [{**pool, **changes}]}

    def drawn(count: int, silent: int = 0) -> tuple[str, str]:
        """Return what is to be seen at once, and what is folded away."""
        many = [
            process(100 + number, **({"last_connect_error": "gone"} if number == 7 else {})) for number in range(count)
        ]
        site = merge(many, [(900 + number, "x", "no answer") for number in range(silent)])
        told = {"at": time_of_day(), "process": 1, "host": "x", "asked": {"process": "", "path": ""}}
        told |= {"unknown": 2, "unknown_sessions": [], **total(site), **site}
        text = draw_site(told)
        folded = "".join(re.findall(r"<details id=\"(?:processes|holders)\b.*?</details>", text, re.DOTALL))
        return re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL), folded

    assert drawn(8)[1] == ""
    at_once, folded = drawn(30, silent=2)
    for number in (107, 900, 901):
        assert f"?process={number}" in at_once
    assert "?process=108" in folded
    assert [number for number in range(100, 130) if f"GET /{number}<" in at_once] == list(range(110, 130))
    assert [number for number in range(100, 130) if f"GET /{number}<" in folded] == list(range(100, 110))
    assert "10 more" in folded
    assert "29 more" in folded
    assert "30 in use" in at_once
    at_once, folded = drawn(9, silent=20)
    assert at_once.count("?process=") == 8
    assert "that no process knows; they may belong to process 900 (no answer) or process 901 (no answer)" in at_once
    assert "or one of 17 more that are silent." in at_once


@pytest.mark.parametrize("words", ["there is no such folder", "nobody answers"])
def test_top_of_a_folder_says_in_a_line_what_is_wrong(share: Path, capsys: Any, words: str) -> None:
    where = share if words == "nobody answers" else share / "nothing"
    assert main(["top", f"{where}/", "--once"]) == 1
    assert words in capsys.readouterr().err
