"""The connections of one pool: obtained, judged, taken back. `opener` opens them, `idle` keeps those at rest in order.

Knows nothing of their users: a connection that is neither parked nor being judged here is in use.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from time import monotonic
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import STATUS_READY
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE

from ..settings import PoolSettings
from .entry import BROKEN
from .entry import CLOSED
from .entry import Entry
from .entry import MOMENT
from .entry import NEVER
from .entry import NEVER_YET
from .entry import PING
from .handoff import CHECKING
from .handoff import CLOSING
from .handoff import CONNECTING
from .handoff import Handoff
from .handoff import OPEN
from .handoff import PUBLISHING
from .handoff import RETURNING
from .hangup import cut_late
from .hangup import hang_up
from .idle import IdleConnections
from .notifier import Notifier
from .notifier import weakly
from .opener import Opener
from .owners import current_work
from .owners import who
from .workers import cancellers
from .workers import will_fork


log = logging.getLogger("zpgpool")

#: Lifetimes are shortened by up to this part at random, so that connections opened together do not end together.
JITTER = 0.05


#: Within so many seconds the first user takes a new connection.
FIRST_USE = 1.0


class Connections(IdleConnections):
    """The entries of a pool.

    connect -- opens a connection.
    notifier -- is told of what happens.
    lost -- called with the weak reference of a connection that was lost, maybe in the middle of the garbage
        collector: it must not take a lock.
    tidy -- finds connections that were lost.
    in_background -- whether other threads may open and close connections for the pool.
    ask_why -- see `Opener`.
    """

    def __init__(
        self,
        settings: PoolSettings,
        connect: Callable[[], Connection | None],
        notifier: Notifier,
        lost: Callable[[weakref.ref[Connection]], object],
        tidy: Callable[[], object],
        lock: AbstractContextManager[object],
        in_background: bool = True,
        ask_why: Callable[[float], str] = lambda until: "",
    ) -> None:
        self.opener = Opener(settings, connect, weakly(self._publish), notifier, lost, in_background, ask_why)
        handoff: Handoff[Entry] = Handoff(Entry, settings.maxconn, weakly(self.opener.fill), lock, tidy)
        self.opener.handoff = handoff
        self.backoff = self.opener.backoff
        super().__init__(handoff, notifier, lock, in_background)
        self.apply(settings)

    def apply(self, settings: PoolSettings) -> None:
        """Follow these settings from now on."""
        self.settings = self.opener.settings = settings
        self.backoff.outage_wait = settings.outage_wait
        #: How long a look at a socket is good for, in seconds: not at all where `check` has to see every user.
        self.moment = MOMENT if settings.check is None else NEVER_YET
        self.handoff.limit = settings.maxconn

    # A checkout ------------------------------------------------------------------------------------------------------

    def obtain(self, entry: Entry | None, start: float, timeout: float) -> Entry | None:
        """Return a connection fit for use: `entry`, if it is, else another one, waited for or opened.

        Returns None when there was none within the `timeout` that began at `start` (monotonic seconds). Raises
        QueueFull and Closed, and what a connect for this checkout raised.
        """
        until = start + timeout
        while True:
            if entry is None:
                entry = self._next(until, timeout > 0)
            if entry is None:
                return None
            entry.turn_autocommit_off()
            now = monotonic()
            if self._is_fit(entry, now, until if timeout > 0 else NEVER):
                entry.since, entry.look_at, entry.is_new = now, now + self.moment, False
                return entry
            if timeout > 0 and monotonic() >= until:
                return None
            entry = None

    def _next(self, until: float, may_wait: bool) -> Entry | None:
        """Return what comes first, an idle connection or a new one, until then."""
        handoff = self.handoff
        entry = None if handoff.queue or handoff.is_closed else handoff.take()
        if entry is not None:
            return entry
        if self.backoff.is_recent and not handoff.is_closed and self._is_hopeless():
            raise self.backoff.copy()
        start = monotonic()

        def coming() -> float:
            return 0 if may_wait else self._coming(start)

        try:
            entry = handoff.get(until, self.settings.max_waiting, coming, not self.backoff.may_recover)
            if entry is None and not may_wait and self.backoff.is_recent and self._has_none():
                raise self.backoff.copy()  # as psycopg2, which waits for nothing else
            return entry
        finally:
            seconds = monotonic() - start
            self.count(requests_queued=may_wait, requests_wait_ms=seconds * 1000)
            self._notifier.waited(seconds)

    def _is_hopeless(self) -> bool:
        """Whether nothing will be returned, and a connect is under way already, or it is too early for that."""
        # In a frame that ends before the error is raised: threads that hold an error each would keep each other's
        # snapshots alive, and with them a slot that was lost, for ever (measured, with twelve threads).
        is_tried = any(slot.state == CONNECTING for slot in self.handoff.slots)
        return (self.backoff.is_on or is_tried) and not self.backoff.may_recover and self._has_none()

    def _has_none(self) -> bool:
        return not any(slot.is_open for slot in self.handoff.slots)

    def _coming(self, start: float) -> float:
        """Return how many connections will come, so that a checkout with `timeout=0` stays in the queue for its own.

        It waits for a connect as long as that takes, as psycopg2 does. It waits for a connection that is being judged,
        closed, or published, only until PING after `start`: that may hang.
        """
        if self.backoff.is_young:
            return math.inf
        with self.lock:
            states = [slot.state for slot in self.handoff.slots]
        coming = states.count(CONNECTING)
        if coming:  # and when that one has shown that the server is there, as many as there is room for
            coming += self.handoff.limit - len(states)
        if monotonic() < start + PING:
            coming += states.count(PUBLISHING) + states.count(CHECKING) + states.count(CLOSING)
        return coming

    def _is_fit(self, entry: Entry, now: float, until: float) -> bool:
        """Judge an idle connection that is ours, until then; False when it was discarded."""
        settings, rested = self.settings, now - entry.since
        # A new one is for its first user even where the pool was drained meanwhile: otherwise there might be no end.
        is_fresh = entry.is_new and rested < FIRST_USE
        is_over = now >= entry.expires and not is_fresh
        if is_over or (settings.idle_timeout and rested > settings.idle_timeout):
            self.discard_later(entry, "too old")
        elif not entry.is_alive():
            self.discard_dead(entry)
            self.look_at_all()
        elif (
            settings.check_idle is not None
            and rested > settings.check_idle
            and not entry.ping(min(entry.patience, until - now))
        ):
            self.discard_dead(entry)
            # What forgot this one, or fell silent, has the others, too; to ask each would cost a deadline each. That
            # the caller had too little time for an answer says nothing about them.
            if entry.patience <= until - now or monotonic() < until:
                self.discard_parked("rested beside one that did not answer", now - settings.check_idle, is_dead=True)
        elif settings.check is None or is_fresh:  # the opener has checked a new one
            return True
        else:
            return self._passes_check(entry, settings.check)
        return False

    def _passes_check(self, entry: Entry, check: Callable[[Connection], object]) -> bool:
        why = "it was interrupted"  # and where that exception is kept, its traceback keeps the slot
        try:
            why = entry.refusal(check, self.settings)
        finally:
            if why:
                log.info("%s: check refused a connection: %s", self._notifier, why)
                self.discard_later(entry, "check refused it")
        return not why

    def _publish(self, entry: Entry, begun: float, seconds: float) -> None:
        """Give a new connection, whose connect began then, to its first user, or let it rest."""
        lifetime = self.settings.max_lifetime
        if begun <= self._drained_at:
            entry.expire_now()
        elif lifetime:
            entry.expires = monotonic() + lifetime * random.uniform(1 - JITTER, 1)
            self.remember_end(entry)
        entry.state, entry.since = PUBLISHING, monotonic()
        self.count(connections_num=1, connections_ms=seconds * 1000)
        try:
            self._notifier.opened(entry, seconds)
        finally:
            self.handoff.publish(entry)
            self.after_return()

    def note_failure(self, error: BaseException) -> None:
        """Count a checkout that got no connection, and tell what its thread works on."""
        self.count(requests_errors=1)
        if isinstance(error, psycopg2.Error) and (work := current_work()) is not None:
            work.failure = error

    # A return --------------------------------------------------------------------------------------------------------

    def roll_back(self, entry: Entry, now: float) -> bool:
        """End the transaction of a session whose settings are unchanged; False: it takes more, see `clean`.

        What most requests leave, in one call.
        """
        conn: Any = entry.conn
        entry.state, entry.since = RETURNING, now  # the rollback may hang: see the watchdog
        try:
            if conn.get_transaction_status() == TRANSACTION_STATUS_ACTIVE:
                return False
            conn.rollback()
            is_clean = conn.status == STATUS_READY and not conn.get_transaction_status() and not conn.is_touched
        except psycopg2.Error:
            return False
        except BaseException:  # the session's state is unknown
            self.discard(entry, "it could not be made clean")
            raise
        if is_clean:
            entry.state = OPEN
        return is_clean

    def clean(self, entry: Entry, close: bool) -> bool:
        """Make a returned connection clean; False when it was discarded instead."""
        now = monotonic()
        is_lost = self._is_lost(entry)
        if self._notifier.observers:
            self._notifier.used(now - entry.since)
        entry.state, entry.since = RETURNING, now  # the rollback may hang: see the watchdog
        reason = "it could not be made clean"
        is_clean = False
        try:
            if is_lost:
                reason = "the server has gone"
                self.count(returns_bad=1)
            elif close:
                reason = "its user asked for it"
            elif now >= entry.expires:
                reason = "too old"
            else:
                why = entry.reset(self.settings, self.settings.reset)
                is_clean = not why
                if why:
                    self._tell_unclean(entry, why)
        finally:
            # After an interrupted rollback, too: the session's state is unknown.
            if not is_clean:
                self.discard(entry, reason)
        entry.state = OPEN
        return is_clean

    def replace(self, entry: Entry) -> None:
        """Discard a connection that its user has closed, or lost, and wants another one for."""
        is_lost = self._is_lost(entry)
        self.discard(entry, "the server has gone" if is_lost else "its user closed it", is_dead=is_lost)

    def _is_lost(self, entry: Entry) -> bool:
        """Whether a connection was lost in use; then let no checkout use another one from before.

        A server that crashes or restarts ends all sessions within milliseconds: a checkout in between would get one
        that looks alive. The first that is lost drains; the others, and what was opened since, need not.
        """
        if entry.conn.closed != BROKEN or entry.is_cut:
            return False
        if (work := current_work()) is not None:
            work.has_lost = True
        if monotonic() < entry.expires:
            self.backoff.doubt()
            self.drain("another connection was lost", later=True)
        return True

    def _tell_unclean(self, entry: Entry, why: str) -> None:
        self.count(returns_bad=1)
        if why != CLOSED:
            log.warning(
                "%s: a returned connection could not be made clean, and is closed: %s (it comes from %s)",
                self._notifier,
                why,
                who(entry.owner),
            )

    def after_return(self) -> None:
        """See to the queue, a closed pool, or too many idle connections, after something was parked."""
        self.handoff.serve()
        if self.handoff.is_closed:
            self.discard_parked("the pool is closed")
        else:
            self.trim()

    # Maintenance -----------------------------------------------------------------------------------------------------

    def refill(self) -> None:
        """Open connections up to `minconn`, at the same time. Raises the first error."""
        self.opener.open_all(self.settings.minconn)

    def prune(self) -> None:
        """Close what is idle for too long, or too old, and open connections up to `minconn`. Raises the first error."""
        now = monotonic()
        if staying := self.expire(now):
            self.opener.open_all(min(len(self.handoff) + staying, self.settings.maxconn))
            self.expire(now)
        self.refill()

    def maintain(self, now: float) -> None:
        """Do the timer's part: nothing here waits for a server."""
        staying = self.expire(now, later=True)
        self.look_at_all()
        missing = max(self.settings.minconn - len(self.handoff) + self._leaving(), staying)
        if missing <= 0:
            self._refill_at = NEVER_YET
        elif now >= self._refill_at or not self._in_background:
            self.opener.open_missing(min(len(self.handoff) + missing, self.settings.maxconn))

    def resized(self) -> None:
        """Follow new limits: more room for waiting threads, or fewer idle connections."""
        self.handoff.serve()
        self.trim()
        self.refill()

    def close(self) -> None:
        """Close every connection, those in use included, in bounded time even while threads are inside a query."""
        # From the list of all slots: one that is in a thread's hands at this moment stands in no table.
        entries = [entry for entry in self.handoff.slots if entry.is_open]
        hang_up(entries)
        # To `hang_up` a thread between its BEGIN and its query is idle; closing would then wait for the query.
        is_done = threading.Event()
        if not will_fork():
            cancellers.run(partial(cut_late, entries, is_done))
        try:
            self._discard_all(entries, "the pool is closed")
        finally:
            is_done.set()
