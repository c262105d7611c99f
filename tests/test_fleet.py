"""Many processes on one server: they fit, they do not come all at once, and they are replaced while they work."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from benchmarks.harness import free_port

import zpgpool
from conftest import eventually
from conftest import is_within
from conftest import Outside
from zpgpool.check import size_pool
from zpgpool.core.backoff import ConnectBackoff
from zpgpool.core.backoff import JITTER
from zpgpool.core.backoff import LONGEST_PAUSE
from zpgpool.core.idle import SPREAD
from zpgpool.demo.server import EmbeddedServer


PROCESSES = 50

#: The issue's own number, in seconds.
READY = 10

MAX_CONNECTIONS = 100

#: For superusers, and the test's own look.
RESERVED = 4

#: A process whose four threads share its pool's connections, again and again until its input ends, with pauses.
WORKER = """
import sys, threading
import zpgpool
dsn, maxconn, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
errors, done, is_ready, is_over = [], [], threading.Event(), threading.Event()
try:
    pool = zpgpool.PersistentConnectionPool(1, maxconn, dsn, idle_timeout=60, timeout=20)

    def work():
        try:
            while True:
                with pool.connection() as conn, conn.cursor() as cursor:
                    cursor.execute("SELECT 1")
                    done.append(cursor.fetchone())
                is_ready.set()
                if is_over.wait(pause):
                    return
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            is_ready.set()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    is_ready.wait()
    print("ready", flush=True)
    sys.stdin.read()
    is_over.set()
    for thread in threads:
        thread.join()
    pool.close()
except Exception as error:
    errors.append(f"{type(error).__name__}: {error}")
print(len(done), *errors, sep="|")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    options = {"fsync": "off", "max_connections": str(MAX_CONNECTIONS), "log_connections": "on"}
    with EmbeddedServer(tmp_path_factory.mktemp("fleet") / "data", port=free_port(), options=options) as server:
        yield server


@pytest.fixture
def outside(server: EmbeddedServer) -> Iterator[Outside]:
    outside = Outside(f"{server.dsn} application_name=fleet")
    yield outside
    outside.conn.close()


class Fleet:
    """Processes that come and go."""

    def __init__(self, dsn: str, count: int, maxconn: int, pause: float) -> None:
        command = [sys.executable, "-c", WORKER, f"{dsn} application_name=fleet", str(maxconn), str(pause)]
        pipe = subprocess.PIPE
        self.processes = [
            subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
            for _ in range(count)
        ]

    def wait_until_ready(self) -> list[str]:
        return [process.stdout.readline().strip() for process in self.processes if process.stdout]

    def stop(self) -> list[str]:
        """Return what each has met."""
        for process in self.processes:
            if process.stdin:
                process.stdin.close()
        told = []
        for process in self.processes:
            assert process.stdout
            told.append(process.stdout.read().strip())
            process.stdout.close()
            process.wait(30)
        return told


def refused(server: EmbeddedServer) -> list[str]:
    lines = (server.sockets / "log").read_text().splitlines()
    return [line for line in lines if "too many" in line or "connection slots" in line]


@pytest.mark.slow
def test_fifty_processes_at_once(server: EmbeddedServer, outside: Outside) -> None:
    maxconn = size_pool(threads=4, processes=PROCESSES, max_connections=MAX_CONNECTIONS, reserved=RESERVED)
    start = time.monotonic()
    fleet = Fleet(server.dsn, PROCESSES, maxconn, 60)
    ready = fleet.wait_until_ready()
    seconds = time.monotonic() - start
    count = len(outside.backends())
    told = fleet.stop()
    assert ready == ["ready"] * PROCESSES, told
    assert all(each.isdigit() and int(each) > 0 for each in told), told
    assert count == PROCESSES * maxconn
    assert refused(server) == []
    assert is_within(seconds, READY), seconds


@pytest.mark.slow
def test_old_and_new_processes_overlap(server: EmbeddedServer, outside: Outside) -> None:
    """Counted twice, they fit while they are replaced."""
    maxconn = size_pool(threads=4, processes=2 * 12, max_connections=MAX_CONNECTIONS, reserved=RESERVED)
    assert maxconn == 4
    old = Fleet(server.dsn, 12, maxconn, 0.01)
    assert old.wait_until_ready() == ["ready"] * 12
    new = Fleet(server.dsn, 12, maxconn, 0.01)
    assert new.wait_until_ready() == ["ready"] * 12
    eventually(lambda: len(outside.backends()) == 24 * maxconn, 20)
    told = old.stop()
    eventually(lambda: len(outside.backends()) == 12 * maxconn)
    told += new.stop()
    assert all(each.isdigit() and int(each) > 0 for each in told), told
    assert refused(server) == []


def test_refills_after_an_outage_are_spread(server: EmbeddedServer, make_pool: Callable[..., Any]) -> None:
    pools = [make_pool(zpgpool.ThreadedConnectionPool, 1, 2, dsn=server.dsn, open=False) for _ in range(20)]
    for pool in pools:
        pool._timer = None  # by this test
        pool.prune()
    server.halt()
    server.launch()
    now = time.monotonic()
    for pool in pools:
        pool.run_maintenance(now)
    took = time.monotonic() - now
    pauses = [pool._connections._refill_at - now for pool in pools]
    assert len(set(pauses)) == len(pools)
    assert 0 <= min(pauses) < SPREAD / 2 < max(pauses) <= SPREAD + took
    for pool in pools:
        pool.run_maintenance(now + SPREAD + took)
    eventually(lambda: all(pool.get_stats()["pool_available"] == 1 for pool in pools))


def test_tries_at_a_server_that_is_down_are_spread() -> None:
    outages = [ConnectBackoff(lambda: 0.0) for _ in range(20)]
    for outage in outages:
        for _ in range(10):
            outage.failed(psycopg2.OperationalError("down"))
    retries = {outage._retry_at for outage in outages}
    assert len(retries) == len(outages)
    assert min(retries) >= LONGEST_PAUSE
    assert max(retries) <= LONGEST_PAUSE * (1 + JITTER)
    assert max(retries) - min(retries) > LONGEST_PAUSE * JITTER / 2
