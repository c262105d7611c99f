"""More threads than connections: throughput, waiting, fairness, errors."""

from __future__ import annotations

import threading
import time
from typing import Any

from benchmarks import peers
from benchmarks.harness import Figure
from benchmarks.harness import percentile
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import tell
from benchmarks.peers import Peer


SECONDS = 1.0 if QUICK else 4.0
CONNECTIONS = 4
WORK = 0.005

#: Those that have a limit.
MAKES = [
    make
    for make in peers.ALL
    if make not in (peers.thread_local, peers.theirs_dbutils_persistent, peers.theirs_zpsycopgda)
]


class User:
    """A thread that wants a connection for 5 ms, again and again, until `end`."""

    def __init__(self, peer: Peer, end: float) -> None:
        self.peer, self.end = peer, end
        self.waits: list[float] = []
        self.errors = 0

    def work(self) -> None:
        """Do that."""
        while (start := time.perf_counter()) < self.end:
            conn = self.get()
            if conn is None:
                return
            self.waits.append(time.perf_counter() - start)
            with conn.cursor() as cursor:
                cursor.execute(f"SELECT pg_sleep({WORK})")
            conn.rollback()
            self.peer.put(conn)

    def get(self) -> Any:
        """Who is refused tries again after a millisecond."""
        while time.perf_counter() < self.end + 1:
            try:
                return self.peer.get()
            except Exception:
                self.errors += 1
                time.sleep(0.001)
        return None


def overload(dsn: str, times: int) -> Question:
    """Ask with so many times more threads than connections."""
    threads = CONNECTIONS * times
    figures = []
    for make in MAKES:
        peer = make(dsn, CONNECTIONS)
        users = [User(peer, time.perf_counter() + SECONDS) for _ in range(threads)]
        workers = [threading.Thread(target=user.work) for user in users]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        waits = [wait * 1000 for user in users for wait in user.waits]
        counts = [len(user.waits) for user in users]
        rate = sum(counts) / SECONDS
        figures.append(
            Figure(
                peer.name,
                rate,
                rate,
                rate,
                rate / (CONNECTIONS / WORK),
                {
                    "errors": sum(user.errors for user in users),
                    "Jain": sum(counts) ** 2 / (threads * sum(count * count for count in counts)),
                    "p50 ms": percentile(waits, 50),
                    "p99 ms": percentile(waits, 99),
                    "max ms": max(waits),
                },
            )
        )
        peer.close()
    ideal = (threads - CONNECTIONS) / CONNECTIONS * WORK * 1000
    return tell(
        Question(
            f"overload-{times}",
            f"{threads} threads over {CONNECTIONS} connections, 5 ms each",
            "/s",
            figures,
            "the ideal",
            is_less_better=False,
            note=f"The ideal is 800 checkouts a second, and a wait of {ideal:g} ms for everyone. Who cannot wait is "
            "refused, and tries again after 1 ms: those are the errors.",
        )
    )


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    return [overload(server.dsn, times) for times in ([8] if QUICK else [4, 8, 16])]
