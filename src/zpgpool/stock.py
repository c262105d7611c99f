"""The connections of one pool: opened, judged, kept in order, closed.

Knows nothing of who uses them: what is neither parked nor being judged here is somebody's.
"""

from __future__ import annotations

import logging
import random
import select
import weakref
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from heapq import heapify
from heapq import heappop
from heapq import heappush
from itertools import count
from time import monotonic

import psycopg2
from psycopg2.extensions import connection as Connection

from .entry import Entry
from .entry import HANG_UP
from .entry import hang_up
from .entry import MOMENT
from .entry import one_line
from .errors import PoolClosed
from .handoff import Handoff
from .herald import Herald
from .outage import Outage
from .session import check_two_phase
from .session import set_up
from .settings import PoolSettings


log = logging.getLogger("zpgpool")

NEVER = float("inf")

#: Lifetimes are shortened by up to this part at random, so that connections opened together do not end together.
JITTER = 0.05

#: How often a checkout that may not wait looks again while something is about to change, in seconds.
SETTLING = 0.1

#: How long a connection that rested for more than `check_idle` may take to answer, in seconds.
PING = 2.0

COUNTS = (
    "requests_num",
    "requests_queued",
    "requests_wait_ms",
    "requests_errors",
    "returns_bad",
    "connections_num",
    "connections_ms",
    "connections_errors",
    "connections_lost",
)


