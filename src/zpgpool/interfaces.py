"""The contracts: what can be relied on in every implementation.

`IConnectionPool` is for users. The middleware, the data manager, the status page and the metrics work with any
pool that provides it. `IPoolManagement` is for administrators and pages: where a pool provides it, too, they show more.
`IPoolInternals` is the package's own.

Knows zope.interface only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zope.interface import Attribute
from zope.interface import Interface


if TYPE_CHECKING:
    from collections.abc import Hashable
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from psycopg2.extensions import connection as Connection

    from .types import Owner


class IConnectionPool(Interface):
    """A pool of psycopg2 connections.

    Registered as a utility under the pool's name. Times are in seconds of monotonic time. What a pool refuses raises
    `zpgpool.PoolError`, a subclass of `psycopg2.pool.PoolError`, and changes nothing. Everything may be called from any
    thread, except the methods of a `SimpleConnectionPool`.
    """

    name = Attribute("The pool's name in logs and messages: text; made up (`pool-1`) where none was given.")
    minconn = Attribute("How many connections are kept open.")
    maxconn = Attribute("How many may be open, or being opened, at a time.")
    closed = Attribute("Whether the pool was closed.")

    def getconn(*, timeout: float | None = None) -> Connection:
        """Return a connection: alive, outside of a transaction, its session as configured.

        The one that the calling thread had before, if it is idle; else another idle one; else a new one, or one that
        is returned meanwhile, first come first served.

        timeout -- seconds that this call may take in all, whatever it waits for; by default the pool's setting. 0: it
            does not wait for other users, as in psycopg2, but for its own connect, as long as that takes.

        Raises `PoolTimeout` when none came free (its message lists the holders), `TooManyRequests` when
        `max_waiting` wait already, `PoolClosed`, or the `psycopg2.OperationalError` of the connect.
        """

    def putconn(conn: Connection, *, close: bool = False) -> None:
        """Return a connection: rolled back and with its session as configured it is idle, or it is closed.

        close -- close it in any case: its place is free at once.

        Never raises for what the server did. Raises `PoolError` for a connection that is not in use here.
        """

    def connection(*, timeout: float | None = None) -> AbstractContextManager[Connection]:
        """Return a context manager: `with pool.connection() as conn:` gets a connection, and returns it at the end.

        In nested blocks of one thread the connection is the same, and the outermost returns it. Nothing is committed:
        `conn.commit()` is the user's; what is not committed is rolled back.

        timeout -- as of `getconn`.
        """

    def checkout(conn: Connection | None = None) -> ICheckout:
        """Return a checkout of a connection, for a use that ends in another thread, or at another time.

        conn -- one that is in use, and that only the checkout returns from now on; by default another one, got as by
            `getconn`.
        """

    def open() -> None:
        """Begin to open `minconn` connections, of a pool that was made with `open=False`. Does not wait for them."""

    def wait(timeout: float = 30.0) -> None:
        """Wait until `minconn` connections are open, and at least one, for so many seconds: a start that fails fast.

        Raises `PoolTimeout`, whose `__cause__` is the error of the last connect.
        """

    def prune() -> None:
        """Close the connections that are idle for more than `idle_timeout`, and open new ones up to `minconn`.

        Raises the `psycopg2.OperationalError` of a connect that failed.
        """

    def closeall() -> None:
        """Close all connections, those in use included, and the pool; in bounded time, even during queries.

        Afterwards getconn, putconn, prune and closeall raise `PoolClosed`.
        """

    def close(timeout: float = 5.0) -> None:
        """Refuse new users, give those of now `timeout` seconds to finish, then do as `closeall`. May be repeated."""

    def get_stats() -> dict[str, int]:
        """Return counters and sizes, under psycopg_pool's names where the meaning is the same.

        Sizes: `pool_min`, `pool_max`, `pool_size` (open, or being opened), `pool_available` (idle),
        `requests_waiting`. Counters, which never go back: `requests_num` (connections asked for), `requests_queued`
        (that waited for one), `requests_wait_ms` (for how long in all), `requests_errors` (that got none),
        `returns_bad` (returned in a state that could not be made clean), `connections_num` (connects that have ended),
        `connections_ms` (how long those in all took that succeeded), `connections_errors` (that failed),
        `connections_lost` (connections found dead when they were idle).
        """


class ICheckout(Interface):
    """A connection in use by the owner of this object. If it is dropped without `putconn`, the connection is closed."""

    conn = Attribute("The psycopg2 connection.")

    def putconn(close: bool = False) -> None:
        """Return the connection, from any thread, as `putconn` of the pool does. May be repeated."""


class IKeyedConnectionPool(IConnectionPool):
    """A pool whose users may name their connections by keys, as in `psycopg2.pool`."""

    def getconn(key: Hashable = None, *, timeout: float | None = None) -> Connection:
        """See `IConnectionPool`. The same `key` (any hashable) gets the same connection, until it is returned.

        Without a key every call gets another connection, and one that its users have lost is closed. A key never
        collides with a thread. A connection that its user closed is replaced.
        """

    def putconn(conn: Connection | None = None, key: Hashable = None, close: bool = False) -> None:
        """See `IConnectionPool`. With a key alone, its connection is returned; with both, they must belong together."""

    def connection(key: Hashable = None, *, timeout: float | None = None) -> AbstractContextManager[Connection]:
        """See `IConnectionPool`. Without a key the block's connection belongs to the thread."""


