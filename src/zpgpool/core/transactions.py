"""What became of a COMMIT whose answer was lost; and transactions that are run again.

The answer can be lost on its way, with the server or without it: then it is not known whether the transaction was
committed. With `verify_commit` the server is asked for the transaction's number before, and afterwards, over another
connection, what became of that number (PostgreSQL documentation, "Transaction ID and Snapshot Information Functions").
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager
from contextlib import suppress
from time import monotonic
from time import sleep
from typing import Any
from typing import cast
from typing import TYPE_CHECKING
from typing import TypeVar

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor
from psycopg2.extensions import STATUS_READY
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from ..errors import CommitInDoubt
from ..errors import database_error
from ..errors import one_line
from ..errors import PoolError
from .entry import BROKEN
from .outage import is_temporary
from .probe import NoAnswer
from .probe import query


if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..types import ObservedPool
    from ..types import Pool


T = TypeVar("T")

#: The number of the transaction, none if nothing was written; and where that number is valid: on this system and
#: timeline. The place of the last checkpoint tells later whether the server has crashed since: recovery ends with one.
NUMBER = """
SELECT pg_current_xact_id_if_assigned()::text,
       (SELECT system_identifier FROM pg_control_system())::text,
       CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END,
       checkpoint_lsn::text
FROM pg_control_checkpoint()
"""

#: A server that crashes forgets the last numbers, if nothing of their transactions had been written to its disk, and
#: gives them to others: below the first number after its recovery, which the checkpoint there has, none is lost.
STATUS = """
SELECT CASE
    WHEN pg_is_in_recovery() THEN 'in recovery'
    WHEN (SELECT system_identifier FROM pg_control_system())::text != %(system)s
         OR left(pg_walfile_name(pg_current_wal_lsn()), 8) != %(timeline)s THEN 'elsewhere'
    WHEN checkpoint_lsn::text != %(checkpoint)s
         AND split_part(next_xid, ':', 1)::numeric * 4294967296 + split_part(next_xid, ':', 2)::numeric
             <= %(xid)s::numeric THEN 'aborted'
    ELSE pg_xact_status(%(xid)s::xid8)
END
FROM pg_control_checkpoint()
"""

#: How long the server is asked what became of a COMMIT, in seconds; longer if `timeout` or `outage_wait` is.
PATIENCE = 5.0

#: Between two questions, and before a transaction is run again, in seconds: the first pause, and the longest.
PAUSE = 0.05
LONGEST_PAUSE = 1.0

#: SQLSTATEs of a transaction that may succeed when it is run again: class 40, "Transaction Rollback".
RETRYABLE = "40"


def commit(pool: Pool, conn: Connection, do: Callable[[], object] | None = None) -> None:
    """Commit the transaction of `conn`, by `do` if that is given.

    Raises what psycopg2 raises: then nothing of it is there. CommitInDoubt: that is not known.
    """
    settings: Any = getattr(pool, "settings", None)  # pools of other classes need not have any
    do = conn.commit if do is None else do
    if conn.get_transaction_status() == TRANSACTION_STATUS_IDLE:
        do()
        return
    is_verified = getattr(settings, "verify_commit", False)
    number = _ask_number(conn) if is_verified else None
    try:
        do()
    except psycopg2.Error as error:
        if conn.closed != BROKEN:
            raise
        if not is_verified:
            raise CommitInDoubt(
                f"{pool!r}: the answer to a COMMIT was lost ({one_line(error)}): it is not known whether it was done "
                "(see the setting verify_commit)"
            ) from error
        if number is None:
            raise  # nothing was written
        until = monotonic() + max(PATIENCE, settings.timeout, settings.outage_wait)
        status = _ask_status(pool, number, until)
        if status == "aborted":
            raise
        if status != "committed":
            raise CommitInDoubt(
                f"{pool!r}: the answer to the COMMIT of transaction {number['xid']} was lost ({one_line(error)}), and "
                f"the server does not tell whether it was done: {status}",
                number["xid"],
            ) from error


def _ask_number(conn: Connection) -> dict[str, str] | None:
    with conn.cursor(cursor_factory=cursor) as curs:
        curs.execute(NUMBER)
        [(xid, system, timeline, checkpoint)] = curs.fetchall()
    return None if xid is None else {"xid": xid, "system": system, "timeline": timeline, "checkpoint": checkpoint}


def _ask_status(pool: Pool, number: dict[str, str], until: float) -> str:
    """Return "committed", "aborted", or why neither is known at `until` (monotonic seconds)."""
    attempt = 0
    while True:
        try:
            one_try = min(until, monotonic() + PATIENCE / 2)  # the first of several hosts may be silent
            [(status,)] = query(cast("ObservedPool", pool), "zpgpool commit", STATUS, number, one_try)[0]
        except NoAnswer as error:
            status = str(error)
            is_final = False
        else:
            status = status or "it has forgotten that number"
            is_final = status not in ("in progress", "in recovery")
        if status == "elsewhere":
            status = "it is another server than before, or a standby that was promoted"
        if is_final or monotonic() >= until:
            return str(status)
        _pause(attempt)
        attempt += 1


def run_transaction(pool: Pool, function: Callable[[Connection], T], attempts: int) -> T:
    """See `AbstractConnectionPool.run_transaction`."""
    attempt = 1
    while True:
        try:
            with pool.connection() as conn, _transaction(pool, conn):
                result = function(conn)
                commit(pool, conn)
                return result
        except Exception as error:
            if attempt >= attempts or not may_succeed(error):
                raise
        _pause(attempt)
        attempt += 1


@contextmanager
def _transaction(pool: Pool, conn: Connection) -> Iterator[None]:
    """A block that is a transaction of its own, whatever the session is, and leaves none open."""
    if conn.status != STATUS_READY or conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
        raise PoolError(f"{pool!r}: run_transaction() was called in a transaction, which it would commit")
    autocommit = conn.autocommit
    if autocommit:
        conn.autocommit = False
    try:
        yield
    finally:
        with suppress(psycopg2.Error):  # it was lost
            conn.rollback()
            if autocommit:
                conn.autocommit = True


def may_succeed(error: BaseException) -> bool:
    """Whether a transaction that failed with `error` left nothing, and may succeed when it is run again."""
    cause = database_error(error)
    if cause is None or isinstance(cause, CommitInDoubt):
        return False
    return (cause.pgcode or "").startswith(RETRYABLE) or is_temporary(cause)


def _pause(attempt: int) -> None:
    sleep(min(LONGEST_PAUSE, PAUSE * 2**attempt) * random.uniform(0.5, 1))
