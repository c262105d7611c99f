"""A connection in a transaction that commits in two phases: prepared in the vote, committed after the others."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from contextlib import closing
from time import monotonic
from time import sleep
from typing import cast
from typing import TYPE_CHECKING

import psycopg2
from psycopg2 import errorcodes
from psycopg2.extensions import cursor
from psycopg2.extensions import STATUS_READY

from .core import commit
from .errors import one_line
from .errors import PoolError
from .onephase import DataManager
from .onephase import Phase
from .onephase import resources_of
from .onephase import votes_of


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import Xid

    from .types import ObservedPool
    from .types import Transaction


log = logging.getLogger("zpgpool")

#: What tells our prepared transactions from those of others (X/Open XA's "format identifier"): "zpgp".
FORMAT_ID = 0x7A706770

#: The key of the global transaction id in a transaction's extended info, which ZODB keeps with its commit.
EXTENDED_INFO = "zpgpool"

#: How long a session that was ended may take to end, in seconds.
ENDED = 5.0


def _end_sessions(conn: Connection, query: str) -> None:
    """End the sessions that run `query` still, though their client is gone: otherwise they could do it later."""
    conn.autocommit = True
    deadline = monotonic() + ENDED
    with conn.cursor(cursor_factory=cursor) as curs:
        while True:
            curs.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = %s AND state = 'active'", [query]
            )
            if not curs.rowcount:
                return
            if monotonic() > deadline:
                raise psycopg2.OperationalError("the session that prepares does not end")
            sleep(0.01)


class TwoPhaseDataManager(DataManager):
    """Commits in two phases (PostgreSQL documentation, "PREPARE TRANSACTION"): prepares in the vote, commits after it.

    Whatever happens in between is found and resolved by `zpgpool recover`.
    """

    ORDER = "}"

    #: The global id of the transaction, which is prepared, or to be; None when it commits in one phase after all.
    _xid: Xid | None = None

    @property
    def _global_id(self) -> Xid:
        assert self._xid is not None
        return self._xid

    def _check_can_join(self, conn: Connection) -> None:
        super()._check_can_join(conn)
        if conn.status != STATUS_READY:
            raise PoolError(f"{self.pool!r}: the connection is in a transaction of one phase already")

    def _begin(self, txn: Transaction, conn: Connection) -> None:
        # One for all pools of the transaction, and known to ZODB before it commits.
        gtrid = txn.extension.get(EXTENDED_INFO)
        if gtrid is None:
            gtrid = f"zpgpool:{socket.gethostname()[:24]}:{os.getpid()}:{uuid.uuid4().hex[:16]}"
            txn.setExtendedInfo(EXTENDED_INFO, gtrid)
        self._xid = conn.xid(FORMAT_ID, _printable(gtrid), "unprepared")
        conn.tpc_begin(self._xid)

    def _release(self, close: bool = False) -> None:
        self._xid = None
        super()._release(close)

    def _vote(self, conn: Connection) -> None:
        """Prepare; or, when no other resource takes part, commit: there is nothing to agree on."""
        others = [resource for resource in resources_of(self._txn) if resource is not self]
        if not others:
            commit(self.pool, conn, conn.tpc_commit)
            self._xid = None
            return
        # Only now it is known whether ZODB takes part, which `zpgpool recover` must know: so not by `tpc_prepare()`,
        # whose id was given at the beginning. The server's process tells whether the owner is still there.
        has_zodb = any(type(other).__module__.startswith("ZODB.") for other in others)
        bqual = f"{self.pool.name[:40]}:{conn.get_backend_pid()}:{'zodb' if has_zodb else 'none'}"
        self._xid = conn.xid(FORMAT_ID, self._global_id.gtrid, _printable(bqual))
        try:
            with conn.cursor(cursor_factory=cursor) as curs:
                curs.execute("PREPARE TRANSACTION %s", [str(self._xid)])
        except psycopg2.Error as error:
            if error.pgcode is None:  # the answer is lost, and maybe nothing else
                self._undo_prepare(error)
            raise
        self.phase = Phase.VOTED  # first: should the connection end now, it is to be told of
        conn.tpc_rollback()  # psycopg2's memory of the beginning; the server has no transaction here any more

    def _undo_prepare(self, error: psycopg2.Error) -> None:
        """Roll back what may be prepared, on a connection of its own: after a failed vote it will not be committed."""
        pool = cast("ObservedPool", self.pool)
        try:
            with closing(pool.open_connection()) as conn:
                _end_sessions(conn, f"PREPARE TRANSACTION '{self._xid}'")
                conn.tpc_rollback(self._global_id)
            log.warning("%r: PREPARE was not answered, but done; it is rolled back: %s", self.pool, one_line(error))
        except psycopg2.Error as second:
            if second.pgcode != errorcodes.UNDEFINED_OBJECT:  # else it was not prepared
                self._tell_in_doubt("ROLLBACK", second)

    def tpc_finish(self, txn: object) -> None:
        """See `DataManager`."""
        if self.conn is not None and self._xid is not None and self.phase is Phase.VOTED:
            try:
                self.conn.tpc_commit(self._xid)
            except psycopg2.Error as error:
                self._commit_by_another(error)
                self._release(close=True)
                return
        self._release()

    def _commit_by_another(self, error: psycopg2.Error) -> None:
        """Try once more, on a connection of its own: the one that prepared is lost, the transaction is not."""
        pool = cast("ObservedPool", self.pool)
        try:
            with closing(pool.open_connection()) as conn:
                conn.tpc_commit(self._global_id)
        except psycopg2.Error as second:
            if second.pgcode == errorcodes.UNDEFINED_OBJECT:
                # The first try has been heard, or another process was faster: nothing holds locks, no doubt is left.
                log.warning("%r: COMMIT PREPARED was not answered, and is done: %s", self.pool, one_line(error))
            else:
                self._tell_in_doubt("COMMIT", error)

    def _abort_voted(self, txn: Transaction) -> None:
        if self._xid is None:
            super()._abort_voted(txn)
            return
        votes = votes_of(txn)
        if len(votes) > 1 and all(votes.get(id(resource)) for resource in resources_of(txn)):
            # All voted, so a resource's `tpc_finish` has failed: maybe after it had committed. ZODB's record tells.
            self._tell_in_doubt("COMMIT", "another resource failed after the votes")
        elif self.conn is not None:
            self._roll_back(self.conn)

    def _can_abort(self) -> bool:
        return self.phase is not Phase.VOTED or self._xid is not None

    def _roll_back(self, conn: Connection) -> None:
        is_prepared = self._xid is not None and self.phase is Phase.VOTED
        try:
            if self._xid is None:
                conn.rollback()
            elif is_prepared:
                conn.tpc_rollback(self._xid)
            else:
                conn.tpc_rollback()
        except psycopg2.Error as error:
            if is_prepared:
                self._tell_in_doubt("ROLLBACK", error)
            self._release(close=True)
        self._xid = None
        if is_prepared and self._shared is not None:
            self.phase = Phase.JOINED

    def _tell_in_doubt(self, what: str, error: BaseException | str) -> None:
        log.critical(
            "%r: %s PREPARED of %s/%s failed (%s): the transaction is in doubt, it holds its locks until "
            "`zpgpool recover` has resolved it",
            self.pool,
            what,
            self._global_id.gtrid,
            self._global_id.bqual,
            error if isinstance(error, str) else one_line(error),
        )


def _printable(text: str) -> str:
    """Return `text` as a part of a transaction id: printable ASCII, at most 64 characters (psycopg2, `xid()`)."""
    return "".join(char if " " < char <= "~" else "_" for char in text)[:64]
