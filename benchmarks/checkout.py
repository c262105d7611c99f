"""What a checkout costs, alone, and around a query; and how many round trips a request takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import peers
from benchmarks.harness import compare
from benchmarks.harness import Figure
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import tell
from benchmarks.peers import Peer
from benchmarks.wire import Wire


#: How long a round lasts, in seconds.
ROUND = 0.02 if QUICK else 0.12

REFERENCE = "psycopg2.pool"

#: What an application does with its connection.
Work = Callable[[Any], object]


def nothing(conn: Any) -> None:
    """Leave the connection as it is."""


def query(sql: str) -> Work:
    """Return work that runs one statement in a transaction, and ends that."""

    def work(conn: Any) -> None:
        cursor = conn.cursor()
        cursor.execute(sql)
        cursor.fetchall()
        cursor.close()
        conn.rollback()

    return work


def loop(peer: Peer, threads: int, work: Work, seconds: float = ROUND) -> float:
    """Return the microseconds between two pairs of get and put, done by so many threads at once."""
    counts = [0] * threads
    barrier = threading.Barrier(threads + 1)
    get, put = peer.get, peer.put
    step = 50 if work is nothing else 1

    def run(number: int) -> None:
        put(get())
        barrier.wait()
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(step):
                conn = get()
                work(conn)
                put(conn)
            count += step
        counts[number] = count

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - start) / sum(counts) * 1e6


def pairs(dsn: str, threads: int, makes: list[Any], work: Work = nothing, name: str = "", title: str = "") -> Question:
    """Compare all peers at one kind of work."""
    made = [make(dsn, threads) for make in makes]
    try:
        return compare(
            name or f"pair-{threads}",
            title or f"One checkout and return, {threads} thread{'s' * (threads > 1)}, all our checks on",
            "µs",
            {peer.name: lambda peer=peer: loop(peer, threads, work) for peer in made},
            REFERENCE,
        )
    finally:
        for peer in made:
            peer.close()


def prices(dsn: str) -> Question:
    """What each of our checks costs, in one thread."""
    variants = {
        "as it is": {},
        "ping after every rest": {"check_idle": 0},
        "check callable": {"check": _look_only},
        "reset callable": {"reset": _look_only},
        "reset=discard": {"reset": "discard"},
        "closed at each return": {"idle_timeout": 0},
    }
    made = {name: peers.ours(dsn, 1, **options) for name, options in variants.items()}
    question = compare(
        "prices",
        "The price of each check, one thread, persistent pool",
        "µs",
        {name: lambda peer=peer: loop(peer, 1, nothing) for name, peer in made.items()},
        "as it is",
    )
    for peer in made.values():
        peer.close()
    return question


def _look_only(conn: Any) -> None:
    pass


def round_trips(server: Any) -> Question:
    """Count the round trips of a read-only request on the wire, and of its warm checkout alone."""
    figures = []
    makes = [
        *peers.ALL,
        peers.theirs_sqlalchemy_ping,
        peers.theirs_psycopg_pool_check,
        peers.ours_autocommit,
        peers.connect_each,
    ]
    for make in makes:
        with Wire(server.port) as wire:
            dsn = f"host=127.0.0.1 port={wire.port} user=postgres dbname=postgres sslmode=disable gssencmode=disable"
            peer = make(dsn, 1)
            work = query("SELECT 1")
            if "autocommit" in peer.name:
                work = _select
            for _ in range(3):  # warm
                conn = peer.get()
                work(conn)
                peer.put(conn)
            trips = []
            for each in (work, nothing):
                before = wire.round_trips
                for _ in range(10):
                    conn = peer.get()
                    each(conn)
                    peer.put(conn)
                trips.append((wire.settled() - before) / 10)
            figures.append(Figure(peer.name, trips[0], trips[0], trips[0], None, {"checkout alone": trips[1]}))
            peer.close()
    return tell(
        Question(
            "round-trips", "Round trips of a request that reads once (counted on the wire)", "round trips", figures
        )
    )


def _select(conn: Any) -> None:
    with conn.cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchall()


@contextmanager
def pinned() -> Iterator[None]:
    """Return a context manager that keeps this process on its first processor: the server's is the last."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    dsn = server.dsn
    few = [make for make in peers.ALL if make is not peers.theirs_zpsycopgda]
    threads = [1, 8] if QUICK else [1, 2, 8, 32]
    return [
        *(pairs(dsn, number, peers.ALL if number == 1 else few) for number in threads),
        pairs(
            dsn, 1, [*few, peers.theirs_sqlalchemy_ping], query("SELECT 1"), "query", "With one SELECT 1, one thread"
        ),
        pairs(dsn, 8, few, query("SELECT pg_sleep(0.001)"), "query-1ms", "With a query of 1 ms, 8 threads"),
        prices(dsn),
        round_trips(server),
    ]
