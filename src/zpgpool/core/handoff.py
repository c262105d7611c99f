"""Where slots rest between two users, and where users wait for one.

Knows no database: it hands over *slots*, of which there are at most `limit`. A test hands over slots without a
connection.

1. A slot has one home: parked, in a ticket, or in the hands of one thread. The thread that removes it there owns it.
2. Return: park first, then look at the queue.
3. Wait: join the queue first, then look for something.
   With 2 and 3 no waiter sleeps while a slot rests. Do not reorder.
4. A ticket is answered once: with a slot, with an error, or by the waiter's own withdrawal.
5. Tickets are served in order; only a thread that finds its own slot parked passes the queue.
6. A slot that nobody refers to any more is room again: an exception between two bytecodes cannot lose one.
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
from threading import Lock
from time import monotonic
from typing import Generic
from typing import TypeVar

from .workers import Gate


#: A waiter looks for itself this often, in seconds: by then it repairs whatever an asynchronous exception left
#: half-done in a giver (a wake-up not sent, a ticket not taken out of the queue).
LOOK_AGAIN = 1.0

#: How often a waiter whose time is up, but who may stay a little, looks again, in seconds.
STAY = 0.05

#: The states of a slot. Whether an open one is idle or in use is no state: rule 1 says where it is, and a checkout
#: that wrote it twice would cost more (measured: 8 of 250 ns).
CONNECTING, PUBLISHING, OPEN, CHECKING, RETURNING, CLOSING = range(6)


class Slot:
    """One of the slots of a hand-off.

    `state` is written by the owner of the slot only. In every state but OPEN it will be at rest, or room, in a moment.
    """

    __slots__ = ("__weakref__", "state")

    def __init__(self) -> None:
        self.state = CONNECTING

    @property
    def is_open(self) -> bool:
        """Whether it has a connection that may still serve a waiter."""
        return self.state in (PUBLISHING, OPEN, CHECKING, RETURNING)

    @property
    def is_coming(self) -> bool:
        """Whether it is on its way to its first user."""
        return self.state in (CONNECTING, PUBLISHING)


S = TypeVar("S", bound=Slot)


class Ticket(Generic[S]):
    """A waiter's turn in the queue."""

    __slots__ = ("_answer", "since", "thread", "until", "wakeup")

    def __init__(self, since: float, until: float) -> None:
        self.since = since
        self.until = until
        self.thread = current_thread()
        self.wakeup: SimpleQueue[None] = SimpleQueue()
        self._answer: dict[int, S | BaseException | None] = {}

    def settle(self, answer: S | BaseException | None) -> S | BaseException | None:
        """Answer the ticket if it has no answer yet, and return the answer that stands.

        `dict.setdefault` is the one atomic test-and-set of CPython: two givers, or a giver and the waiter who gives
        up (with None), cannot both win.
        """
        return self._answer.setdefault(0, answer)

    @property
    def is_settled(self) -> bool:
        return bool(self._answer)


class Closed(Exception):
    """The hand-off was closed while, or before, its caller waited."""


class QueueFull(Exception):
    """There are as many waiters as the caller tolerates."""


