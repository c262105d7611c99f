"""The history of the pools: what is sampled, measured and told, how much of it, and nothing where nobody asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
import zope.event
from psycopg2.extensions import make_dsn
from zope.interface.verify import verifyObject

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import KINDS
from conftest import Outside
from conftest import run
from zpgpool.interfaces import IObserver
from zpgpool.monitor import history
from zpgpool.monitor.history import begin
from zpgpool.monitor.history import BOUNDS
from zpgpool.monitor.history import EVERY
from zpgpool.monitor.history import History
from zpgpool.monitor.history import history_of
from zpgpool.monitor.history import Incident
from zpgpool.monitor.history import INCIDENTS
from zpgpool.monitor.history import SPAN


MakePool = Callable[..., Any]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Nobody asked for each single time, before and after each test."""
    history._exporters.clear()
    yield
    history._exporters.clear()


def kinds(pool: Any) -> list[tuple[str, int]]:
    return [(incident.kind, incident.count) for incident in history_of(pool).incidents]


def test_nothing_is_kept_where_nobody_asked(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zope.event, "subscribers", [])  # a status page of another test asks for good
    pool = make_pool(idle_timeout=60)
    pool.getconn()
    pool.putconn()
    assert pool._notifier.observers == []
    assert pool not in history._histories


def test_a_history_observes() -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, open=False)
    assert verifyObject(IObserver, history_of(pool))
    assert history_of(pool) is history_of(pool)
    assert pool._notifier.observers == [history_of(pool)]


def test_a_pool_that_opens_a_connection_has_one_from_then_on(make_pool: MakePool) -> None:
    begin()
    begin()
    pool = make_pool(idle_timeout=60)
    pool.getconn()
    pool.putconn()
    assert pool._notifier.observers == [history_of(pool)]
    eventually(lambda: history_of(pool).samples)  # the timer was told that there is an observer now
    assert sum(history_of(pool).times["create_time"].read()[0]) == 1


class TestSamples:
    def test_are_taken_by_the_rounds_of_the_timer(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 3, idle_timeout=600, prune_interval=30)
        pool._timer = None
        kept = history_of(pool)
        now = time.monotonic()
        assert pool.run_maintenance(now) == now + EVERY
        conns = [pool.getconn() for _ in range(3)]
        pool.putconn(conns.pop())
        assert pool.run_maintenance(now + 1) == now + EVERY
        assert pool.run_maintenance(now + EVERY) == now + 2 * EVERY
        assert [(sample.used, sample.idle, sample.waiting) for sample in kept.samples] == [(0, 0, 0), (2, 1, 0)]
        assert [sample.at for sample in kept.samples] == [now, now + EVERY]
        for conn in conns:
            pool.putconn(conn)

    def test_of_ten_minutes_are_kept(self) -> None:
        pool = zpgpool.ThreadedConnectionPool(0, 1, open=False)
        kept = history_of(pool)
        for number in range(1000):
            kept.maintain(number * EVERY)
        assert len(kept.samples) == SPAN / EVERY
        assert kept.samples[-1].at - kept.samples[0].at == SPAN - EVERY

    @pytest.mark.parametrize("kind", ["threaded", "persistent"])
    def test_tell_the_longest_wait(self, make_pool: MakePool, kind: str) -> None:
        pool = make_pool(KINDS[kind], 0, 1, idle_timeout=60, timeout=20)
        pool._timer = None
        kept = history_of(pool)
        conn = pool.getconn()
        kept.maintain(5)  # the wait for the connect is in a sample of its own: it may be the longest
        waiter = Call(lambda: pool.putconn(pool.getconn()))
        eventually(pool.waiters)
        time.sleep(0.05)
        kept.maintain(10)
        pool.putconn(conn)
        waiter.result()
        kept.maintain(20)
        kept.maintain(30)
        _, *samples = kept.samples
        waits = [sample.wait for sample in samples]
        assert 0.05 <= waits[0] <= waits[1]
        assert waits[2] == 0
        assert [sample.waiting for sample in samples] == [1, 0, 0]

    def test_do_not_keep_a_pool_alive(self) -> None:
        kept = history_of(zpgpool.ThreadedConnectionPool(0, 1, open=False))
        due = kept.maintain(10)
        assert list(kept.samples) == []
        assert due is not None
        assert due <= 10  # at once

    def test_of_a_simple_pool_are_taken_in_passing(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.SimpleConnectionPool, 0, 2, idle_timeout=60)
        kept = history_of(pool)
        pool.putconn(pool.getconn())
        assert len(kept.samples) == 1


