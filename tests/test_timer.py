"""The timer: each pool is maintained when it says, by one thread, whatever happens in a pool."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import zpgpool
from conftest import Call
from conftest import DEFAULTS
from conftest import eventually
from conftest import is_within
from conftest import Outside
from conftest import run
from zpgpool.core.timer import MaintenanceTimer
from zpgpool.core.timer import timer as process_timer
from zpgpool.core.timer import TRY_AGAIN
from zpgpool.core.workers import start


MakePool = Callable[..., Any]

#: Later than any test lasts.
FAR = 1000.0


class Fake:
    """Something to run_maintenance: notes when it was, and says what it is told to."""

    def __init__(self, *says: float | BaseException | None) -> None:
        self.says = list(says)
        self.times: list[float] = []
        self.threads: set[str] = set()

    def run_maintenance(self, now: float) -> float | None:
        self.times.append(now)
        self.threads.add(threading.current_thread().name)
        says = self.says.pop(0) if self.says else now + FAR
        if isinstance(says, BaseException):
            raise says
        return says


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def idle_timer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> MaintenanceTimer:
    """A timer without a thread: the test calls `run_due`."""
    monkeypatch.setattr(MaintenanceTimer, "_start", lambda self: None)
    return MaintenanceTimer(clock)


@pytest.fixture
def timer() -> Iterator[MaintenanceTimer]:
    """A timer with its thread, in real time."""
    timer = MaintenanceTimer()
    yield timer
    eventually(lambda: not [thread for thread in timer_threads() if thread not in BEFORE])


def timer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zpgpool-timer"]


BEFORE: list[threading.Thread] = []


@pytest.fixture(autouse=True)
def before() -> None:
    """The timer of the process may be running for pools of other modules."""
    BEFORE[:] = timer_threads()


class TestTimes:
    def test_a_watched_pool_is_due_at_once(self, idle_timer: MaintenanceTimer) -> None:
        pool = Fake(150.0)
        idle_timer.watch(pool)
        assert idle_timer.run_due(100.0) == 150.0
        assert pool.times == [100.0]

    def test_and_again_when_it_says(self, idle_timer: MaintenanceTimer) -> None:
        pool = Fake(150.0, 170.0)
        idle_timer.watch(pool)
        for now in (100.0, 149.9, 150.0, 169.9, 171.0):
            idle_timer.run_due(now)
        assert pool.times == [100.0, 150.0, 171.0]

    def test_the_next_time_is_the_earliest_of_all_pools(self, idle_timer: MaintenanceTimer) -> None:
        pools = [Fake(150.0, 190.0), Fake(130.0, 180.0), Fake(170.0)]
        for pool in pools:
            idle_timer.watch(pool)
        assert idle_timer.run_due(100.0) == 130.0
        assert idle_timer.run_due(130.0) == 150.0
        assert idle_timer.run_due(160.0) == 170.0
        assert [pool.times for pool in pools] == [[100.0, 160.0], [100.0, 130.0], [100.0]]

    def test_there_is_no_next_time_without_a_pool(self, idle_timer: MaintenanceTimer) -> None:
        assert idle_timer.run_due(100.0) is None

    def test_a_pool_that_says_never_is_not_tended_again(self, idle_timer: MaintenanceTimer) -> None:
        closed, other = Fake(None), Fake(150.0)
        idle_timer.watch(closed)
        idle_timer.watch(other)
        assert idle_timer.run_due(100.0) == 150.0
        idle_timer.run_due(10_000.0)
        assert closed.times == [100.0]

    def test_hurry_makes_it_due_and_watching_it_again_does_not(
        self, idle_timer: MaintenanceTimer, clock: Clock
    ) -> None:
        pool = Fake(150.0, None)
        idle_timer.watch(pool)
        idle_timer.run_due(100.0)
        clock.now = 120.0
        idle_timer.watch(pool)
        assert idle_timer.run_due(120.0) == 150.0
        idle_timer.hurry(pool)
        assert idle_timer.run_due(120.0) is None
        assert pool.times == [100.0, 120.0]

    def test_a_pool_may_be_watched_from_within_another_ones_round(self, idle_timer: MaintenanceTimer) -> None:
        late = Fake(150.0)

        class Opens(Fake):
            def run_maintenance(self, now: float) -> float | None:
                idle_timer.watch(late)
                return super().run_maintenance(now)

        pool = Opens(None)
        idle_timer.watch(pool)
        assert idle_timer.run_due(100.0) == 100.0
        assert idle_timer.run_due(100.0) == 150.0


class TestExceptions:
    @pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
    def test_are_logged_and_the_pool_is_tried_again_a_second_later(
        self, idle_timer: MaintenanceTimer, caplog: pytest.LogCaptureFixture, error: BaseException
    ) -> None:
        """Pitfall 19."""
        pool = Fake(error, 150.0)
        idle_timer.watch(pool)
        assert idle_timer.run_due(100.0) == 100.0 + TRY_AGAIN
        assert idle_timer.run_due(100.0 + TRY_AGAIN) == 150.0
        (record,) = caplog.records
        assert record.getMessage() == "the maintenance of a pool failed; next try in 1 s"
        assert record.exc_info is not None
        assert record.exc_info[1] is error

    def test_of_one_pool_do_not_touch_the_others(
        self, idle_timer: MaintenanceTimer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Pitfall 19."""
        pools = [Fake(SystemExit()), Fake(150.0), Fake(RuntimeError())]
        for pool in pools:
            idle_timer.watch(pool)
        idle_timer.run_due(100.0)
        assert [pool.times for pool in pools] == [[100.0]] * 3
        assert len(caplog.records) == 2


