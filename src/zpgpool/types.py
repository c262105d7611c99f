"""The contracts of `interfaces` as type checkers know them: a pool of another class fits where these are asked for.

`tests/test_third_party.py` compares both. Knows nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from typing import Protocol
from typing import TYPE_CHECKING
from typing import TypeAlias


if TYPE_CHECKING:
    import psycopg2
    from psycopg2.extensions import connection as Connection

    from .interfaces import IObserver
    from .settings import PoolSettings


#: A thread as a pool knows it. `Any`: only the pool that gave it knows what it is.
Owner: TypeAlias = Any


class Checkout(Protocol):
    """See `ICheckout`."""

    @property
    def conn(self) -> Connection: ...

    def putconn(self, close: bool = False) -> None: ...


class Pool(Protocol):
    """See `IConnectionPool`."""

    @property
    def name(self) -> str: ...

    @property
    def minconn(self) -> int: ...

    @property
    def maxconn(self) -> int: ...

    @property
    def closed(self) -> bool: ...

    def getconn(self, *, timeout: float | None = None) -> Connection: ...

    def putconn(self, conn: Connection, *, close: bool = False) -> None: ...

    def connection(self, *, timeout: float | None = None) -> AbstractContextManager[Connection]: ...

    def checkout(self, conn: Connection | None = None) -> Checkout: ...

    def open(self) -> None: ...

    def wait(self, timeout: float = 30.0) -> None: ...

    def prune(self) -> None: ...

    def closeall(self) -> None: ...

    def close(self, timeout: float = 5.0) -> None: ...

    def get_stats(self) -> dict[str, int]: ...


class KeyedPool(Pool, Protocol):
    """See `IKeyedConnectionPool`."""

    def getconn(self, key: Hashable = None, *, timeout: float | None = None) -> Connection: ...

    def putconn(self, conn: Connection | None = None, key: Hashable = None, close: bool = False) -> None: ...


class PersistentPool(Pool, Protocol):
    """See `IPersistentConnectionPool`."""

    def owner(self) -> Owner: ...

    def connection_of(self, owner: Owner) -> Connection | None: ...

    def putconn_of(self, owner: Owner, close: bool = False) -> bool: ...


class Savepoint(Protocol):
    """What is needed of a `transaction.interfaces.ISavepoint`."""

    def rollback(self) -> None: ...


class Transaction(Protocol):
    """What a data manager needs of `transaction.interfaces.ITransaction`."""

    extension: dict[str, Any]  # what an application notes in it is its own affair

    def join(self, resource: object) -> None: ...

    def data(self, key: object) -> Any: ...  # whatever was set

    def set_data(self, key: object, data: object) -> None: ...

    def abort(self) -> None: ...

    def savepoint(self, optimistic: bool = False) -> Savepoint: ...

    def setExtendedInfo(self, name: str, value: str) -> None: ...

    def addBeforeCommitHook(self, hook: Callable[..., None], args: tuple[object, ...] = ()) -> None: ...

    def addAfterAbortHook(self, hook: Callable[..., None], args: tuple[object, ...] = ()) -> None: ...

    def addAfterCommitHook(self, hook: Callable[..., None]) -> None: ...


class TransactionManager(Protocol):
    """What a data manager needs of `transaction.interfaces.ITransactionManager`."""

    def get(self) -> Transaction: ...


class Holder(Protocol):
    """See `IHolder`."""

    @property
    def thread(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def status(self) -> str: ...

    @property
    def backend_pid(self) -> int: ...

    @property
    def request(self) -> str: ...

    @property
    def line(self) -> str: ...


class Waiter(Protocol):
    """See `IWaiter`."""

    @property
    def thread(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def request(self) -> str: ...

    @property
    def line(self) -> str: ...


class ManagedPool(Pool, Protocol):
    """See `IPoolManagement`."""

    @property
    def last_connect_error(self) -> psycopg2.Error | None: ...

    @property
    def outage_seconds(self) -> float | None: ...

    @property
    def settings(self) -> PoolSettings: ...

    def holders(self) -> Sequence[Holder]: ...

    def waiters(self) -> Sequence[Waiter]: ...

    def cancel(self, conn: Connection, timeout: float = 1.0) -> bool: ...

    def detach(self, conn: Connection) -> None: ...

    def drain(self) -> None: ...

    def resize(self, minconn: int, maxconn: int) -> None: ...


class ObservedPool(ManagedPool, Protocol):
    """See `IPoolInternals`."""

    def run_maintenance(self, now: float) -> float | None: ...

    def observe(self, observer: IObserver) -> None: ...

    def backend_pids(self) -> Sequence[int]: ...

    def open_connection(self, **keywords: object) -> Connection: ...

    def scrub(self, text: str) -> str: ...

    def adopt_name(self, name: str) -> None: ...

    def serve_readers(self, timeout: float) -> None: ...

    def longest_use(self, now: float) -> float: ...

    def hang_up(self) -> None: ...

    def forgo_timer(self) -> None: ...

    def take_for_reading(self, key: Hashable = None) -> None: ...

    def check_process(self) -> None: ...
