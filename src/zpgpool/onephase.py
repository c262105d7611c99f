"""A connection in a transaction that commits in one phase: in `tpc_vote`, after all others have voted."""

from __future__ import annotations

import logging
from enum import Enum
from itertools import count
from typing import Any
from typing import TYPE_CHECKING

import psycopg2
from psycopg2.errors import InFailedSqlTransaction
from psycopg2.extensions import cursor
from psycopg2.extensions import STATUS_READY
from psycopg2.extensions import TRANSACTION_STATUS_INERROR
from psycopg2.extensions import TRANSACTION_STATUS_UNKNOWN
from transaction.interfaces import IDataManagerSavepoint
from transaction.interfaces import ISavepointDataManager
from transaction.interfaces import TransactionFailedError
from zope.interface import implementer

from .core import commit
from .core import LOST
from .core import only_reads
from .errors import PoolError
from .request import current_lease
from .request import join_body
from .request import note_commit
from .request import SharedCheckout
from .transient import default_factory
from .transient import is_retryable
from .transient import note
from .transient import transient_cursor


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from .types import Pool
    from .types import Transaction
    from .types import TransactionManager


log = logging.getLogger("zpgpool")

_numbers = count(1)


def resources_of(txn: object) -> list[object]:
    """Return what has joined a transaction. Private to `transaction`, which has no other way to tell."""
    return list(txn._resources)  # type: ignore[attr-defined]  # private to `transaction`: a test knows it


def votes_of(txn: object) -> dict[int, bool]:
    """Return which resources have voted, by id. Private to `transaction`, as `_resources`; `tests` watch both."""
    return dict(getattr(txn, "_voted", None) or {})


class Phase(Enum):
    """Where a data manager is in its transaction."""

    OUTSIDE = "outside"
    JOINED = "joined"
    #: The transaction has failed, and nothing can join it: what is done until its abort is rolled back then.
    LENT = "lent"
    #: In one phase: the connection has committed. In two: its transaction is prepared.
    VOTED = "voted"


