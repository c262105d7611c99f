"""The order that makes the hand-over safe, shown twice.

A model of its steps, in which every interleaving is tried; and the code itself, whose threads are switched at every
touch of shared state, as a schedule says, through every schedule (two threads) or those with few switches (four).
Each has a negative control: with the wrong order a waiter must be stranded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest

from zpgpool.core.handoff import Handoff
from zpgpool.core.handoff import OPEN
from zpgpool.core.handoff import Slot


# The model ------------------------------------------------------------------------------------------------------------

# A state is (parked, line, answers, programs): how many slots rest; the waiters in line, in order; what each waiter
# was answered (None, "given", "gave up"); and for each thread where it stands and what it holds.
State = tuple[int, tuple[int, ...], tuple[str | None, ...], tuple[tuple[str, int], ...]]

RETURNER, WAITER = "returner", "waiter"


def steps(state: State, thread: int, kind: str, waiter: int, is_right: bool, may_give_up: bool) -> Iterator[State]:
    """Yield the states that one atomic step of `thread` can lead to."""
    parked, line, answers, programs = state
    where, held = programs[thread]

    def at(where: str, held: int, parked: int = parked, line: Any = line, answers: Any = answers) -> State:
        return (parked, line, answers, (*programs[:thread], (where, held), *programs[thread + 1 :]))

    def answered(value: str) -> tuple[str | None, ...]:
        return (*answers[:waiter], value, *answers[waiter + 1 :])

    if where == "start":
        if kind == RETURNER:
            # Right: park, then look at the line. Wrong: look at the line, then park.
            yield at("serve", 0, parked=parked + 1) if is_right else at("look", 1)
        else:
            # Right: join, then look for something. Wrong: look, then join.
            yield at("serve", 0, line=(*line, waiter)) if is_right else at("look", 0)
    elif where == "look":  # the wrong order only
        if kind == RETURNER:
            yield at("offer", held) if line else at("park", held)
        elif parked:
            yield at("done", 1, parked=parked - 1, answers=answered("given"))
        else:
            yield at("join", 0)
    elif where == "park":
        yield at("done", 0, parked=parked + 1)
    elif where == "join":
        yield at("wait", 0, line=(*line, waiter))
    elif where == "serve":  # while the line is not empty: take something
        if not line:
            yield at("wait" if kind == WAITER else "done", 0)
        elif parked:
            yield at("offer", 1, parked=parked - 1)
        else:
            yield at("wait" if kind == WAITER else "done", 0)
    elif where == "offer":  # settle the first ticket with what we hold, or find the line empty
        if not line:
            yield at("home", held)
        elif answers[line[0]] is None:
            first = line[0]
            yield (
                parked,
                line[1:],
                (*answers[:first], "given", *answers[first + 1 :]),
                (*programs[:thread], ("serve", 0), *programs[thread + 1 :]),
            )
        else:
            yield at("offer", held, line=line[1:])
    elif where == "home":  # park what nobody took, then look at the line again
        yield at("serve" if is_right else "done", 0, parked=parked + 1)
    elif where == "wait":
        if answers[waiter] == "given":
            yield at("done", 1)
        elif may_give_up and answers[waiter] is None:
            yield at("done", 0, line=tuple(each for each in line if each != waiter), answers=answered("gave up"))


def explore(kinds: list[str], is_right: bool, may_give_up: bool) -> tuple[int, int]:
    """Try every interleaving; return how many states there are, and in how many a waiter is stranded."""
    waiters = [thread for thread, kind in enumerate(kinds) if kind == WAITER]
    start: State = (0, (), (None,) * len(waiters), tuple(("start", 0) for _ in kinds))
    seen, todo, stranded = {start}, [start], 0
    while todo:
        state = todo.pop()
        following = [
            after
            for thread, kind in enumerate(kinds)
            for after in steps(
                state, thread, kind, waiters.index(thread) if kind == WAITER else -1, is_right, may_give_up
            )
        ]
        parked, _, answers, programs = state
        # Nobody else moves any more, something rests, and a waiter sleeps (or can only give up).
        asleep = [waiter for waiter, thread in enumerate(waiters) if programs[thread][0] == "wait"]
        is_quiet = all(where in ("wait", "done") for where, _ in programs)
        stranded += bool(is_quiet and parked and any(answers[waiter] is None for waiter in asleep))
        if not following:
            holding = sum(held for _, held in programs)
            assert parked + holding == kinds.count(RETURNER), "a slot was lost, or doubled"
        for after in following:
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return len(seen), stranded


@pytest.mark.parametrize("may_give_up", [False, True])
@pytest.mark.parametrize("returners", [1, 2, 3])
@pytest.mark.parametrize("waiters", [1, 2, 3])
def test_the_right_order_strands_nobody(returners: int, waiters: int, may_give_up: bool) -> None:
    states, stranded = explore([RETURNER] * returners + [WAITER] * waiters, True, may_give_up)
    assert states > 10
    assert stranded == 0


@pytest.mark.parametrize("may_give_up", [False, True])
def test_the_wrong_order_strands_a_waiter_in_the_model(may_give_up: bool) -> None:
    _, stranded = explore([RETURNER, RETURNER, WAITER, WAITER], False, may_give_up)
    assert stranded > 0


# The code -------------------------------------------------------------------------------------------------------------


class Scheduler:
    """Lets one thread run at a time, and switches where a schedule says: at the touches of shared state."""

    def __init__(self, schedule: list[int]) -> None:
        self._schedule = schedule
        self.choices: list[int] = []  # how many threads could have run at each point
        self._resume: dict[int, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._runnable: list[int] = []
        self._current = -1
        self._blocked: dict[int, Callable[[], bool]] = {}
        self.errors: list[BaseException] = []

    def touch(self) -> None:
        """Called by a thread before it touches shared state."""
        me = threading.get_ident()
        for number, thread in self._threads.items():
            if thread.ident == me:
                self._back.release()
                self._resume[number].acquire()
                return

    def block_until(self, condition: Callable[[], bool]) -> bool:
        """Called by a thread that waits; returns False when nobody is left who could wake it."""
        me = next(number for number, thread in self._threads.items() if thread.ident == threading.get_ident())
        self._blocked[me] = condition
        self.touch()
        del self._blocked[me]
        return condition()

    def run(self, functions: list[Callable[[], None]]) -> None:
        def body(number: int, function: Callable[[], None]) -> None:
            self._resume[number].acquire()
            try:
                function()
            except BaseException as error:
                self.errors.append(error)
            self._runnable.remove(number)
            self._back.release()

        self._threads: dict[int, threading.Thread] = {}
        for number, function in enumerate(functions):
            self._resume[number] = threading.Semaphore(0)
            self._threads[number] = threading.Thread(target=body, args=(number, function), daemon=True)
            self._runnable.append(number)
        for thread in self._threads.values():
            thread.start()
        while self._runnable:
            ready = [each for each in self._runnable if each not in self._blocked or self._blocked[each]()]
            if not ready:  # all that are left wait: let them find that out
                ready = list(self._runnable)
            # The thread that runs stays first: a schedule of zeros never switches without need.
            if self._current in ready:
                ready.remove(self._current)
                ready.insert(0, self._current)
            point = len(self.choices)
            choice = self._schedule[point] if point < len(self._schedule) else 0
            self.choices.append(len(ready))
            self._current = ready[choice]
            self._resume[self._current].release()
            self._back.acquire()
        for thread in self._threads.values():
            thread.join()


class Number(Slot):
    __slots__ = ()


def instrumented(handoff: Handoff[Number], scheduler: Scheduler) -> None:
    """Make every touch of the hand-off's shared state a point where threads may be switched."""

    class Dict(dict[Any, Any]):
        def setdefault(self, *args: Any) -> Any:
            scheduler.touch()
            return super().setdefault(*args)

        def popitem(self) -> Any:
            scheduler.touch()
            return super().popitem()

        def __setitem__(self, *args: Any) -> None:
            scheduler.touch()
            super().__setitem__(*args)

    class Line(deque[Any]):
        def append(self, item: Any) -> None:
            scheduler.touch()
            super().append(item)

        def __getitem__(self, index: Any) -> Any:
            scheduler.touch()
            return super().__getitem__(index)

        def __bool__(self) -> bool:
            scheduler.touch()
            return len(self) > 0

        def remove(self, item: Any) -> None:
            scheduler.touch()
            super().remove(item)

    class Bell:
        def __init__(self) -> None:
            self.rung = 0

        def put(self, item: None) -> None:
            self.rung += 1

        def get(self, timeout: float) -> None:
            if not scheduler.block_until(lambda: self.rung > 0):
                raise Stranded
            self.rung -= 1

    class NoLock:
        """The threads are switched at no other point: a lock would never be waited for."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *exc_info: object) -> None:
            pass

    handoff.parked, handoff.queue, handoff._lock = Dict(), Line(), NoLock()
    original = handoff._join

    def join(ticket: Any, max_waiting: int | None, has_room: bool) -> None:
        ticket.wakeup = Bell()
        original(ticket, max_waiting, has_room)

    handoff._join = join  # type: ignore[method-assign]  # the wakeup is a point where threads are switched, too


class Stranded(Exception):
    """A waiter sleeps, and nobody is left to wake it."""


class WrongOrder(Handoff[Number]):
    """Looks at the line first, and parks then."""

    def park(self, key: Any, slot: Number) -> None:
        is_waited_for = bool(self.queue)
        if self.parked.setdefault(key, slot) is not slot:
            self.parked[slot] = slot
        if is_waited_for:
            self.serve()


def play(make: type[Handoff[Number]], schedule: list[int], returners: int, waiters: int) -> tuple[list[int], int]:
    """Run the code through `schedule`; return the choices there were, and how many waiters were stranded."""
    scheduler = Scheduler(schedule)
    handoff = make(Number, returners)
    slots = [handoff.reserve() for _ in range(returners)]
    for slot in slots:
        assert slot is not None
        slot.state = OPEN
    instrumented(handoff, scheduler)
    got: list[Any] = []
    stranded: list[int] = []

    def give(slot: Number) -> None:
        handoff.park(slot, slot)

    def wait() -> None:
        try:
            slot = handoff.get(1e9)
            got.append(slot)
        except Stranded:
            stranded.append(1)
            return
        if len(got) <= waiters - returners:  # somebody else waits for it
            handoff.park(slot, slot)  # type: ignore[arg-type]  # never None: the time is not up

    functions: list[Callable[[], None]] = [lambda slot=slot: give(slot) for slot in slots]  # type: ignore[misc]
    scheduler.run([*functions, *[wait] * waiters])
    assert not scheduler.errors, scheduler.errors
    return scheduler.choices, len(stranded)


def schedules(make: type[Handoff[Number]], returners: int, waiters: int, switches: int) -> tuple[int, int]:
    """Go through all schedules with at most so many unforced switches; return how many, and how many stranded."""
    todo: list[list[int]] = [[]]
    count = bad = 0
    while todo:
        prefix = todo.pop()
        choices, stranded = play(make, prefix, returners, waiters)
        count += 1
        bad += bool(stranded)
        if sum(map(bool, prefix)) < switches:
            for point in range(len(prefix), len(choices)):
                for choice in range(1, choices[point]):
                    todo.append([*prefix, *[0] * (point - len(prefix)), choice])
    return count, bad


def test_the_code_strands_nobody_in_any_schedule_of_two_threads() -> None:
    count, bad = schedules(Handoff, 1, 1, switches=100)
    assert count > 100
    assert bad == 0


@pytest.mark.parametrize(("returners", "waiters"), [(1, 2), (2, 1), (2, 2)])
def test_the_code_strands_nobody_in_schedules_with_few_switches(returners: int, waiters: int) -> None:
    count, bad = schedules(Handoff, returners, waiters, switches=2)
    assert count > 50
    assert bad == 0


def test_the_wrong_order_strands_a_waiter_in_the_code() -> None:
    _, bad = schedules(WrongOrder, 1, 1, switches=2)
    assert bad > 0
