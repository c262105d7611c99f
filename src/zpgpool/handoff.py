"""Where places rest between two users, and where users wait for one.

Knows no database: it hands over *places*, of which there are at most `limit`, and tests hand over integers.

1. A place has one home: parked, in a ticket, or in the hands of one thread. Whoever removes it from its home owns it.
2. Return: park first, then look at the line.
3. Wait: join the line first, then look for something.
   With 2 and 3 no waiter sleeps while a place rests. Do not reorder.
4. A ticket is answered once: with a place, with an error, or by the waiter's own withdrawal.
5. Tickets are served in order; only a thread that finds its own place parked passes the line.
6. A place that nobody refers to any more is room again: an exception between two bytecodes cannot lose one.
"""

import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Hashable
from contextlib import AbstractContextManager
from contextlib import suppress
from queue import Empty
from queue import SimpleQueue
from threading import current_thread
from threading import Event
from threading import Lock
from time import monotonic
from typing import Generic
from typing import TypeVar


#: A waiter looks for itself this often, in seconds: whatever an asynchronous exception left half-done in a giver
#: (a bell not rung, a ticket not taken out of the line) is mended by then.
LOOK_AGAIN = 1.0


class Place:
    """One of the places of a hand-off: empty until its owner fills it.

    `is_filled` and `is_passing` are written by the owner of the place only; the latter says that it will be at rest,
    or room, in a moment.
    """

    __slots__ = ("__weakref__", "is_filled", "is_passing")

    def __init__(self) -> None:
        self.is_filled = False
        self.is_passing = False


P = TypeVar("P", bound=Place)


class Ticket(Generic[P]):
    """A waiter's stand in the line."""

    __slots__ = ("_answer", "bell", "since", "thread")

    def __init__(self, since: float) -> None:
        self.since = since
        self.thread = current_thread()
        self.bell: SimpleQueue[None] = SimpleQueue()
        self._answer: dict[int, P | BaseException | None] = {}

    def settle(self, answer: P | BaseException | None) -> P | BaseException | None:
        """Answer the ticket if nobody has, and return the answer that stands.

        `dict.setdefault` is the one atomic test-and-set of CPython: two givers, or a giver and the waiter who gives
        up (with None), cannot both win.
        """
        return self._answer.setdefault(0, answer)

    @property
    def is_settled(self) -> bool:
        return bool(self._answer)


class Closed(Exception):
    """The hand-off was closed while, or before, its caller waited."""


class LineFull(Exception):
    """There are as many waiters as the caller tolerates."""


