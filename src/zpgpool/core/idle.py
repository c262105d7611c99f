"""The idle connections of a pool: claimed, looked at, expired, and closed; and how any connection is closed.

Knows nothing of the connections in use.
"""

from __future__ import annotations

import logging
import random
import select
import weakref
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from heapq import heapify
from heapq import heappop
from heapq import heappush
from itertools import count
from time import monotonic

from ..settings import PoolSettings
from .backoff import ConnectBackoff
from .entry import Entry
from .entry import HANG_UP
from .entry import NEVER
from .entry import NEVER_YET
from .handoff import CHECKING
from .handoff import CLOSING
from .handoff import Handoff
from .handoff import OPEN
from .handoff import RETURNING
from .hangup import hang_up
from .notifier import Notifier
from .opener import Opener
from .workers import closers


log = logging.getLogger("zpgpool")

#: Within so many seconds, at random, the timer begins to open what is missing after the server is gone.
SPREAD = 0.5

#: How often the timer looks after a pool that has fewer than `minconn` connections, or may lose them, in seconds.
REFILL_EVERY = 0.5

COUNTS = (
    "requests_num",
    "requests_queued",
    "requests_wait_ms",
    "requests_errors",
    "returns_bad",
    "connections_num",
    "connections_ms",
    "connections_lost",
)


