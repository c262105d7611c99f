"""Double book-keeping: what an application stored in ZODB and in PostgreSQL, and what its clients were told.

The applications under test have one page for each of `JOBS`. Each page stores an object in ZODB and a row in
PostgreSQL under the request's `key`, and ends in its own way: then both are there, or neither.
"""

from __future__ import annotations

import base64
import http.client
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import make_dsn

from conftest import Call
from conftest import eventually
from conftest import Outside
from conftest import run


SCHEMA = """
DROP TABLE IF EXISTS rows;
CREATE TABLE rows (key text PRIMARY KEY, mark text UNIQUE DEFERRABLE INITIALLY DEFERRED)
"""

#: The numbers of the rows that a page streams.
STREAMED = 2000

#: What a client may ask for: the share in percent, the status, and whether something is stored then.
JOBS = {
    "store": (48, 200, True),
    "read": (16, 200, False),
    "fail": (10, 500, False),
    "vote": (8, 500, False),
    "swallow": (4, 500, False),
    "kill": (4, 500, False),
    "stream": (6, 200, True),
    "abandon": (4, 200, True),
}

CLIENTS = 8


class Planned(Exception):
    """What a page raises that is meant to fail."""


def store_row(conn: Connection, key: str, mark: str | None = None) -> None:
    run(conn, "INSERT INTO rows VALUES (%s, %s)", key, mark or key)


def store_row_for(job: str, conn: Connection, key: str) -> None:
    """Do what a page does in PostgreSQL."""
    if job == "read":
        run(conn, "SELECT count(*) FROM rows")
        return
    store_row(conn, key)
    if job == "fail":
        raise Planned(key)
    if job == "vote":
        store_row(conn, f"{key} again", key)
    if job in ("swallow", "kill"):
        try:
            run(conn, "SELECT 1 / 0" if job == "swallow" else "SELECT pg_terminate_backend(pg_backend_pid())")
        except psycopg2.Error:
            pass  # the page does not care: the commit must


def numbers(conn: Connection) -> Iterator[bytes]:
    """A body that queries while it is sent."""
    for start in range(0, STREAMED, 500):
        with conn.cursor() as cursor:
            cursor.execute("SELECT n FROM generate_series(%s, %s) n", (start, start + 499))
            yield b"".join(b"%d\n" % n for (n,) in cursor)


@contextmanager
def database(server_dsn: str, name: str) -> Iterator[str]:
    """Make an empty database for the books, and give its connection string."""
    name = f"{name}_{os.getpid()}"
    with closing(psycopg2.connect(server_dsn)) as conn:
        conn.autocommit = True
        run(conn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        run(conn, f"CREATE DATABASE {name}")
        dsn = make_dsn(server_dsn, dbname=name, application_name=name)
        with closing(psycopg2.connect(dsn)) as own, own:
            run(own, SCHEMA)
        yield dsn
        run(conn, f"DROP DATABASE {name} WITH (FORCE)")


def rows(outside: Outside) -> list[str]:
    """Return the keys in PostgreSQL."""
    return sorted(key for (key,) in outside.query("SELECT key FROM rows"))


class Client:
    """Asks for one page after the other, and keeps its own books."""

    def __init__(self, port: int, number: int = 0, jobs: list[str] | None = None) -> None:
        self.port = port
        self.number = number
        self.jobs = jobs or []
        self.statuses: Counter[tuple[str, int]] = Counter()
        #: What must be there, as it was told.
        self.stored: list[str] = []

    def run(self) -> Client:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as self._conn:
            for turn, job in enumerate(self.jobs):
                key = f"{self.number}-{turn}"
                status = self._abandon(key) if job == "abandon" else self._get(job, key)
                self.statuses[job, status] += 1
                if JOBS[job][2] and status == 200:
                    self.stored.append(key)
        return self

    def _get(self, job: str, key: str) -> int:
        self._conn.request("GET", f"/{job}?key={key}&client={self.number}")
        response = self._conn.getresponse()
        body = response.read()
        if job == "stream" and response.status == 200:
            assert [int(line) for line in body.split()] == list(range(STREAMED))
        return response.status

    def _abandon(self, key: str) -> int:
        """Read a little of much, and reset the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(f"GET /stream?key={key}&client={self.number} HTTP/1.0\r\n\r\n".encode())
            with sock.makefile("rb") as stream:
                status = int(stream.readline().split()[1])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return status


def get(port: int, path: str, user: str = "") -> tuple[int, bytes]:
    """Ask for one page, as `name:password` if that is given; return its status and its body."""
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as conn:
        conn.request("GET", path, headers=headers)
        response = conn.getresponse()
        return response.status, response.read()


def shares(requests: int, seed: int) -> list[list[str]]:
    """Return the jobs of each client: exactly so many in all, in an order that is the same each time."""
    jobs = [job for job, (percent, _, _) in JOBS.items() for _ in range(requests * percent // 100)]
    assert len(jobs) == requests
    random.Random(seed).shuffle(jobs)
    return [jobs[number::CLIENTS] for number in range(CLIENTS)]


def load(port: int, requests: int) -> list[str]:
    """Ask for so many pages by all clients at a time, check each answer, and return the keys that must be stored."""
    calls = [Call(Client(port, number, jobs).run) for number, jobs in enumerate(shares(requests, seed=1))]
    clients: list[Client] = [call.result(90) for call in calls]
    statuses: Counter[tuple[str, int]] = sum((client.statuses for client in clients), Counter())
    assert statuses == {(job, status): requests * percent // 100 for job, (percent, status, _) in JOBS.items()}
    return sorted(key for client in clients for key in client.stored)


def check_books(outside: Outside, stored: list[str], objects: Callable[[], list[str]], maxconn: int) -> None:
    """Both sides have what the clients were told, no transaction is open, and the sessions are within the limit."""
    assert len(stored) > 0
    assert rows(outside) == stored
    assert objects() == stored
    eventually(lambda: {outside.state(pid) for pid in outside.backends()} <= {"idle"})
    assert 1 <= len(outside.backends()) <= maxconn
    assert outside.query("SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()")[0][0] == 0
