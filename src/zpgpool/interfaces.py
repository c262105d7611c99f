"""The contracts: what can be relied on, whoever implements it.

Knows zope.interface only.
"""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from zope.interface import Attribute
from zope.interface import Interface


if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager

    from psycopg2.extensions import connection as Connection

    from .caller import Caller
    from .caller import Holder
    from .caller import Waiter


class IConnectionPool(Interface):
    """A pool of psycopg2 connections.

    Registered as a utility under the pool's name. Times are in seconds of monotonic time. What a pool refuses raises
    `zpgpool.PoolError`, a subclass of `psycopg2.pool.PoolError`, and changes nothing. Everything but the
    life of a `SimpleConnectionPool` may be called from any thread.
    """

    name = Attribute("The pool's name in logs and messages: text, '' by default.")
    minconn = Attribute("How many connections are kept open.")
    maxconn = Attribute("How many may be open, or being opened, at a time.")
    closed = Attribute("Whether the pool was closed.")
    twophase = Attribute("Whether transactions that join its connections commit in two phases.")
    outage = Attribute("The error of the last connect, a `psycopg2.Error`; None when that succeeded.")

    def getconn() -> Connection:
        """Return a connection: alive, outside of a transaction, its session as configured.

        One that the calling thread had before, if it is idle; else another idle one; else a new one; else one that is
        returned within the setting `timeout`, first come first served. With the server down the first to ask tries to
        connect, and the others get its error at once.

        Raises `PoolTimeout` when none came free (its message tells who holds them), `TooManyRequests` when
        `max_waiting` wait already, `PoolClosed`, or the `psycopg2.OperationalError` of the connect.
        """

    def putconn(conn: Connection) -> None:
        """Put a connection away: rolled back and with its session as configured it is idle, or it is closed.

        Never raises for what the server did. Raises `PoolError` for a connection that is not in use here.
        """

    def connection() -> AbstractContextManager[Connection]:
        """Return a context manager: `with pool.connection() as conn:` gets a connection, and puts it away at the end.

        In nested blocks of one thread the connection is the same, and the outermost puts it away. Nothing is
        committed: `conn.commit()` is the user's; what is not committed is rolled back.
        """

    def hold(conn: Connection | None = None) -> IHold:
        """Return a hold on a connection, for whoever ends its use in another thread, or at another time.

        On `conn`, which is in use, and which only the hold puts away from now on; by default on another one, got as by
        getconn().
        """

    def cancel(conn: Connection) -> bool:
        """Ask the server to cancel the query that runs on `conn`, which is in use; return whether one runs.

        From any thread; takes a second at most. Whoever waits for the query gets `psycopg2.errors.QueryCanceled`.
        """

    def prune() -> None:
        """Close the connections that are idle for more than `idle_timeout`, then open new ones up to `minconn`.

        Raises the `psycopg2.OperationalError` of a connect that failed.
        """

    def closeall() -> None:
        """Close all connections, those in use included, and the pool; in bounded time, even during queries.

        Afterwards getconn, putconn, prune and closeall raise `PoolClosed`.
        """

    def close(timeout: float = 5.0) -> None:
        """Refuse new users, give those of now `timeout` seconds to finish, then do as `closeall`. May be repeated."""

    def drain() -> None:
        """Replace every connection: idle ones are closed now, the others when they are returned."""

    def resize(minconn: int, maxconn: int) -> None:
        """Change the limits. Raises ValueError as the constructor does."""

    def holders() -> list[Holder]:
        """Return a list of who holds a connection: thread, request, seconds, transaction status, source line now."""

    def waiters() -> list[Waiter]:
        """Return a list of who waits for a connection, the next one first: thread, request, seconds, source line."""

    def get_stats() -> dict[str, int]:
        """Return counters and sizes as a dict, under psycopg_pool's names where the meaning is the same."""

    def tend(now: float) -> float | None:
        """Do what is due at `now`, and return when to come again, or None for never."""

    def observe(observer: IObserver) -> None:
        """Tell `observer` from now on what `IObserver` lists. A return takes some microseconds more with that."""

    def connect_aside(**keywords: Any) -> Connection:
        """Return a new connection to the pool's server that is none of the pool's, with `keywords` of libpq on top.

        For a look from outside: the caller closes it.
        """

    def scrub(text: str) -> str:
        """Return the message of an error of a connect without what it tells of the connection string."""