class IPersistentConnectionPool(IConnectionPool):
    """A pool that gives each thread one connection, the same one until the thread returns it."""

    def getconn(*, timeout: float | None = None) -> Connection:
        """See `IConnectionPool`. Never two connections for one thread."""

    def putconn(conn: Connection | None = None, close: bool = False) -> None:
        """See `IConnectionPool`. Returns the calling thread's connection, which `conn` must be if it is given."""

    def owner() -> Owner:
        """Return the calling thread as this pool knows it: opaque, for `connection_of` and `putconn_of`."""

    def connection_of(owner: Owner) -> Connection | None:
        """Return the connection that the thread `owner` has, from any thread.

        None when it has none, or a checkout returns it.
        """

    def putconn_of(owner: Owner, close: bool = False) -> bool:
        """Return the connection of the thread `owner` to the pool, from any thread; say whether it had one.

        For code that ends a thread's work on its behalf, while the thread itself does not use the connection.
        """


class IConnectionPoolFactory(Interface):
    """Makes pools; registered as a utility under the name of its kind: `simple`, `threaded`, `persistent`."""

    def __call__(minconn: int, maxconn: int, *args: object, **kwargs: object) -> IConnectionPool:
        """Return a new `IConnectionPool`. The arguments are those of `zpgpool.AbstractConnectionPool`."""


class IPoolManagement(Interface):
    """What administrators, and the pages for them, do with a pool and see of it."""

    last_connect_error = Attribute("The error of the last connect, a `psycopg2.Error`; None when that succeeded.")
    outage_seconds = Attribute("For how long the server cannot be reached; None while it can, as far as is known.")
    settings = Attribute("The `zpgpool.settings.PoolSettings`; they cannot be changed.")

    def holders() -> Sequence[IHolder]:
        """Return the current holders of connections."""

    def waiters() -> Sequence[IWaiter]:
        """Return the requests that wait for a connection now, the next one first."""

    def cancel(conn: Connection, timeout: float = 1.0) -> bool:
        """Ask the server to cancel the query that runs on `conn`, which is in use; return whether it was asked.

        timeout -- seconds to wait until the server has been told; 0: it is told soon.

        From any thread. The thread that waits for the query gets `psycopg2.errors.QueryCanceled`. The
        connection is closed when it is returned: so no other user's query is cancelled.
        """

    def detach(conn: Connection) -> None:
        """Take a connection that is in use out of the pool, for good: there is room for another one.

        `conn` stays open, as it is, and belongs to the caller, who closes it. From any thread; in a persistent pool
        from the one that has it. Not for the connection that the middleware gives a request. Raises `PoolError` for a
        connection that is not in use here, or that a checkout has: a transaction's, for one.
        """

    def drain() -> None:
        """Replace every connection: idle ones are closed now, the others when they are returned."""

    def resize(minconn: int, maxconn: int) -> None:
        """Change the limits. Raises ValueError as the constructor does."""


class IHolder(Interface):
    """The holder of a connection: a snapshot."""

    thread = Attribute("The thread's name.")
    seconds = Attribute("For how long.")
    status = Attribute("`idle`, `in a query`, `in a transaction`, `in a failed transaction`, `returning`, ...")
    backend_pid = Attribute("The process number of the server's side; 0 where it is not known.")
    request = Attribute("What the thread works on: a method and path, or a task's name; may be empty.")
    line = Attribute("The source line that the thread is at: `file:number in function`.")


class IWaiter(Interface):
    """A request that waits for a connection: a snapshot."""

    thread = Attribute("The thread's name.")
    seconds = Attribute("For how long.")
    request = Attribute("What the thread works on: a method and path, or a task's name; may be empty.")
    line = Attribute("The source line that the thread is at: `file:number in function`.")


