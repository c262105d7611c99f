"""How far the server of a replica's pool is behind its primary: measured in a thread of its own.

See the PostgreSQL documentation, "Recovery Information Functions" and "pg_stat_wal_receiver".
"""

from __future__ import annotations

import os
import random
import threading
import weakref
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

import psycopg2

from ..errors import PoolClosed
from ..errors import SettingError
from ..interfaces import IPoolInternals
from .keyed import SimpleConnectionPool
from .outage import diagnose
from .outage import Diagnosis
from .probe import ask_why
from .probe import NoAnswer
from .probe import query
from .probe import Silent
from .timer import timer


if TYPE_CHECKING:
    from ..types import ObservedPool
    from ..types import Pool


#: Between two looks, in seconds; up to a fifth less, at random, so that many processes do not look together.
EVERY = 2.0

#: The same while some user has had its connection for longer than `TICK`: a server that hangs is found out soon.
HURRY = 0.5

#: How long a look may take, in seconds.
LOOK = 0.75

#: A look that has not ended so many seconds after that hangs somewhere. Not less: a busy process is no silent server.
STUCK = 2.0

#: How often the timer comes, in seconds.
TICK = 0.25

#: No checkout of a replica's pool waits longer, in seconds: there is the primary.
WAIT = 1.0

#: After so many seconds without a look that was answered nothing is known any more.
STALE = EVERY + LOOK + 1.0

#: A role that has no right to see the receiver's state (pg_read_all_stats) sees that there is one, which ends with its
#: connection. What was received is read first: what is replayed goes on meanwhile. More may be received than can be
#: replayed: the primary sends what it has not committed in whole pages, whose last record is half a one, and the other
#: half with its next commit (measured: up to 20 s later). Then the recovery waits for it, as who has that right sees.
QUESTION = """
SET LOCAL statement_timeout = '1s';
SELECT pg_is_in_recovery(),
       (coalesce(pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn(), false)
        OR EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'startup' AND wait_event = 'RecoveryWalStream'))
       AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE coalesce(status, 'streaming') = 'streaming'),
       extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8
"""

#: What a server is that takes writes, too: see `Lag.look`.
NO_STANDBY = "its server is no standby: a split brain, unless it is the primary itself"

#: What a look says that was not answered in time.
SILENT = "the server does not answer"

NOT_YET = "it has not been looked at yet"


