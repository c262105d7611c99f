"""How a pool's connections are opened: in threads of their own, so that a connect that hangs delays no other checkout.

A connect has three steps: connect, prepare, publish. A checkout waits in the queue, and takes what
comes first: a connection that is returned, or a new one. A connect that outlives its waiter goes on, and is parked.
"""

from __future__ import annotations

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
from .entry import NEVER_YET
from .handoff import CLOSING
from .handoff import CONNECTING
from .handoff import Handoff
from .handoff import Ticket
from .notifier import Notifier
from .outage import diagnose
from .outage import diagnose_code
from .outage import Diagnosis
from .outage import is_servers
from .outage import Unfit
from .session import check_two_phase
from .session import set_up
from .workers import Opening
from .workers import start


#: How long a second connect may take, which asks why the first one failed, in seconds.
PATIENCE = 2.0

#: For how long a server with too many clients is not told of again, in seconds.
QUIET = 60.0

#: How many texts of errors are remembered with what they say: a server has a few.
MANY = 32


class Opener:
    """Opens connections for the waiters of `handoff`, and up to a number.

    connect -- opens a connection; returns None when its pool was garbage-collected.
    publish -- gives a new entry to its first user; gets the entry, when its connect began, and how long that took.
    notifier -- is told of a connect that failed.
    lost -- called with the weak reference of a connection that was lost, maybe in the middle of the garbage
        collector: it must not take a lock.
    in_background -- whether other threads may open connections.
    ask_why -- connects once more, until then (monotonic seconds), and returns the error of that, with its SQLSTATE.
    """

    def __init__(
        self,
        settings: PoolSettings,
        connect: Callable[[], Connection | None],
        publish: Callable[[Entry, float, float], None],
        notifier: Notifier,
        lost: Callable[[weakref.ref[Connection]], object],
        in_background: bool,
        ask_why: Callable[[float], str],
    ) -> None:
        self.handoff: Handoff[Entry]
        self.settings = settings
        self.backoff = ConnectBackoff()
        #: How many connects have failed.
        self.failures = 0
        self._connect = connect
        self._publish = publish
        self._notifier = notifier
        self._lost = lost
        self._in_background = in_background
        self._may_prepare = False
        self._ask_why = ask_why
        self._quiet_until = NEVER_YET
        self._diagnoses: dict[str, Diagnosis] = {}

    @property
    def under_way(self) -> int:
        """How many connects are under way. Counted each time: an exception may break off what would keep a number."""
        return sum(slot.is_coming for slot in self.handoff.slots)

    def fill(self) -> float | None:
        """Open connections until one is on its way for each waiter, as far as there is room.

        A connect that hangs does not count as on its way. Returns the seconds until the next try, if it is too early.
        """
        waiter: list[Ticket[Entry]] = []

        def may_fill(connecting: int) -> bool:
            if self.handoff.parked:  # just now: who has parked it serves the queue next
                return False
            waiting = [ticket for ticket in list(self.handoff.queue) if not ticket.is_settled]
            waiter[:] = waiting[connecting:] or waiting
            is_wanted = connecting < len(waiting) or self.backoff.is_hanging
            return bool(waiting) and is_wanted and self.backoff.may_connect(connecting)

        while len(self.handoff) < self.handoff.limit and (entry := self.handoff.reserve(may_fill)) is not None:
            entry.waiter = waiter[0]
            self._begin(entry)
        return self.backoff.pause or None

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
        run = partial(self._run, entry, opening)
        if not self._in_background or not start(run, "zpgpool-connect"):
            run()
        return opening

    def _run(self, entry: Entry, opening: Opening) -> None:
        try:
            opening.error = self._open(entry)
        finally:
            opening.has_ended.open()

    def _open(self, entry: Entry) -> BaseException | None:
        """Connect, prepare and publish; return why that failed, if it did."""
        begun = monotonic()
        try:
            conn = self._connect()
            if conn is None:
                self.handoff.free(entry)
                return None
            entry.attach(conn, weakref.ref(conn, self._lost))
            set_up(conn, self.settings)
            if self.settings.twophase and not self._may_prepare:
                check_two_phase(conn, str(self._notifier))
                self._may_prepare = True
            entry.begin(monotonic(), monotonic() - begun, self.settings.refuses_writes)
            if (self.backoff.is_doubted or self.backoff.outage_seconds is not None) and not entry.ping(PATIENCE):
                raise psycopg2.OperationalError("it lets us connect, but does not answer")
            check = self.settings.check
            # Here, before the connect counts as one that succeeded: where all are refused, it is tried with pauses.
            if check is not None and (why := entry.refusal(check, self.settings)):
                raise Unfit(f"check refused a new connection: {why}")
            outage = self.backoff.succeeded()
            if outage is not None:
                self._notifier.outage_ended(outage, len(self.handoff.queue))
        except BaseException as error:
            return self._give_up(entry, error.with_traceback(None), begun)
        entry.waiter = None  # the ticket may hold this entry as its answer: a cycle would keep it, were it lost
        del conn  # or this frame would keep it alive when its first user has lost it
        self._publish(entry, begun, monotonic() - begun)
        return None

    def _give_up(self, entry: Entry, plain: BaseException, begun: float) -> BaseException:
        """Close what there is, and tell the waiters. Their error has no traceback: it would show the password."""
        seconds = monotonic() - begun
        is_first = self.backoff.error is None
        try:
            if isinstance(plain, psycopg2.OperationalError):
                self._note_failure(plain, begun, is_connected=entry.is_attached)
                self._notifier.failed(plain, seconds)
            # Waiting checkouts get the error, unless they wait for the server's return.
            is_untold = not self.handoff.queue or self.backoff.may_recover
            # A server with too many clients takes one now and then, a hook may raise each time: told once a minute.
            is_outage = isinstance(plain, psycopg2.OperationalError) and not self.backoff.is_chance
            is_news = is_outage or begun >= self._quiet_until
            if is_first and is_untold and is_news and not self.handoff.is_closed:
                self._quiet_until = begun + QUIET
                self._notifier.cannot_connect(plain, self.backoff.outage_wait if self.backoff.is_young else 0.0)
        finally:
            entry.state = CLOSING
            if entry.is_attached:
                entry.close()
            self.failures += 1
            self._tell_waiters(entry, plain)
        return plain

    def _note_failure(self, error: psycopg2.OperationalError, begun: float, is_connected: bool) -> None:
        """Find out what the error says, and remember it."""
        text = str(error)
        if isinstance(error, Unfit):
            diagnosis = Diagnosis.CHANCE
        elif is_connected:  # what failed is the set-up of the session
            diagnosis = diagnose_code(error.pgcode)
        elif is_servers(text):
            diagnosis = self._diagnose(text)
        else:
            diagnosis = diagnose(text)
        if self.backoff.failed(error, diagnosis, begun):
            self._notifier.outage_began(error)

    def _diagnose(self, text: str) -> Diagnosis:
        """Return what the server's refusal says. Its text may be in any language, and psycopg2 gives no SQLSTATE."""
        if text not in self._diagnoses:
            if len(self._diagnoses) > MANY:
                self._diagnoses.clear()
            why = self._ask_why(monotonic() + PATIENCE)
            if not is_servers(why):  # it has changed meanwhile
                return diagnose(why) if why else Diagnosis.CHANCE
            self._diagnoses[text] = diagnose(why)
        return self._diagnoses[text]

    def _tell_waiters(self, entry: Entry, plain: BaseException) -> None:
        """Give the error to the waiter for whom the connect was made; to all, if nothing is left to wait for."""
        is_servers_fault = isinstance(plain, psycopg2.OperationalError)
        waiter = entry.waiter
        if not (is_servers_fault and self.backoff.may_recover):
            states = [slot.state for slot in self.handoff.slots if slot is not entry]
            if waiter is not None:
                self.handoff.fail(lambda: plain, waiter)
            if is_servers_fault and all(state in (CONNECTING, CLOSING) for state in states):
                self.handoff.fail(self.backoff.copy)
        else:
            if waiter is not None and self.backoff.is_chance and waiter.until <= monotonic():
                self.handoff.fail(lambda: plain, waiter)  # it does not wait for other users
            self.handoff.shed(self.settings.max_waiting)  # they joined when room was to be had
        self.handoff.free(entry)
