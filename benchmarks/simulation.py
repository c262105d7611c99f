"""A fleet of processes on one database, simulated: the hand-over's rules, and the limits that stand behind it.

Times are in seconds. The same site and seed give the same outcome.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from dataclasses import field
from random import Random
from typing import Any

import simpy


@dataclass(frozen=True)
class Site:
    """What is simulated: processes with threads and a pool each, and the database behind them."""

    processes: int
    threads: int = 16
    maxconn: int = 16
    timeout: float = 10.0
    max_waiting: int | None = None
    #: Connections to the server that all processes share, as PgBouncer does it; None: each pool has its own.
    shared: int | None = None
    #: How many queries the server runs at a time; None: as many as come.
    processors: int | None = None
    #: The mean time that a request takes of the database, and before that of its thread alone; exponential.
    service: float = 0.010
    think: float = 0.050
    #: What a query takes beyond its service: the way, and the interpreter.
    overhead: float = 0.0
    #: From when until when the server begins nothing, as behind a lock that everybody wants.
    stall: tuple[float, float] = (0.0, 0.0)
    #: Requests a second, of all processes; None: each thread begins the next one when it has ended one.
    rate: float | None = None
    seconds: float = 20.0
    seed: int = 1


@dataclass
class Outcome:
    """What the requests have met after the first tenth of the time."""

    #: From asking for a connection until the server works on it, of those that were answered.
    waits: list[float] = field(default_factory=list)
    #: From the arrival until the answer, or the 503.
    answers: list[float] = field(default_factory=list)
    refused: int = 0
    #: The most connections that the server had at a time.
    connections: int = 0


class Pool:
    """The hand-over of one process: `src/zpgpool/handoff.py` in its rules."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._parked: dict[int, None] = {}
        self._line: deque[simpy.Event] = deque()
        self._size = 0

    def get(self, thread: int) -> Generator[simpy.Event, Any, bool]:
        """Get a connection for `thread`; return whether there was one."""
        site, env = self._fleet.site, self._fleet.env
        if thread in self._parked:  # its own, past the line
            del self._parked[thread]
            return True
        if not self._line:
            if self._parked:
                self._parked.popitem()
                return True
            if self._size < site.maxconn:
                self._size += 1
                self._fleet.connected()
                return True
        if site.max_waiting is not None and len(self._line) >= site.max_waiting:
            return False
        ticket = env.event()
        self._line.append(ticket)
        yield ticket | env.timeout(site.timeout)
        if not ticket.triggered:
            self._line.remove(ticket)
        return bool(ticket.triggered)

    def put(self, thread: int) -> None:
        """Park the connection, then look at the line."""
        self._parked[thread] = None
        if self._line:
            self._parked.popitem()
            self._line.popleft().succeed()


class Fleet:
    """The processes, and what they share."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.env = simpy.Environment()
        self.outcome = Outcome()
        self._limits = [
            simpy.Resource(self.env, capacity) for capacity in (site.shared, site.processors) if capacity is not None
        ]
        for process in range(site.processes):
            pool = Pool(self)
            arrivals = simpy.Store(self.env) if site.rate is not None else None
            for thread in range(site.threads):
                random = Random(f"{site.seed}-{process}-{thread}")
                self.env.process(self._work(pool, thread, random, arrivals))
            if arrivals is not None:
                self.env.process(self._arrive(arrivals, Random(f"{site.seed}-{process}")))

    def run(self) -> Outcome:
        """Let the time pass."""
        self.env.run(self.site.seconds)
        if self.site.shared is not None:
            self.outcome.connections = min(self.outcome.connections, self.site.shared)
        return self.outcome

    def connected(self) -> None:
        """Count a connection, which is there from now on."""
        self.outcome.connections += 1

    def _arrive(self, arrivals: simpy.Store, random: Random) -> Generator[simpy.Event, Any, None]:
        rate = (self.site.rate or 0.0) / self.site.processes
        while True:
            yield self.env.timeout(random.expovariate(rate))
            arrivals.put(self.env.now)

    def _work(
        self, pool: Pool, thread: int, random: Random, arrivals: simpy.Store | None
    ) -> Generator[simpy.Event, Any, None]:
        env, site, outcome = self.env, self.site, self.outcome
        while True:
            arrival = env.now if arrivals is None else (yield arrivals.get())
            think, service = random.expovariate(1 / site.think), random.expovariate(1 / site.service)
            yield env.timeout(think)
            asked = env.now
            is_served = yield from pool.get(thread)
            if is_served:
                granted = []
                for limit in self._limits:
                    granted.append(request := limit.request())
                    yield request
                if site.stall[0] <= env.now < site.stall[1]:
                    yield env.timeout(site.stall[1] - env.now)
                began = env.now
                yield env.timeout(service + site.overhead)
                for limit, request in zip(self._limits, granted, strict=True):
                    limit.release(request)
                pool.put(thread)
            if asked >= site.seconds / 10:
                outcome.answers.append(env.now - arrival)
                if is_served:
                    outcome.waits.append(began - asked)
                else:
                    outcome.refused += 1


def simulate(site: Site) -> Outcome:
    """Return what the requests of `site` meet."""
    return Fleet(site).run()
