"""What administrators, the timer and the package's other parts do with a pool, and see of it."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from os import getpid
from time import monotonic
from typing import NoReturn

import psycopg2
from psycopg2.extensions import connection as Connection

from ..errors import PoolClosed
from ..errors import PoolError
from ..interfaces import IObserver
from ..settings import PoolSettings
from .entry import Entry
from .entry import NEVER_YET
from .handoff import Ticket
from .hangup import CANCEL
from .hangup import cancel
from .lines import current_lines
from .notifier import Notifier
from .owners import CheckoutOwner
from .owners import Holder
from .owners import Waiter
from .timer import MaintenanceTimer
from .users import Users
from .watchdog import due_times
from .watchdog import end_held_too_long
from .watchdog import report_leaks


#: How many holders a message names.
NAMED = 10

#: How old the holders may be that a refusal names, in seconds.
LATELY = 1.0


class ManagedPool(Users):
    """See `IPoolManagement` and `IPoolInternals`."""

    settings: PoolSettings
    closed: bool
    _name: str
    _pid: int
    _is_long: bool
    _timer: MaintenanceTimer | None
    _notifier: Notifier
    _queue: deque[Ticket[Entry]]
    _open_connection: Callable[..., Connection]
    _scrub: Callable[[str], str]
    #: What `_held_lately` has found, and until when that is good (monotonic seconds).
    _held: str = ""
    _held_until: float = NEVER_YET

    @property
    def last_connect_error(self) -> psycopg2.Error | None:
        """See `IConnectionPool`."""
        return self._connections.backoff.error

    @property
    def outage_seconds(self) -> float | None:
        """See `IPoolManagement`."""
        return self._connections.backoff.outage_seconds

    def drain(self) -> None:
        """See `IConnectionPool`."""
        self._check_open()
        self._connections.drain()

    def holders(self) -> list[Holder]:
        """See `IPoolManagement`."""
        self.check_process()
        now, lines = monotonic(), current_lines()
        return [Holder.of(owner, entry, now, lines) for owner, entry in self._busy()]

    def _held_by(self) -> str:
        """Return who holds connections, the longest holding first, for a message."""
        busy = sorted(self._busy(), key=lambda each: each[1].since)
        now, lines = monotonic(), current_lines()
        named = "; ".join(str(Holder.of(owner, entry, now, lines)) for owner, entry in busy[:NAMED])
        more = f"; and {len(busy) - NAMED} more" if len(busy) > NAMED else ""
        return f"{named or 'nobody'}{more}"

    def _held_lately(self) -> str:
        """Return the same, at most a second old: an overload refuses thousands of checkouts in that time."""
        now = monotonic()
        if now >= self._held_until:
            self._held, self._held_until = self._held_by(), now + LATELY
        return self._held

    def backend_pids(self) -> list[int]:
        """See `IPoolInternals`."""
        self.check_process()
        return [pid for entry in self._connections.handoff.slots if (pid := getattr(entry, "backend_pid", 0))]

    def waiters(self) -> list[Waiter]:
        """See `IPoolManagement`."""
        now, lines = monotonic(), current_lines()
        return [Waiter.of(ticket.thread, now - ticket.since, lines) for ticket in list(self._queue)]

    def cancel(self, conn: Connection, timeout: float = CANCEL) -> bool:
        """See `IPoolManagement`."""
        for _, entry in self._users():
            if entry.connection() is conn and entry.is_active:
                # Expired first. If it was returned before this, `since` has changed; if it is returned after this, it
                # is closed. So no other user has the connection when the server hears of this.
                since = entry.since
                entry.expire_now()
                return entry.since == since and cancel([entry], timeout) > 0
        return False

    def detach(self, conn: Connection) -> None:
        """See `IPoolManagement`."""
        for owner, entry in self._users():
            is_ours = entry.connection() is conn and not isinstance(owner, CheckoutOwner)
            if is_ours and self._remove_user(owner, entry):
                self._connections.detach(entry)
                return
        self._refuse("the connection is not in use, or a checkout has it")

    def get_stats(self) -> dict[str, int]:
        """See `IConnectionPool`."""
        self.check_process()
        with self._connections.lock:  # as `_forget_ended` has: the sum never goes back
            stats = self._connections.get_stats()
            stats["requests_num"] += sum(owner.uses for owner in list(self._owners)) + stats["requests_errors"]
        return stats

    def run_maintenance(self, now: float) -> float | None:
        """See `IMaintained`. Nothing here waits for a server: the timer has other pools to look after."""
        if self.closed:
            return None
        self.check_process()
        settings, connections = self.settings, self._connections
        self._reap()
        self._forget_ended()
        end_held_too_long(self._busy(), settings, self._notifier, now)
        report_leaks(self._users(), settings, self._notifier, now)
        connections.maintain(now)
        due = [*due_times(self._busy(), settings, now), *connections.due_times(now), *self._notifier.maintain(now)]
        return min([now + settings.prune_interval, *due])

    def observe(self, observer: IObserver) -> None:
        """See `IConnectionPool`."""
        self._notifier.observers.append(observer)
        self._is_long = True
        if self._timer is not None:
            self._timer.hurry(self)  # the observer wants its rounds, too

    def forgo_timer(self) -> None:
        """See `IPoolInternals`."""
        self._timer = None

    def serve_readers(self, timeout: float) -> None:
        """See `IPoolInternals`."""
        settings = replace(self.settings, readonly=True, timeout=min(timeout, self.settings.timeout or timeout))
        if settings != self.settings:
            self._apply(settings)
            self._connections.drain(later=True)

    def longest_use(self, now: float) -> float:
        """See `IPoolInternals`."""
        return max((now - entry.since for _, entry in self._busy()), default=0.0)

    def hang_up(self) -> None:
        """See `IPoolInternals`."""
        for _, entry in self._busy():
            entry.expire_now()
            entry.cut()

    def adopt_name(self, name: str) -> None:
        """Take the name under which the pool is registered, unless it was given one of its own."""
        if name and not self.settings.name:
            self._name = name

    def open_connection(self, **keywords: object) -> Connection:
        """See `IConnectionPool`."""
        return self._open_connection(keywords)

    def scrub(self, text: str) -> str:
        """See `IConnectionPool`."""
        return self._scrub(text)

    def check_process(self) -> None:
        """See `IPoolInternals`."""
        if self._pid != getpid():
            self._forget()

    def _check_open(self) -> None:
        self.check_process()
        if self.closed:
            raise PoolClosed(f"{self!r}")

    def _refuse(self, why: str) -> NoReturn:
        self._check_open()
        raise PoolError(f"{self!r}: {why}")

    @abstractmethod
    def _apply(self, settings: PoolSettings) -> None:
        """Follow these settings from now on."""

    @abstractmethod
    def _forget(self) -> None:
        """In a forked child: leave the parent its connections, and begin with none."""
