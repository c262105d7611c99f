"""The hand-over, which knows no database: the tests hand over numbered places."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from conftest import Call
from conftest import eventually
from zpgpool.handoff import Closed
from zpgpool.handoff import Handoff
from zpgpool.handoff import LineFull
from zpgpool.handoff import Place
from zpgpool.handoff import Ticket


class Number(Place):
    """A place that holds a number."""

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
    place = handoff.room()
    assert place is not None
    handoff.filled(place)
    return place


FOREVER = 1e9


class TestWithoutWaiting:
    def test_there_is_room_for_as_many_as_the_limit(self) -> None:
        handoff = new(2)
        places = [handoff.take(), handoff.take()]
        assert None not in places
        assert handoff.take() is None
        assert len(handoff) == 2

    def test_a_place_that_nobody_refers_to_any_more_is_room_again(self) -> None:
        handoff = new(1)
        for _ in range(5):
            assert handoff.take() is not None

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

    def test_a_vacated_place_is_room(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        assert handoff.take() is None
        handoff.vacate(place)
        assert handoff.take() is not place

    def test_may_fill_is_asked_with_the_number_being_filled(self) -> None:
        asked = []

        def may_fill(filling: int) -> bool:
            asked.append(filling)
            return filling == 0

        handoff = new(5, may_fill=may_fill)
        place = handoff.take()
        assert place is not None
        assert handoff.take() is None
        handoff.filled(place)
        assert handoff.take() is not None
        assert asked == [0, 1, 0]

    def test_get_returns_none_when_there_is_nothing_and_no_time(self) -> None:
        handoff = new(1)
        place = handoff.get(until=0, clock=Clock())
        assert place is not None
        assert handoff.get(until=0, clock=Clock()) is None
        assert not handoff.line


class TestWaiting:
    def wait(self, handoff: Handoff[Number], **options: Any) -> Call:
        before = len(handoff.line)
        call = Call(lambda: handoff.get(FOREVER, clock=Clock(), **options))
        eventually(lambda: len(handoff.line) > before)
        return call

    def test_waiters_are_served_first_come_first_served(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        first, second = self.wait(handoff), self.wait(handoff)
        handoff.park("a", place)
        assert first.result() is place
        assert second.is_running
        handoff.park("a", place)
        assert second.result() is place

    def test_who_comes_later_does_not_pass_the_line(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        first = self.wait(handoff)
        handoff.parked["x"] = place  # in the moment between a park and its look at the line
        second = Call(lambda: handoff.get(FOREVER, clock=Clock()))
        assert first.result() is place
        eventually(lambda: handoff.line)
        assert second.is_running
        handoff.park("a", place)
        assert second.result() is place

    def test_freed_room_serves_the_line(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        waiter = self.wait(handoff)
        handoff.vacate(place)
        new_place = waiter.result()
        assert new_place is not place
        assert not new_place.is_filled

    def test_a_finished_filling_serves_the_line(self) -> None:
        handoff = new(2, may_fill=lambda filling: filling == 0)
        place = handoff.take()
        assert place is not None
        waiter = self.wait(handoff)
        handoff.filled(place)
        assert not waiter.result().is_filled

    def test_the_time_is_for_the_whole_wait(self) -> None:
        handoff, clock = new(1), Clock()
        place = filled(handoff)
        waiter = Call(lambda: handoff.get(10, clock=clock))
        eventually(lambda: handoff.line)
        clock.now = 9.9
        handoff.line[0].bell.put(None)  # a bell for nothing: it goes on waiting
        assert waiter.is_running
        clock.now = 10
        handoff.line[0].bell.put(None)
        assert waiter.result() is None
        assert not handoff.line
        handoff.park("a", place)
        assert handoff.parked["a"] is place

    def test_one_more_than_max_waiting_is_refused_at_once(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        waiters = [self.wait(handoff, max_waiting=2) for _ in range(2)]
        with pytest.raises(LineFull):
            handoff.get(FOREVER, max_waiting=2, clock=Clock())
        for waiter in waiters:
            handoff.park("a", place)
            waiter.result()

    def test_whom_free_room_will_serve_does_not_count_as_waiting(self) -> None:
        handoff = new(2, may_fill=lambda filling: filling == 0)
        first = handoff.take()
        assert first is not None
        second, third = self.wait(handoff, max_waiting=1), self.wait(handoff, max_waiting=1)
        with pytest.raises(LineFull):
            handoff.get(FOREVER, max_waiting=1, clock=Clock())
        handoff.filled(first)
        place = second.result()
        assert not place.is_filled
        handoff.park("a", first)
        assert third.result() is first

    def test_closing_wakes_all(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        waiters = [self.wait(handoff) for _ in range(3)]
        handoff.close()
        for waiter in waiters:
            with pytest.raises(Closed):
                waiter.result()
        with pytest.raises(Closed):
            handoff.get(FOREVER)
        assert not handoff.is_empty.is_set()
        handoff.vacate(place)
        assert handoff.is_empty.is_set()

    def test_closing_an_empty_one(self) -> None:
        handoff = new(1)
        handoff.close()
        assert handoff.is_empty.is_set()
        assert handoff.room() is None

    def test_who_joins_while_it_closes_does_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handoff = new(1)
        place = filled(handoff)
        join = handoff._join

        def close_then_join(*args: Any) -> None:
            handoff.close()
            join(*args)

        monkeypatch.setattr(handoff, "_join", close_then_join)  # the moment between a look and the joining
        with pytest.raises(Closed):
            handoff.get(FOREVER, clock=Clock())
        assert place

    def test_fail_gives_each_an_error_of_its_own(self) -> None:
        handoff = new(1)
        place = filled(handoff)
        waiters = [self.wait(handoff) for _ in range(2)]
        handoff.fail(lambda: ZeroDivisionError("each"))
        errors = []
        for waiter in waiters:
            with pytest.raises(ZeroDivisionError) as caught:
                waiter.result()
            errors.append(caught.value)
        assert errors[0] is not errors[1]
        handoff.park("a", place)
        assert handoff.parked["a"] is place

    @pytest.mark.parametrize("is_filled", [True, False])
    def test_what_an_interrupted_waiter_was_given_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, is_filled: bool
    ) -> None:
        handoff = new(1)
        place = filled(handoff)

        def interrupted_wait(ticket: Any, *args: Any) -> None:
            if is_filled:
                handoff.park("a", place)
            else:
                handoff.vacate(place)
            assert ticket.is_settled
            raise KeyboardInterrupt

        monkeypatch.setattr(handoff, "_wait", interrupted_wait)  # stands for a signal
        with pytest.raises(KeyboardInterrupt):
            handoff.get(FOREVER, clock=Clock())
        assert not handoff.line
        assert (handoff.take() is place) == is_filled

    def test_an_interrupted_waiter_that_was_given_nothing_leaves_the_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handoff = new(1)
        place = filled(handoff)

        def interrupted_wait(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(handoff, "_wait", interrupted_wait)  # stands for a signal
        with pytest.raises(KeyboardInterrupt):
            handoff.get(FOREVER, clock=Clock())
        assert not handoff.line
        assert place

    @pytest.mark.parametrize("is_filled", [True, False])
    def test_what_nobody_takes_goes_home(self, is_filled: bool) -> None:
        """The waiter gives up between the giver's look at the line and the giving."""
        handoff = new(1)
        place = filled(handoff) if is_filled else None
        gone: Ticket[Number] = Ticket(0.0)
        gone.settle(None)
        handoff.line.append(gone)
        if place is not None:
            handoff.park("a", place)
            assert list(handoff.parked.values()) == [place]
        else:
            handoff.serve()
            assert len(handoff) == 0
        assert not handoff.line

    def test_a_waiter_looks_for_itself_from_time_to_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Real time: what an interrupted giver left undone is found."""
        monkeypatch.setattr("zpgpool.handoff.LOOK_AGAIN", 0.01)
        tidied: list[int] = []
        handoff = new(1, tidy=lambda: tidied.append(1))
        place = filled(handoff)
        waiter = self.wait(handoff)
        eventually(lambda: tidied)
        handoff.parked["x"] = place  # parked, and then interrupted before the look at the line
        assert waiter.result(2) is place