class IMaintained(Interface):
    """What the timer needs."""

    def run_maintenance(now: float) -> float | None:
        """Do what is due at `now`, and return when to come again (monotonic seconds); None: never."""


class IPoolInternals(IMaintained):
    """What the package's own parts use of a pool beyond that. May change with any release."""

    def observe(observer: IObserver) -> None:
        """Tell `observer` from now on what `IObserver` lists. A return takes some microseconds more with that."""

    def backend_pids() -> Sequence[int]:
        """Return the process numbers of the server's side of all connections: in use, idle, or being closed."""

    def open_connection(**keywords: object) -> Connection:
        """Return a new connection to the pool's server that is none of the pool's, with `keywords` of libpq on top.

        For a look from outside: the caller closes it.
        """

    def scrub(text: str) -> str:
        """Return the message of an error of a connect without what it tells of the connection string."""

    def take_for_reading(key: Hashable = None) -> None:
        """Check out for `key`, or for the thread, what rests with autocommit on, if something does: see `getconn`.

        Call `getconn` next: it returns that one. A caller that needs autocommit off calls `getconn` only.
        """

    def check_process() -> None:
        """Notice that the process was forked by C code, which does not call Python's hooks."""

    def serve_readers(timeout: float) -> None:
        """Be a replica's pool: sessions are read-only, whatever server they find, and a checkout waits so long at most.

        timeout -- in seconds. A setting `timeout` that is longer, or 0, which has no limit for a connect, becomes this.

        Raises SettingError where a session cannot be read-only, behind a pooler.
        """

    def longest_use(now: float) -> float:
        """Return for how long a connection is in use, or being returned, at `now`: the longest one, in seconds."""

    def hang_up() -> None:
        """End the sockets of all connections in use: what waits there for a silent server gets an error."""

    def forgo_timer() -> None:
        """Start no timer: this process serves one request, and ends."""

    def adopt_name(name: str) -> None:
        """Take the name under which the pool is registered, unless it was given one of its own."""


class IObserver(Interface):
    """Is told by a pool what is too frequent for events. Must neither block nor raise."""

    def waited(seconds: float) -> None:
        """A checkout has waited in the queue for so long, with or without success."""

    def used(seconds: float) -> None:
        """A connection was returned after so long a use."""

    def maintain(now: float) -> float:
        """Do what is due in a round of the pool's timer at `now`; return when there should be another one."""

    def forget() -> None:
        """Begin again: in a forked child nothing of the pool's has happened yet."""


class IPoolEvent(Interface):
    """Something happened to a pool's connections. Told through `zope.event`, in the thread where it happened."""

    pool = Attribute("The `IConnectionPool`.")


class IConnectionOpened(IPoolEvent):
    """A connection was opened, and set up as configured."""

    backend_pid = Attribute("The process number of the server's side.")
    seconds = Attribute("How long that took.")


class IConnectionClosed(IPoolEvent):
    """A connection was closed, and its place is free. One per `IConnectionOpened`, whatever closed it.

    Except for a connection that an asynchronous exception lost between two bytecodes: that one is closed in silence.
    """

    backend_pid = Attribute("The process number that the server's side had.")
    reason = Attribute("Why, in a few words: `idle for too long`, `too old`, `the server has gone`, ...")


class IConnectFailed(IPoolEvent):
    """The server could not be reached, or refused a new connection."""

    error = Attribute("The `psycopg2.OperationalError`; it may name the host, the user and the database.")
    seconds = Attribute("How long the try took.")


class IOutageBegan(IPoolEvent):
    """The server cannot be reached, or does not take connections: it is down, or starts, stops or recovers."""

    error = Attribute("The `psycopg2.OperationalError` of the connect; it may name host, user and database.")


class IOutageEnded(IPoolEvent):
    """The server takes connections again."""

    seconds = Attribute("How long it did not.")
    waiting = Attribute("How many wait for a connection now.")


class IRequestTimedOut(IPoolEvent):
    """A checkout has waited for a connection for the whole `timeout`, and got none."""

    seconds = Attribute("How long it waited.")
    error = Attribute("The `PoolTimeout` that it got; its message lists the holders of the connections.")


class IRequestRefused(IPoolEvent):
    """A checkout got no connection, because `max_waiting` others wait for one already."""

    error = Attribute("The `TooManyRequests` that it got; its message lists the holders of a moment ago.")


class IConnectionLeaked(IPoolEvent):
    """A connection is held for longer than `leak_after`. Told once for each time it is got."""

    holder = Attribute("The holder: an `IHolder`.")
