"""A pool's connection in a transaction of the `transaction` package: it commits with the others, or not at all.

One-phase, the connection commits in `tpc_vote`, after all others have voted: what fails there still aborts them. With
two phases (the pool's setting `twophase`) it is prepared there, and committed after the others; whatever happens in
between is found and resolved by `zpgpool recover`.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from contextlib import closing
from functools import cache
from itertools import count
from typing import Any
from typing import TYPE_CHECKING

import psycopg2
from psycopg2 import errorcodes
from psycopg2.errors import InFailedSqlTransaction
from psycopg2.extensions import connection as Psycopg2Connection
from psycopg2.extensions import cursor
from psycopg2.extensions import STATUS_READY
from psycopg2.extensions import TRANSACTION_STATUS_INERROR
from zope.interface import implementer

from .entry import one_line
from .errors import PoolError
from .lease import current_lease
from .readers import blames_replica
from .registry import get_pool
from .session import PLAIN


try:
    import transaction
    from transaction.interfaces import IDataManagerSavepoint
    from transaction.interfaces import ISavepointDataManager
    from transaction.interfaces import NoTransaction
    from transaction.interfaces import TransientError
except ImportError as error:
    raise ImportError(f"zpgpool.datamanager needs the extra zpgpool[transaction]: {error}") from None


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from zope.interface.registry import Components


log = logging.getLogger("zpgpool")

#: What tells our prepared transactions from those of others (X/Open XA's "format identifier"): "zpgp".
FORMAT_ID = 0x7A706770

#: The key of the global transaction id in a transaction's extended info, which ZODB keeps with its commit.
EXTENDED_INFO = "zpgpool"

#: SQLSTATE class 40, "Transaction Rollback": the same transaction may succeed when it is run again.
RETRYABLE = "40"

_numbers = count(1)


def connection(name: str = "", tm: Any = None, registry: Components | None = None) -> Connection:
    """Return the connection of the current transaction, from the pool `name`: the same one until the transaction ends.

    tm -- the transaction manager; by default `transaction.manager`, the thread's.
    registry -- where the pool is looked up; by default the global registry.

    Inside a request it is the connection of the request (see `zpgpool.wsgi.get_connection`). `commit()` and
    `rollback()` are the transaction's.

    Raises ComponentLookupError when no such pool is registered, `transaction.interfaces.NoTransaction` when an
    explicit manager has not begun one, `transaction.interfaces.TransactionFailedError` when the transaction has failed
    already, PoolError when the connection cannot take part in it, and what `IConnectionPool.getconn` raises.
    """
    pool = get_pool(name, registry)
    if (lease := current_lease(pool)) is not None:
        pool = lease.source()
    tm = transaction.manager if tm is None else tm
    try:
        txn = tm.get()
    except NoTransaction:
        raise NoTransaction("no transaction was begun that the connection could join") from None
    try:
        manager = txn.data(pool)
    except KeyError:
        manager = DataManager(pool, tm)
        txn.set_data(pool, manager)
    conn: Connection = manager.join(txn)
    return conn


@implementer(ISavepointDataManager)
class DataManager:
    """One connection in one transaction. Every method may be called at any time, in any state, by any thread."""

    def __init__(self, pool: Any, tm: Any) -> None:
        self.transaction_manager = tm
        self.pool = pool
        self._hold: Any = None
        self._lease: Any = None
        self._factory: Any = None
        self.is_joined = False
        self._txn: Any = None
        #: The global id of the prepared, or to be prepared, transaction; None in one-phase.
        self._xid: Any = None
        #: Whether the votes are cast: the transaction is committed, or prepared.
        self._has_voted = False
        # The votes are asked for, and commits done, in the order of these keys. One-phase comes last: what is
        # committed cannot be taken back. Two-phase finishes after ZODB, whose record of the transaction then tells
        # what was decided, and before one-phase: "}" is behind every letter, "~" behind that.
        self._sort_key = f"{'}' if pool.twophase else '~'}zpgpool:{pool.name}:{next(_numbers):012d}"

    def __repr__(self) -> str:
        return f"<DataManager of {self.pool!r}>"

    def sortKey(self) -> str:
        """See `transaction.interfaces.IDataManager`."""
        return self._sort_key

    def join(self, txn: Any) -> Connection:
        """Return the connection, which is part of `txn` from now on."""
        if self.is_joined and self._hold is not None:
            joined: Connection = self._hold.conn
            return joined
        is_first = self._hold is None
        if is_first:
            self._take()
        conn: Connection = self._hold.conn
        try:
            self._check_can_join(conn)
            txn.join(self)
            self.is_joined, self._txn = True, txn
            if self.pool.twophase:
                self._begin(txn, conn)
        except BaseException:
            if self.is_joined or is_first:
                self._release()
            raise
        return conn

    def _take(self) -> None:
        lease = current_lease(self.pool)
        if lease is not None and (lease.borrower is None or not lease.borrower.is_joined):
            self._hold = lease.lend(self)
            self._lease = lease
        else:
            self._hold = self.pool.hold()
        conn = self._hold.conn
        self._factory = conn.cursor_factory
        conn.cursor_factory = transient_cursor(self._factory or _default_factory(conn))

    def _check_can_join(self, conn: Connection) -> None:
        if conn.autocommit:
            raise PoolError(
                f"{self.pool!r}: a connection with autocommit commits at once, and cannot join a transaction"
            )
        if self.pool.twophase and conn.status != STATUS_READY:
            raise PoolError(f"{self.pool!r}: the connection is in a transaction of one phase already")

    def _begin(self, txn: Any, conn: Connection) -> None:
        # One for all pools of the transaction, and known to ZODB before it commits.
        gtrid = txn.extension.get(EXTENDED_INFO)
        if gtrid is None:
            gtrid = f"zpgpool:{socket.gethostname()[:24]}:{os.getpid()}:{uuid.uuid4().hex[:16]}"
            txn.setExtendedInfo(EXTENDED_INFO, gtrid)
        self._xid = conn.xid(FORMAT_ID, _printable(gtrid), "unprepared")
        conn.tpc_begin(self._xid)

    def _prepare(self, conn: Connection) -> None:
        """Prepare; or, when nobody else takes part, commit: there is nothing to agree on."""
        others = [resource for resource in self._txn._resources if resource is not self]
        if not others:
            conn.tpc_commit()
            self._xid = None
            return
        # Only now it is known whether ZODB takes part, which `zpgpool recover` must know: so not by `tpc_prepare()`,
        # whose id was given at the beginning. The server's process tells whether the owner is still there.
        has_zodb = any(type(other).__module__.startswith("ZODB.") for other in others)
        bqual = f"{self.pool.name[:40]}:{conn.get_backend_pid()}:{'zodb' if has_zodb else 'none'}"
        xid = conn.xid(FORMAT_ID, self._xid.gtrid, _printable(bqual))
        with conn.cursor(cursor_factory=cursor) as curs:
            curs.execute("PREPARE TRANSACTION %s", [str(xid)])
        self._xid, self._has_voted = xid, True  # first: should the connection end now, it is to be told of
        conn.tpc_rollback()  # psycopg2's memory of the beginning; the server has no transaction here any more

    def _release(self, close: bool = False) -> None:
        """Let go of the connection: a late call of a method cannot reach whoever has it next."""
        hold, self._hold = self._hold, None
        lease, self._lease = self._lease, None
        self.is_joined = False
        if hold is None:
            return
        hold.conn.cursor_factory = self._factory
        if lease is not None:
            if lease.borrower is self:
                lease.borrower = None
            if not lease.is_over and not close:
                return  # the request goes on with it, and puts it away
        hold.putconn(close)

    # What `transaction` calls -----------------------------------------------------------------------------------------

    def tpc_begin(self, txn: object) -> None:
        """See `transaction.interfaces.IDataManager`."""

    def commit(self, txn: object) -> None:
        """See `transaction.interfaces.IDataManager`."""

    def tpc_vote(self, txn: object) -> None:
        """Commit; or, with two phases, prepare. Raises what makes that impossible, a failed statement before, too."""
        if self._hold is None or self._has_voted:
            return
        conn = self._hold.conn
        try:
            self._check_can_commit(conn)
            if self._xid is not None:
                self._prepare(conn)
            else:
                conn.commit()
        except psycopg2.Error as error:
            make_transient(error)
            raise
        self._has_voted = True

    def _check_can_commit(self, conn: Connection) -> None:
        # PostgreSQL answers a COMMIT here with ROLLBACK, a PREPARE TRANSACTION, too, and psycopg2 says nothing.
        if conn.get_transaction_status() == TRANSACTION_STATUS_INERROR:
            raise InFailedSqlTransaction(
                f"{self.pool!r}: a statement of this transaction has failed, and was not rolled back to a savepoint: "
                "nothing of it can be committed"
            )

    def tpc_finish(self, txn: object) -> None:
        """End the transaction. Raises nothing: the others have committed."""
        if self._hold is None:
            return
        if self._xid is not None and self._has_voted:
            try:
                self._hold.conn.tpc_commit(self._xid)
            except psycopg2.Error as error:
                self._commit_aside(error)
                self._release(close=True)
                return
        self._release()

    def _commit_aside(self, error: psycopg2.Error) -> None:
        """Try once more, on a connection of its own: the one that prepared is lost, the transaction is not."""
        try:
            with closing(self.pool.connect_aside()) as conn:
                conn.tpc_commit(self._xid)
        except psycopg2.Error as second:
            if second.pgcode == errorcodes.UNDEFINED_OBJECT:
                # The first try has been heard, or somebody else was faster: nothing holds locks, no doubt is left.
                log.warning("%r: COMMIT PREPARED was not answered, and is done: %s", self.pool, one_line(error))
            else:
                self._tell_in_doubt("COMMIT", error)

    def tpc_abort(self, txn: Any) -> None:
        """Roll back what can be, and end the transaction."""
        voted = getattr(txn, "_voted", None) or {}
        if (
            self._hold is not None
            and self._has_voted
            and self._xid is not None
            and len(voted) > 1
            and all(voted.get(id(resource)) for resource in txn._resources)
        ):
            # All have voted, so somebody's finish has failed: maybe after it had committed. ZODB's record tells.
            self._tell_in_doubt("COMMIT", "another resource failed after the votes")
        elif self._hold is not None and self._has_voted and self._xid is None:
            log.critical(
                "%r: the transaction was committed here, but failed elsewhere after that: at most one resource that "
                "cannot be prepared may take part in a transaction (set twophase=true)",
                self.pool,
            )
        elif self._hold is not None:
            self._roll_back()
        self._release()

    def abort(self, txn: Any) -> None:
        """Roll back. May come before the end, to roll back to a savepoint from before the connection joined."""
        if self._hold is None or (self._has_voted and self._xid is None):
            return
        self._roll_back()
        self.is_joined = False
        if self._hold is not None:
            # Its user may go on with the connection until the transaction's end: that joins again.
            txn.addBeforeCommitHook(self._rejoin, (txn,))
            txn.addAfterAbortHook(self._release_unjoined)
            txn.addAfterCommitHook(self._release_unjoined)

    def _rejoin(self, txn: Any) -> None:
        if self._hold is not None and not self.is_joined and self._hold.conn.status != STATUS_READY:
            self.join(txn)

    def abandon(self, why: str) -> None:
        """Abort the transaction, which nobody has ended."""
        if self.is_joined:
            log.error("%r: a transaction was neither committed nor aborted; it is aborted now: %s", self.pool, why)
            try:
                self._txn.abort()
            except Exception:  # another resource's: the request that ends, or begins, has no part in it
                log.exception("%r: aborting it failed", self.pool)

    def _release_unjoined(self, *status: bool) -> None:
        if not self.is_joined:
            self._release()

    def _roll_back(self) -> None:
        conn = self._hold.conn
        try:
            if self._xid is None:
                conn.rollback()
            elif self._has_voted:
                conn.tpc_rollback(self._xid)
            else:
                conn.tpc_rollback()
        except psycopg2.Error as error:
            if self._has_voted:
                self._tell_in_doubt("ROLLBACK", error)
            self._release(close=True)
        self._xid, self._has_voted = None, False

    def _tell_in_doubt(self, what: str, error: BaseException | str) -> None:
        log.critical(
            "%r: %s PREPARED of %s/%s failed (%s): the transaction is in doubt, it holds its locks until "
            "`zpgpool recover` has resolved it",
            self.pool,
            what,
            self._xid.gtrid,
            self._xid.bqual,
            error if isinstance(error, str) else one_line(error),
        )

    def savepoint(self) -> Savepoint:
        """See `transaction.interfaces.ISavepointDataManager`. Raises PoolError when the connection does autocommit."""
        return Savepoint(self)

    def should_retry(self, error: BaseException) -> bool:
        """Whether the transaction may succeed when it is run again: a serialization failure, or a deadlock."""
        return is_retryable(error)


@implementer(IDataManagerSavepoint)
class Savepoint:
    """A savepoint of PostgreSQL (documentation, "SAVEPOINT")."""

    def __init__(self, manager: DataManager) -> None:
        self._manager = manager
        self._name = f"zpgpool_{next(_numbers)}"
        if manager._hold is not None:
            if manager._hold.conn.autocommit:
                raise PoolError(f"{manager.pool!r}: a connection with autocommit has no transaction, and no savepoints")
            self._execute("SAVEPOINT")

    def rollback(self) -> None:
        """See `transaction.interfaces.IDataManagerSavepoint`."""
        if self._manager._hold is not None:
            self._execute("ROLLBACK TO SAVEPOINT")

    def _execute(self, sql: str) -> None:
        with self._manager._hold.conn.cursor(cursor_factory=cursor) as curs:
            curs.execute(f"{sql} {self._name}")


# Errors that say "once more" ------------------------------------------------------------------------------------------


def is_retryable(error: BaseException) -> bool:
    """Whether `error` says that the same transaction may succeed when it is run again."""
    return isinstance(error, psycopg2.Error) and (blames_replica(error) or (error.pgcode or "").startswith(RETRYABLE))


def make_transient(error: psycopg2.Error) -> None:
    """Make a retryable error a `transaction.interfaces.TransientError`, too, which Zope's publisher looks for.

    In place: it is the error that the user gets, with its traceback, its `diag`, and its class among its bases.
    """
    if is_retryable(error) and not isinstance(error, TransientError):
        error_class: Any = type(error)
        error.__class__ = _transient(error_class)


@cache
def _transient(error_class: Any) -> Any:
    return type(error_class.__name__, (error_class, TransientError), {"__module__": __name__})


def _telling(name: str) -> Any:
    """Return a cursor's method `name` whose errors are transient, where they are."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(_TransientMixin, self), name)(*args, **kwargs)
        except psycopg2.Error as error:
            make_transient(error)
            raise

    method.__name__ = name
    return method