class Handoff(Generic[S]):
    """Parking, taking, waiting and room.

    make -- returns a new slot, in the state CONNECTING.
    limit -- how many slots there may be.
    fill -- called when nothing rests for those in the queue: may `reserve` room, and have it filled. Should not block.
        Returns in how many seconds it wants to be called again, while there are waiters; None: it does not mind.
    lock -- guards the count of slots, and the end of the queue.
    tidy -- called by waiting threads, each time they look for themselves: it may find slots that were lost.
    """

    def __init__(
        self,
        make: Callable[[], S],
        limit: int,
        fill: Callable[[], float | None] = lambda: None,
        lock: AbstractContextManager[object] | None = None,
        tidy: Callable[[], object] = lambda: None,
    ) -> None:
        self.limit = limit
        #: Slots at rest, by the key that will look for them first; the oldest first. Anyone may take any.
        self.parked: dict[Hashable, S] = {}
        #: The waiters, the next one first. The waiter adds its ticket; the thread that settles the ticket removes it.
        self.queue: deque[Ticket[S]] = deque()
        self.is_closed = False
        #: Set when the hand-off is closed and the last slot is gone.
        self.is_empty = Gate()
        self._make = make
        self._fill = fill
        self._tidy = tidy
        self._lock = Lock() if lock is None else lock
        #: Not a WeakSet: that forgets in Python code, which an asynchronous exception may break off (measured).
        self._refs: set[weakref.ref[S]] = set()

    @property
    def slots(self) -> list[S]:
        """All slots, wherever they are: a snapshot."""
        return [slot for ref in list(self._refs) if (slot := ref()) is not None]

    def __len__(self) -> int:
        """Return how many slots there are, those included that were lost since the last `forget_lost`."""
        return len(self._refs)

    def forget_lost(self) -> None:
        """Stop counting what an asynchronous exception, or a careless user, has lost: it is room again."""
        with self._lock:
            self._refs.difference_update([ref for ref in list(self._refs) if ref() is None])
        self._tell_if_empty()

    def reserve(self, may_fill: Callable[[int], bool] = lambda filling: True) -> S | None:
        """Return a new slot, or None when there is no room for one.

        may_fill -- says whether one more may be filled while so many are coming. Asked under the lock: it must not
            block.
        """
        with self._lock:
            if self.is_closed or len(self._refs) >= self.limit:
                return None
            if not may_fill(sum(slot.is_coming for slot in self.slots)):
                return None
            slot = self._make()
            self._refs.add(weakref.ref(slot))
            return slot

    def publish(self, slot: S) -> None:
        """Park a new slot, or give it to the first waiter.

        It is parked in the same step in which it is no longer coming: who counts both under the lock misses it nowhere.
        """
        with self._lock:
            slot.state = OPEN
            self.parked[slot] = slot
        if self.queue:
            self.serve()

    def free(self, slot: S) -> bool:
        """Turn `slot` into room; False when another thread has done so."""
        with self._lock:
            is_first = weakref.ref(slot) in self._refs
            self._refs.discard(weakref.ref(slot))
        if self.queue and self.serve() is not None:
            with suppress(IndexError):
                self.queue[0].wakeup.put(None)  # it sleeps for longer than the pause that `serve` has named
        self._tell_if_empty()
        return is_first

    def park(self, key: Hashable, slot: S) -> None:
        """Let `slot` rest where `key` finds it, or give it to the first waiter."""
        if self.parked.setdefault(key, slot) is not slot:
            self.parked[slot] = slot  # its key has one at rest already: never overwrite
        if self.queue:
            self.serve()

    def take(self) -> S | None:
        """Return the slot that was parked last, or None. Does not wait.

        While there are more slots than `limit`, which was lowered, those at rest are for their owner to close.
        """
        if self.parked and len(self._refs) <= self.limit:
            with suppress(KeyError):
                return self.parked.popitem()[1]
        return None

    def get(
        self,
        until: float,
        max_waiting: int | None = None,
        coming: Callable[[], float] = lambda: 0,
        has_room: bool = True,
        clock: Callable[[], float] = monotonic,
    ) -> S | None:
        """Return a slot, or None when there was none until `until` (in the time of `clock`).

        A thread that finds a queue joins its end, except when there is no time to wait.

        max_waiting -- raise QueueFull when so many wait already.
        has_room -- whether there will be new slots as far as there is room, so that who waits for one does not wait for
            others.
        coming -- says, when the time is up, how many slots will be there in a moment: a waiter with fewer others ahead
            may stay for it.

        Raises QueueFull, Closed, or the error that the ticket was answered with.
        """
        if self.is_closed:
            raise Closed
        now = clock()
        if not self.queue or now >= until:
            slot = self.take()
            if slot is not None:
                return slot
        ticket: Ticket[S] = Ticket(now, until)
        try:
            self._join(ticket, max_waiting, has_room)
            self._wait(ticket, coming, clock)
        except BaseException:
            answer = self._withdraw(ticket)
            if isinstance(answer, Slot):
                self.park(answer, answer)
            raise
        answer = self._withdraw(ticket)
        try:
            if isinstance(answer, BaseException):
                raise answer
            return answer
        finally:
            del answer, ticket  # no cycle with this frame: it would keep the frames of a traceback, and their slots

    def serve(self) -> float | None:
        """Give what is parked to the queue, in its order, and have room filled for those that remain; see `fill`."""
        while self.queue:
            slot = self.take()
            if slot is None:
                return self._fill()
            while not self._offer(slot):
                # No waiter is left to take it. Home first, then look at the queue again (rule 2).
                if not self.queue:
                    self.parked[slot] = slot
                    break
        return None

    def fail(self, make_error: Callable[[], BaseException], only: Ticket[S] | None = None) -> None:
        """Answer every waiter of now with an error of its own; or only one of them, if it still waits."""
        for ticket in list(self.queue):
            if only is None or ticket is only:
                ticket.settle(make_error())
                self._dismiss(ticket)

    def shed(self, max_waiting: int | None) -> None:
        """Answer with QueueFull the threads that wait behind so many others."""
        if max_waiting is not None:
            for ticket in list(self.queue)[max_waiting:]:
                self.fail(QueueFull, ticket)

    def close(self) -> None:
        """Wake all waiters with Closed; no slot is handed over any more."""
        self.is_closed = True
        self.fail(Closed)
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if self.is_closed and not self.slots:
            self.is_empty.open()

    def _join(self, ticket: Ticket[S], max_waiting: int | None, has_room: bool) -> None:
        with self._lock:
            if max_waiting is not None:
                # A waiter that a new slot will serve waits for no other thread.
                room = self.limit - len(self._refs) + sum(slot.is_coming for slot in self.slots)
                coming = room if has_room else 0
                if len(self.queue) - coming >= max_waiting:
                    raise QueueFull
            self.queue.append(ticket)

    def _wait(self, ticket: Ticket[S], coming: Callable[[], float], clock: Callable[[], float]) -> None:
        while True:
            again = self.serve()
            if self.is_closed:
                ticket.settle(Closed())
            rest = ticket.until - clock()
            if ticket.is_settled:
                return
            if rest <= 0:
                soon = coming()  # before `ahead`: who is served in between counts in neither
                try:
                    ahead = self.queue.index(ticket)
                except ValueError:  # it has just been answered
                    return
                if soon <= ahead:
                    if self.parked:  # it was coming when we served, and is no more
                        self.serve()
                    return
                rest = STAY
            rest = min(rest, LOOK_AGAIN)
            if again is not None and self._is_first(ticket):  # one of the waiters is enough
                rest = min(rest, again)
            try:
                ticket.wakeup.get(timeout=rest)
            except Empty:
                self._tidy()

    def _is_first(self, ticket: Ticket[S]) -> bool:
        with suppress(IndexError):
            return self.queue[0] is ticket
        return False

    def _offer(self, slot: S) -> bool:
        """Give `slot` to the first in the queue; False when that one would not take it, or there is no queue."""
        try:
            ticket = self.queue[0]
        except IndexError:
            return False
        # The ticket leaves the queue only after it is settled: an exception in between leaves it where others see it.
        is_taken = ticket.settle(slot) is slot
        self._dismiss(ticket)
        return is_taken

    def _withdraw(self, ticket: Ticket[S]) -> S | BaseException | None:
        answer = ticket.settle(None)
        self._dismiss(ticket)
        return answer

    def _dismiss(self, ticket: Ticket[S]) -> None:
        ticket.wakeup.put(None)
        with suppress(ValueError):  # another thread has removed it first
            self.queue.remove(ticket)
