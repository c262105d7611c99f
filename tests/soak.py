"""The scenario of `make stress` that counts: a million checkouts, and nothing grows."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from collections.abc import Sequence

from attacks import Forks
from invariants import descriptors
from invariants import memory
from scenario import GROWTH
from struck import Site


#: Of each in a lap, and how many laps there are over each of two pools when this is the only scenario: a million
#: checkouts, 300,000 requests, 20,000 threads, 100 forks.
CHECKOUTS = 10_000
REQUESTS = 3_000
THREADS = 200
LAPS = 50

#: After so many laps everything is as large as it will be.
WARM = 10

#: So many KiB, descriptors and threads more are no growth: a pool at rest has 0 to 6 connections, each with two
#: descriptors, and its threads end after two seconds without work.
MORE = (GROWTH, 12, 8)


class Soak(Forks):
    """Checkouts, requests, threads and forks, in laps; for so many laps, when it is chosen, otherwise for its time."""

    def begin(self) -> None:
        self.query("DROP TABLE IF EXISTS stress")
        self.query("CREATE TABLE stress (number int, state text)")
        self.laps = 0
        self.warm: tuple[int, int, int] | None = None

    def helpers(self) -> Sequence[Callable[[], object]]:
        return []

    def attack(self, seconds: float) -> None:
        self.site = Site(self, itertools.count())
        super().attack(float("inf") if self.is_alone else seconds)

    def step(self) -> bool:
        for _ in range(CHECKOUTS):
            self.pool.putconn(self.pool.getconn())
        self.in_threads(self.serve, 3)
        for _ in range(THREADS // 10):
            self.in_threads(self.check_out, 10)
        self.fork()
        self.counts |= {
            "checkout": self.counts.get("checkout", 0) + CHECKOUTS + THREADS,
            "request": self.counts.get("request", 0) + REQUESTS,
            "thread": self.counts.get("thread", 0) + THREADS,
        }
        self.count("fork")
        self.laps += 1
        if self.laps % WARM == 0:
            self.query("TRUNCATE stress")
            self.measure()
        return not self.is_alone or self.laps < LAPS

    @staticmethod
    def in_threads(function: Callable[[], object], number: int) -> None:
        threads = [threading.Thread(target=function) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def serve(self) -> None:
        dice = random.Random(self.laps)
        for _ in range(REQUESTS // 3):
            self.site.serve(dice)

    def check_out(self) -> None:
        with self.in_time():
            conn = self.pool.getconn()
        self.check_begins(conn)
        with conn.cursor() as cursor:
            cursor.execute("SELECT 1")
        self.pool.putconn(conn)

    def measure(self) -> None:
        """Remember how large everything is, or compare it with that."""
        self.pool.run_maintenance(0.0)
        now = memory(), descriptors(), threading.active_count()
        if self.warm is None:
            self.warm = now
            self.memory = now[0]
        kinds = zip(("KiB", "descriptors", "threads"), self.warm, MORE, now, strict=True)
        for what, was, more, is_now in kinds:
            if is_now > was + more:
                self.problems.append(f"after {self.laps} laps {was} {what} have become {is_now}")
        print(f"  {self.laps} laps: {now[0]:,} KiB, {now[1]} descriptors, {now[2]} threads", flush=True)