class TestReferences:
    def test_a_pool_is_held_weakly(self, idle_timer: MaintenanceTimer) -> None:
        pool = Fake()
        idle_timer.watch(pool)
        idle_timer.run_due(100.0)
        del pool
        assert idle_timer.run_due(100.0) is None

    def test_a_pool_that_goes_during_a_round_is_left_out(self, idle_timer: MaintenanceTimer) -> None:
        pools: dict[str, Fake] = {}

        class Drops(Fake):
            def run_maintenance(self, now: float) -> float | None:
                pools.pop("other", None)
                return super().run_maintenance(now)

        first = Drops(150.0)
        idle_timer.watch(first)
        pools["other"] = Fake(120.0)
        idle_timer.watch(pools["other"])
        assert idle_timer.run_due(100.0) == 150.0

    def test_a_pool_that_is_forgotten_during_a_round_is_not_tended(self, idle_timer: MaintenanceTimer) -> None:
        pools: list[Fake] = []

        class Ends(Fake):
            def run_maintenance(self, now: float) -> float | None:
                for pool in pools:
                    idle_timer._due.pop(pool, None)  # as its own end would
                return super().run_maintenance(now)

        first, second = Ends(None), Fake()
        pools.append(second)
        idle_timer.watch(first)
        idle_timer.watch(second)
        idle_timer.run_due(100.0)
        assert second.times == []


