"""Moments that two threads only meet by chance, played one after the other."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import queue
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
import zope.event

import zpgpool
import zpgpool.core.base
import zpgpool.core.lag
import zpgpool.core.owners
import zpgpool.core.workers
import zpgpool.monitor.history
from conftest import Call
from conftest import DEFAULTS
from conftest import eventually
from conftest import in_thread
from conftest import Outside
from conftest import run
from zpgpool.core.entry import Descriptor
from zpgpool.core.handoff import CLOSING
from zpgpool.core.handoff import Handoff
from zpgpool.core.handoff import OPEN
from zpgpool.core.handoff import QueueFull
from zpgpool.core.handoff import Slot
from zpgpool.core.handoff import Ticket
from zpgpool.core.hangup import hang_up
from zpgpool.core.lines import current_lines
from zpgpool.core.lines import is_users
from zpgpool.core.owners import Holder
from zpgpool.core.session import is_at_end
from zpgpool.core.session import Messages
from zpgpool.core.workers import Gate
from zpgpool.core.workers import Workers
from zpgpool.demo.server import EmbeddedServer


MakePool = Callable[..., Any]

SHARED = [zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool]


@pytest.fixture(params=SHARED)
def pool(request: pytest.FixtureRequest, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pool of two idle connections that no timer maintains."""
    monkeypatch.setitem(DEFAULTS, "timer", None)
    return make_pool(request.param, 2, 2, idle_timeout=60)


def parked(pool: Any) -> tuple[Any, Any]:
    key, entry = next(iter(pool._parked.items()))
    return key, entry


def test_a_pool_that_is_dropped_closes_its_connections(make_pool: MakePool, dsn: str, outside: Outside) -> None:
    pool = zpgpool.ThreadedConnectionPool(2, 2, dsn, idle_timeout=60)
    is_gone = weakref.ref(pool)
    tidy = pool._connections.handoff._tidy
    del pool
    gc.collect()
    eventually(lambda: is_gone() is None)  # the timer may be maintaining it
    eventually(lambda: not outside.backends())
    assert tidy() is None


def test_a_forked_child_forgets_everything(pool: Any, outside: Outside) -> None:
    """Here in the parent, whose sockets are released without a word to the server."""
    conn = pool.getconn()
    zpgpool.core.base._forget_all()
    with pytest.raises(psycopg2.Error):
        run(conn, "SELECT 1")
    assert pool.holders() == []
    assert pool.get_stats()["pool_size"] == 0
    pool.close()
    zpgpool.core.base._forget_all()
    assert pool._connections.handoff.is_closed


def test_an_entry_that_was_taken_meanwhile_is_not_claimed(pool: Any) -> None:
    connections = pool._connections
    key, entry = parked(pool)
    del pool._parked[key]
    assert not connections._claim(key, entry)
    other_key, other = parked(pool)
    assert not connections._claim(other_key, entry)  # its key has another one by now, which stays
    assert list(pool._parked.values()) == [other]
    pool._parked[key] = entry