class IdleConnections:
    """The parked connections of `handoff`. Any thread may take one at any moment: first of all, claim it."""

    settings: PoolSettings
    opener: Opener
    backoff: ConnectBackoff

    def __init__(
        self, handoff: Handoff[Entry], notifier: Notifier, lock: AbstractContextManager[object], in_background: bool
    ) -> None:
        self.handoff = handoff
        self.lock = lock
        self._parked = handoff.parked
        self._notifier = notifier
        self._in_background = in_background
        #: When which lifetime ends: a heap; the numbers decide between equals.
        self._ends: list[tuple[float, int, weakref.ref[Entry]]] = []
        self._numbers = count()
        self._drained_at = NEVER_YET
        #: Whether one may be parked behind younger ones: then all must be asked for their age.
        self._is_unordered = False
        #: When the timer may open connections up to `minconn`, where the server is gone: not in all processes at once.
        self._refill_at = NEVER_YET
        self._counts = dict.fromkeys(COUNTS, 0.0)

    # Too many, too old, dead -------------------------------------------------------------------------------------

    def trim(self, later: bool = False) -> None:
        """Close idle connections that are too many: beyond `minconn` with `idle_timeout` 0, or beyond `maxconn`."""
        settings = self.settings
        while len(self.handoff) > settings.maxconn or (
            settings.idle_timeout == 0 and len(self._parked) > settings.minconn
        ):
            entry = self._claim_surplus()
            if entry is None:
                return
            if later:
                self.discard_later(entry, "there are enough")
            else:
                self.discard(entry, "there are enough")

    def _claim_surplus(self) -> Entry | None:
        # Counted and taken under the lock: two that return at the same time would each close one.
        with self.lock:
            staying = sum(slot.state in (OPEN, RETURNING) for slot in self.handoff.slots)
            spare = len(self._parked) - self.settings.minconn if self.settings.idle_timeout == 0 else 0
            if staying > self.settings.maxconn or spare > 0:
                # A copy: while `list(items())` makes its tuples, CPython 3.10 and 3.11 may collect garbage, and that a
                # connection, which changes the dict.
                for key, entry in self._parked.copy().items():
                    if self._claim(key, entry):
                        return entry
        return None

    def expire(self, now: float, later: bool = False) -> int:
        """Close what is idle for too long, or too old: as many steps as there are such connections.

        Keeps `minconn` open while there is room to open their replacements first: returns how many must be replaced.
        """
        staying = 0
        idle_timeout = self.settings.idle_timeout
        if idle_timeout and self._rests_since(now - idle_timeout):
            staying = self._expire_idle(now - idle_timeout, later)
        ended = set()
        with self.lock:
            while self._ends and self._ends[0][0] <= now:
                ended.add(heappop(self._ends)[2]())
        if ended:
            self.discard_parked("too old", among=ended, later=later)
        return staying

    def _rests_since(self, since: float) -> bool:
        """Whether one may rest since then at the latest. Most often none does: a look at the oldest must do."""
        try:
            return self._is_unordered or next(iter(self._parked.values())).since <= since
        except (StopIteration, RuntimeError):  # RuntimeError: another thread parked while we looked
            return False

    def _expire_idle(self, since: float, later: bool) -> int:
        """Close what rests since then at the latest, as `expire` says; return how many must be replaced first."""
        has_room = len(self.handoff) < self.settings.maxconn
        others = self._leaving() + self.opener.under_way
        most = len(self.handoff) - others - self.settings.minconn
        if most <= 0 and not has_room and not others:  # no other one can be opened first
            most = len(self.handoff)
        claimed = list(self._claim_idle(since, most))
        staying = 0
        if len(claimed) >= most and has_room:
            staying = sum(entry.since <= since for entry in list(self._parked.values()))
        self._discard_all(claimed, "idle for too long", later=later)
        return staying

    def _claim_idle(self, since: float, most: int) -> Iterator[Entry]:
        """Claim those that rest since then at the latest, the oldest first."""
        in_order = sorted(self._parked.items(), key=lambda each: each[1].since) if self._is_unordered else None
        self._is_unordered = False
        while most > 0:
            try:
                key, entry = in_order.pop(0) if in_order is not None else next(iter(self._parked.items()))
            except (StopIteration, RuntimeError, IndexError):  # RuntimeError: another thread parked while we looked
                return
            if entry.since > since or not self._claim(key, entry):
                if in_order is None or entry.since > since:
                    self._is_unordered = bool(in_order)
                    return
            elif entry.since > since:  # ours now; it was used, and parked again, since we looked
                self.park_again(key, entry)
            else:
                most -= 1
                yield entry
        self._is_unordered |= bool(in_order)

    def discard_parked(
        self,
        reason: str,
        rested_since: float = NEVER,
        among: Collection[object] | None = None,
        is_dead: bool = False,
        later: bool = False,
    ) -> None:
        """Close the idle connections: all, or those that rest since then, or those `among` the given."""
        claimed = [
            entry
            for key, entry in self._parked.copy().items()
            if entry.since <= rested_since and (among is None or entry in among) and self._claim(key, entry)
        ]
        self._discard_all(claimed, reason, is_dead, later)

    def _discard_all(self, claimed: Iterable[Entry], reason: str, is_dead: bool = False, later: bool = False) -> None:
        until = monotonic() + HANG_UP
        for entry in claimed:
            if later:
                self.discard_later(entry, reason)
            else:
                self.discard(entry, reason, is_dead, until)

    def look_at_all(self) -> None:
        """Discard the idle connections whose server is gone: one look at all sockets, no round trip."""
        parked = {entry.sock.fileno(): (key, entry) for key, entry in self._parked.copy().items()}
        poll = select.poll()
        for number in parked.keys() - {-1}:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            # A look takes nothing away. Only a suspect is claimed, and judged then: its user may have it by now.
            key, entry = parked[number]
            if self._claim(key, entry):
                if entry.is_alive():
                    self.park_again(key, entry)
                else:
                    self.discard_dead(entry)

    def _claim(self, key: object, entry: Entry) -> bool:
        """Take `entry` from its home, if it is still there."""
        # Before it is ours: a checkout that may not wait must always see it either at rest or on its way.
        entry.state = CHECKING
        claimed = self._parked.pop(key, None)
        if claimed is entry:
            return True
        entry.state = OPEN
        if claimed is not None:
            self.handoff.park(key, claimed)
        return False

    def park_again(self, key: object, entry: Entry) -> None:
        """Park what was only looked at: it has rested since before."""
        entry.state = OPEN
        self._is_unordered = True  # it goes behind those that were parked after it
        self.handoff.park(key, entry)

    def remember_end(self, entry: Entry) -> None:
        with self.lock:
            if len(self._ends) > 2 * len(self.handoff) + 16:  # most of those that it remembers are gone
                self._ends = [end for end in self._ends if end[2]() is not None]
                heapify(self._ends)
            heappush(self._ends, (entry.expires, next(self._numbers), weakref.ref(entry)))

    def due_times(self, now: float) -> Iterator[float]:
        """Yield when there will be something to maintain (monotonic seconds)."""
        if idle_timeout := self.settings.idle_timeout:
            # What will be parked from now on is not due before this; what is parked already may be.
            yield now + idle_timeout
            parked = list(self._parked.values())
            for entry in parked if self._is_unordered else parked[:1]:
                due = entry.since + idle_timeout
                yield due if due > now else now + REFILL_EVERY  # it stays until another one is open
        if self._ends:
            yield self._ends[0][0]
        if self.settings.minconn:
            yield now + REFILL_EVERY

    def drain(self, reason: str = "drained", later: bool = False) -> None:
        """Let every connection's lifetime end now: the idle ones are closed, the others when they return."""
        self._drained_at = monotonic()
        for entry in self.handoff.slots:
            entry.expire_now()
        self.discard_parked(reason, later=later)

    # Closing ---------------------------------------------------------------------------------------------------------

    def discard_dead(self, entry: Entry) -> None:
        self.backoff.doubt()
        self.count(connections_lost=1)
        if self._refill_at == NEVER_YET:
            self._refill_at = monotonic() + random.uniform(0, SPREAD)
        self.discard(entry, "the server has gone", is_dead=True)

    def discard(self, entry: Entry, reason: str, is_dead: bool = False, until: float | None = None) -> None:
        """Close a connection that no other thread can reach, and give its room away.

        The server is not waited for when the connection is dead, and not for longer than `until` (see Entry.close).
        """
        entry.state = CLOSING
        is_first = False
        try:
            if is_dead:
                entry.cut()
            else:
                hang_up([entry])
            entry.close(until)
        finally:
            is_first = self.handoff.free(entry)
        if is_first:  # not the user who returns it after the pool has closed it, too
            log.debug("%s closed a connection: %s", self._notifier, reason)
            self._notifier.closed(entry, reason)

    def detach(self, entry: Entry) -> None:
        """Give away the room of a connection that is in use, and that its user keeps."""
        entry.state = CLOSING
        entry.sock.close()
        if self.handoff.free(entry):
            log.debug("%s detached a connection", self._notifier)
            self._notifier.closed(entry, "its user detached it")

    def discard_later(self, entry: Entry, reason: str) -> None:
        """Do as `discard`, in another thread: the server may be silent, and the caller has no time for that."""
        entry.state, entry.is_leaving = CLOSING, True
        if self._in_background:
            closers.run(partial(self.discard, entry, reason))
        else:
            self.discard(entry, reason)

    def _leaving(self) -> int:
        """Return how many are being closed by other threads."""
        return sum(slot.is_leaving for slot in self.handoff.slots)

    # Numbers ---------------------------------------------------------------------------------------------------------

    def count(self, **more: float) -> None:
        """Add to the counters."""
        with self.lock:
            for name, number in more.items():
                self._counts[name] += number

    def get_stats(self) -> dict[str, int]:
        """Return counters and sizes by their names in psycopg_pool."""
        with self.lock:
            counts = {name: round(number) for name, number in self._counts.items()}
        counts["connections_num"] += self.opener.failures
        return counts | {
            "connections_errors": self.opener.failures,
            "pool_min": self.settings.minconn,
            "pool_max": self.settings.maxconn,
            "pool_size": len(self.handoff),
            "pool_available": len(self._parked),
            "requests_waiting": len(self.handoff.queue),
        }
