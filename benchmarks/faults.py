"""A server that goes away: how many users see an error, and how soon all is well again."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import psycopg2

from benchmarks import peers
from benchmarks.harness import Figure
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import tell


IDLE = 8

MAKES = [make for make in peers.ALL if make not in (peers.thread_local, peers.theirs_zpsycopgda)]


def fill(peer: peers.Peer) -> None:
    """Leave 8 idle connections in the pool."""
    barrier = threading.Barrier(IDLE)

    def take() -> None:
        conn = peer.get()
        barrier.wait()
        peer.put(conn)

    takers = [threading.Thread(target=take) for _ in range(IDLE)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()


def killed(dsn: str) -> Question:
    """All backends killed while 8 connections are idle; then 8 users, one after the other."""
    connects = []
    for _ in range(5):
        start = time.perf_counter()
        psycopg2.connect(dsn).close()
        connects.append((time.perf_counter() - start) * 1000)
    slow: Iterable[Any] = [] if QUICK else [peers.theirs_psycopg_pool_check]
    figures = []
    for make in [*MAKES, peers.theirs_sqlalchemy_ping, *slow]:
        peer = make(f"{dsn} application_name=killed", IDLE)
        fill(peer)
        with closing(psycopg2.connect(dsn)) as outside, outside.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'killed'")
        time.sleep(0.2)
        failed, first = 0, 0.0
        for _ in range(IDLE):
            start = time.perf_counter()
            conn = None
            try:
                conn = peer.get()
                first = first or (time.perf_counter() - start) * 1000
                with conn.cursor() as cursor:
                    cursor.execute("SELECT 1")
                conn.rollback()
            except Exception:
                failed += 1
            if conn is not None:
                _put(peer, conn)
        figures.append(Figure(peer.name, failed, failed, failed, None, {"first checkout ms": first}))
        peer.close()
    return tell(
        Question(
            "killed",
            "All backends killed, 8 idle connections: failures among the next 8 users",
            f"of {IDLE}",
            figures,
            note=f"A connect takes {statistics.median(connects):.1f} ms here.",
        )
    )


def _put(peer: peers.Peer, conn: Any) -> None:
    try:
        peer.put(conn)
    except Exception:
        pass


def restarted(server: Any) -> Question:
    """The server restarts while 8 threads ask it: who fails after it is back, and until when."""
    figures = []
    for make in MAKES:
        peer = make(server.dsn, IDLE)
        fill(peer)
        failures: list[float] = []
        successes: list[float] = []
        is_over = threading.Event()

        def ask(
            peer: peers.Peer = peer, failures: Any = failures, successes: Any = successes, over: Any = is_over
        ) -> None:
            while not over.is_set():
                conn = None
                try:
                    conn = peer.get()
                    with conn.cursor() as cursor:
                        cursor.execute("SELECT 1")
                    conn.rollback()
                    successes.append(time.perf_counter())
                except Exception:
                    failures.append(time.perf_counter())
                    time.sleep(0.005)
                if conn is not None:
                    _put(peer, conn)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(IDLE)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.halt()
        server.launch()
        back = time.perf_counter()
        time.sleep(1.0 if QUICK else 3.0)
        is_over.set()
        for thread in threads:
            thread.join(5)
        late = [when for when in failures if when > back]
        first = min((when for when in successes if when > back), default=back + 60) - back
        figures.append(
            Figure(
                peer.name,
                len(late),
                len(late),
                len(late),
                None,
                {
                    "first success ms": first * 1000,
                    "last failure ms": (max(late) - back) * 1000 if late else 0,
                    "requests after it": len([when for when in successes if when > back]),
                },
            )
        )
        if not any(thread.is_alive() for thread in threads):
            peer.close()
    return tell(
        Question(
            "restarted", "The server restarts under 8 busy threads: failures after it is back", "failures", figures
        )
    )


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    return [killed(server.dsn), restarted(server)]
