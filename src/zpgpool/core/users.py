"""The users of a pool's connections: their table, their blocks, and what dead threads leave behind."""

from __future__ import annotations

import gc
import logging
import weakref
from abc import ABC
from abc import abstractmethod
from collections import deque
from collections.abc import Hashable
from os import getpid
from time import monotonic

from psycopg2.extensions import connection as Connection

from .connections import Connections
from .entry import Entry
from .entry import MOMENT
from .entry import Owner
from .handoff import CLOSING
from .handoff import RETURNING
from .owners import forget_tasks
from .owners import LifeToken
from .owners import ThreadOwner


log = logging.getLogger("zpgpool")

#: How many threads a pool may know before it looks which of them have ended.
MANY = 64

#: Between two looks for slots without a home, in seconds, at least.
ASTRAY = 0.5


class Users(ABC):
    """A pool's users. The table itself is the subclass's: by thread, or by key."""

    _connections: Connections
    _owners: set[ThreadOwner]
    _many_owners: int
    #: The outermost `connection()` blocks, by key.
    _blocks: dict[Hashable, weakref.ref[LifeToken]]
    #: What was lost without being returned, until its slot is freed.
    _lost: deque[Entry]
    _parked: dict[Hashable, Entry]
    #: The process, and the seconds of rest after which a connection is judged.
    _pid: int
    _rest: float
    #: The slots without a home at the last look, by their ids and since when they are used; and when that was.
    _astray: set[tuple[int, float]]
    _looked_at: float
    #: Those for which the garbage was collected.
    _collected: set[tuple[int, float]]

    # The table -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _users(self) -> list[tuple[Owner, Entry]]:
        """Return the connections in use, with their owners: a snapshot."""

    @abstractmethod
    def _remove_user(self, owner: Owner, entry: Entry) -> bool:
        """Take `entry` out of the table; False when it has been returned meanwhile."""

    @abstractmethod
    def _forget_users(self) -> None:
        """Empty the table."""

    @abstractmethod
    def _entry_of(self, key: Hashable) -> Entry | None:
        """Return what is in use under `key`, which may be a thread's owner."""

    def _busy(self) -> list[tuple[Owner, Entry]]:
        """Return the connections in use, and those that are being returned, with their owners: a snapshot."""
        returning = [entry for entry in self._connections.handoff.slots if entry.state == RETURNING]
        users = self._users()
        in_use = {id(entry) for _, entry in users}
        return users + [(entry.owner, entry) for entry in returning if id(entry) not in in_use]

    def _add_owner(self, owner: ThreadOwner) -> None:
        self._owners.add(owner)
        if len(self._owners) > self._many_owners:  # a server with a thread for each request, and no timer yet
            self._forget_ended()
            self._many_owners = 2 * len(self._owners) + MANY

    # Requests that read -----------------------------------------------------------------------------------------------

    @abstractmethod
    def take_for_reading(self, key: Hashable = None) -> None:
        """See `IPoolInternals`."""

    def _pop_for_reading(self, owner: ThreadOwner) -> Entry | None:
        """Return what rests for `owner` with autocommit on; None where nothing does, or it must be judged first."""
        entry = self._parked.pop(owner.reader, None)
        if entry is None:
            return None
        now = monotonic()
        if now > entry.look_at:
            if now >= entry.expires or now - entry.since > self._rest or entry.look(0) or getpid() != self._pid:
                self._connections.park_again(owner.reader, entry)
                return None
            entry.look_at = now + MOMENT
        entry.since = now
        return entry

    # Blocks ----------------------------------------------------------------------------------------------------------

    def _begin_block(self, key: Hashable) -> LifeToken | None:
        """Return the token of a `connection()` block that is the outermost of `key`; None for an inner one.

        The block keeps it alive. So a dead token means that an exception broke off the block's end: its connection is
        returned first.
        """
        outer, entry = self._blocks.get(key), self._entry_of(key)
        if outer is not None and outer() is None and entry is not None:
            self._end_block(key, entry.connection())
            entry = self._entry_of(key)
        if entry is not None and not entry.conn.closed:
            return None
        token = LifeToken()
        self._blocks[key] = weakref.ref(token)
        return token

    def _end_block(self, key: Hashable, conn: Connection | None) -> None:
        entry = self._entry_of(key)
        # conn is None: an exception came before `getconn` could return it.
        if entry is not None and (conn is None or entry.connection() is conn):
            self._put_away(key, entry)
        self._blocks.pop(key, None)

    @abstractmethod
    def _put_away(self, key: Hashable, entry: Entry) -> None:
        """Put away what is in use under `key`, if that is still `entry`."""

    # Threads that have ended, connections that were lost --------------------------------------------------------------

    def _reap(self) -> None:
        """Close what threads that have ended still held, so that the server rolls back; free what was lost."""
        for owner, entry in self._users():
            if not self._is_over(owner, entry):
                continue
            with self._connections.lock:
                if (owner, entry) not in self._users():
                    continue  # it was returned meanwhile, and its state is its next user's
                state, entry.state = entry.state, CLOSING  # first: a checkout that may not wait sees that it comes free
                is_ours = self._remove_user(owner, entry)
                if not is_ours:
                    entry.state = state
            if is_ours:
                log.warning("%r: thread %s ended while it held a connection, which is closed", self, owner.name)
                self._connections.discard_later(entry, "its thread has ended")
        while self._lost:
            entry = self._lost.popleft()
            log.warning("%r: thread %s lost a connection without returning it", self, entry.owner.name)
            self._connections.discard_later(entry, "its user lost it")
        self._connections.handoff.forget_lost()

    def _collect_astray(self, now: float) -> None:
        """Have the garbage collected when a slot has had no home for a while: what is lost in a cycle is no room yet.

        An exception that some code has made part of a cycle keeps the frames of its traceback, and a slot in one of
        them. Once for each slot: it may only be in the hands of a thread that takes its time with it.
        """
        if now < self._looked_at + ASTRAY:
            return
        at_home = {id(entry) for _, entry in self._users()} | {id(entry) for entry in list(self._parked.values())}
        slots = self._connections.handoff.slots
        astray = {(id(slot), getattr(slot, "since", 0.0)) for slot in slots if id(slot) not in at_home}
        del slots
        is_news = bool(astray & self._astray - self._collected)
        self._collected = astray & (self._collected | self._astray)
        self._looked_at, self._astray = now, astray
        if is_news:
            gc.collect()
            self._connections.handoff.forget_lost()

    def _is_over(self, owner: Owner, entry: Entry) -> bool:
        """Whether `entry` can no longer be returned."""
        return not owner.is_alive

    def _forget_ended(self) -> None:
        """Forget the threads that have ended: not in `_reap`, for a checkout that waits need not look at every thread.

        With 32 threads that was a tenth of the processor's time of such a checkout.
        """
        with self._connections.lock:  # several threads do this: each owner's uses count once
            ended = {owner for owner in list(self._owners) if not owner.is_alive and owner.entry is None}
            self._owners -= ended
            self._connections.count(requests_num=sum(owner.uses for owner in ended))
        forget_tasks(owner.ident for owner in ended)

    @abstractmethod
    def _on_lost(self, ref: weakref.ref[Connection]) -> None:
        """Note that a connection object is lost. Called by the garbage collector: takes no lock, logs nothing."""