def test_an_entry_that_was_used_since_it_was_seen_is_not_expired(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = pool._connections
    _, entry = parked(pool)
    entry.since = -math.inf
    claim = connections._claim

    def use_then_claim(key: Any, entry: Any) -> bool:
        entry.since = time.monotonic()
        return bool(claim(key, entry))

    monkeypatch.setattr(connections, "_claim", use_then_claim)
    connections.expire(time.monotonic())
    assert pool.get_stats()["pool_available"] == 2


@pytest.mark.parametrize("look", ["look_at_all", "discard"])
def test_what_was_taken_since_it_was_seen_is_left_alone(
    pool: Any, outside: Outside, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    outside.terminate()
    monkeypatch.setattr(pool._connections, "_claim", lambda key, entry: False)
    if look == "discard":
        pool._connections.discard_parked("", rested_since=-math.inf)
        pool._connections.discard_parked("")
    else:
        pool._connections.look_at_all()
    assert pool.get_stats()["pool_available"] == 2


def test_what_a_dead_thread_held_was_given_back_by_another(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    in_thread(lambda: kept.append(pool.getconn()))
    [(owner, entry)] = pool._users()
    assert pool._remove_user(owner, entry)
    assert not pool._remove_user(owner, entry)
    monkeypatch.setattr(pool, "_users", lambda: [(owner, entry)])
    pool._reap()
    assert entry.state == OPEN
    assert not kept[0].closed
    pool._connections.discard(entry, "")


def test_a_holder_that_has_lost_its_connection(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    conn = pool.getconn()
    [(owner, entry)] = pool._users()
    in_thread(lambda: None)
    ref = entry.ref
    del conn
    assert ref() is None
    holder = Holder.of(owner, entry, time.monotonic(), {})
    assert holder.status == "lost"
    hang_up([entry])
    entry.cancel_handle.send()  # to the session's number and key, which it keeps


def test_where_a_thread_that_has_ended_is(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool)
    owner = in_thread(pool.owner)
    with pool.connection():
        [(_, entry)] = pool._users()
        holder = Holder.of(owner, entry, time.monotonic(), current_lines())
    assert holder.line == "(its thread has ended)"
    assert holder.request == ""


def test_a_socket_that_never_falls_silent_is_given_up(pool: Any) -> None:
    _, entry = parked(pool)
    entry.look = lambda timeout: [(0, 1)]
    assert not entry.is_alive()


def test_a_place_goes_by_those_who_have_left_the_line(pool: Any) -> None:
    handoff = pool._connections.handoff
    gone: list[Ticket[Any]] = [Ticket(0.0, 0.0), Ticket(0.0, 0.0)]
    for ticket in gone:
        ticket.settle(None)
        handoff.queue.append(ticket)
    handoff.serve()
    assert not handoff.queue
    assert pool.get_stats()["pool_available"] == 2


def test_a_server_that_is_down_is_not_tried_at_each_round(pool: Any) -> None:
    for _ in range(6):
        pool._connections.backoff.failed(psycopg2.OperationalError("down"))
    pool._connections.discard_parked("")
    pool.run_maintenance(time.monotonic())
    assert pool.get_stats()["pool_size"] == 0


def test_a_forked_child_forgets_what_is_half_made_or_lost(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    pool._timer = None
    pool.getconn()  # and lost at once
    entries = [pool._connections.handoff.reserve(), *pool._lost]  # and a connect under way
    pool._forget()
    assert pool.get_stats()["pool_size"] == 0
    assert [entry.is_attached for entry in entries] == [False, True]


def test_a_search_that_the_garbage_collector_breaks_in_upon(make_pool: MakePool) -> None:
    """CPython 3.10 and 3.11 may collect garbage whenever a tuple is made; the collector finds a lost connection."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, idle_timeout=60)
    pool._timer = None
    kept, conn = pool.getconn(), pool.getconn()
    other = SimpleNamespace(connection=lambda: None, ref=None)
    pool._used.update({object(): other for _ in range(6000)})  # more than CPython has tuples in stock
    before = gc.get_threshold()
    try:
        gc.disable()
        gc.collect()
        lost = [conn]  # young: it is found soon
        lost.append(lost)
        del conn, lost
        gc.set_threshold(gc.get_count()[0] + 2000)
        gc.enable()
        pool.checkout(kept).putconn()
    finally:
        gc.enable()
        gc.set_threshold(*before)
        for key in [key for key, entry in pool._used.copy().items() if entry is other]:
            del pool._used[key]


def test_the_socket_of_a_lost_entry_closes_itself() -> None:
    """A warning is an error here."""
    ours, peer = socket.socketpair()
    with peer:
        Descriptor(fileno=ours.detach())
        assert peer.recv(1) == b""


def test_what_was_lost_is_closed_with_the_pool(make_pool: MakePool, outside: Outside) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, idle_timeout=60)
    pool._timer = None
    pool.getconn()  # and lost at once
    [entry] = pool._lost
    pool.closeall()
    eventually(lambda: entry.sock.fileno() == -1)
    eventually(lambda: not outside.backends())


def test_a_line_that_everybody_has_left(pool: Any) -> None:
    _, entry = parked(pool)
    assert not pool._connections.handoff._offer(entry)


def test_a_block_with_a_key_of_its_own(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    with pool.connection("key") as conn, pool.connection() as other:
        assert pool.getconn("key") is conn is not other
        [_, second] = pool._users()
        assert pool._remove_user(*second)
        pool._connections.discard(second[1], "")
    assert pool.holders() == []


@pytest.mark.hangs
def test_a_connect_that_hangs_holds_up_the_next_one_for_a_second_only(pool: Any) -> None:
    """Real time."""
    pool.drain()
    connecting = pool._connections.handoff.reserve(pool._connections.backoff.may_connect)
    pool._connections.backoff.doubt()
    start = time.monotonic()
    pool.putconn(pool.getconn())  # although its timeout is 0: there is room for a connect of its own
    assert 0.5 < time.monotonic() - start < 5
    pool._connections.handoff.free(connecting)


def test_who_may_not_wait_does_not_wait_for_another_ones_connect(pool: Any) -> None:
    pool.resize(0, 1)
    pool.drain()
    handoff = pool._connections.handoff
    connecting = handoff.reserve()
    handoff.queue.append(Ticket(0.0, 0.0))  # whom it is for
    with pytest.raises(zpgpool.PoolTimeout, match="exhausted"):
        pool.getconn()
    handoff.queue.clear()
    handoff.free(connecting)


def test_the_collector_stays_as_it_was(pool: Any) -> None:
    conn = pool.getconn()
    gc.disable()
    try:
        assert len(pool.holders()) == 1
        assert not gc.isenabled()
    finally:
        gc.enable()
    pool.putconn(conn)


def test_only_what_was_seen_is_removed(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    pool.getconn("a")
    pool.getconn("b")
    [(_, first), (_, second)] = pool._users()
    assert not pool._remove("a", second)
    assert pool._remove("a", first)
    pool._connections.discard(first, "")


def test_an_entry_that_is_lost_during_a_query_does_not_wait_for_its_end(make_pool: MakePool, outside: Outside) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool)
    conn = pool.getconn()
    [(_, entry)] = pool._users()
    user = Call(run, conn, "SELECT pg_sleep(60)")
    eventually(lambda: outside.runs("SELECT pg_sleep(60)"))
    entry.__del__()  # as the collector does
    with pytest.raises(psycopg2.Error):
        user.result(5)


def test_who_holds_an_error_does_not_hold_a_place_that_was_lost(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    connections = pool._connections
    lost = connections.handoff.reserve()  # a connect that an exception is about to break off
    connections.backoff.failed(psycopg2.OperationalError("down"))
    with pytest.raises(psycopg2.OperationalError, match="down") as caught:
        pool.getconn()
    del lost
    connections.handoff.forget_lost()
    assert len(connections.handoff) == 0
    assert caught.value.__traceback__ is not None


def test_a_closed_pool_says_so_also_when_the_server_is_down(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    pool._connections.backoff.failed(psycopg2.OperationalError("down"))
    pool.close()
    with pytest.raises(zpgpool.PoolClosed):
        pool.getconn()


class TestAKeyThatIsNew:
    """Two threads ask with one key that has no connection yet."""

    def test_the_second_gets_the_first_ones_connection(self, make_pool: MakePool, dsn: str) -> None:
        go = threading.Event()
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, configure=lambda conn: go.wait(10))
        pool._timer = None  # no timer: the first thread ends, and what it holds with it
        first = Call(pool.getconn, "key")
        eventually(lambda: "key" in pool._comers)
        second = Call(pool.getconn, "key")
        go.set()
        assert first.result() is second.result()
        assert not pool._comers
        pool.putconn(key="key")

    def test_who_was_stopped_half_way_is_not_waited_for_for_ever(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("zpgpool.core.keyed.PING", 0.01)
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1)
        pool._comers["key"] = Gate()  # its thread got an exception before it could tell
        conn = pool.getconn("key")
        assert pool.getconn("key") is conn

    def test_what_its_user_closed_was_replaced_meanwhile(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1)
        pool.getconn("key").close()
        monkeypatch.setattr(pool, "_remove", lambda key, entry: False)
        assert pool._conn_of("key", pool.here.owner) is None
        monkeypatch.undo()
        pool.putconn(key="key")

    def test_what_came_first_stays(self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60)
        obtain = pool._obtain
        winner: list[Any] = []

        def obtain_too_late(*args: Any) -> Any:
            entry = obtain(*args)
            if not winner:
                winner.append(obtain(None, 5.0))
                winner[0].owner = pool.here.owner
                pool._used["key"] = winner[0]
            return entry

        monkeypatch.setattr(pool, "_obtain", obtain_too_late)
        assert pool.getconn("key") is winner[0].conn
        assert pool.get_stats()["pool_available"] == 1


class TestResizeUnderALine:
    def test_connections_beyond_the_new_limit_are_closed(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 3, timeout=20, idle_timeout=60)
        held = [pool.getconn() for _ in range(3)]
        waiting = Call(pool.getconn)
        eventually(lambda: pool._queue)
        pool.resize(0, 1)
        pool.putconn(held.pop())
        pool.putconn(held.pop())
        assert waiting.is_running
        assert pool.get_stats()["pool_size"] == 1
        pool.putconn(held.pop())
        pool.putconn(waiting.result())
        assert pool.get_stats()["pool_size"] == 1

    def test_who_was_stopped_before_it_closed_one_is_mended(self, make_pool: MakePool) -> None:
        """Real time: a waiter looks for itself once a second."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 2, 2, timeout=20, idle_timeout=60)
        pool._apply(dataclasses.replace(pool.settings, minconn=0, maxconn=1))  # and then an exception
        conn = pool.getconn()
        assert pool.get_stats()["pool_size"] == 1
        pool.putconn(conn)

    def test_none_is_closed_twice(self, pool: Any) -> None:
        pool._apply(dataclasses.replace(pool.settings, minconn=0, maxconn=1))
        _, entry = parked(pool)
        entry.state = CLOSING  # another thread closes it just now
        pool._connections.trim()
        assert pool.get_stats()["pool_available"] == 2
        entry.state = OPEN

    def test_nothing_rests_any_more(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool._connections, "_claim", lambda key, entry: False)
        pool._apply(dataclasses.replace(pool.settings, minconn=0, maxconn=1))
        pool._connections.trim()
        assert pool.get_stats()["pool_available"] == 2


def test_a_connect_that_hangs_does_not_stop_the_timer(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60, configure=lambda conn: go.wait(10))
    pool._timer = None
    pool._apply(dataclasses.replace(pool.settings, minconn=2))
    assert pool.run_maintenance(time.monotonic()) is not None
    assert pool.run_maintenance(time.monotonic() + 1) is not None  # and starts no second connect before that is done
    assert pool.get_stats()["pool_size"] == 1
    go.set()
    eventually(lambda: pool.get_stats()["pool_available"] == 1)
    pool.run_maintenance(time.monotonic() + 3)
    eventually(lambda: pool.get_stats()["pool_available"] == 2)


def test_idle_timeout_is_exact_behind_a_younger_one(pool: Any) -> None:
    pool._apply(dataclasses.replace(pool.settings, minconn=0))
    (old_key, old), (_, young) = list(pool._parked.items())
    now = time.monotonic()
    old.since, young.since = now - 50, now - 10
    assert pool._connections._claim(old_key, old)  # looked at, for a NOTIFY
    pool._connections.park_again(old_key, old)
    assert list(pool._parked.values()) == [young, old]
    assert min(pool._connections.due_times(now)) == pytest.approx(old.since + 60)
    pool._connections.expire(now + 11)  # for which there is no room to open another one first
    assert list(pool._parked.values()) == [young]
    assert not pool._connections._is_unordered
    assert min(pool._connections.due_times(now + 11)) == pytest.approx(young.since + 60)


def test_two_that_stay_unordered_are_asked_again(pool: Any) -> None:
    (old_key, old), (_, young) = list(pool._parked.items())
    now = time.monotonic()
    old.since, young.since = now - 50, now - 10
    assert pool._connections._claim(old_key, old)
    pool._connections.park_again(old_key, old)
    pool._connections.expire(now)
    assert pool._connections._is_unordered


def test_one_that_must_stay_is_replaced_though_it_rests_behind_a_younger_one(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 2, 3, idle_timeout=60, timer=None)
    (old_key, old), (_, young) = list(pool._parked.items())
    now = time.monotonic()
    old.since, young.since = now - 50, now - 10
    assert pool._connections._claim(old_key, old)
    pool._connections.park_again(old_key, old)
    assert [pool._connections.expire(now + later) for later in (0, 11, 11.5)] == [0, 1, 1]


def test_checkouts_that_are_lost_are_forgotten_without_a_timer(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.PersistentConnectionPool, 1, 2, idle_timeout=60, timer=None)
    for _ in range(200):
        pool.checkout()
    assert len(pool._owners) < 100


def test_closing_notices_what_is_lost_meanwhile(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool)
    kept = [pool.getconn()]
    closing = Call(pool.close, 60)
    eventually(lambda: pool._connections.handoff.is_closed)
    kept.clear()
    closing.result(10)
    assert pool.get_stats()["pool_size"] == 0


def test_a_configure_that_fails_leaves_no_session(make_pool: MakePool, outside: Outside) -> None:
    def fail(conn: Any) -> None:
        raise RuntimeError("not today")

    pool = make_pool(zpgpool.ThreadedConnectionPool, configure=fail)
    for _ in range(5):
        with pytest.raises(RuntimeError):
            pool.getconn()
        eventually(lambda: not outside.backends())


def test_a_connection_that_cannot_be_watched(make_pool: MakePool, outside: Outside, monkeypatch: Any) -> None:
    """No descriptor is left."""

    def fail(number: int) -> int:
        raise OSError(24, "Too many open files")

    pool = make_pool(zpgpool.ThreadedConnectionPool)
    with monkeypatch.context() as patch:
        patch.setattr("os.dup", fail)
        with pytest.raises(OSError, match="Too many"):
            pool.getconn()
    assert pool.get_stats()["pool_size"] == 0
    eventually(lambda: not outside.backends())


def test_the_ends_of_lifetimes_gone_by_are_forgotten(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, max_lifetime=3600)
    for _ in range(50):
        pool.putconn(pool.getconn(), close=True)
    assert len(pool._connections._ends) < 20


def test_a_forked_child_has_a_lock_of_its_own_for_frames(pool: Any) -> None:
    """Another thread of the parent may have been in `holders()`: here in the parent, for what the child does."""
    lock = zpgpool.core.lines._frames_lock
    with lock:
        zpgpool.core.lines._is_collector_off = True
        gc.disable()
        zpgpool.core.lines._renew_frames_lock()
        assert gc.isenabled()
        assert zpgpool.core.lines._frames_lock is not lock
        conn = pool.getconn()
        assert len(pool.holders()) == 1
        pool.putconn(conn)
    zpgpool.core.lines._renew_frames_lock()
    assert gc.isenabled()


class TestAKeyOfSeveralThreads:
    def test_it_is_theirs_as_long_as_one_of_them_lives(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        pool._timer = None
        conn = pool.getconn("key")
        assert in_thread(pool.getconn, "key") is conn
        pool.run_maintenance(time.monotonic())  # the other thread has ended
        assert run(conn, "SELECT 1") == 1
        assert pool.getconn("key") is conn
        pool.putconn(key="key")

    def test_its_first_thread_may_end_before(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        pool._timer = None
        conns = [in_thread(pool.getconn, "key")]
        conns.append(pool.getconn("key"))
        pool.run_maintenance(time.monotonic())
        assert run(conns[1], "SELECT 1") == 1
        assert [holder.thread for holder in pool.holders()] == ["MainThread"]
        pool.putconn(key="key")


def test_a_simple_pool_that_was_resized_closes_what_comes_back(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.SimpleConnectionPool, 0, 3, idle_timeout=60)
    conns = [pool.getconn() for _ in range(3)]
    pool.resize(0, 1)
    for conn in conns:
        pool.putconn(conn)
    assert pool.get_stats()["pool_size"] == 1


@pytest.mark.parametrize("factory", SHARED)
def test_a_hold_whose_connection_was_ended_by_others(make_pool: MakePool, factory: Any) -> None:
    pool = make_pool(factory, idle_timeout=60)
    hold = pool.checkout()
    [(owner, entry)] = pool._users()
    assert pool._remove_user(owner, entry)
    pool._connections.discard(entry, "")
    hold.putconn()
    assert pool.get_stats()["pool_size"] == 0


def test_a_refill_that_is_overtaken_by_close_is_silent(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pools: list[Any] = []

    def fail(conn: Any) -> None:
        if len(pools) == 2:
            pools[0].close(0)
        raise RuntimeError("not today")

    for expected in (1, 1):
        pools.append(make_pool(zpgpool.ThreadedConnectionPool, 1, 2, open=False, configure=fail, timer=None))
        with pytest.raises(RuntimeError):
            pools[0]._connections.refill()
        assert caplog.text.count("cannot connect: not today") == expected


def test_idle_connections_leave_no_time_below_minconn(make_pool: MakePool, outside: Outside) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 2, 4, idle_timeout=60, timer=None)
    before = outside.backends()
    sizes = []
    now = time.monotonic() + 61

    def is_replaced() -> bool:
        nonlocal now
        now += 0.5
        pool.run_maintenance(now)
        sizes.append(len(outside.backends()))
        return not outside.backends() & before

    eventually(is_replaced)
    assert min(sizes) >= 2


def test_idle_connections_are_replaced_at_once_where_there_is_no_room(make_pool: MakePool, outside: Outside) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 2, 2, idle_timeout=60, timer=None)
    before = outside.backends()
    pool.run_maintenance(time.monotonic() + 61)
    eventually(lambda: pool.run_maintenance(time.monotonic() + 1) and len(outside.backends() - before) == 2)


class TestWhatTwoThreadsRarelyDo:
    """Single steps, as another thread would meet them."""

    def test_no_connection_is_opened_for_who_has_one(self, make_pool: MakePool) -> None:
        """The ticket is answered, and not out of the queue yet; or what was parked is not given to it yet."""
        pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, idle_timeout=60, timer=None)
        handoff, opener = pool._connections.handoff, pool._connections.opener
        pool.putconn(pool.getconn())
        handoff.queue.append(Ticket(0.0, math.inf))
        opener.fill()
        [(key, entry)] = pool._parked.items()
        del pool._parked[key]
        handoff.queue[0].settle(entry)
        opener.fill()
        assert len(handoff) == 1
        handoff.queue.clear()
        handoff.park(key, entry)

    def test_what_is_judged_for_long_is_not_waited_for(self, pool: Any) -> None:
        _, entry = parked(pool)
        entry.state = CLOSING
        assert pool._connections._coming(time.monotonic()) == 1
        assert pool._connections._coming(-math.inf) == 0
        entry.state = OPEN

    def test_a_ticket_that_has_just_left_the_queue(self, pool: Any) -> None:
        ticket: Ticket[Any] = Ticket(0.0, -math.inf)
        pool._parked.clear()
        pool._connections.handoff._wait(ticket, lambda: 99, time.monotonic)
        assert not ticket.is_settled

    def test_one_of_several_unordered_ones_was_taken(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pool._connections._is_unordered = True
        monkeypatch.setattr(pool._connections, "_claim", lambda key, entry: False)
        assert list(pool._connections._claim_idle(math.inf, 5)) == []

    def test_locks_are_renewed_in_a_child(self) -> None:
        for module in (zpgpool.core.lag, zpgpool.monitor.history):
            before = module._lock
            module._renew_lock()
            assert module._lock is not before

    def test_the_task_of_a_thread_that_lives_is_kept(self) -> None:
        me = threading.get_ident()
        with zpgpool.task("mine"):
            zpgpool.core.owners.forget_tasks([me])
            assert me in zpgpool.core.tasks
        zpgpool.core.tasks[-1] = "nobody's"
        zpgpool.core.owners.forget_tasks([-1, -2])
        assert -1 not in zpgpool.core.tasks

    def test_frames_where_python_has_no_bug(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("zpgpool.core.lines.HAS_FRAMES_BUG", False)
        assert threading.get_ident() in current_lines()

    def test_a_connection_that_was_returned_by_another_thread(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60)
        with pool.connection():
            owner = pool.owner()
            entry, owner.entry = owner.entry, None
            original = pool._remove_user
            pool._remove_user = lambda owner, entry: False
            owner.entry = entry
            assert not in_thread(pool.putconn_of, owner)
            pool._remove_user = original
        keyed = make_pool(zpgpool.ThreadedConnectionPool, idle_timeout=60)
        conn = keyed.getconn("key")
        [(_, used)] = keyed._users()
        keyed._put_away("other", used)
        keyed.putconn(conn, "key")
        assert pool.holders() == keyed.holders() == []

    def test_a_worker_that_finds_work_when_it_is_about_to_end(self) -> None:
        class Queue:
            def __init__(self) -> None:
                self.answers: list[Any] = [None, lambda: done.append(1), None]

            def get(self, timeout: float) -> Any:
                answer = self.answers.pop(0)
                if answer is None:
                    raise queue.Empty
                return answer

            def empty(self) -> bool:
                return not self.answers

        done: list[int] = []
        workers = Workers("never-started", 1)
        workers._tasks = Queue()  # type: ignore[assignment]  # one that the test drives
        workers._work()
        assert done == [1]
        workers._threads.add(threading.current_thread())
        workers._work()  # one too many: it ends at once

    def test_a_thread_that_cannot_be_started_by_the_one_that_was_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        done: list[int] = []
        zpgpool.core.workers._start(lambda: done.append(1), "started")
        eventually(lambda: done == [1])
        monkeypatch.setattr(threading.Thread, "start", fail)
        zpgpool.core.workers._start(lambda: done.append(2), "not started")
        assert done == [1, 2]

    def test_a_query_has_a_second_to_end_after_its_cancel(
        self, make_pool: MakePool, outside: Outside, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The process's own may all be busy with the silent servers of other tests: then the socket is cut at once.
        monkeypatch.setattr("zpgpool.core.watchdog.cancellers", Workers("test-cancel", most=1))
        pool = make_pool(zpgpool.PersistentConnectionPool, hold_limit=10, timer=None)
        conn = pool.getconn()
        [(_, entry)] = pool._users()
        entry.cancel_handle = Silent()
        user = Call(run, conn, "SELECT pg_sleep(60)")
        eventually(lambda: outside.runs("SELECT pg_sleep(60)"))
        pool.run_maintenance(entry.since + 10.1)
        pool.run_maintenance(entry.since + 10.9)
        assert user.is_running
        pool.run_maintenance(entry.since + 11.1)
        with pytest.raises(psycopg2.Error):
            user.result(5)
        pool.putconn()


class Silent:
    def send(self) -> None:
        """Do not reach the server."""


def test_who_was_ended_is_told_of_once(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1, hold_limit=5, timer=None)
    conn = pool.getconn()
    now = time.monotonic()
    for seconds in (5.1, 5.2, 7):
        pool.run_maintenance(now + seconds)
    assert caplog.text.count("held for over 5 s, and ended") == 1
    with pytest.raises(psycopg2.Error):
        conn.cursor().execute("SELECT 1")
    pool.putconn(conn)
    assert pool.get_stats()["pool_size"] == 0


def test_a_message_may_come_after_its_connection(dsn: str) -> None:
    conn = psycopg2.connect(dsn)
    messages = Messages(conn)
    conn.close()
    del conn
    messages.append("too late")
    assert list(messages) == ["too late"]


class TestWhereAThreadIs:
    def test_the_user_s_own_line_comes_first(self, make_pool: MakePool) -> None:
        with make_pool(zpgpool.PersistentConnectionPool) as pool, pool.connection():
            [holder] = pool.holders()
        users, inside = holder.line.split(", inside ")
        assert users.startswith(f"{__file__}:")
        assert users.endswith(" in test_the_user_s_own_line_comes_first")
        assert inside.endswith(" in _current_frames")

    def test_of_a_thread_without_a_line_of_the_user_s(self) -> None:
        thread = threading.Thread(target=(gate := threading.Event()).wait)
        thread.start()
        try:
            assert thread.ident is not None
            assert "inside" not in current_lines()[thread.ident]
        finally:
            gate.set()
            thread.join()

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/srv/shop/views.py", True),
            ("/srv/venv/lib/python3.12/site-packages/flask/app.py", False),
            ("/usr/lib/python3/dist-packages/psycopg2/extras.py", False),
            (threading.__file__, False),
            ("<frozen importlib._bootstrap>", False),
            (zpgpool.__file__, False),
            (str(Path(zpgpool.__file__).parent / "demo" / "app.py"), True),
        ],
    )
    def test_whose_a_file_is(self, path: str, expected: bool) -> None:
        assert is_users(path) is expected


class TestWhatALossLeaves:
    def test_a_transaction_that_psycopg2_does_not_know_of_is_ended(self, make_pool: MakePool) -> None:
        pool = make_pool(zpgpool.ThreadedConnectionPool, autocommit=True, idle_timeout=60)
        conn = pool.getconn()
        run(conn, "BEGIN")
        pool.putconn(conn)
        with pool.connection() as conn:
            assert conn.get_transaction_status() == psycopg2.extensions.TRANSACTION_STATUS_IDLE

    def test_a_persistent_pool_replaces_what_its_thread_has_lost(self, make_pool: MakePool, outside: Outside) -> None:
        pool = make_pool(zpgpool.PersistentConnectionPool, idle_timeout=60)
        conn = pool.getconn()
        outside.terminate()
        with pytest.raises(psycopg2.OperationalError):
            run(conn, "SELECT 1")
        assert run(pool.getconn(), "SELECT 2") == 2
        pool.putconn()

    def test_those_behind_max_waiting_are_told(self) -> None:
        handoff: Handoff[Slot] = Handoff(Slot, 1)
        tickets: list[Ticket[Any]] = [Ticket(0.0, 0.0) for _ in range(3)]
        handoff.queue.extend(tickets)
        handoff.shed(None)
        assert not any(ticket.is_settled for ticket in tickets)
        handoff.shed(1)
        assert [ticket.is_settled for ticket in tickets] == [False, True, True]
        assert isinstance(tickets[1].settle(None), QueueFull)

    def test_nobody_is_first_in_a_queue_that_is_empty(self) -> None:
        handoff: Handoff[Slot] = Handoff(Slot, 1)
        assert not handoff._is_first(Ticket(0.0, 0.0))


def test_who_does_not_hang_up_is_cut(own_server: EmbeddedServer) -> None:
    """A server that has stopped behind its query: it is neither cancelled, nor does it end."""
    pool = zpgpool.ThreadedConnectionPool(0, 1, f"{own_server.dsn} options='-c client_min_messages=error'", open=False)
    conn = pool.getconn()
    [entry] = pool._connections.handoff.slots
    pid = conn.get_backend_pid()
    call = Call(run, conn, "SELECT pg_sleep(60)")
    eventually(lambda: entry.is_active)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert not entry.let_end(time.monotonic() + 0.05)
        assert not entry.let_end(time.monotonic() - 1)  # no time is left
        hang_up([entry])
        with pytest.raises(psycopg2.OperationalError):
            call.result()
    finally:
        os.kill(pid, signal.SIGCONT)
    pool.closeall()


def test_a_connection_that_a_pool_has_closed_meanwhile_is_told_of_once(make_pool: MakePool) -> None:
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 1)
    told: list[Any] = []
    zope.event.subscribers.append(told.append)
    conn = pool.getconn()
    [entry] = pool._connections.handoff.slots
    pool.detach(conn)
    pool._connections.detach(entry)
    assert [type(event).__name__ for event in told] == ["ConnectionOpened", "ConnectionClosed"]
    conn.close()


def test_an_end_that_psycopg2_has_not_noticed(dsn: str, outside: Outside) -> None:
    conn = psycopg2.connect(dsn)
    assert not is_at_end(conn)
    outside.terminate(conn.get_backend_pid())
    assert is_at_end(conn)
    conn.close()
    assert not is_at_end(conn)  # its user has closed it


def test_greenlets_are_refused(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = zpgpool.ThreadedConnectionPool(0, 1, dsn, open=False)

    def get_ident(original: Callable[[], int] = threading.get_ident) -> int:
        return original()

    get_ident.__module__ = "gevent.thread"
    monkeypatch.setattr(threading, "get_ident", get_ident)
    with pytest.raises(zpgpool.PoolError, match="gevent has put greenlets"):
        pool.getconn()
    with pytest.raises(zpgpool.PoolError, match="gevent has put greenlets"):
        zpgpool.ThreadedConnectionPool(0, 1, dsn, open=False)
