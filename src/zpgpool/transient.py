"""Errors that say "once more", as `transaction` knows them: those of the server become `TransientError`, too.

Zope's publisher, pyramid_retry and `transaction.attempts()` look for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor

from .core import current_work
from .core import may_succeed
from .core import PLAIN
from .request import fail_over
from .request import may_succeed_on_primary


try:
    from transaction.interfaces import TransientError
except ImportError as error:
    raise ImportError(f"zpgpool.transient needs the extra zpgpool[transaction]: {error}") from None


LOCK_NOT_AVAILABLE = "55P03"


def is_retryable(error: BaseException) -> bool:
    """Whether `error` says that the same transaction may succeed when it is run again."""
    if not isinstance(error, psycopg2.Error):
        return False
    work = current_work()
    if work is not None and work.was_ended:  # by `hold_limit`: it would only be held for as long again
        return False
    return may_succeed(error) or error.pgcode == LOCK_NOT_AVAILABLE or may_succeed_on_primary(error)


def note(error: psycopg2.Error) -> None:
    """Take note of an error of a statement: one of the replica's sends the request to the primary.

    And one that is retryable becomes a `transaction.interfaces.TransientError`, too. In place: it is the error that the
    user gets, with its traceback, its `diag`, and its class among its bases.
    """
    is_transient = is_retryable(error)
    fail_over(error)
    if is_transient and not isinstance(error, TransientError):
        error_class: Any = type(error)  # mypy takes it for a class without __hash__
        error.__class__ = _transient(error_class)


@cache
def _transient(error_class: Any) -> Any:
    return type(error_class.__name__, (error_class, TransientError), {"__module__": __name__})


def _telling(name: str) -> Callable[..., object]:
    """Return a cursor's method `name` whose errors are transient, where they are."""

    def method(self: _TransientMixin, *args: object, **kwargs: object) -> object:
        try:
            return getattr(super(_TransientMixin, self), name)(*args, **kwargs)
        except psycopg2.Error as error:
            note(error)
            raise

    method.__name__ = name
    return method


class _TransientMixin:
    """The methods that talk to the server; those that fetch and scroll do it for a cursor with a name."""

    execute = _telling("execute")
    executemany = _telling("executemany")
    callproc = _telling("callproc")
    copy_expert = _telling("copy_expert")
    copy_from = _telling("copy_from")
    copy_to = _telling("copy_to")
    fetchone = _telling("fetchone")
    fetchmany = _telling("fetchmany")
    fetchall = _telling("fetchall")
    scroll = _telling("scroll")
    __next__ = _telling("__next__")


def default_factory(conn: Connection) -> Any:
    """Return the class of cursors that a connection without `cursor_factory` makes; its own class may decide that."""
    if type(conn) in (Connection, PLAIN):
        return cursor
    with conn.cursor() as curs:
        return type(curs)


@cache
def transient_cursor(factory: Any) -> Any:  # whatever psycopg2 takes: a class, a function, None
    """Return a subclass of the cursor class `factory` whose retryable errors are transient; anything else as it is."""
    if not isinstance(factory, type):
        return factory
    return type(factory.__name__, (_TransientMixin, factory), {"__module__": factory.__module__})