class IObserver(Interface):
    """Is told by a pool what is too frequent for events. Must neither block nor raise."""

    def waited(seconds: float) -> None:
        """Somebody stood in the line for so long, with or without success."""

    def used(seconds: float) -> None:
        """A connection was put away after so long a use."""

    def tend(now: float) -> float:
        """Do what is due in a round of the pool's timer at `now`; return when there should be another one."""

    def forget() -> None:
        """Begin anew: in a forked child nothing of the pool's has happened yet."""


class IHold(Interface):
    """A connection in use by whoever has this object. Who drops it without `putconn` has the connection closed."""

    conn = Attribute("The psycopg2 connection.")

    def putconn(close: bool = False) -> None:
        """Put the connection away, from any thread, as `putconn` of the pool does. May be repeated."""


class IKeyedConnectionPool(IConnectionPool):
    """A pool whose users may name their connections by keys, as in `psycopg2.pool`."""

    def getconn(key: Hashable = None) -> Connection:
        """See `IConnectionPool`. The same `key` (any hashable) gets the same connection, until it is put away.

        Without a key every call gets another connection, and who loses it without putting it away has it closed.
        A key never collides with a thread. A connection that its user closed is replaced.
        """

    def putconn(conn: Connection | None = None, key: Hashable = None, close: bool = False) -> None:
        """See `IConnectionPool`. `close=True` closes the connection, and its place is free at once.

        With a key alone, its connection is put away; with a connection and a key, they must belong together.
        """

    def connection(key: Hashable = None) -> AbstractContextManager[Connection]:
        """See `IConnectionPool`. Without a key the block's connection belongs to the thread."""


class IPersistentConnectionPool(IConnectionPool):
    """A pool that gives each thread one connection, the same one until the thread puts it away."""

    def getconn() -> Connection:
        """See `IConnectionPool`. Never two connections for one thread."""

    def putconn(conn: Connection | None = None, close: bool = False) -> None:
        """See `IConnectionPool`. Puts the calling thread's connection away, which `conn` must be if it is given.

        `close=True` closes it, and its place is free at once.
        """

    def caller() -> Caller:
        """Return the calling thread as this pool knows it: opaque, for `putconn_of`."""

    def putconn_of(caller: Caller, close: bool = False) -> bool:
        """Put away what the thread `caller` holds, from any thread; return whether it held something.

        For whoever ends a thread's work on its behalf, while the thread itself does not use the connection.
        """


class IConnectionPoolFactory(Interface):
    """Makes pools; registered as a utility under the name of its kind: `simple`, `threaded`, `persistent`."""

    def __call__(minconn: int, maxconn: int, *args: Any, **kwargs: Any) -> IConnectionPool:
        """Return a new `IConnectionPool`. The arguments are those of `zpgpool.AbstractConnectionPool`."""


class IPoolEvent(Interface):
    """Something happened to a pool's connections. Told through `zope.event`, in the thread where it happened."""

    pool = Attribute("The `IConnectionPool`.")


class IConnectionOpened(IPoolEvent):
    """A connection was opened, and set up as configured."""

    backend_pid = Attribute("The process number of the server's side.")
    seconds = Attribute("How long that took.")


class IConnectionClosed(IPoolEvent):
    """A connection was closed, and its place is free. One per `IConnectionOpened`, whoever closed it.

    Except for a connection that an asynchronous exception lost between two bytecodes: that one is closed in silence.
    """

    backend_pid = Attribute("The process number that the server's side had.")
    reason = Attribute("Why, in a few words: `idle for too long`, `too old`, `the server has gone`, ...")


class IConnectFailed(IPoolEvent):
    """The server could not be reached, or refused a new connection."""

    error = Attribute("The `psycopg2.OperationalError`; it may name the host, the user and the database.")
    seconds = Attribute("How long the try took.")


class IRequestTimedOut(IPoolEvent):
    """Somebody waited for a connection as long as `timeout` allows, and got none."""

    seconds = Attribute("How long it waited.")
    error = Attribute("The `PoolTimeout` that it got; its message tells who held the connections.")


class IConnectionLeaked(IPoolEvent):
    """A connection is held for longer than `leak_after`. Told once for each time it is got."""

    holder = Attribute("Who holds it: a `zpgpool.caller.Holder`.")
