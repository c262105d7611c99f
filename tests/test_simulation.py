"""The simulation of a fleet keeps the hand-over's rules, and what queueing theory knows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.simulation import Fleet
from benchmarks.simulation import Pool
from benchmarks.simulation import simulate
from benchmarks.simulation import Site


def erlang_c(servers: int, load: float) -> float:
    """Return the share of those who wait for one of so many servers (Erlang, 1917)."""
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(load**number / math.factorial(number) for number in range(servers)) + last)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["maxconn", "shared", "processors"])
def test_random_requests_wait_as_long_as_theory_says(limit: str) -> None:
    servers, service, rate = 4, 0.010, 280.0
    site = Site(processes=1, threads=64, maxconn=64, service=service, think=0.001, rate=rate, seconds=500.0)
    outcome = simulate(Site(**{**vars(site), limit: servers}))
    expected = erlang_c(servers, rate * service) / (servers / service - rate)
    assert statistics.fmean(outcome.waits) == pytest.approx(expected, rel=0.06)
    assert outcome.refused == 0


def test_the_same_seed_gives_the_same() -> None:
    site = Site(processes=2, maxconn=2, rate=300.0, seconds=2.0)
    assert simulate(site) == simulate(site)
    assert simulate(site) != simulate(Site(**{**vars(site), "seed": 2}))


class Users:
    """Threads that come when they are told to, hold for a second, and note what they got."""

    def __init__(self, **site: Any) -> None:
        self.fleet = Fleet(Site(processes=0, **site))
        self.pool = Pool(self.fleet)
        self.seen: list[tuple[int, float, bool]] = []

    def come(self, thread: int, at: float) -> None:
        self.fleet.env.process(self._use(thread, at))

    def _use(self, thread: int, at: float) -> Generator[Any, Any, None]:
        env = self.fleet.env
        yield env.timeout(at)
        is_served = yield from self.pool.get(thread)
        self.seen.append((thread, env.now, is_served))
        if is_served:
            yield env.timeout(1)
            self.pool.put(thread)

    def run(self) -> list[tuple[int, float, bool]]:
        self.fleet.env.run(100)
        return self.seen


def test_first_come_first_served() -> None:
    users = Users(maxconn=1)
    for thread in range(4):
        users.come(thread, thread / 10)
    assert users.run() == [(0, 0.0, True), (1, 1.0, True), (2, 2.0, True), (3, 3.0, True)]
    assert users.fleet.outcome.connections == 1


def test_a_thread_finds_its_own() -> None:
    users = Users(maxconn=2)
    users.come(0, 0.0)
    users.come(1, 0.1)
    users.run()
    assert list(users.pool._parked) == [0, 1]
    users.fleet.env.process(users._use(0, 0.0))
    users.fleet.env.run(100.5)
    assert list(users.pool._parked) == [1]


def test_who_waits_for_too_long_is_refused() -> None:
    users = Users(maxconn=1, timeout=0.5)
    users.come(0, 0.0)
    users.come(1, 0.1)
    users.come(2, 0.7)
    assert users.run() == [(0, 0.0, True), (1, 0.6, False), (2, 1.0, True)]


def test_who_finds_too_many_waiting_is_refused_at_once() -> None:
    users = Users(maxconn=1, max_waiting=1)
    for thread in range(3):
        users.come(thread, thread / 10)
    assert users.run() == [(0, 0.0, True), (2, 0.2, False), (1, 1.0, True)]


def test_nothing_begins_while_the_server_stands_still() -> None:
    site = Site(processes=1, rate=100.0, seconds=10.0, stall=(4.0, 6.0), timeout=60.0)
    assert 1.9 < max(simulate(site).waits) < 2.5


def test_the_kept_run_agrees_with_the_real_one() -> None:
    """What docs/fleets.rst speaks of was reproduced before."""
    path = Path(__file__).parent.parent / "docs" / "benchmarks" / "results.json"
    questions = {question["name"]: question for question in json.loads(path.read_text())["questions"]}
    for name in ("fleet-direct", "fleet-pgbouncer"):
        means = {figure["peer"]: figure["value"] for figure in questions[name]["figures"]}
        assert means["simulated"] == pytest.approx(means["real"], rel=0.10)
    assert {"fleet-10-70", "fleet-100-70", "fleet-1000-70"} <= set(questions)
