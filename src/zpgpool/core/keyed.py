"""The pools whose users tell connections apart by a key of theirs. The hot path is as in `persistent`."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from functools import partial
from os import getpid
from threading import TIMEOUT_MAX
from time import monotonic
from typing import Any

from psycopg2.extensions import connection as Connection
from zope.interface import implementer

from ..interfaces import IKeyedConnectionPool
from ..interfaces import IPoolInternals
from ..interfaces import IPoolManagement
from ..settings import convert
from .base import AbstractConnectionPool
from .entry import Entry
from .entry import MOMENT
from .entry import Owner
from .entry import PING
from .handoff import CLOSING
from .owners import Checkout
from .owners import CheckoutOwner
from .owners import LifeToken
from .owners import ThreadOwner
from .workers import Gate


class CheckoutKey:
    """The key of a connection that a checkout has: no other code can name it."""


class _KeyedConnectionPool(AbstractConnectionPool):
    """Pools whose users tell connections apart by a key of theirs, or by the connection itself."""

    def _start(self) -> None:
        #: The connections in use: by key, or by a weak reference to the connection, which is all we keep then.
        self._used: dict[Hashable, Entry] = {}
        #: Keys for which a thread is checking out just now.
        self._comers: dict[Hashable, Gate] = {}
        super()._start()

    def getconn(self, key: Hashable = None, timeout: float | None = None) -> Connection:
        """See `IKeyedConnectionPool`."""
        owner = self.here.owner
        if key is not None:
            return self._getconn_by_key(key, owner, timeout)
        entry = self._parked.pop(owner, None)
        now = monotonic()
        if entry is None:
            entry = self._obtain(None, timeout)
        elif now <= entry.look_at:
            entry.since = now
        elif now >= entry.expires or now - entry.since > self._rest or entry.look(0) or getpid() != self._pid:
            entry = self._obtain(entry, timeout)
        else:
            entry.since, entry.look_at = now, now + MOMENT
        entry.owner = owner
        owner.uses += 1
        conn = entry.conn
        del entry.conn  # only its user keeps it alive now, see Entry.ref
        self._used[entry.ref] = entry
        return conn

    def _getconn_by_key(self, key: Hashable, owner: ThreadOwner, timeout: float | None) -> Connection:
        start = monotonic()
        seconds = self.settings.timeout if timeout is None else convert("timeout", timeout)
        entry = None if key in self._used else self._parked.pop(owner, None)
        if entry is not None:  # most often, and nobody else asks with this key: as in `getconn`
            is_old = start > entry.look_at
            if is_old and (
                start >= entry.expires or start - entry.since > self._rest or entry.look(0) or getpid() != self._pid
            ):
                self._connections.park_again(owner, entry)  # to be judged below: that may take its time
            else:
                entry.since, entry.look_at = start, start + MOMENT if is_old else entry.look_at
                return self._enter(key, owner, entry)
        until = start + min(seconds or PING, TIMEOUT_MAX)
        mine = Gate()
        while (conn := self._conn_of(key, owner)) is None:
            first = self._comers.setdefault(key, mine)
            # Another thread is getting this key's connection. Not for ever: an exception may have stopped it half-way.
            if first is mine or not first.wait(until - monotonic()):
                break
        else:
            return conn
        try:
            return self._enter(key, owner, self._obtain(self._parked.pop(owner, None), seconds, start))
        finally:
            self._comers.pop(key, None)
            mine.open()

    def take_for_reading(self, key: Hashable = None) -> None:
        """See `IPoolInternals`."""
        owner = self.here.owner
        if key is not None and key not in self._used and (entry := self._pop_for_reading(owner)) is not None:
            self._enter(key, owner, entry)

    def _enter(self, key: Hashable, owner: ThreadOwner, entry: Entry) -> Connection:
        """Let `key` have `entry`; return what it has, which another thread may have entered first."""
        entry.owner, entry.sharers = owner, ()
        owner.uses += 1
        winner = self._used.setdefault(key, entry)
        if winner is not entry:
            self._share(winner, owner)
            self._give_back(owner, entry, close=False)
        return winner.conn

    def _share(self, entry: Entry, owner: ThreadOwner) -> None:
        if entry.owner is not owner and owner not in entry.sharers:
            entry.sharers = (*entry.sharers, owner)

    def _conn_of(self, key: Hashable, owner: ThreadOwner) -> Connection | None:
        """Return the connection that `key` has; the owner uses it, too, from now on."""
        entry = self._used.get(key)
        if entry is None:
            return None
        if not entry.conn.closed:
            self._share(entry, owner)
            return entry.conn
        if self._remove(key, entry):
            self._connections.replace(entry)
        return None

    def putconn(self, conn: Connection | None = None, key: Hashable = None, close: bool = False) -> None:
        """See `IKeyedConnectionPool`."""
        if key is not None or conn is None or (entry := self._used.pop(weakref.ref(conn), None)) is None:
            entry = self._take_out(conn, key)
        else:
            entry.conn = conn
        self._give_back(self.here.owner, entry, close)

    def _take_out(self, conn: Connection | None, key: Hashable) -> Entry:
        """Remove what `key` holds, or what `conn` is under whatever key; refuse where they do not match."""
        with self._connections.lock:
            for used_key, entry in [(key, self._used.get(key))] if key is not None else self._used.copy().items():
                if entry is None or isinstance(used_key, CheckoutKey):
                    continue
                if entry.connection() is conn or (conn is None and key is not None):
                    return self._used.pop(used_key)
        return self._refuse("the connection is not in use, or not with this key; was it returned before?")

    def checkout(self, conn: Connection | None = None) -> Checkout:
        """See `IConnectionPool`."""
        home = self.here.owner
        if conn is None:
            conn = self.getconn()
        key = CheckoutKey()
        with self._connections.lock:
            entry = self._take_out(conn, None)
            if hasattr(entry, "conn"):
                del entry.conn  # only the checkout keeps it alive now
            entry.owner, entry.sharers = CheckoutOwner(life := LifeToken()), ()
            self._used[key] = entry
        return Checkout(conn, partial(self._end_checkout, key, home, weakref.ref(conn)), life)

    def _end_checkout(self, key: CheckoutKey, home: ThreadOwner, ref: weakref.ref[Connection], close: bool) -> None:
        entry = self._used.pop(key, None)
        conn = ref()
        if entry is not None and conn is not None:
            entry.conn = conn
            self._give_back(home, entry, close)

    @contextmanager
    def connection(self, key: Hashable = None, *, timeout: float | None = None) -> Iterator[Connection]:
        """See `IKeyedConnectionPool`."""
        if key is None:
            key = self.here.owner
        token, conn = self._begin_block(key), None
        try:
            conn = self.getconn(key, timeout=timeout)
            yield conn
        finally:
            if token is not None:
                self._end_block(key, conn)

    def _entry_of(self, key: Hashable) -> Entry | None:
        return self._used.get(key)

    def _put_away(self, key: Hashable, entry: Entry) -> None:
        if self._remove(key, entry):
            self._give_back(self.here.owner, entry, close=False)

    def _users(self) -> list[tuple[Owner, Entry]]:
        return [(self._owner(entry), entry) for entry in list(self._used.values())]

    def _is_over(self, owner: Owner, entry: Entry) -> bool:
        # Without a key it belongs to any code that refers to it: another thread may use it after the first has ended.
        is_anybodys = not hasattr(entry, "conn") and not isinstance(owner, CheckoutOwner)
        return not owner.is_alive and not (is_anybodys and entry.ref() is not None)

    @staticmethod
    def _owner(entry: Entry) -> Owner:
        """Return the first thread that has it and lives, if any does: a key may have several."""
        return next((owner for owner in (entry.owner, *entry.sharers) if owner.is_alive), entry.owner)

    def _remove_user(self, owner: Owner, entry: Entry) -> bool:
        with self._connections.lock:
            for key, value in self._used.copy().items():  # a copy: see `_claim_surplus`
                # It may have been returned, and taken by another thread, since the caller saw it with this owner.
                if value is entry and self._owner(entry) is owner:
                    return self._remove(key, entry)
        return False

    def _remove(self, key: Hashable, entry: Entry) -> bool:
        """Take `entry` out of the table, if `key` still has it; another one that has come there stays."""
        with self._connections.lock:
            found = self._used.pop(key, None)  # in one step: `putconn` takes without the lock
            if found is not None and found is not entry:
                self._used.setdefault(key, found)
            return found is entry

    def _forget_users(self) -> None:
        self._used.clear()

    def _on_lost(self, ref: weakref.ref[Connection]) -> None:
        # Under the reference itself; or in a checkout.
        for key in (ref, *(key for key, entry in self._used.copy().items() if entry.ref is ref)):
            entry = self._used.pop(key, None)
            if entry is not None:
                entry.state = CLOSING
                self._lost.append(entry)


@implementer(IKeyedConnectionPool, IPoolManagement, IPoolInternals)
class SimpleConnectionPool(_KeyedConnectionPool):
    """A pool for one thread: it takes no locks, and no other thread touches it, the timer neither.

    It does in passing what the timer does for the others, when a connection is returned.
    """

    _in_background = False

    def __init__(self, minconn: int, maxconn: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(minconn, maxconn, *args, timer=None, **kwargs)

    def _make_lock(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _after_return(self, now: float) -> None:
        super()._after_return(now)
        due = self.run_maintenance(now)
        has_surplus = len(self._connections.handoff) > self.maxconn  # since a resize(): to be closed on their return
        if due is not None and self.settings.idle_timeout != 0 and not has_surplus:
            self._watch_at = due


@implementer(IKeyedConnectionPool, IPoolManagement, IPoolInternals)
class ThreadedConnectionPool(_KeyedConnectionPool):
    """A pool for any number of threads: a thread gets any connection, preferably the one that it had last."""
