"""How a pool's connections are opened: in threads of their own, so that a connect that hangs stops nobody.

A connect has three steps: connect, prepare, publish. Whoever wants a connection waits in the queue, and takes what
comes first: a connection that is returned, or a new one. A connect that outlives its waiter goes on, and is parked.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from time import sleep

import psycopg2
from psycopg2.extensions import connection as Connection

from ..settings import PoolSettings
from .backoff import ConnectBackoff
from .backoff import FIRST_PAUSE
from .entry import Entry
from .handoff import CLOSING
from .handoff import CONNECTING
from .handoff import Handoff
from .handoff import Ticket
from .notifier import Notifier
from .session import check_two_phase
from .session import set_up
from .workers import Gate
from .workers import start


class Opening:
    """A connect that is under way."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.has_ended = Gate()


class Opener:
    """Opens connections for the waiters of `handoff`, and up to a number.

    connect -- opens a connection; returns None when its pool was garbage-collected.
    publish -- gives a new entry to its first user; gets the entry, when its connect began, and how long that took.
    notifier -- is told of a connect that failed.
    lost -- called with the weak reference of a connection that nobody has any more, maybe in the middle of the garbage
        collector: it must not take a lock.
    in_background -- whether other threads may open connections.
    """

    def __init__(
        self,
        settings: PoolSettings,
        connect: Callable[[], Connection | None],
        publish: Callable[[Entry, float, float], None],
        notifier: Notifier,
        lost: Callable[[weakref.ref[Connection]], object],
        in_background: bool,
    ) -> None:
        self.handoff: Handoff[Entry]
        self.settings = settings
        self.backoff = ConnectBackoff()
        #: How many connects have failed, and how many are under way.
        self.failures = self.under_way = 0
        self._connect = connect
        self._publish = publish
        self._notifier = notifier
        self._lost = lost
        self._in_background = in_background
        self._may_prepare = False
        self._lock = threading.Lock()  # only for the counter: nothing that is called under it can call us

    def fill(self) -> None:
        """Open connections until one is on its way for each waiter, as far as there is room.

        A connect that hangs does not count as on its way.
        """
        waiter: list[Ticket[Entry]] = []

        def may_fill(connecting: int) -> bool:
            waiting = list(self.handoff.queue)
            waiter[:] = waiting[connecting:] or waiting
            is_wanted = connecting < len(waiting) or self.backoff.is_hanging
            return bool(waiting) and is_wanted and self.backoff.may_connect(connecting)

        while len(self.handoff) < self.handoff.limit and (entry := self.handoff.reserve(may_fill)) is not None:
            entry.waiter = waiter[0]
            self._begin(entry)

    def open_missing(self, number: int) -> list[Opening]:
        """Begin to open connections up to `number`; only one while nothing proves that the server is there."""
        openings: list[Opening] = []

        def may_fill(connecting: int) -> bool:
            return len(self.handoff) < number and self.backoff.may_connect(connecting)

        for _ in range(number - len(self.handoff)):
            entry = self.handoff.reserve(may_fill)
            if entry is None:
                break
            openings.append(self._begin(entry))
        return openings

    def open_all(self, number: int) -> None:
        """Open connections until there are `number`, several at the same time. Raises the first error."""
        while openings := self.open_missing(number):
            for opening in openings:
                opening.has_ended.wait()
            for opening in openings:
                if opening.error is not None:
                    raise opening.error

    def wait_for(self, number: int, until: float) -> bool:
        """Open connections until there are `number`, and try again until then; return whether there are.

        Raises what a hook of the user's raised.
        """
        opened = 0  # and closed again, maybe, where none is kept
        while max(opened, sum(slot.is_open for slot in self.handoff.slots)) < number:
            openings = self.open_missing(number)
            for opening in openings:
                opened += opening.has_ended.wait(max(0.0, until - monotonic())) and opening.error is None
                if opening.error is not None and not isinstance(opening.error, psycopg2.OperationalError):
                    raise opening.error
            if monotonic() >= until:
                return False
            if not openings:
                sleep(FIRST_PAUSE)  # another thread's are under way, or it is too early to try again
        return True

    def _begin(self, entry: Entry) -> Opening:
        opening = Opening()
        with self._lock:
            self.under_way += 1
        run = partial(self._run, entry, opening)
        if not self._in_background or not start(run, "zpgpool-connect"):
            run()
        return opening

    def _run(self, entry: Entry, opening: Opening) -> None:
        try:
            opening.error = self._open(entry)
        finally:
            with self._lock:
                self.under_way -= 1
            opening.has_ended.open()

    def _open(self, entry: Entry) -> BaseException | None:
        """Connect, prepare and publish; return why that failed, if it did."""
        begun = monotonic()
        try:
            conn = self._connect()
            if conn is None:
                self.handoff.free(entry)
                return None
            self.backoff.succeeded()
            entry.attach(conn, weakref.ref(conn, self._lost))
            set_up(conn, self.settings)
            if self.settings.twophase and not self._may_prepare:
                check_two_phase(conn, str(self._notifier))
                self._may_prepare = True
            entry.begin(monotonic(), monotonic() - begun)
        except BaseException as error:
            return self._give_up(entry, error.with_traceback(None), monotonic() - begun)
        entry.waiter = None  # the ticket may hold this entry as its answer: a cycle would keep it, were it lost
        del conn  # or this frame would keep it alive when its first user has lost it
        self._publish(entry, begun, monotonic() - begun)
        return None

    def _give_up(self, entry: Entry, plain: BaseException, seconds: float) -> BaseException:
        """Close what there is, and tell the waiters. Their error has no traceback: it would show the password."""
        entry.state = CLOSING
        if entry.is_attached:
            entry.close()
        self.failures += 1
        is_first = self.backoff.error is None
        try:
            if isinstance(plain, psycopg2.OperationalError):
                self.backoff.failed(plain)
                self._notifier.failed(plain, seconds)
            if is_first and not self.handoff.is_closed and not self.handoff.queue:
                self._notifier.cannot_connect(plain)  # nobody waits who would be told
        finally:
            self._tell_waiters(entry, plain)
        return plain

    def _tell_waiters(self, entry: Entry, plain: BaseException) -> None:
        """Give the error to the waiter for whom the connect was made; to all, if nothing is left to wait for."""
        states = [slot.state for slot in self.handoff.slots if slot is not entry]
        if entry.waiter is not None:
            self.handoff.fail(lambda: plain, entry.waiter)
        if isinstance(plain, psycopg2.OperationalError) and all(state in (CONNECTING, CLOSING) for state in states):
            self.handoff.fail(self.backoff.copy)
        self.handoff.free(entry)