class TestTimes:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_use_have_every_use(self, make_pool: MakePool, kind: str) -> None:
        pool = make_pool(KINDS[kind], 1, 2, idle_timeout=60)
        kept = history_of(pool)
        for close in (False, False, True):
            conn = pool.getconn()
            time.sleep(0.002)
            pool.putconn(conn, close=close)
        counts, total = kept.times["use_time"].read()
        assert sum(counts) == 3
        assert counts[0] == 0
        assert 0.006 <= total < 5

    def test_of_waits_agree_with_the_counters(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60, timeout=20)
        kept = history_of(pool)

        def use() -> None:
            for _ in range(10):
                with pool.connection() as conn:
                    run(conn, "SELECT pg_sleep(0.001)")

        for call in [Call(use) for _ in range(6)]:
            call.result()
        stats = pool.get_stats()
        counts, total = kept.times["wait_time"].read()
        assert sum(counts) == stats["requests_queued"] > 0
        assert round(total * 1000) == pytest.approx(stats["requests_wait_ms"], abs=1)
        assert sum(kept.times["use_time"].read()[0]) == stats["requests_num"] == 60

    def test_have_their_bounds(self) -> None:
        times = history.Times()
        for seconds in (0.0, 0.001, 0.0011, 10.0, 11.0):
            times.add(seconds)
        counts, total = times.read()
        assert counts == [2, 1, *[0] * (len(BOUNDS) - 3), 1, 1]
        assert total == pytest.approx(21.0021)

    def test_each_single_one_waits_for_an_exporter_only(self) -> None:
        kept = History(zpgpool.ThreadedConnectionPool(0, 1, open=False))
        kept.used(1.0)
        assert list(kept.drain()) == []
        begin(exporter=self)
        kept.used(2.0)
        kept.waited(3.0)
        assert list(kept.drain()) == [("use_time", 2.0), ("wait_time", 3.0)]
        assert list(kept.drain()) == []


class TestTales:
    def test_of_what_goes_wrong(self, make_pool: MakePool, outside: Outside) -> None:
        begin()
        pool = make_pool(idle_timeout=60, leak_after=5)
        pool._timer = None
        for _ in range(2):
            in_thread(lambda: pool.getconn() and None)
        pool.run_maintenance(time.monotonic())
        eventually(lambda: kinds(pool) == [("thread reclaimed", 2)])
        pool.getconn()
        pool.run_maintenance(time.monotonic() + 6)
        pool.putconn()
        outside.terminate()
        pool.getconn()
        pool.resize(0, 1)
        for _ in range(2):  # each with words of its own
            with pytest.raises(zpgpool.PoolTimeout):
                in_thread(lambda: pool.getconn(timeout=0.05))
        pool.putconn()
        assert kinds(pool) == [
            ("thread reclaimed", 2),
            ("held for long", 1),
            ("server gone", 1),
            ("timed out", 2),
        ]
        assert "Held by thread MainThread" in history_of(pool).incidents[-1].text
        assert time.time() - 60 < history_of(pool).incidents[0].at <= time.time()

    def test_of_a_server_that_refuses_without_a_secret(self, dsn: str) -> None:
        begin()
        there = psycopg2.extensions.parse_dsn(dsn)
        pool = zpgpool.ThreadedConnectionPool(
            0, 1, make_dsn(**{**there, "dbname": "hunter2db", "user": "hunter2user", "password": "hunter2"}), open=False
        )

        def ask() -> Incident:
            with pytest.raises(psycopg2.OperationalError):
                pool.getconn()
            [incident] = history_of(pool).incidents
            return incident

        assert ask().count == 1
        eventually(lambda: ask().count == 2)  # after a pause, in which nobody tries
        incident = ask()
        assert incident.kind == "connect failed"
        assert "FATAL" in incident.text
        assert "hunter2" not in incident.text
        assert there["host"] not in incident.text

    def test_are_few(self) -> None:
        kept = History(zpgpool.ThreadedConnectionPool(0, 1, open=False))
        for number in range(200):
            kept._tell("test", str(number))
        assert [incident.text for incident in kept.incidents] == [str(number) for number in range(200 - INCIDENTS, 200)]

    def test_other_events_are_nobodys_business(self) -> None:
        begin()
        zope.event.notify("something else")
        zope.event.notify(object())


def test_a_forked_child_begins_anew(make_pool: MakePool) -> None:
    begin()
    pool = make_pool(idle_timeout=60)
    pool._timer = None
    pool.getconn()
    pool.putconn()
    kept = history_of(pool)
    kept.maintain(10)
    kept._tell("test", "of the parent")
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        result = b"no"
        try:
            empty = not kept.samples and not kept.incidents and sum(kept.times["use_time"].read()[0]) == 0
            pool.getconn()
            pool.putconn()
            result = b"ok" if empty and sum(kept.times["use_time"].read()[0]) == 1 else b"no"
        finally:
            os.write(writer, result)
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 2) == b"ok"
    os.close(reader)
    os.close(writer)
    assert len(kept.samples) == 1


def test_what_a_forked_child_is_told() -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, open=False)
    kept = history_of(pool)
    kept._tell("test", "of the parent")
    pool._forget()
    assert not kept.incidents
    assert pool._is_long


def test_many_threads_lose_no_count() -> None:
    times = history.Times()

    def add() -> None:
        for _ in range(2000):
            times.add(0.1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(times.read()[0]) == 8000


class Broken:
    """An observer that fails at everything."""

    def fail(self, *args: Any) -> Any:
        raise ValueError("observed too closely")

    waited = used = maintain = tell = forget = fail


def test_an_observer_that_fails_costs_nobody_anything(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, idle_timeout=60, timeout=20)
    pool._timer = None
    pool.observe(Broken())
    history = history_of(pool)
    conn = pool.getconn()
    waiting = Call(lambda: pool.putconn(pool.getconn()))
    eventually(lambda: pool.waiters())
    pool.putconn(conn)
    waiting.result()
    assert pool.get_stats()["pool_available"] == 1
    assert pool.run_maintenance(time.monotonic()) is not None
    assert len(history.samples) == 1
    assert sum(history.times["use_time"].read()[0]) == 2
    assert "an observer of <ThreadedConnectionPool" in caplog.text
