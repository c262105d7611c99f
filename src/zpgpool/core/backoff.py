"""What a pool knows of a server that does not answer: one thread tries it, the others wait for that, or are told.

An outage that has just begun is probably a restart, and over soon: a checkout waits for its end, for `outage_wait`
seconds since it began. A later checkout gets the error at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from time import monotonic

import psycopg2

from .outage import Diagnosis


#: How long a connect that succeeded speaks for the next ones, in seconds.
PROOF = 1.0

#: The first and the longest pause between two tries, in seconds; each is twice the one before. While a checkout waits
#: for the server, the pauses stay short.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
LONGEST_SHORT_PAUSE = 0.2

#: After so many seconds a connect is taken to hang, and does not hold up the next one. Less than waiters take to look
#: again for themselves: they begin it.
HANGS = 0.9

NEVER_YET = float("-inf")

#: How much longer a pause may be, at random: processes that lost the same server do not all try it at once.
JITTER = 0.25


class ConnectBackoff:
    """The memory of failed connects. Written by the thread that tried last; a stale read costs one more try."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        #: The error of the last try; None when that succeeded, or there was none.
        self.error: psycopg2.Error | None = None
        #: How long an outage is waited out, in seconds since it began.
        self.outage_wait = 0.0
        #: When the outage began (monotonic seconds); None while there is none.
        self.outage_since: float | None = None
        #: Whether a connection was found dead, or was lost, since the last new one that has answered: a pooler accepts
        #: connections while it has no server.
        self.is_doubted = False
        #: What the last try has failed of; None when it succeeded, or there was none.
        self.diagnosis: Diagnosis | None = None
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
        """Whether the error is recent enough to report: while there are checkouts, each failed try replaces it."""
        return self.error is not None and self._clock() < self._failed_at + 2 * LONGEST_PAUSE

    def doubt(self) -> None:
        """A connection was found dead: the next connect is a try again."""
        self._proven_until, self.is_doubted = NEVER_YET, True

    @property
    def is_young(self) -> bool:
        """Whether there is an outage that is waited out."""
        return self.outage_since is not None and self._clock() < self.outage_since + self.outage_wait

    @property
    def is_full(self) -> bool:
        """Whether the server has too many clients."""
        return self.diagnosis is Diagnosis.FULL

    @property
    def is_chance(self) -> bool:
        """Whether the next try may succeed at any time: a checkout waits for its whole timeout, if it has one."""
        return self.diagnosis in (Diagnosis.FULL, Diagnosis.CHANCE)

    @property
    def may_recover(self) -> bool:
        """Whether the next try may succeed in a moment, so that it is worth to wait for it."""
        return self.is_chance or self.is_young

    @property
    def outage_seconds(self) -> float | None:
        """For how long there has been an outage; None while there is none."""
        since = self.outage_since
        return None if since is None else self._clock() - since

    @property
    def pause(self) -> float:
        """The rest of the pause before the next try, in seconds."""
        return max(0.0, self._retry_at - self._clock())

    def failed(
        self, error: psycopg2.Error, diagnosis: Diagnosis = Diagnosis.OUTAGE, begun: float | None = None
    ) -> bool:
        """Remember the error of a try that began then, and pause; return whether an outage begins with it."""
        now = self._failed_at = self._clock()
        is_first = diagnosis is Diagnosis.OUTAGE and self.outage_since is None
        if is_first:
            self.outage_since = now if begun is None else begun
        elif diagnosis not in (Diagnosis.OUTAGE, Diagnosis.CHANCE):
            self.outage_since = None
        self.diagnosis = diagnosis
        longest = LONGEST_SHORT_PAUSE if self.may_recover else LONGEST_PAUSE
        self._pause = min(longest, self._pause * 2 or FIRST_PAUSE)
        pause = self._pause * random.uniform(1, 1 + JITTER)
        # A copy: the traceback of the error itself would keep the frame of the connect alive, and its slot with it.
        self.error, self._retry_at, self._proven_until = _copy(error), now + pause, NEVER_YET
        return is_first

    def succeeded(self) -> float | None:
        """Forget the outage; return how long it was, if there was one."""
        seconds, self.outage_since, self.diagnosis, self.is_doubted = self.outage_seconds, None, None, False
        self.error, self._pause, self._retry_at = None, 0.0, NEVER_YET
        self._proven_until = self._clock() + PROOF
        return seconds

    def copy(self) -> psycopg2.Error:
        """Return the remembered error for another thread: one instance in two threads mixes their tracebacks."""
        error = self.error or psycopg2.OperationalError("the server cannot be reached")
        copy = _copy(error)
        copy.__cause__ = error
        return copy


def _copy(error: psycopg2.Error) -> psycopg2.Error:
    return type(error)(*error.args)
