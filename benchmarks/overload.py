"""More threads than connections: throughput, waiting, fairness, errors."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from benchmarks import peers
from benchmarks.harness import compare
from benchmarks.harness import percentile
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.peers import Peer


SECONDS = 1.0 if QUICK else 2.0
#: The fewest rounds whose median has an interval, and one more.
ROUNDS = 7
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


class Crowd:
    """Many users of one peer, round after round."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self.peer, self.threads = peer, threads
        self.rounds: list[list[User]] = []

    def measure(self) -> float:
        """Return how many uses there were in a second, until the last one of those who wait in the end."""
        start = time.perf_counter()
        users = [User(self.peer, start + SECONDS) for _ in range(self.threads)]
        workers = [threading.Thread(target=user.work) for user in users]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.rounds.append(users)
        return sum(len(user.waits) for user in users) / (time.perf_counter() - start)

    def more(self) -> dict[str, float]:
        """Return the errors, the fairness of the median round, and the waits."""
        users = [user for users in self.rounds for user in users]
        waits = [wait * 1000 for user in users for wait in user.waits]
        return {
            "errors": sum(user.errors for user in users),
            "Jain": statistics.median(fairness([len(user.waits) for user in users]) for users in self.rounds),
            "p50 ms": percentile(waits, 50),
            "p99 ms": percentile(waits, 99),
            "max ms": max(waits),
        }


def fairness(counts: list[int]) -> float:
    """Return Jain's index: 1 when everyone has had as much as the others."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


def overload(dsn: str, times: int) -> Question:
    """Ask with so many times more threads than connections."""
    threads = CONNECTIONS * times
    crowds = {peer.name: Crowd(peer, threads) for peer in (make(dsn, CONNECTIONS) for make in MAKES)}
    # Near what can be reached at all: as many threads as connections, each with its own. That it connects in each
    # round, as its threads are new, costs it less than a hundredth.
    limit = peers.thread_local(dsn, CONNECTIONS)
    crowds[limit.name] = Crowd(limit, CONNECTIONS)
    wait = (threads - CONNECTIONS) / CONNECTIONS * WORK * 1000
    try:
        return compare(
            f"overload-{times}",
            f"{threads} threads over {CONNECTIONS} connections, 5 ms each",
            "/s",
            {name: crowd.measure for name, crowd in crowds.items()},
            "the ideal",
            is_less_better=False,
            rounds=3 if QUICK else ROUNDS,
            note=f"The ideal is 800 checkouts a second, and a wait of {wait:g} ms for everyone. Who cannot wait is "
            f"refused, and tries again after 1 ms: those are the errors. The limit has {CONNECTIONS} threads, each "
            "with a connection of its own.",
            more=lambda name: crowds[name].more(),
            ideal=CONNECTIONS / WORK,
        )
    finally:
        for crowd in crowds.values():
            crowd.peer.close()


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    return [overload(server.dsn, times) for times in ([8] if QUICK else [4, 8, 16])]