class Stock:
    """The entries of a pool.

    `connect` opens a connection; `herald` is told of what happens. `lost` is called with the weak reference of one that
    nobody has any more, maybe in the middle of the garbage collector: it must not take a lock. `tidy` finds what nobody
    holds any more.
    """

    def __init__(
        self,
        settings: PoolSettings,
        connect: Callable[[], Connection],
        herald: Herald,
        lost: Callable[[weakref.ref[Connection]], object],
        tidy: Callable[[], object],
        lock: AbstractContextManager[object],
    ) -> None:
        self.settings = settings
        self.lock = lock
        self.outage = Outage()
        self.handoff: Handoff[Entry] = Handoff(Entry, settings.maxconn, self.outage.may_connect, lock, tidy)
        self._parked = self.handoff.parked
        self._connect = connect
        self._set_up = partial(set_up, settings=settings)
        self._herald = herald
        self._lost = lost
        #: When which lifetime ends: a heap; the numbers decide between equals.
        self._ends: list[tuple[float, int, weakref.ref[Entry]]] = []
        self._numbers = count()
        self._may_prepare = False
        self._generation = 0
        #: Whether one may be parked behind younger ones: then all must be asked for their age.
        self._is_unordered = False
        self._counts = dict.fromkeys(COUNTS, 0.0)

    # A checkout ------------------------------------------------------------------------------------------------------

    def obtain(self, entry: Entry | None, start: float) -> Entry | None:
        """Return a connection fit for use: `entry`, if it is, else another one, waited for or opened.

        Returns None when there was none within the `timeout` that began at `start`. Raises LineFull and Closed, and
        what the connect raised.
        """
        while True:
            if entry is None:
                entry = self._next(start)
            if entry is None:
                return None
            if not entry.is_filled:
                self.open(entry)
                return entry
            now = monotonic()
            if self._is_fit(entry, now):
                entry.since, entry.look_at = now, now + MOMENT
                return entry
            entry = None

    def _next(self, start: float) -> Entry | None:
        """Return what comes first, a parked connection or room for one, within the `timeout` that began at `start`."""
        if self.outage.error is not None and not self.handoff.is_closed and self._is_hopeless():
            raise self.outage.copy()
        place = self.handoff.take() if not self.handoff.line and not self.handoff.is_closed else None
        if place is not None:
            return place
        now = monotonic()
        until = start + self.settings.timeout
        try:
            while True:
                place = self.handoff.get(until, self.settings.max_waiting)
                if place is not None or self.settings.timeout > 0 or not self._is_settling():
                    return place
                if monotonic() > start + PING:  # whoever connects, or closes, hangs: this one may not
                    return None
                until = monotonic() + SETTLING
        finally:
            seconds = monotonic() - now
            self.count(requests_queued=self.settings.timeout > 0, requests_wait_ms=seconds * 1000)
            self._herald.waited(seconds)

    def _is_hopeless(self) -> bool:
        """Whether nothing will be returned, and somebody tries to connect already, or it is too early for that."""
        # In a frame that ends before the error is raised: threads that hold an error each would keep each other's
        # snapshots alive, and with them a place that was lost, for ever (measured, with twelve threads).
        places = self.handoff.places
        return not any(place.is_filled for place in places) and (self.outage.is_on or bool(places))

    def _is_settling(self) -> bool:
        """Whether who may not wait should look again: a place is being freed, or another thread tries the server."""
        places = self.handoff.places
        has_room = len(places) < self.settings.maxconn
        return any(place.is_passing or (has_room and not place.is_filled) for place in places)

    def open(self, entry: Entry) -> None:
        """Fill an empty place that is ours; when that fails, its room goes to the next in line."""
        generation, start = self._generation, monotonic()
        try:
            conn = self._connect()
            self.outage.succeeded()
            entry.attach(conn, weakref.ref(conn, self._lost))
            self._set_up(conn)
            if self.settings.twophase and not self._may_prepare:
                check_two_phase(conn, str(self._herald))
                self._may_prepare = True
            now = monotonic()
            lifetime = self.settings.max_lifetime
            entry.begin(now, now + lifetime * random.uniform(1 - JITTER, 1) if lifetime else NEVER)
        except BaseException as error:
            if entry.is_attached:
                entry.close()
            self.count(connections_errors=1)
            if isinstance(error, psycopg2.OperationalError):
                self.outage.failed(error)
            self.handoff.vacate(entry)
            if self.outage.error is not None and not any(place.is_filled for place in self.handoff.places):
                self.handoff.fail(self.outage.copy)
            if isinstance(error, psycopg2.OperationalError):
                self._herald.failed(error, monotonic() - start)
            raise
        if generation != self._generation:
            entry.doom()
        if lifetime:
            self._remember_end(entry)
        self.count(connections_num=1, connections_ms=(now - start) * 1000)
        self.handoff.filled(entry)
        self._herald.opened(entry, now - start)
        if self.handoff.is_closed:
            self.discard(entry, "the pool is closed")
            raise PoolClosed(f"{self._herald} was closed during the connect")

    def _remember_end(self, entry: Entry) -> None:
        with self.lock:
            if len(self._ends) > 2 * len(self.handoff) + 16:  # most of those that it remembers are gone
                self._ends = [end for end in self._ends if end[2]() is not None]
                heapify(self._ends)
            heappush(self._ends, (entry.expires, next(self._numbers), weakref.ref(entry)))

    def _is_fit(self, entry: Entry, now: float) -> bool:
        """Judge a parked connection that is ours; False when it was discarded."""
        settings, rested = self.settings, now - entry.since
        if now >= entry.expires or (settings.idle_timeout and rested > settings.idle_timeout):
            self.discard(entry, "too old")
        elif not entry.is_alive():
            self._discard_dead(entry)
            self.look_at_all()
        elif settings.check_idle is not None and rested > settings.check_idle and not entry.ping(PING):
            self._discard_dead(entry)
            # What forgot this one, or fell silent, has the others, too; to ask each would cost a deadline each.
            self.discard_parked("rested beside one that did not answer", now - settings.check_idle, is_dead=True)
        elif settings.check is not None and not self._passes_check(entry, settings.check):
            self._discard_dead(entry)
        else:
            return True
        return False

    def _passes_check(self, entry: Entry, check: Callable[[Connection], object]) -> bool:
        try:
            check(entry.conn)
        except Exception as error:
            log.info("%s: check refused a connection: %s", self._herald, one_line(error))
            return False
        return entry.is_clean() or entry.reset(None, self._set_up)

    # A return --------------------------------------------------------------------------------------------------------

    def clean(self, entry: Entry, close: bool) -> bool:
        """Make a returned connection clean; False when it was discarded instead."""
        if self._herald.observers:
            self._herald.used(monotonic() - entry.since)
        reason = "it could not be made clean"
        is_clean = False
        try:
            if close:
                reason = "its user asked for it"
            elif monotonic() >= entry.expires:
                reason = "too old"
            else:
                is_clean = entry.reset(self.settings.reset, self._set_up)
                if not is_clean:
                    self.count(returns_bad=1)
        finally:
            # After an interrupted rollback, too: nobody knows what state that left.
            if not is_clean:
                self.discard(entry, reason)
        return is_clean

    def after_return(self) -> None:
        """See to the line, a closed pool, or too many idle connections, after something was parked."""
        self.handoff.serve()
        if self.handoff.is_closed:
            self.discard_parked("the pool is closed")
        else:
            self.trim()

    def trim(self) -> None:
        """Close idle connections that are too many: beyond `minconn` with `idle_timeout` 0, or beyond `maxconn`."""
        settings = self.settings
        while len(self.handoff) > settings.maxconn or (
            settings.idle_timeout == 0 and len(self._parked) > settings.minconn
        ):
            entry = self._claim_surplus()
            if entry is None:
                return
            self.discard(entry, "there are enough")

    def _claim_surplus(self) -> Entry | None:
        # Counted and taken under the lock: two that return at the same time would each close one.
        with self.lock:
            staying = sum(not place.is_passing for place in self.handoff.places)
            spare = len(self._parked) - self.settings.minconn if self.settings.idle_timeout == 0 else 0
            if staying > self.settings.maxconn or spare > 0:
                for key, entry in list(self._parked.items()):
                    if self._claim(key, entry):
                        return entry
        return None

    # Maintenance -----------------------------------------------------------------------------------------------------

    def refill(self) -> None:
        """Open connections up to `minconn`."""
        while len(self.handoff) < self.settings.minconn and (entry := self.handoff.room()) is not None:
            entry.is_passing = True
            self.open(entry)
            entry.is_passing = False
            self.handoff.park(entry, entry)

    def expire(self, now: float) -> None:
        """Close what is idle for too long, or too old: as many steps as there are such connections."""
        if idle_timeout := self.settings.idle_timeout:
            while self._discard_oldest("idle for too long", now - idle_timeout):
                pass
            if self._is_unordered:
                self._is_unordered = False
                self.discard_parked("idle for too long", now - idle_timeout)
                rests = [entry.since for entry in list(self._parked.values())]
                self._is_unordered = self._is_unordered or rests != sorted(rests)
        ended = set()
        with self.lock:
            while self._ends and self._ends[0][0] <= now:
                ended.add(heappop(self._ends)[2]())
        if ended:
            self.discard_parked("too old", among=ended)

    def _discard_oldest(self, reason: str, rested_since: float) -> bool:
        """Close the connection that is parked longest, if that is since `rested_since` at the latest."""
        try:
            key, entry = next(iter(self._parked.items()))
        except (StopIteration, RuntimeError):  # RuntimeError: another thread parked while we looked
            return False
        if entry.since > rested_since or not self._claim(key, entry):
            return False
        if entry.since > rested_since:  # ours now; it was used, and parked again, since we looked
            self._unclaim(key, entry)
            return False
        self.discard(entry, reason)
        return True

    def discard_parked(
        self,
        reason: str,
        rested_since: float = NEVER,
        among: Collection[object] | None = None,
        is_dead: bool = False,
    ) -> None:
        """Close the parked connections: all, or those that rest since then, or those `among` the given."""
        until = monotonic() + HANG_UP
        for key, entry in list(self._parked.items()):
            if entry.since <= rested_since and (among is None or entry in among):
                if self._claim(key, entry):
                    self.discard(entry, reason, is_dead, until)

    def look_at_all(self) -> None:
        """Discard the parked connections whose server is gone: one look at all sockets, no round trip."""
        parked = {entry.sock.fileno(): (key, entry) for key, entry in list(self._parked.items())}
        # Not by Entry.look: two threads cannot call one poll object, and users call theirs.
        poll = select.poll()
        for number in parked.keys() - {-1}:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            # A look takes nothing away. Only a suspect is claimed, and judged then: its user may have it by now.
            key, entry = parked[number]
            if self._claim(key, entry):
                if entry.is_alive():
                    self._unclaim(key, entry)
                else:
                    self._discard_dead(entry)

    def _claim(self, key: object, entry: Entry) -> bool:
        """Take `entry` from its home, if it is still there."""
        entry.is_passing = True  # first: who may not wait must see that this is for a moment only
        claimed = self._parked.pop(key, None)
        if claimed is entry:
            return True
        entry.is_passing = False
        if claimed is not None:
            self.handoff.park(key, claimed)
        return False

    def _unclaim(self, key: object, entry: Entry) -> None:
        entry.is_passing = False
        self._is_unordered = True  # it goes behind those that were parked after it
        self.handoff.park(key, entry)

    def _discard_dead(self, entry: Entry) -> None:
        self.outage.doubt()
        self.count(connections_lost=1)
        self.discard(entry, "the server has gone", is_dead=True)

    def discard(self, entry: Entry, reason: str, is_dead: bool = False, until: float | None = None) -> None:
        """Close a connection that nobody else can reach, and give its room away.

        The server is not waited for when the connection is dead, and not for longer than `until` (see Entry.close).
        """
        entry.is_passing = True
        is_first = False
        try:
            if is_dead:
                entry.cut()
            else:
                hang_up([entry])
            entry.close(until)
        finally:
            is_first = self.handoff.vacate(entry)
        if is_first:  # not the user who returns it after the pool has closed it, too
            log.debug("%s closed a connection: %s", self._herald, reason)
            self._herald.closed(entry, reason)

    def drain(self) -> None:
        """Let every connection's lifetime end now: the parked ones are closed, the others when they return."""
        self._generation += 1
        for entry in self.handoff.places:
            entry.doom()
        self.discard_parked("drained")

    def resized(self) -> None:
        """Follow new limits in the settings: more room for those who wait, or fewer idle connections."""
        self.handoff.limit = self.settings.maxconn
        self.handoff.serve()
        self.trim()
        self.refill()

    def close(self) -> None:
        """Close every connection, those in use included, in bounded time even while threads are inside a query."""
        # From the list of all places: one that is in a thread's hands at this moment stands in no table.
        entries = [entry for entry in self.handoff.places if entry.is_filled]
        hang_up(entries)
        until = monotonic() + HANG_UP
        for entry in entries:
            self.discard(entry, "the pool is closed", until=until)

    def due_times(self, now: float) -> Iterator[float]:
        """Yield when there will be something to expire (monotonic seconds)."""
        if idle_timeout := self.settings.idle_timeout:
            # What will be parked from now on is not due before this; what is parked already may be.
            yield now + idle_timeout
            parked = list(self._parked.values())
            for entry in parked if self._is_unordered else parked[:1]:
                yield entry.since + idle_timeout
        if self._ends:
            yield self._ends[0][0]

    def count(self, **more: float) -> None:
        """Add to the counters."""
        with self.lock:
            for name, number in more.items():
                self._counts[name] += number

    def get_stats(self) -> dict[str, int]:
        """Return counters and sizes by their names in psycopg_pool."""
        with self.lock:
            counts = {name: round(number) for name, number in self._counts.items()}
        return counts | {
            "pool_min": self.settings.minconn,
            "pool_max": self.settings.maxconn,
            "pool_size": len(self.handoff),
            "pool_available": len(self._parked),
            "requests_waiting": len(self.handoff.line),
        }
