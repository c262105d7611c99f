"""The pool that gives each thread one connection. The hot path is in this module, in `keyed` and `users`.

A hit takes the connection that the calling thread parked, without a lock: removing it from the dict is the claim. It is
written out in both classes: a call more costs 25 of 250 ns. `timeout` is not keyword-only: that costs 15 on 3.11.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import getpid
from time import monotonic

from psycopg2.extensions import connection as Connection
from zope.interface import implementer

from ..interfaces import IPersistentConnectionPool
from ..interfaces import IPoolInternals
from ..interfaces import IPoolManagement
from .base import AbstractConnectionPool
from .entry import Entry
from .entry import MOMENT
from .entry import Owner
from .handoff import CLOSING
from .owners import Checkout
from .owners import CheckoutOwner
from .owners import LifeToken
from .owners import ThreadOwner


@implementer(IPersistentConnectionPool, IPoolManagement, IPoolInternals)
class PersistentConnectionPool(AbstractConnectionPool):
    """A pool that gives each thread one connection, the same until the thread puts it away."""

    def getconn(self, timeout: float | None = None) -> Connection:
        """See `IPersistentConnectionPool`."""
        owner = self.here.owner
        entry = owner.entry
        if entry is not None:
            if not entry.conn.closed:
                return entry.conn
            owner.entry = None
            if not entry.has_checkout and self._reclaim(entry):
                self._connections.replace(entry)
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
        owner.uses += 1
        owner.entry = entry
        return entry.conn

    def putconn(self, conn: Connection | None = None, close: bool = False) -> None:
        """See `IPersistentConnectionPool`."""
        owner = self.here.owner
        entry = owner.entry
        if entry is None or (conn is not None and conn is not entry.conn):
            self._refuse("this thread does not hold that connection; was it returned before?")
        if entry.checkout is not None:
            if not entry.has_checkout:  # else: by a transaction, which puts it away
                self.putconn_of(owner, close)
            return
        if owner.entry is not entry:
            return  # another thread has just ended the checkout, and returned it: see `_end_checkout`
        owner.entry = None
        self._give_back(owner, entry, close)

    @contextmanager
    def connection(self, *, timeout: float | None = None) -> Iterator[Connection]:
        """See `IConnectionPool`."""
        owner = self.here.owner
        token, conn = self._begin_block(owner), None
        try:
            conn = self.getconn(timeout=timeout)
            yield conn
        finally:
            if token is not None:
                self._end_block(owner, conn)  # whichever thread ends the block

    def take_for_reading(self, key: Hashable = None) -> None:
        """See `IPoolInternals`."""
        owner = self.here.owner
        if owner.entry is None and (entry := self._pop_for_reading(owner)) is not None:
            owner.uses += 1
            owner.entry = entry

    def _entry_of(self, key: Hashable) -> Entry | None:
        return key.entry if isinstance(key, ThreadOwner) else None

    def checkout(self, conn: Connection | None = None) -> Checkout:
        """See `IConnectionPool`."""
        home, user, entry = self.here.owner, CheckoutOwner(life := LifeToken()), None
        try:
            if conn is None:
                entry = self._obtain(self._parked.pop(home, None))
                home.uses += 1
                entry.checkout = weakref.ref(life)
            else:
                with self._connections.lock:
                    home, entry = self._find_user(home, conn)
                    entry.checkout = weakref.ref(life)
            user.entry = entry
            self._add_owner(user)
            return Checkout(entry.conn, partial(self._end_checkout, user, home), life)
        except BaseException:  # the traceback, which somebody may keep, has the token of its life
            user.entry = None
            if entry is not None:
                entry.checkout = None
            raise

    def _find_user(self, here: ThreadOwner, conn: Connection) -> tuple[ThreadOwner, Entry]:
        """Return the thread that has `conn`, and may go on with it as long as the checkout lasts. Under the lock."""
        for owner in [here, *self._owners]:
            entry = owner.entry
            if entry is not None and entry.conn is conn and not entry.has_checkout and self._reclaim(entry):
                return owner, entry
        return self._refuse("the connection is not in use, or checked out already")

    def _reclaim(self, entry: Entry) -> bool:
        """Take `entry` from a checkout that was lost; False when it was reaped for that, and is closed.

        What has another user must not stand under the lost one: to reap that would close it in the other's hands.
        """
        if entry.checkout is None:
            return True
        with self._connections.lock:
            lost = [user for user in list(self._owners) if isinstance(user, CheckoutOwner) and user.entry is entry]
            for user in lost:
                user.entry = None
            entry.checkout = None
            return bool(lost) or entry.state != CLOSING

    def _end_checkout(self, user: ThreadOwner, home: ThreadOwner, close: bool) -> None:
        with self._connections.lock:
            entry, user.entry = user.entry, None
            if entry is not None:
                # In this order: `putconn` of the home thread takes no lock, and looks at them the other way round.
                if home.entry is entry:
                    home.entry = None
                entry.checkout = None
        if entry is not None:
            self._give_back(home, entry, close)
        self._owners.discard(user)

    def detach(self, conn: Connection) -> None:
        """See `IPoolManagement`. From the thread that has it: that takes no lock to return it."""
        owner = self.here.owner
        entry = owner.entry
        if entry is None or entry.conn is not conn or entry.has_checkout or not self._reclaim(entry):
            self._refuse("this thread does not hold that connection, or a checkout has it")
        owner.entry = None
        self._connections.detach(entry)

    def owner(self) -> ThreadOwner:
        """See `IPersistentConnectionPool`."""
        return self.here.owner

    def connection_of(self, owner: ThreadOwner) -> Connection | None:
        """See `IPersistentConnectionPool`."""
        entry = owner.entry
        return None if entry is None or entry.has_checkout else entry.conn

    def putconn_of(self, owner: ThreadOwner, close: bool = False) -> bool:
        """See `IPersistentConnectionPool`."""
        entry = owner.entry
        if entry is None:
            return False
        if owner is self.here.owner and entry.checkout is None:  # its own thread needs no lock
            if owner.entry is not entry:
                return False  # as in `putconn`
            owner.entry = None
        else:
            with self._connections.lock:
                if not self._remove_user(owner, entry):
                    return False
                if entry.has_checkout or not self._reclaim(entry):
                    return True
        self._give_back(owner, entry, close)
        return True

    def _put_away(self, key: Hashable, entry: Entry) -> None:
        assert isinstance(key, ThreadOwner)
        self.putconn_of(key)

    def _users(self) -> list[tuple[Owner, Entry]]:
        held = [(owner, entry) for owner in list(self._owners) if (entry := owner.entry) is not None]
        # What is checked out stands under its checkout; the thread beside it is a guest.
        return [(owner, entry) for owner, entry in held if not entry.has_checkout or isinstance(owner, CheckoutOwner)]

    def _remove_user(self, owner: Owner, entry: Entry) -> bool:
        assert isinstance(owner, ThreadOwner)
        with self._connections.lock:
            if owner.entry is not entry:
                return False
            owner.entry = None
            return True

    def _forget_users(self) -> None:
        for owner in list(self._owners):
            owner.entry = None

    def _on_lost(self, ref: weakref.ref[Connection]) -> None:
        pass  # its users cannot lose what the pool itself holds