class Lag:
    """What is known of one replica's pool."""

    def __init__(self, pool: ObservedPool) -> None:
        self._pool = weakref.ref(pool)
        #: How far behind, in seconds, at the last look: that at most. None: not known.
        self.seconds: float | None = None
        #: Why nothing is to be read there, if so; one line, without a secret.
        self.trouble = ""
        #: When the last look began that was answered, and the last one that found nothing left to be replayed.
        self._looked_at = self._level_at = float("-inf")
        self._looker = threading.Thread()
        #: When it began, and when the next one does.
        self._began = self._next = float("-inf")
        self._watched_in = 0

    def watch(self) -> None:
        """Have the timer look from now on; harmless when repeated."""
        if self._watched_in != os.getpid():  # after a fork the timer has forgotten us
            self._watched_in = os.getpid()
            timer.watch(self)

    def run_maintenance(self, now: float) -> float | None:
        """Look, in a thread of its own: a server that does not answer must not stop the timer of all pools."""
        pool = self._pool()
        if pool is None or pool.closed:
            return None
        is_soon = pool.longest_use(now) > TICK
        if self._looker.is_alive():
            if now > self._began + LOOK + STUCK:  # it does not end by itself: a name is looked up, or the pool is asked
                self._hang_up(pool)
        elif now >= (min(self._next, self._began + HURRY) if is_soon else self._next):
            self._began, self._next = now, now + EVERY * random.uniform(0.8, 1.0)
            self._looker = threading.Thread(target=self.look, name="zpgpool-lag", daemon=True)
            self._looker.start()
        return now + TICK

    def look(self) -> None:
        """Ask the server."""
        start, pool = monotonic(), self._pool()
        if pool is None:
            return
        try:
            rows, _ = query(pool, "zpgpool lag", QUESTION, (), start + LOOK, TICK)
        except Silent:
            self._hang_up(pool)
        except NoAnswer as error:
            # A limit of connections says nothing of the server: it has answered.
            if diagnose(ask_why(pool.open_connection, start + LOOK)) is not Diagnosis.FULL:
                self.lost(str(error))
            elif rows := _ask_in(pool):
                self._learn(start, pool, *rows[0])
        else:
            self._learn(start, pool, *rows[0])

    def _hang_up(self, pool: ObservedPool) -> None:
        """Let nobody wait for a server that is silent: what runs there ends with an error."""
        self.lost(SILENT)
        pool.hang_up()

    def _learn(
        self, start: float, pool: ObservedPool, is_standby: bool, is_level: bool, since_replayed: float | None
    ) -> None:
        if not is_standby:
            self.lost(NO_STANDBY)
            return
        if self.trouble == NO_STANDBY:
            with suppress(PoolClosed):
                pool.drain()  # its connections are to the other one
        if is_level:
            self._level_at = start
        # The last commit may be old because there was none since: the last moment with nothing to replay tells more.
        behind = min(start - self._level_at, float("inf") if since_replayed is None else max(0.0, since_replayed))
        self.seconds = behind if behind < float("inf") else None
        self.trouble = "" if self.seconds is not None else "it has replayed nothing, and receives nothing"
        self._looked_at = start

    def lost(self, why: str) -> None:
        """Remember that the replica cannot be used, until the next look."""
        self.seconds, self.trouble = None, why or "it is lost"

    def why_not(self, most: float | None, now: float) -> str:
        """Return why the replica must not be read now (monotonic seconds): a line of text; empty: it may be.

        most -- how far it may be behind, in seconds; None: as far as it likes.
        """
        if self.trouble:
            return self.trouble
        if most is None:
            return ""
        if self.seconds is None:
            return NOT_YET
        if now - self._looked_at > STALE:
            return f"no look was answered for {now - self._looked_at:.0f} s"
        return f"it is {self.seconds:.1f} s behind, max_lag is {most:g}" if self.seconds > most else ""

    def show(self, now: float) -> dict[str, object]:
        """Return what is known, for the status page: how far behind, when that was seen, and what is wrong."""
        ago = None if self.seconds is None else now - self._looked_at
        return {"seconds": self.seconds, "ago": ago, "trouble": self.trouble}


def _ask_in(pool: ObservedPool) -> list[tuple[bool, bool, float | None]]:
    """Ask over a connection of the pool's; return nothing when none is free."""
    if isinstance(pool, SimpleConnectionPool):  # it is for one thread
        return []
    try:
        with pool.connection(timeout=TICK) as conn, conn.cursor() as cursor:
            cursor.execute(QUESTION)
            return cursor.fetchall()
    except psycopg2.Error:
        return []


_lock = threading.RLock()  # reentrant, for a signal's handler


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
_lags: weakref.WeakKeyDictionary[Pool, Lag] = weakref.WeakKeyDictionary()


def watch(pool: ObservedPool) -> Lag:
    """Return the lag of `pool`, whose server is a replica, and which is looked at from now on.

    Raises SettingError where its sessions cannot be read-only, or it is of a class that cannot be told so.
    """
    lag = _lags.get(pool)
    if lag is None:
        if not IPoolInternals.providedBy(pool):
            raise SettingError(f"{type(pool).__name__} does not provide IPoolInternals, as a replica's pool must")
        # Whatever server they find: a standby may be promoted, and "prefer-standby" may meet the primary.
        pool.serve_readers(WAIT)
        with _lock:
            lag = _lags.setdefault(pool, Lag(pool))
    lag.watch()
    return lag


def lag_of(pool: Pool) -> Lag | None:
    """Return the lag of `pool`; None if no pool uses it as its replica."""
    return _lags.get(pool)