@implementer(ISavepointDataManager)
class DataManager:
    """One connection in one transaction, committed in one phase. Every method may be called at any time, by any thread.

    It commits in `tpc_vote`, and votes last: what fails there still aborts the others.

    After an error the page that tells of it may need the database, too (Zope renders it before the abort). So the
    connection of a failed transaction is made usable for the next one that asks for it. Nothing of it is committed: the
    vote raises.
    """

    #: The votes are asked for, and commits done, in the order of `sortKey`. One-phase comes last: what is committed
    #: cannot be taken back. Two-phase finishes after ZODB, whose record of the transaction then tells what was
    #: decided, and before one-phase: "}" is behind every letter, "~" behind that.
    ORDER = "~"

    def __init__(self, pool: Pool, tm: TransactionManager) -> None:
        self.transaction_manager = tm
        self.pool = pool
        self.phase = Phase.OUTSIDE
        self._shared: SharedCheckout | None = None
        self._factory: Any = None
        self._txn: Transaction | None = None
        #: What the vote raises: the transaction has failed, and went on.
        self.failure: psycopg2.Error | None = None
        #: The names of those that the server has, the last one last.
        self.savepoints: list[str] = []
        self._sort_key = f"{self.ORDER}zpgpool:{pool.name}:{next(_numbers):012d}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.pool!r}>"

    def sortKey(self) -> str:
        """See `transaction.interfaces.IDataManager`."""
        return self._sort_key

    @property
    def is_joined(self) -> bool:
        """Whether the transaction goes on with the connection."""
        return self.phase in (Phase.JOINED, Phase.VOTED)

    @property
    def conn(self) -> Connection | None:
        """The connection; None when the transaction has none."""
        return None if self._shared is None else self._shared.conn

    def join(self, txn: Transaction) -> Connection:
        """Return the connection, which is part of `txn` from now on; unless that has failed, and will be aborted."""
        if self.phase in (Phase.JOINED, Phase.LENT):
            return self._usable()
        if self._shared is not None and self.is_joined:
            return self._shared.conn
        is_first = self._shared is None
        shared = self._shared = self._take() if self._shared is None else self._shared
        try:
            self._check_can_join(shared.conn)
            try:
                txn.join(self)
            except TransactionFailedError:
                self.phase, self._txn = Phase.LENT, txn
                txn.addAfterAbortHook(self._release_unjoined)
                return shared.conn
            self.phase, self._txn = Phase.JOINED, txn
            self._begin(txn, shared.conn)
        except BaseException:
            if self.is_joined or is_first:
                self._release()
            raise
        return shared.conn

    def _take(self) -> SharedCheckout:
        lease = current_lease(self.pool)
        try:
            shared = None if lease is None else lease.share(self)
            if shared is None:
                shared = SharedCheckout(self.pool.checkout())
                shared.add(self)
                join_body(self)
        except psycopg2.Error as error:
            note(error)
            raise
        conn = shared.conn
        self._factory = conn.cursor_factory
        conn.cursor_factory = transient_cursor(self._factory or default_factory(conn))
        return shared

    def _usable(self) -> Connection:
        """Return the connection, after an error in a state in which it can be used."""
        phase, conn = self.phase, self.conn
        status = None if conn is None else conn.get_transaction_status()
        if conn is not None and status == TRANSACTION_STATUS_INERROR:
            self.failure = self.failure or self._failed_statement()
            self._go_back(conn)
        elif status == TRANSACTION_STATUS_UNKNOWN:
            self.failure = self.failure or psycopg2.InterfaceError(LOST)
            self._release(close=True)
        if self._shared is None:
            self.phase = phase
            self._shared = self._take()
        return self._shared.conn

    def _go_back(self, conn: Connection) -> None:
        """Leave the failed transaction: back to its last savepoint, so that all of them stay, or to the beginning."""
        try:
            if self.savepoints:
                run_savepoint("ROLLBACK TO SAVEPOINT", conn, self.savepoints[-1])
            else:
                self._roll_back(conn)
        except psycopg2.Error:
            self._release(close=True)

    def _failed_statement(self) -> psycopg2.Error:
        return InFailedSqlTransaction(
            f"{self.pool!r}: a statement of this transaction has failed, and was not rolled back to a "
            "savepoint: nothing of it can be committed"
        )

    def _check_can_join(self, conn: Connection) -> None:
        if conn.autocommit:
            raise PoolError(
                f"{self.pool!r}: a connection with autocommit commits at once, and cannot join a transaction"
            )

    def _begin(self, txn: Transaction, conn: Connection) -> None:
        """Begin a transaction of the server's; psycopg2 does with the first statement."""

    def _release(self, close: bool = False) -> None:
        """Let go of the connection: a late call of a method cannot reach the connection's next user."""
        shared, self._shared = self._shared, None
        self.phase = Phase.OUTSIDE
        self.savepoints = []
        if shared is not None:
            shared.conn.cursor_factory = self._factory
            shared.let_go(self, close)

    # What `transaction` calls ----------------------------------------------------------------------------------------

    def tpc_begin(self, txn: object) -> None:
        """See `transaction.interfaces.IDataManager`."""

    def commit(self, txn: object) -> None:
        """See `transaction.interfaces.IDataManager`."""

    def tpc_vote(self, txn: object) -> None:
        """Commit; or, with two phases, prepare. Raises what makes that impossible, a failed statement before, too."""
        conn = self.conn
        if self.phase is Phase.VOTED or (conn is None and self.failure is None):
            return
        try:
            # PostgreSQL answers a COMMIT here with ROLLBACK, a PREPARE TRANSACTION, too, and psycopg2 says nothing.
            if conn is None or self.failure or conn.get_transaction_status() == TRANSACTION_STATUS_INERROR:
                if conn is None or not only_reads(conn):
                    raise self.failure or self._failed_statement()
                return  # it could write nothing: nothing of it is lost
            self._vote(conn)
        except psycopg2.Error as error:
            note(error)
            raise
        self.phase = Phase.VOTED
        note_commit()

    def _vote(self, conn: Connection) -> None:
        commit(self.pool, conn)

    def tpc_finish(self, txn: object) -> None:
        """End the transaction. Raises nothing: the others have committed."""
        self._release()

    def tpc_abort(self, txn: Transaction) -> None:
        """Roll back what can be, and end the transaction."""
        if self.conn is not None and self.phase is Phase.VOTED:
            self._abort_voted(txn)
        elif self.conn is not None:
            self._roll_back(self.conn)
        self._release()

    def _abort_voted(self, txn: Transaction) -> None:
        log.critical(
            "%r: the transaction was committed here, but failed elsewhere after that: at most one resource that "
            "cannot be prepared may take part in a transaction (set twophase=true)",
            self.pool,
        )

    def abort(self, txn: Transaction) -> None:
        """Roll back. May come before the end, to roll back to a savepoint from before the connection joined."""
        if not self._can_abort():
            return
        self.failure = None  # all of it is undone, what has failed, too
        self.savepoints = []
        if self.conn is not None:
            self._roll_back(self.conn)
        self.phase = Phase.OUTSIDE
        if self._shared is not None:
            # Its user may go on with the connection until the transaction's end: that joins again.
            txn.addBeforeCommitHook(self._rejoin, (txn,))
            txn.addAfterAbortHook(self._release_unjoined)
            txn.addAfterCommitHook(self._release_unjoined)

    def _can_abort(self) -> bool:
        return self.phase is not Phase.VOTED

    def _rejoin(self, txn: Transaction) -> None:
        if self.conn is not None and not self.is_joined and self.conn.status != STATUS_READY:
            self.join(txn)

    def _release_unjoined(self, *status: bool) -> None:
        if not self.is_joined:
            if self.conn is not None:
                self._roll_back(self.conn)
            self._release()

    def _roll_back(self, conn: Connection) -> None:
        try:
            conn.rollback()
        except psycopg2.Error:
            self._release(close=True)

    def abandon(self, why: str) -> None:
        """Abort a transaction that was left open, and that may join again until then."""
        if self.conn is not None:
            log.error("%r: a transaction was neither committed nor aborted; it is aborted now: %s", self.pool, why)
            try:
                if self._txn is not None:
                    self._txn.abort()
            except Exception:  # another resource's: the request that ends, or begins, has no part in it
                log.exception("%r: aborting it failed", self.pool)
            finally:
                if self.conn is not None:
                    self._roll_back(self.conn)
                self._release()

    def savepoint(self) -> Savepoint:
        """See `transaction.interfaces.ISavepointDataManager`. Raises PoolError when the connection does autocommit."""
        return Savepoint(self)

    def should_retry(self, error: BaseException) -> bool:
        """Whether the transaction may succeed when it is run again: see `transient`."""
        return is_retryable(error)


@implementer(IDataManagerSavepoint)
class Savepoint:
    """A savepoint of PostgreSQL (documentation, "SAVEPOINT")."""

    def __init__(self, manager: DataManager) -> None:
        self._manager = manager
        self._name = f"zpgpool_{next(_numbers)}"
        self._failure = manager.failure
        if manager.conn is not None:
            if manager.conn.autocommit:
                raise PoolError(f"{manager.pool!r}: a connection with autocommit has no transaction, and no savepoints")
            run_savepoint("SAVEPOINT", manager.conn, self._name)
            manager.savepoints.append(self._name)

    def rollback(self) -> None:
        """See `transaction.interfaces.IDataManagerSavepoint`."""
        manager = self._manager
        if manager.conn is not None:
            run_savepoint("ROLLBACK TO SAVEPOINT", manager.conn, self._name)
            del manager.savepoints[manager.savepoints.index(self._name) + 1 :]
            manager.failure = self._failure


def run_savepoint(command: str, conn: Connection, name: str) -> None:
    with conn.cursor(cursor_factory=cursor) as curs:
        curs.execute(f"{command} {name}")
