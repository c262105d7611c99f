"""The pools: who holds which connection. The hot path is here, and only here.

A hit takes the connection that the calling thread parked, without a lock: removing it from the dict is the claim. It is
written out in both classes, because a call more would cost a tenth of it (measured: 25 of 250 ns).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from functools import partial
from threading import Event
from time import monotonic

from psycopg2.extensions import connection as Connection
from zope.interface import implementer

from .base import AbstractConnectionPool
from .caller import Caller
from .caller import Held
from .caller import Hold
from .caller import Pulse
from .entry import Entry
from .entry import MOMENT
from .interfaces import IKeyedConnectionPool
from .interfaces import IPersistentConnectionPool
from .stock import PING


@implementer(IPersistentConnectionPool)
class PersistentConnectionPool(AbstractConnectionPool):
    """A pool that gives each thread one connection, the same until the thread puts it away."""

    def getconn(self) -> Connection:
        """See `IPersistentConnectionPool`."""
        caller = self._here.caller
        entry = caller.held
        if entry is not None:
            if not entry.conn.closed:
                return entry.conn
            caller.held = None
            if not entry.is_held:
                self._stock.discard(entry, "its user closed it")
        entry = self._parked.pop(caller, None)
        now = monotonic()
        if entry is None:
            entry = self._obtain(None)
        elif now > entry.look_at:
            if now >= entry.expires or now - entry.since > self._rest or entry.look(0):
                entry = self._obtain(entry)
            entry.since, entry.look_at = now, now + MOMENT
        else:
            entry.since = now
        caller.uses += 1
        caller.held = entry
        return entry.conn

    def putconn(self, conn: Connection | None = None, close: bool = False) -> None:
        """See `IPersistentConnectionPool`."""
        caller = self._here.caller
        entry = caller.held
        if entry is None or (conn is not None and conn is not entry.conn):
            self._refuse("this thread does not hold that connection; was it put away before?")
        if entry.is_held:
            return  # by a transaction: that puts it away
        caller.held = None
        self._give_back(caller, entry, close)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """See `IConnectionPool`."""
        caller = self._here.caller
        is_inner = caller.held is not None and not caller.held.conn.closed
        conn = self.getconn()
        try:
            yield conn
        finally:
            if not is_inner and caller.held is not None and caller.held.conn is conn:
                self.putconn_of(caller)  # whichever thread ends the block

    def hold(self, conn: Connection | None = None) -> Hold:
        """See `IConnectionPool`."""
        home = self._here.caller
        if conn is None:
            entry = self._obtain(self._parked.pop(home, None))
            home.uses += 1
            entry.is_held = True
        else:
            home, entry = self._find_user(home, conn)
        holder = Held(pulse := Pulse())
        holder.held = entry
        self._callers.add(holder)
        return Hold(entry.conn, partial(self._put_hold, holder, home), pulse)

    def _find_user(self, here: Caller, conn: Connection) -> tuple[Caller, Entry]:
        """Return the thread that has `conn`, and may go on with it as long as the hold lasts."""
        with self._stock.lock:
            for caller in [here, *self._callers]:
                entry = caller.held
                if entry is not None and entry.conn is conn and not entry.is_held:
                    entry.is_held = True
                    return caller, entry
        return self._refuse("the connection is not in use, or held already")

    def _put_hold(self, holder: Caller, home: Caller, close: bool) -> None:
        entry = holder.held
        if entry is not None and self._seize(holder, entry):
            if home.held is entry:
                home.held = None
            entry.is_held = False
            self._give_back(home, entry, close)
        self._callers.discard(holder)

    def caller(self) -> Caller:
        """See `IPersistentConnectionPool`."""
        return self._here.caller

    def putconn_of(self, caller: Caller, close: bool = False) -> bool:
        """See `IPersistentConnectionPool`."""
        entry = caller.held
        if entry is None or not self._seize(caller, entry):
            return False
        if not entry.is_held:
            self._give_back(caller, entry, close)
        return True

    def _users(self) -> list[tuple[Caller, Entry]]:
        held = [(caller, entry) for caller in list(self._callers) if (entry := caller.held) is not None]
        # What is held stands under its hold; the thread beside it is a guest.
        return [(caller, entry) for caller, entry in held if not entry.is_held or isinstance(caller, Held)]

    def _seize(self, caller: Caller, entry: Entry) -> bool:
        with self._stock.lock:
            if caller.held is not entry:
                return False
            caller.held = None
            return True

    def _forget_users(self) -> None:
        for caller in list(self._callers):
            caller.held = None

    def _lose(self, ref: weakref.ref[Connection]) -> None:
        pass  # its users cannot lose what the pool itself holds


class HoldKey:
    """Under which a keyed pool has what is held: nobody else can name it."""


class _KeyedConnectionPool(AbstractConnectionPool):
    """Pools whose users tell connections apart by a key of theirs, or by the connection itself."""

    def _start(self) -> None:
        #: Who holds what: by key; without one by the weak reference to the connection, which is all we keep then.
        self._used: dict[Hashable, Entry] = {}
        #: Keys whose connection somebody is getting just now.
        self._comers: dict[Hashable, Event] = {}
        super()._start()

    def getconn(self, key: Hashable = None) -> Connection:
        """See `IKeyedConnectionPool`."""
        caller = self._here.caller
        if key is not None:
            return self._getconn_by_key(key, caller)
        entry = self._parked.pop(caller, None)
        now = monotonic()
        if entry is None:
            entry = self._obtain(None)
        elif now > entry.look_at:
            if now >= entry.expires or now - entry.since > self._rest or entry.look(0):
                entry = self._obtain(entry)
            entry.since, entry.look_at = now, now + MOMENT
        else:
            entry.since = now
        entry.caller = caller
        caller.uses += 1
        conn = entry.conn
        del entry.conn  # only its user keeps it alive now, see Entry.ref
        self._used[entry.ref] = entry
        return conn

    def _getconn_by_key(self, key: Hashable, caller: Caller) -> Connection:
        start = monotonic()
        mine = Event()
        while (conn := self._conn_of(key, caller)) is None:
            first = self._comers.setdefault(key, mine)
            # Another thread is getting this key's connection. Not for ever: an exception may have stopped it half-way.
            if first is mine or not first.wait(start + max(self.settings.timeout, PING) - monotonic()):
                break
        else:
            return conn
        try:
            entry = self._obtain(self._parked.pop(caller, None), start)
            entry.caller, entry.sharers = caller, ()
            caller.uses += 1
            winner = self._used.setdefault(key, entry)
            if winner is not entry:
                self._give_back(caller, entry, close=False)
            return winner.conn
        finally:
            self._comers.pop(key, None)
            mine.set()

    def _conn_of(self, key: Hashable, caller: Caller) -> Connection | None:
        """Return the connection that `key` has; the caller uses it, too, from now on."""
        entry = self._used.get(key)
        if entry is None:
            return None
        if not entry.conn.closed:
            if entry.caller is not caller and caller not in entry.sharers:
                entry.sharers = (*entry.sharers, caller)
            return entry.conn
        if self._remove(key, entry):
            self._stock.discard(entry, "its user closed it")
        return None

    def putconn(self, conn: Connection | None = None, key: Hashable = None, close: bool = False) -> None:
        """See `IKeyedConnectionPool`."""
        if key is not None or conn is None or (entry := self._used.pop(weakref.ref(conn), None)) is None:
            entry = self._take_out(conn, key)
        else:
            entry.conn = conn
        self._give_back(self._here.caller, entry, close)

    def _take_out(self, conn: Connection | None, key: Hashable) -> Entry:
        """Remove what `key` holds, or what `conn` is under whatever key; refuse where they do not match."""
        with self._stock.lock:
            for used_key, entry in [(key, self._used.get(key))] if key is not None else list(self._used.items()):
                if entry is None or isinstance(used_key, HoldKey):
                    continue
                if entry.connection() is conn or (conn is None and key is not None):
                    return self._used.pop(used_key)
        return self._refuse("the connection is not in use, or not with this key; was it put away before?")

    def hold(self, conn: Connection | None = None) -> Hold:
        """See `IConnectionPool`."""
        home = self._here.caller
        if conn is None:
            conn = self.getconn()
        key = HoldKey()
        with self._stock.lock:
            entry = self._take_out(conn, None)
            if hasattr(entry, "conn"):
                del entry.conn  # only the hold keeps it alive now
            entry.caller, entry.sharers = Held(pulse := Pulse()), ()
            self._used[key] = entry
        return Hold(conn, partial(self._put_hold, key, home, weakref.ref(conn)), pulse)

    def _put_hold(self, key: HoldKey, home: Caller, ref: weakref.ref[Connection], close: bool) -> None:
        entry = self._used.pop(key, None)
        conn = ref()
        if entry is not None and conn is not None:
            entry.conn = conn
            self._give_back(home, entry, close)

    @contextmanager
    def connection(self, key: Hashable = None) -> Iterator[Connection]:
        """See `IKeyedConnectionPool`."""
        if key is None:
            key = self._here.caller
        outer = self._used.get(key)
        is_inner = outer is not None and not outer.conn.closed
        conn = self.getconn(key)
        try:
            yield conn
        finally:
            entry = self._used.get(key)
            if not is_inner and entry is not None and entry.conn is conn:
                self.putconn(conn, key)

    def _users(self) -> list[tuple[Caller, Entry]]:
        return [(self._owner(entry), entry) for entry in list(self._used.values())]

    @staticmethod
    def _owner(entry: Entry) -> Caller:
        """Return the first thread that has it and lives, if any does: a key may have several."""
        return next((caller for caller in (entry.caller, *entry.sharers) if caller.is_alive), entry.caller)

    def _seize(self, caller: Caller, entry: Entry) -> bool:
        for key, value in list(self._used.items()):
            if value is entry:
                return self._remove(key, entry)
        return False

    def _remove(self, key: Hashable, entry: Entry) -> bool:
        """Take `entry` out of the table, if `key` still has it; another one that has come there stays."""
        with self._stock.lock:
            if self._used.get(key) is not entry:
                return False
            del self._used[key]
            return True

    def _forget_users(self) -> None:
        self._used.clear()

    def _lose(self, ref: weakref.ref[Connection]) -> None:
        # Under the reference itself; or in a hold.
        for key in (ref, *(key for key, entry in list(self._used.items()) if entry.ref is ref)):
            entry = self._used.pop(key, None)
            if entry is not None:
                entry.is_passing = True
                self._strays.append(entry)


@implementer(IKeyedConnectionPool)
class SimpleConnectionPool(_KeyedConnectionPool):
    """A pool for one thread: it takes no locks, and no other thread touches it, the timer neither.

    It does in passing what the timer does for the others, when a connection is returned.
    """

    def _start(self) -> None:
        super()._start()
        self.is_attended = True  # by nobody else
        self._watch_at = 0.0

    def _make_lock(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _start_refill(self) -> None:
        self._refill()

    def _after_return(self, now: float) -> None:
        super()._after_return(now)
        due = self.tend(now)
        has_surplus = len(self._stock.handoff) > self.maxconn  # since a resize(): to be closed when it is returned
        if due is not None and self.settings.idle_timeout != 0 and not has_surplus:
            self._watch_at = due


@implementer(IKeyedConnectionPool)
class ThreadedConnectionPool(_KeyedConnectionPool):
    """A pool for any number of threads: who asks gets a connection, preferably the one he had last."""
