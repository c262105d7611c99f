"""Load for a site whose server goes away: clients that read and write, and what became of each of their requests."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import psycopg2

from conftest import eventually
from conftest import run


CLIENTS = 8

TABLE = "CREATE TABLE IF NOT EXISTS written (id text PRIMARY KEY)"

#: Of so many requests of a client one writes, and one takes long enough to be met by the fault.
WRITES, SLOW = 4, 5

SHORT, LONG = 0.005, 0.3


def seconds_of(path: str) -> float:
    """Return how long the query of a request shall take."""
    return LONG if path.endswith("/slow") else SHORT


def answer(start_response: Any, text: str = "done") -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
    return [text.encode()]


def read(conn: Any, path: str) -> None:
    run(conn, "SELECT pg_sleep(%s)", seconds_of(path))


def write(conn: Any, path: str) -> None:
    """Store the id of the request, which its path names."""
    run(conn, "INSERT INTO written VALUES (%s)", path.split("/")[1])
    run(conn, "SELECT pg_sleep(%s)", seconds_of(path))


@dataclass
class Request:
    """What became of a request."""

    method: str
    id: str
    begun: float
    ended: float
    status: int

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    def __repr__(self) -> str:
        return f"{self.method} {self.id}: {self.status} after {self.seconds:.2f} s"


class Load:
    """Clients that send requests until the block ends."""

    def __init__(self, port: int, prefix: str = "", clients: int = CLIENTS, pause: float = 0.02) -> None:
        self.requests: list[Request] = []
        self._port = port
        self._prefix = prefix
        self._pause = pause
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, client: int) -> None:
        for number in count(client):
            if self._is_over.is_set():
                return
            method = "POST" if number % WRITES == 0 else "GET"
            name = f"{client}-{number}"
            path = f"{self._prefix}/{name}/slow" if number % SLOW == 0 else f"{self._prefix}/{name}"
            begun = time.monotonic()
            status = self.ask(method, path)
            self.requests.append(Request(method, name, begun, time.monotonic(), status))
            self._is_over.wait(self._pause)

    def ask(self, method: str, path: str) -> int:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as conn:
                conn.request(method, path)
                response = conn.getresponse()
                response.read()
                return response.status
        except OSError:
            return 0

    def wait_for(self, number: int) -> None:
        """Wait until so many requests more were begun, and answered."""
        now = time.monotonic()
        eventually(lambda: sum(each.begun > now for each in list(self.requests)) >= number, 60)

    def failed(self, method: str) -> list[Request]:
        return [request for request in list(self.requests) if request.method == method and request.status != 200]

    @property
    def longest(self) -> float:
        return max(request.seconds for request in self.requests)

    def check_rows(self, dsn: str) -> None:
        """Assert that each acknowledged write is there, once."""
        with closing(psycopg2.connect(dsn)) as conn, conn.cursor() as cursor:
            cursor.execute("SELECT id FROM written")
            stored = Counter(name for (name,) in cursor)
        acknowledged = {request.id for request in self.requests if request.method == "POST" and request.status == 200}
        assert acknowledged <= stored.keys()
        assert set(stored.values()) <= {1}