class _TransientMixin:
    """The methods that talk to the server; those that fetch do it for a cursor with a name."""

    execute = _telling("execute")
    executemany = _telling("executemany")
    callproc = _telling("callproc")
    copy_expert = _telling("copy_expert")
    copy_from = _telling("copy_from")
    copy_to = _telling("copy_to")
    fetchone = _telling("fetchone")
    fetchmany = _telling("fetchmany")
    fetchall = _telling("fetchall")
    __next__ = _telling("__next__")


def _default_factory(conn: Connection) -> Any:
    """Return the class of cursors that a connection without `cursor_factory` makes; its own class may decide that."""
    if type(conn) in (Psycopg2Connection, PLAIN):
        return cursor
    with conn.cursor() as curs:
        return type(curs)


@cache
def transient_cursor(factory: Any) -> Any:
    """Return a subclass of the cursor class `factory` whose retryable errors are transient; anything else as it is."""
    if not isinstance(factory, type):
        return factory
    return type(factory.__name__, (_TransientMixin, factory), {"__module__": factory.__module__})


def _printable(text: str) -> str:
    """Return `text` as a part of a transaction id: printable ASCII, at most 64 characters (psycopg2, `xid()`)."""
    return "".join(char if " " < char <= "~" else "_" for char in text)[:64]
