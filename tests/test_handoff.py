"""The hand-over, which knows no database: the tests hand over numbered slots."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from conftest import Call
from conftest import eventually
from zpgpool.core.handoff import Closed
from zpgpool.core.handoff import CONNECTING
from zpgpool.core.handoff import Handoff
from zpgpool.core.handoff import OPEN
from zpgpool.core.handoff import PUBLISHING
from zpgpool.core.handoff import QueueFull
from zpgpool.core.handoff import Slot
from zpgpool.core.handoff import Ticket


class Number(Slot):
    """A slot that holds a number."""

    numbers = itertools.count()
    __slots__ = ("number",)

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.numbers)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def new(limit: int = 2, **options: Any) -> Handoff[Number]:
    return Handoff(Number, limit, **options)


def filled(handoff: Handoff[Number]) -> Number:
    slot = handoff.reserve()
    assert slot is not None
    slot.state = OPEN
    return slot


FOREVER = 1e9


class TestWithoutWaiting:
    def test_there_is_room_for_as_many_as_the_limit(self) -> None:
        handoff = new(2)
        slots = [handoff.reserve(), handoff.reserve()]
        assert None not in slots
        assert handoff.reserve() is None
        assert len(handoff) == 2

    def test_a_place_that_nobody_refers_to_any_more_is_room_again(self) -> None:
        handoff = new(1)
        for _ in range(5):
            assert handoff.reserve() is not None
            assert handoff.reserve() is None
            handoff.forget_lost()

    def test_what_was_parked_last_is_taken_first(self) -> None:
        handoff = new(2)
        first, second = filled(handoff), filled(handoff)
        handoff.park("a", first)
        handoff.park("b", second)
        assert handoff.take() is second
        assert handoff.take() is first

    def test_a_key_finds_its_own(self) -> None:
        handoff = new(2)
        first, second = filled(handoff), filled(handoff)
        handoff.park("a", first)
        handoff.park("b", second)
        assert handoff.parked.pop("a") is first

    def test_parking_never_overwrites(self) -> None:
        handoff = new(2)
        first, second = filled(handoff), filled(handoff)
        handoff.park("a", first)
        handoff.park("a", second)
        assert handoff.parked == {"a": first, second: second}

    def test_a_new_one_is_parked_in_the_step_in_which_it_is_no_longer_coming(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        seen = []

        class Lock:
            """Of its holder's steps the others see what there is before the first, and after the last."""

            def __enter__(self) -> None:
                seen.append((slot.is_coming, slot in handoff.parked.values()))

            def __exit__(self, *exc_info: object) -> None:
                self.__enter__()

        handoff._lock = Lock()
        for state in (CONNECTING, PUBLISHING):
            slot.state = state
            handoff.publish(slot)
            assert seen == [(True, False), (False, True)]
            assert handoff.take() is slot
            seen.clear()

    def test_who_may_not_wait_gets_what_came_in_the_last_moment(self) -> None:
        handoff = new(1)
        slot = filled(handoff)

        def coming() -> int:
            handoff.parked[slot] = slot  # by another thread, which will serve the queue next
            return 0

        assert handoff.get(until=0, coming=coming, clock=Clock()) is slot
        assert not handoff.queue

    def test_a_vacated_place_is_room(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        assert handoff.reserve() is None
        assert handoff.free(slot)
        assert not handoff.free(slot)  # by another thread: once only
        assert handoff.reserve() not in (None, slot)

    def test_may_fill_is_asked_with_the_number_being_filled(self) -> None:
        asked = []

        def may_fill(filling: int) -> bool:
            asked.append(filling)
            return filling == 0

        handoff = new(5)
        slot = handoff.reserve(may_fill)
        assert slot is not None
        assert handoff.reserve(may_fill) is None
        slot.state = OPEN
        assert handoff.reserve(may_fill) is not None
        assert asked == [0, 1, 0]

    def test_get_returns_none_when_there_is_nothing_and_no_time(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        assert handoff.get(until=0, clock=Clock()) is None
        assert not handoff.queue
        handoff.park("a", slot)
        assert handoff.get(until=0, clock=Clock()) is slot

    def test_beyond_a_lowered_limit_nothing_is_taken(self) -> None:
        handoff = new(2)
        slots = [filled(handoff), filled(handoff)]
        handoff.park("a", slots[0])
        handoff.limit = 1
        assert handoff.take() is None
        assert handoff.free(slots[1])
        assert handoff.take() is slots[0]


def filler(handoff: Handoff[Number]) -> None:
    """Have room filled at once, as a server does that needs no time for a connect."""

    def fill() -> None:
        slot = handoff.reserve()
        if slot is not None:
            slot.state = OPEN
            handoff.park(slot, slot)

    handoff._fill = fill


class TestWaiting:
    def wait(self, handoff: Handoff[Number], **options: Any) -> Call:
        before = len(handoff.queue)
        call = Call(lambda: handoff.get(FOREVER, clock=Clock(), **options))
        eventually(lambda: len(handoff.queue) > before)
        return call

    def test_waiters_are_served_first_come_first_served(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        first, second = self.wait(handoff), self.wait(handoff)
        handoff.park("a", slot)
        assert first.result() is slot
        assert second.is_running
        handoff.park("a", slot)
        assert second.result() is slot

    def test_who_comes_later_does_not_pass_the_queue(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        first = self.wait(handoff)
        handoff.parked["x"] = slot  # in the moment between a park and its look at the queue
        second = Call(lambda: handoff.get(FOREVER, clock=Clock()))
        assert first.result() is slot
        eventually(lambda: handoff.queue)
        assert second.is_running
        handoff.park("a", slot)
        assert second.result() is slot

    def test_freed_room_serves_the_queue(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        waiter = self.wait(handoff)
        filler(handoff)
        handoff.free(slot)
        assert waiter.result() is not slot

    def test_who_comes_first_is_served_whoever_had_room_filled(self) -> None:
        fills: list[Number | None] = []
        handoff = new(1)
        handoff._fill = lambda: fills.append(handoff.reserve())
        first, second = self.wait(handoff), self.wait(handoff)
        [slot] = [slot for slot in fills if slot is not None]
        slot.state = OPEN
        handoff.park(slot, slot)
        assert first.result() is slot
        assert second.is_running
        handoff.park(slot, slot)
        assert second.result() is slot

    def test_a_waiter_whose_time_is_up_may_stay_a_little(self) -> None:
        handoff, asked = new(1), []
        slot = filled(handoff)

        def coming() -> int:
            asked.append(len(handoff.queue))
            if len(asked) == 3:
                handoff.park("a", slot)
            return int(len(asked) < 5)

        assert handoff.get(0, coming=coming, clock=Clock()) is slot
        assert asked == [1, 1, 1]
        assert handoff.get(0, coming=coming, clock=Clock()) is None
        assert not handoff.queue

    def test_whoever_is_served_while_it_is_counted_is_not_ahead(self) -> None:
        handoff, counted = new(1), []
        slot = filled(handoff)
        first = Call(lambda: handoff.get(20, clock=Clock()))
        eventually(lambda: len(handoff.queue) == 1)

        def coming() -> int:
            """One is on its way, which the first gets now; then none."""
            counted.append(1)
            if len(counted) == 1:
                handoff.park(slot, slot)
                handoff.serve()
                first.result()
                return 1
            return 0

        assert handoff.get(0, coming=coming, clock=Clock()) is None
        assert len(counted) == 2

    def test_the_time_is_for_the_whole_wait(self) -> None:
        handoff, clock = new(1), Clock()
        slot = filled(handoff)
        waiter = Call(lambda: handoff.get(10, clock=clock))
        eventually(lambda: handoff.queue)
        clock.now = 9.9
        handoff.queue[0].wakeup.put(None)  # a wake-up for nothing: it goes on waiting
        assert waiter.is_running
        clock.now = 10
        handoff.queue[0].wakeup.put(None)
        assert waiter.result() is None
        assert not handoff.queue
        handoff.park("a", slot)
        assert handoff.parked["a"] is slot

    def test_one_more_than_max_waiting_is_refused_at_once(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        waiters = [self.wait(handoff, max_waiting=2) for _ in range(2)]
        with pytest.raises(QueueFull):
            handoff.get(FOREVER, max_waiting=2, clock=Clock())
        for waiter in waiters:
            handoff.park("a", slot)
            waiter.result()

    def test_whom_free_room_will_serve_does_not_count_as_waiting(self) -> None:
        handoff = new(2)
        first = handoff.reserve()  # a connect is under way, and there is room for another one
        assert first is not None
        waiters = [self.wait(handoff, max_waiting=1) for _ in range(3)]
        with pytest.raises(QueueFull):
            handoff.get(FOREVER, max_waiting=1, clock=Clock())
        first.state = OPEN
        for waiter in waiters:
            handoff.park("a", first)
            assert waiter.result() is first

    def test_closing_wakes_all(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        waiters = [self.wait(handoff) for _ in range(3)]
        handoff.close()
        for waiter in waiters:
            with pytest.raises(Closed):
                waiter.result()
        with pytest.raises(Closed):
            handoff.get(FOREVER)
        assert not handoff.is_empty.wait(0)
        handoff.free(slot)
        assert handoff.is_empty.wait(0)

    def test_closing_an_empty_one(self) -> None:
        handoff = new(1)
        handoff.close()
        assert handoff.is_empty.wait(0)
        assert handoff.reserve() is None

    def test_who_joins_while_it_closes_does_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handoff = new(1)
        slot = filled(handoff)
        join = handoff._join

        def close_then_join(*args: Any) -> None:
            handoff.close()
            join(*args)

        monkeypatch.setattr(handoff, "_join", close_then_join)  # the moment between a look and the joining
        with pytest.raises(Closed):
            handoff.get(FOREVER, clock=Clock())
        assert slot

    def test_fail_gives_each_an_error_of_its_own(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        waiters = [self.wait(handoff) for _ in range(2)]
        handoff.fail(lambda: ZeroDivisionError("each"))
        errors = []
        for waiter in waiters:
            with pytest.raises(ZeroDivisionError) as caught:
                waiter.result()
            errors.append(caught.value)
        assert errors[0] is not errors[1]
        handoff.park("a", slot)
        assert handoff.parked["a"] is slot

    def test_what_an_interrupted_waiter_was_given_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handoff = new(1)
        slot = filled(handoff)

        def interrupted_wait(ticket: Any, *args: Any) -> None:
            handoff.park("a", slot)
            assert ticket.is_settled
            raise KeyboardInterrupt

        monkeypatch.setattr(handoff, "_wait", interrupted_wait)  # stands for a signal
        with pytest.raises(KeyboardInterrupt):
            handoff.get(FOREVER, clock=Clock())
        assert not handoff.queue
        assert handoff.take() is slot

    def test_an_interrupted_waiter_that_was_given_nothing_leaves_the_queue(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handoff = new(1)
        slot = filled(handoff)

        def interrupted_wait(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(handoff, "_wait", interrupted_wait)  # stands for a signal
        with pytest.raises(KeyboardInterrupt):
            handoff.get(FOREVER, clock=Clock())
        assert not handoff.queue
        assert slot

    def test_what_nobody_takes_goes_home(self) -> None:
        """The waiter gives up between the giver's look at the queue and the giving."""
        handoff = new(1)
        slot = filled(handoff)
        gone: Ticket[Number] = Ticket(0.0, 0.0)
        gone.settle(None)
        handoff.queue.append(gone)
        handoff.park("a", slot)
        assert list(handoff.parked.values()) == [slot]
        assert not handoff.queue

    def test_an_error_for_one_waiter_is_for_no_other(self) -> None:
        handoff = new(1)
        slot = filled(handoff)
        waiters = [self.wait(handoff) for _ in range(3)]
        handoff.fail(lambda: ZeroDivisionError("one"), handoff.queue[1])
        handoff.fail(lambda: ZeroDivisionError("one"), Ticket(0.0, 0.0))  # which has left
        with pytest.raises(ZeroDivisionError):
            waiters[1].result()
        for waiter in (waiters[0], waiters[2]):
            handoff.park("a", slot)
            assert waiter.result() is slot

    def test_a_waiter_looks_for_itself_from_time_to_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Real time: what an interrupted giver left undone is found."""
        monkeypatch.setattr("zpgpool.core.handoff.LOOK_AGAIN", 0.01)
        tidied: list[int] = []
        handoff = new(1, tidy=lambda: tidied.append(1))
        slot = filled(handoff)
        waiter = self.wait(handoff)
        eventually(lambda: tidied)
        handoff.parked["x"] = slot  # parked, and then interrupted before the look at the queue
        assert waiter.result(2) is slot
