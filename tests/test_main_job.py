"""What the package is for, all at once: the demo behind waitress, many clients, some of them rude, in real time."""

from __future__ import annotations

import http.client
import logging
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg2
import pytest
from paste.deploy import loadapp
from psycopg2.extensions import make_dsn

import zpgpool
from conftest import Call
from conftest import eventually
from serving import waitress


THREADS = 8
CLIENTS = 16
REQUESTS = 5000

#: As in demo.ini.
MAXCONN = 8

#: How often a client does what, in percent, and the status that it must get.
JOBS = {"page": 50, "store": 30, "stream": 8, "abandon": 6, "fail": 6}
STATUS = {"page": 200, "store": 303, "stream": 200, "abandon": 200, "fail": 500}

ROWS = 3000

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def database(server_dsn: str) -> Iterator[str]:
    """An empty database: its connection string."""
    name = f"main_job_{os.getpid()}"
    with closing(psycopg2.connect(server_dsn)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            cursor.execute(f"CREATE DATABASE {name}")
            yield make_dsn(server_dsn, dbname=name)
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def app(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The demo's own pipeline, with an idle time that a test can wait for."""
    monkeypatch.setenv("ZPGPOOL_DEMO_DSN", database)
    text = (files("zpgpool.demo") / "demo.ini").read_text()
    assert f"\nmaxconn = {MAXCONN}\n" in text
    ini = tmp_path / "demo.ini"
    ini.write_text(text.replace("\nidle_timeout = 60\n", "\nidle_timeout = 1\nminconn = 1\n"))
    app = loadapp(f"config:{ini}")
    pool: Any = zpgpool.get_pool()
    assert (pool.settings.idle_timeout, pool.minconn, pool.maxconn) == (1, 1, MAXCONN)
    yield app
    pool.close(0)


class Watcher:
    """Counts the pool's sessions, as the server does, for as long as it may."""

    def __init__(self, dsn: str) -> None:
        self._conn = psycopg2.connect(make_dsn(dsn, application_name="outside"))
        self._conn.autocommit = True
        self._is_over = threading.Event()
        self._call = Call(self._watch)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with self._conn.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def sessions(self) -> list[str]:
        """Return the states of the pool's sessions."""
        sql = "SELECT state FROM pg_stat_activity"
        rows = self.query(f"{sql} WHERE application_name = 'zpgpool demo' AND datname = current_database()")
        return [state for (state,) in rows]

    def _watch(self) -> Counter[int]:
        seen: Counter[int] = Counter()
        while not self._is_over.is_set():
            seen[len(self.sessions())] += 1
        return seen

    def end(self) -> Counter[int]:
        """Stop watching, and return how often each number of sessions was seen."""
        self._is_over.set()
        seen: Counter[int] = self._call.result()
        return seen

    def close(self) -> None:
        self._is_over.set()
        self._conn.close()


class Client:
    """One of many: does its share of the jobs, in an order of its own."""

    def __init__(self, port: int, number: int, jobs: list[str]) -> None:
        self.port = port
        self.number = number
        self.jobs = jobs
        self.acknowledged: list[str] = []
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.conn = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def run(self) -> Client:
        with closing(self.conn):
            for turn, job in enumerate(self.jobs):
                status = getattr(self, job)(turn)
                self.statuses[job, status] += 1
        return self

    def ask(self, path: str, method: str = "GET", body: str | None = None) -> http.client.HTTPResponse:
        self.conn.request(method, path, body, FORM if body else {})
        return self.conn.getresponse()

    def page(self, turn: int) -> int:
        response = self.ask("/")
        assert b"never stored" not in response.read()
        return response.status

    def store(self, turn: int) -> int:
        note = f"note {self.number}-{turn}"
        response = self.ask("/", "POST", urlencode({"note": note}))
        response.read()
        if response.status == 303:
            self.acknowledged.append(note)
        return response.status

    def fail(self, turn: int) -> int:
        response = self.ask("/fail")
        response.read()
        return response.status

    def stream(self, turn: int) -> int:
        """Read all of it, in small pieces."""
        response = self.ask(f"/stream?rows={ROWS}")
        text = b""
        while piece := response.read(1000):
            text += piece
        assert [int(line.split()[0]) for line in text.splitlines()] == list(range(1, ROWS + 1))
        return response.status

    def abandon(self, turn: int) -> int:
        """Read a little of much, and reset the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as sock:
            sock.sendall(b"GET /stream?rows=100000 HTTP/1.1\r\nHost: x\r\n\r\n")
            with sock.makefile("rb") as stream:
                status = int(stream.readline().split()[1])
                stream.read(2000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return status


def is_unexpected(record: logging.LogRecord) -> bool:
    """Whether waitress logs something else than the page that is meant to fail."""
    return "this page fails after it has written" not in str(record.exc_info and record.exc_info[1])


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, but what this test is meant to cause: errors of that page, and clients that wait."""
    caplog.set_level("ERROR", "waitress.queue")
    logger = logging.getLogger("waitress")
    logger.addFilter(is_unexpected)
    yield caplog
    logger.removeFilter(is_unexpected)


def shares(seed: int) -> list[list[str]]:
    """Return the jobs of each client: exactly REQUESTS in all, in an order that is the same each time."""
    jobs = [job for job, percent in JOBS.items() for _ in range(REQUESTS * percent // 100)]
    assert len(jobs) == REQUESTS
    random.Random(seed).shuffle(jobs)
    return [jobs[number::CLIENTS] for number in range(CLIENTS)]


@pytest.mark.slow
def test_five_thousand_requests_lose_nothing_and_leave_nothing_in_real_time(
    app: Any, database: str, log: pytest.LogCaptureFixture
) -> None:
    with closing(Watcher(database)) as watcher:
        with waitress(app, threads=THREADS) as port:
            calls = [Call(Client(port, number, jobs).run) for number, jobs in enumerate(shares(1))]
            clients: list[Client] = [call.result(60) for call in calls]
            eventually(lambda: zpgpool.get_pool().holders() == [])  # those who hung up are noticed, too
            seen = watcher.end()

            # Each got what it should: no error but that of the page that fails.
            assert log.text == ""
            statuses: Counter[tuple[str, int]] = sum((client.statuses for client in clients), Counter())
            assert statuses == {(job, STATUS[job]): REQUESTS * percent // 100 for job, percent in JOBS.items()}

            # What was acknowledged is there, once; what was not is not.
            notes = Counter(note for (note,) in watcher.query("SELECT note FROM notes"))
            assert notes == Counter(note for client in clients for note in client.acknowledged)
            assert set(notes.values()) == {1}
            assert "never stored" not in notes

            # Never more sessions than the limit, however many clients; and nobody's transaction is left open.
            assert 2 <= max(seen) <= MAXCONN
            assert set(watcher.sessions()) <= {"idle"}
            stats = zpgpool.get_pool().get_stats()
            assert stats["requests_errors"] == stats["connections_errors"] == stats["connections_lost"] == 0

            # Then the timer, alone, closes what is idle; the server is up and no request comes.
            eventually(lambda: len(watcher.sessions()) == 1)
        assert log.text == ""
