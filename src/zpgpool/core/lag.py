"""How far the server of a replica's pool is behind its primary: measured in a thread of its own.

See the PostgreSQL documentation, "Recovery Information Functions" and "pg_stat_wal_receiver".
"""

from __future__ import annotations

import os
import random
import threading
import weakref
from time import monotonic
from typing import TYPE_CHECKING

from .probe import NoAnswer
from .probe import query
from .timer import timer


if TYPE_CHECKING:
    from ..types import ObservedPool
    from ..types import Pool


#: Between two looks, in seconds; up to a fifth less, at random, so that many processes do not look together.
EVERY = 2.0

#: How long a look may take, in seconds.
LOOK = 2.0

#: After so many seconds without a look that was answered nothing is known any more.
STALE = EVERY + LOOK + 1.0

#: A role that has no right to see the receiver's state (pg_read_all_stats) sees that there is one, which ends with its
#: connection. What was received is read first: what is replayed goes on meanwhile.
QUESTION = """
SET LOCAL statement_timeout = '1s';
SELECT pg_is_in_recovery(),
       coalesce(pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn(), false)
       AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE coalesce(status, 'streaming') = 'streaming'),
       extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8
"""

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
        if not self._looker.is_alive():
            self._looker = threading.Thread(target=self.look, name="zpgpool-lag", daemon=True)
            self._looker.start()
        return now + EVERY * random.uniform(0.8, 1.0)

    def look(self) -> None:
        """Ask the server."""
        start, pool = monotonic(), self._pool()
        if pool is None:
            return
        try:
            [(is_standby, is_level, since_replayed)], _ = query(pool, "zpgpool lag", QUESTION, (), start + LOOK)
        except NoAnswer as error:
            self.lost(str(error))
            return
        if is_level or not is_standby:
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


_lock = threading.RLock()  # reentrant, for a signal's handler


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
_lags: weakref.WeakKeyDictionary[Pool, Lag] = weakref.WeakKeyDictionary()


def watch(pool: ObservedPool) -> Lag:
    """Return the lag of `pool`, whose server is a replica, and which is looked at from now on."""
    lag = _lags.get(pool)
    if lag is None:
        with _lock:
            lag = _lags.setdefault(pool, Lag(pool))
    lag.watch()
    return lag


def lag_of(pool: Pool) -> Lag | None:
    """Return the lag of `pool`; None if no pool uses it as its replica."""
    return _lags.get(pool)
