"""What a pool knows of a server that does not answer: one thread tries it, the others are told at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import monotonic

import psycopg2


#: How long a connect that succeeded speaks for the next ones, in seconds.
PROOF = 1.0

#: The first and the longest pause between two tries, in seconds; each is twice the one before.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0

#: After so many seconds a connect is taken to hang, and does not hold up the next one. Less than waiters take to look
#: again for themselves: they begin it.
HANGS = 0.9

NEVER_YET = float("-inf")

#: How much shorter a pause may be, at random: processes that lost the same server do not all try it at once.
JITTER = 0.5


class ConnectBackoff:
    """The memory of failed connects. Written by whoever tried last; a stale read costs one more try."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        #: The error of the last try; None when that succeeded, or there was none.
        self.error: psycopg2.Error | None = None
        self._clock = clock
        self._pause = 0.0
        self._retry_at = self._proven_until = self._tried_at = self._failed_at = NEVER_YET

    def may_connect(self, connecting: int) -> bool:
        """Whether one more connect may begin while `connecting` others are under way.

        While nothing proves that the server is there, one at a time; one that hangs holds the next one up for a
        second only: it may be the network that has lost this one.
        """
        now = self._clock()
        if now >= self._proven_until and (now < self._retry_at or (connecting and not self.is_hanging)):
            return False
        self._tried_at = now
        return True

    @property
    def is_hanging(self) -> bool:
        """Whether no connect has begun for HANGS seconds: one that is still under way hangs."""
        return self._clock() >= self._tried_at + HANGS

    @property
    def is_on(self) -> bool:
        """Whether the server is known to be down, and it is too early to try again."""
        return self.error is not None and self._clock() < self._retry_at

    @property
    def is_recent(self) -> bool:
        """Whether the error is recent enough to report: while somebody asks, each failed try replaces it."""
        return self.error is not None and self._clock() < self._failed_at + 2 * LONGEST_PAUSE

    def doubt(self) -> None:
        """A connection was found dead: the next connect is a try again."""
        self._proven_until = NEVER_YET

    def failed(self, error: psycopg2.Error) -> None:
        """Remember the error of a try, and pause."""
        self._pause = min(LONGEST_PAUSE, self._pause * 2 or FIRST_PAUSE)
        now = self._failed_at = self._clock()
        # A copy: the traceback of the error itself would keep the frame of the connect alive, and its slot with it.
        pause = self._pause * random.uniform(1 - JITTER, 1)
        self.error, self._retry_at, self._proven_until = _copy(error), now + pause, NEVER_YET

    def succeeded(self) -> None:
        """Forget the outage."""
        self.error, self._pause, self._retry_at = None, 0.0, NEVER_YET
        self._proven_until = self._clock() + PROOF

    def copy(self) -> psycopg2.Error:
        """Return the remembered error for another thread: one instance in two threads mixes their tracebacks."""
        error = self.error or psycopg2.OperationalError("the server cannot be reached")
        copy = _copy(error)
        copy.__cause__ = error
        return copy


def _copy(error: psycopg2.Error) -> psycopg2.Error:
    return type(error)(*error.args)