class TestThread:
    def test_there_is_none_before_there_is_a_pool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pitfall 19."""
        started: list[object] = []
        monkeypatch.setattr(MaintenanceTimer, "_start", lambda self: started.append(self))
        timer = MaintenanceTimer()
        assert not timer.is_running
        assert started == []
        timer.watch(Fake(None))
        assert started == [timer]

    def test_is_a_daemon_with_a_name_and_works_in_real_time(self, timer: MaintenanceTimer) -> None:
        pool = Fake(0.0, 0.0, None)
        timer.watch(pool)
        eventually(lambda: len(pool.times) == 3)
        assert pool.threads == {"zpgpool-timer"}
        assert pool.times == sorted(pool.times)

    def test_is_one_for_many_pools(self, timer: MaintenanceTimer) -> None:
        """Pitfall 19."""
        pools = [Fake() for _ in range(20)]
        for pool in pools:
            timer.watch(pool)
        eventually(lambda: all(pool.times for pool in pools))
        # Two were started, maybe: the second one ends at once.
        (thread,) = eventually(
            lambda: len(new := [each for each in timer_threads() if each not in BEFORE]) == 1 and new
        )
        assert thread.daemon
        self.end(timer, pools)

    def test_sleeps_until_a_pool_is_due_in_real_time(self, timer: MaintenanceTimer) -> None:
        start = time.monotonic()
        pool = Fake(start + 0.2, None)
        timer.watch(pool)
        eventually(lambda: len(pool.times) == 2)
        assert pool.times[1] - start >= 0.2
        assert is_within(time.monotonic() - start, 5)

    def test_is_woken_by_a_new_pool(self, timer: MaintenanceTimer) -> None:
        sleeper, pool = Fake(), Fake(None)
        timer.watch(sleeper)
        eventually(lambda: sleeper.times)
        timer.watch(pool)
        eventually(lambda: pool.times)
        assert len(sleeper.times) == 1
        self.end(timer, [sleeper])

    def test_ends_when_no_pool_is_left_and_begins_again_with_the_next(self, timer: MaintenanceTimer) -> None:
        """Pitfall 19."""
        for _ in range(3):
            pool = Fake(None)
            timer.watch(pool)
            eventually(partial(getattr, pool, "times"))
            eventually(lambda: not timer.is_running)
            assert len(pool.times) == 1

    def test_ends_when_the_last_pool_is_garbage(self, timer: MaintenanceTimer) -> None:
        start = time.monotonic()  # what it is told is never far: until then it would not notice
        pool = Fake(*[start + number / 20 for number in range(1, 400)])
        timer.watch(pool)
        times = pool.times
        eventually(lambda: times)
        del pool
        eventually(lambda: not timer.is_running)

    def test_survives_a_SystemExit(self, timer: MaintenanceTimer, caplog: pytest.LogCaptureFixture) -> None:
        """Pitfall 19."""
        pool, other = Fake(SystemExit()), Fake(None)
        timer.watch(pool)
        eventually(lambda: caplog.records)
        timer.watch(other)
        eventually(lambda: other.times)
        self.end(timer, [pool])

    @pytest.mark.parametrize("says", [math.inf, 1e10])
    def test_survives_a_pool_whose_time_is_beyond_every_timeout(self, timer: MaintenanceTimer, says: float) -> None:
        """A `prune_interval` of 1e10 seconds is a finite number above 0, and more than `threading.TIMEOUT_MAX`."""
        pool, other = Fake(time.monotonic() + says), Fake(None)
        timer.watch(pool)
        eventually(lambda: pool.times)
        timer.watch(other)
        eventually(lambda: other.times, 3)
        self.end(timer, [pool])

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # it is meant to be
    def test_a_forked_child_begins_anew(self) -> None:
        """Pitfall 17."""
        pool, timer = Fake(), process_timer
        timer.watch(pool)
        eventually(lambda: pool.times)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                was_running = timer.is_running
                other = Fake(None)
                timer.watch(other)
                eventually(lambda: other.times, 5)
                is_tended = len(pool.times) > 1
                os.write(write, repr((was_running, is_tended)).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            assert stream.read() == "(False, False)"
        os.waitpid(pid, 0)
        eventually(lambda: timer.is_running)
        self.end(timer, [pool], last=False)

    def test_is_none_where_uwsgi_is_to_fork(self, timer: MaintenanceTimer, monkeypatch: pytest.MonkeyPatch) -> None:
        """tests/test_servers.py asks a real one."""
        pool, worker = Fake(None), 0
        uwsgi = SimpleNamespace(masterpid=os.getpid, worker_id=lambda: worker)
        monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace())  # somebody else's
        assert start(lambda: None, "test")
        monkeypatch.setitem(sys.modules, "uwsgi", uwsgi)
        timer.watch(pool)
        assert not start(lambda: None, "test")
        assert not timer.is_running
        worker = 1
        timer.watch(pool)
        eventually(lambda: pool.times)

    @staticmethod
    def end(timer: MaintenanceTimer, pools: list[Fake], last: bool = True) -> None:
        for pool in pools:
            pool.says = [None]
            timer.hurry(pool)
        eventually(lambda: all(not pool.says for pool in pools))
        if last:
            eventually(lambda: not timer.is_running)


def test_a_pool_starts_no_thread_where_uwsgi_is_to_fork(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("_thread.start_new_thread", lambda *args: started.append(args))
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(masterpid=os.getpid, worker_id=lambda: 0))
    pool = make_pool(zpgpool.ThreadedConnectionPool, 2, 4, idle_timeout=60)
    pool.putconn(pool.getconn(), close=True)
    pool.drain()
    pool.closeall()
    assert started == []


class TestRealPools:
    @pytest.fixture(autouse=True)
    def own_timer(self, timer: MaintenanceTimer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(DEFAULTS, "timer", timer)

    def test_a_pool_is_tended_in_real_time_and_not_after_it_was_closed(
        self, make_pool: MakePool, outside: Outside, timer: MaintenanceTimer
    ) -> None:
        """Pitfall 19."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=0.1)
        rounds = []
        original = pool.run_maintenance

        def run_maintenance(now: float) -> float | None:
            says: float | None = original(now)
            rounds.append(says)
            return says

        pool.run_maintenance = run_maintenance
        pool.putconn(pool.getconn())
        eventually(lambda: len(rounds) >= 2)
        eventually(lambda: not outside.backends())
        pool.closeall()
        eventually(lambda: not timer.is_running)
        assert rounds[-1] is None
        assert rounds.count(None) == 1

    def test_every_pool_has_the_timer_of_the_process_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert DEFAULTS["timer"] is process_timer

    def test_no_thread_is_there_before_the_first_connection(self, make_pool: MakePool, timer: MaintenanceTimer) -> None:
        """Pitfall 19."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, prune_interval=0.05)
        assert not timer.is_running
        pool.putconn(pool.getconn())
        eventually(lambda: timer.is_running)
        pool.closeall()
        eventually(lambda: not timer.is_running)

    def test_a_pool_for_one_thread_has_none(self, make_pool: MakePool, timer: MaintenanceTimer) -> None:
        pool = make_pool(zpgpool.SimpleConnectionPool, 1, 2, idle_timeout=0.01)
        pool.putconn(pool.getconn())
        assert not timer.is_running

    def test_a_connection_in_use_is_never_touched_by_the_timer_in_real_time(self, make_pool: MakePool) -> None:
        """Pitfall 19: rounds as fast as they can be, and everything idle is due."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, idle_timeout=0.001, prune_interval=0.001, timeout=20)

        def work() -> None:
            for _ in range(100):
                with pool.connection() as conn:
                    pid = run(conn, "SELECT pg_backend_pid()")
                    assert run(conn, "SELECT pg_backend_pid()") == pid

        for call in [Call(work) for _ in range(4)]:
            call.result()
        pool.closeall()