class Handoff(Generic[P]):
    """Parking, taking, waiting and room.

    `make` gives a new, empty place; `limit` is how many there may be; `may_fill(n)` says whether one more may be
    filled while `n` others are being filled (it is asked under the lock: it must not block). `lock` guards the count
    of places, and the end of the line. `tidy` is called by those who wait, each time they look for themselves: it may
    find places that nobody holds any more.
    """

    def __init__(
        self,
        make: Callable[[], P],
        limit: int,
        may_fill: Callable[[int], bool] = lambda filling: True,
        lock: AbstractContextManager[object] | None = None,
        tidy: Callable[[], object] = lambda: None,
    ) -> None:
        self.limit = limit
        #: Places at rest, by the key that will look for them first; the oldest first. Anyone may take any.
        self.parked: dict[Hashable, P] = {}
        #: The waiters, the next one first. Joined by the waiter, left by whoever settles the ticket.
        self.line: deque[Ticket[P]] = deque()
        self.is_closed = False
        #: Set when the hand-off is closed and the last place has gone.
        self.is_empty = Event()
        self._make = make
        self._may_fill = may_fill
        self._tidy = tidy
        self._lock = Lock() if lock is None else lock
        #: Not a WeakSet: that forgets in Python code, which an asynchronous exception may break off (measured).
        self._refs: set[weakref.ref[P]] = set()

    @property
    def places(self) -> list[P]:
        """All places, wherever they are: a snapshot."""
        return [place for ref in list(self._refs) if (place := ref()) is not None]

    def __len__(self) -> int:
        """Return how many places there are, those included that were lost since the last `forget_lost`."""
        return len(self._refs)

    def forget_lost(self) -> None:
        """Count no longer what an asynchronous exception, or a careless user, has lost: it is room again."""
        with self._lock:
            self._refs.difference_update([ref for ref in list(self._refs) if ref() is None])
        self._tell_if_empty()

    def park(self, key: Hashable, place: P) -> None:
        """Let `place` rest where `key` finds it, or give it to the first waiter."""
        if self.parked.setdefault(key, place) is not place:
            self.parked[place] = place  # its key has one at rest already: never overwrite
        if self.line:
            self.serve()

    def vacate(self, place: P) -> bool:
        """Give the room of `place` to the first waiter, or leave it free; False when another thread has done so."""
        with self._lock:
            is_first = weakref.ref(place) in self._refs
            self._refs.discard(weakref.ref(place))
        if self.line:
            self.serve()
        self._tell_if_empty()
        return is_first

    def filled(self, place: P) -> None:
        """Tell that `place` has been filled: others may be waiting to fill theirs."""
        place.is_filled = True
        if self.line:
            self.serve()

    def take(self) -> P | None:
        """Return the place that was parked last, or room for a new one, or None. Does not wait.

        While there are more places than `limit`, which was lowered, those at rest are for their owner to close.
        """
        if len(self._refs) > self.limit:
            self.forget_lost()
        if len(self._refs) <= self.limit:
            with suppress(KeyError):
                return self.parked.popitem()[1]
        return self.room()

    def get(self, until: float, max_waiting: int | None = None, clock: Callable[[], float] = monotonic) -> P | None:
        """Return a place, filled or not, or None when there was none until `until` (in the time of `clock`).

        Who finds a line joins its end. Raises LineFull, Closed, or the error that `fail` was given.
        """
        if self.is_closed:
            raise Closed
        now = clock()
        if not self.line or now >= until:
            place = self.take()
            if place is not None:
                return place
            if now >= until:
                return None
        ticket: Ticket[P] = Ticket(now)
        try:
            self._join(ticket, max_waiting)
            self._wait(ticket, until, clock)
        except BaseException:
            answer = self._withdraw(ticket)
            if isinstance(answer, Place):
                self.park(answer, answer) if answer.is_filled else self.vacate(answer)
            raise
        answer = self._withdraw(ticket)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def serve(self) -> None:
        """Give what rests, and room, to the line, in its order."""
        while self.line:
            place = self.take()
            if place is None:
                return
            while not self._offer(place):
                # Nobody is left to take it. Home first, then look at the line again (rule 2).
                if not self.line:
                    if place.is_filled:
                        self.parked[place] = place
                    else:
                        self.vacate(place)
                    break

    def fail(self, make_error: Callable[[], BaseException]) -> None:
        """Answer every waiter of now with an error of its own."""
        for ticket in list(self.line):
            ticket.settle(make_error())
            self._dismiss(ticket)

    def close(self) -> None:
        """Wake all waiters with Closed; nobody gets a place any more."""
        self.is_closed = True
        self.fail(Closed)
        self._tell_if_empty()

    def room(self) -> P | None:
        """Return a new, empty place, or None when there is no room."""
        if len(self._refs) >= self.limit:
            self.forget_lost()
        with self._lock:
            if self.is_closed or len(self._refs) >= self.limit:
                return None
            if not self._may_fill(sum(not place.is_filled for place in self.places)):
                return None
            place = self._make()
            self._refs.add(weakref.ref(place))
            return place

    def _tell_if_empty(self) -> None:
        if self.is_closed and not self.places:
            self.is_empty.set()

    def _join(self, ticket: Ticket[P], max_waiting: int | None) -> None:
        with self._lock:
            # Whom free room will serve, as soon as it may be filled, does not wait for anybody.
            waiting = len(self.line) - (self.limit - len(self._refs))
            if max_waiting is not None and waiting >= max_waiting:
                raise LineFull
            self.line.append(ticket)

    def _wait(self, ticket: Ticket[P], until: float, clock: Callable[[], float]) -> None:
        while True:
            self.serve()
            if self.is_closed:
                ticket.settle(Closed())
            rest = until - clock()
            if ticket.is_settled or rest <= 0:
                return
            try:
                ticket.bell.get(timeout=min(rest, LOOK_AGAIN))
            except Empty:
                self._tidy()

    def _offer(self, place: P) -> bool:
        """Give `place` to the first in line; False when it would not take it, or there is no line."""
        try:
            ticket = self.line[0]
        except IndexError:
            return False
        # The ticket leaves the line only after it is settled: an exception in between leaves it where others see it.
        is_taken = ticket.settle(place) is place
        self._dismiss(ticket)
        return is_taken

    def _withdraw(self, ticket: Ticket[P]) -> P | BaseException | None:
        answer = ticket.settle(None)
        self._dismiss(ticket)
        return answer

    def _dismiss(self, ticket: Ticket[P]) -> None:
        ticket.bell.put(None)
        with suppress(ValueError):  # whoever was first has removed it
            self.line.remove(ticket)
