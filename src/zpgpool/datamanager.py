"""A pool's connection in a transaction of the `transaction` package: it commits with the others, or not at all.

One-phase, the connection commits in `tpc_vote`, after all others have voted: what fails there still aborts them. With
two phases (the pool's setting `twophase`) it is prepared there, and committed after the others; whatever happens in
between is found and resolved by `zpgpool recover`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import get_pool
from .request import current_lease


try:
    import transaction
    from transaction.interfaces import NoTransaction
except ImportError as error:
    raise ImportError(f"zpgpool.datamanager needs the extra zpgpool[transaction]: {error}") from None

from .onephase import DataManager
from .twophase import EXTENDED_INFO as EXTENDED_INFO
from .twophase import FORMAT_ID as FORMAT_ID
from .twophase import TwoPhaseDataManager


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from zope.interface.registry import Components

    from .types import Pool
    from .types import TransactionManager


def get_connection(
    name: str = "", tm: TransactionManager | None = None, registry: Components | None = None
) -> Connection:
    """Return the connection of the current transaction, from the pool `name`: the same one until the transaction ends.

    tm -- the transaction manager; by default `transaction.manager`, the thread's.
    registry -- where the pool is looked up; by default the global registry.

    Inside a request it is the connection of the request (see `zpgpool.wsgi.get_connection`). `commit()` and
    `rollback()` are the transaction's.

    In a transaction that has failed, by a statement, by its commit, or with its connection, it is one that works, for
    the page that tells of the error. What is done with it is not committed: the commit raises what had failed.

    Raises ComponentLookupError when no such pool is registered, `transaction.interfaces.NoTransaction` when an
    explicit manager has not begun one, PoolError when the connection cannot take part in it, and what
    `IConnectionPool.getconn` raises.
    """
    pool: Pool = get_pool(name, registry)
    if (lease := current_lease(pool)) is not None:
        pool = lease.source()
    tm = transaction.manager if tm is None else tm
    try:
        txn = tm.get()
    except NoTransaction:
        raise NoTransaction("no transaction was begun that the connection could join") from None
    try:
        manager: DataManager = txn.data(pool)
    except KeyError:
        manager = (TwoPhaseDataManager if _is_twophase(pool) else DataManager)(pool, tm)
        txn.set_data(pool, manager)
    return manager.join(txn)


#: The same as `get_connection`, under its first name.
connection = get_connection


def _is_twophase(pool: object) -> bool:
    settings = getattr(pool, "settings", None)
    return bool(getattr(settings, "twophase", False))
