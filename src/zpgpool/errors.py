"""The errors of the pools: one class for each different decision a caller can take.

The pools' are all `psycopg2.pool.PoolError`, so handlers written for `psycopg2.pool` keep working.
A server that cannot be reached is not in this list: its own `psycopg2.OperationalError` is raised.
"""

import psycopg2.pool


class PoolError(psycopg2.pool.PoolError):
    """The pool was used wrongly, or cannot serve; nothing has changed."""

    __module__ = "zpgpool"


class PoolClosed(PoolError):
    """The pool was closed: asking again is of no use."""

    __module__ = "zpgpool"


class PoolTimeout(PoolError):
    """No connection came free within `timeout` seconds: try later.

    The message lists the holders of the connections; `__cause__` is the last error of a connect, if there was one.
    """

    __module__ = "zpgpool"


class TooManyRequests(PoolError):
    """`max_waiting` threads wait already: shed load."""

    __module__ = "zpgpool"


class CommitInDoubt(psycopg2.DatabaseError):
    """The answer to a COMMIT was lost, and it is not known whether it was done: look before it is done again.

    xid -- the number of the transaction, as text; empty when it was not asked for (setting `verify_commit`).
    """

    __module__ = "zpgpool"

    def __init__(self, message: str, xid: str = "") -> None:
        super().__init__(message)
        self.xid = xid


class SettingError(ValueError):
    """An option is unknown, missing, or has a value that it cannot have."""


class CommandError(Exception):
    """What a command of `zpgpool` cannot do, in one line."""


def database_error(error: BaseException | None) -> psycopg2.Error | None:
    """Return psycopg2's error that is the cause of `error`, or is that itself; None if it has another cause."""
    while error is not None and not isinstance(error, psycopg2.Error):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def one_line(error: BaseException) -> str:
    """Return an error's message as one line for the log."""
    return " ".join(str(error).split()) or type(error).__name__
