"""The settings of a session: set up, watched for changes, compared and brought back, mostly without a round trip.

Knows nothing of pools.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from ..errors import PoolError
from ..settings import PoolSettings


#: psycopg2's own attribute; that of a watched connection says what the server does, too.
_OWN: Any = vars(Connection)["readonly"]

#: Set past what notes a change.
_AUTOCOMMIT: Any = vars(Connection)["autocommit"]

_attributes = attrgetter("status", "autocommit", "encoding", "cursor_factory", "isolation_level", "deferrable")


def session_of(conn: Connection) -> tuple[object, ...]:
    """Return what a transaction, and a user's own settings, change."""
    return *_attributes(conn), _OWN.__get__(conn)


#: The settings that `set_session()` takes; None leaves psycopg2's own.
SESSION = ("isolation_level", "readonly", "autocommit")


#: The attributes of ours that a watched connection has.
_SLOTS = ("is_touched", "refuses_writes")


class Watched(Connection):
    """Mixed into a connection class, behind the user's own: notes whether what `session_of` reads may have changed.

    To read and compare all that is a quarter of a checkout and return (docs/performance.rst), and few change it.
    A change is noted before it is made, in case it is interrupted, and again after it, in case another thread has
    compared the session meanwhile. Only `set_temporarily` has a note of its own.
    """

    __slots__ = ()

    #: False, True, or `_ONLY_AUTOCOMMIT`.
    is_touched: bool | str

    #: Whether the server was asked to refuse writes, in place of psycopg2: see `refuse_writes`.
    refuses_writes: bool

    @property
    def readonly(self) -> bool | None:
        """Whether transactions only read, as psycopg2 says it: None is the server's default."""
        own: bool | None = _OWN.__get__(self)
        return True if own is None and getattr(self, "refuses_writes", False) else own

    @readonly.setter
    def readonly(self, value: object) -> None:
        _OWN.__set__(self, value)

    def __setattr__(self, name: str, value: object) -> None:
        with Noted(self):
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        with Noted(self):
            super().__delattr__(name)

    def set_session(self, *args: object, **keywords: object) -> None:
        with Noted(self):
            super().set_session(*args, **keywords)  # type: ignore[arg-type]  # psycopg2 checks them

    def set_isolation_level(self, *args: object) -> None:
        with Noted(self):
            super().set_isolation_level(*args)  # type: ignore[arg-type]  # psycopg2 checks it

    def set_client_encoding(self, *args: object) -> None:
        with Noted(self):
            super().set_client_encoding(*args)  # type: ignore[arg-type]  # psycopg2 checks it

    def reset(self) -> None:
        with Noted(self):
            super().reset()


class Noted:
    """Notes a change of a watched connection: a class, for `contextlib.contextmanager` takes 0.9 µs more (measured)."""

    __slots__ = ("_conn",)

    def __init__(self, conn: Watched) -> None:
        self._conn = conn

    def __enter__(self) -> None:
        mark(self._conn, True)

    def __exit__(self, *exc_info: object) -> None:
        mark(self._conn, True)


def mark(conn: Connection, is_touched: bool | str) -> None:
    """Set the note, past a `__setattr__` of the user's."""
    Connection.__setattr__(conn, "is_touched", is_touched)


def _watch(factory: Any) -> Any:  # a class, of whatever metaclass
    names = {"__slots__": _SLOTS, "__module__": factory.__module__, "__doc__": factory.__doc__}
    return type(factory)(factory.__name__, (factory, Watched), names)


#: What psycopg2's own class becomes.
PLAIN: Any = type("connection", (Watched,), {"__slots__": _SLOTS, "__module__": Connection.__module__})


def watched(factory: Any) -> Any:  # whatever psycopg2 takes: a class, or a function
    """Return a class of connections like `factory`'s, watched; whatever cannot be watched comes back as it is.

    The class has the name of the user's own, and adds no `__dict__`.
    """
    if factory is Connection:
        return PLAIN
    if not issubclass(type(factory), type) or not issubclass(factory, Connection) or issubclass(factory, Watched):
        return factory
    try:
        return _watch(factory)
    except Exception:  # a metaclass, or __init_subclass__, that wants something else
        return factory


def is_touched(conn: Connection) -> bool:
    """Whether the session's settings may differ from what they were at `untouch`."""
    return bool(getattr(conn, "is_touched", True))


def untouch(conn: Connection) -> None:
    """Begin to watch: the session is now as every user shall find it."""
    if isinstance(conn, Watched):
        mark(conn, False)


#: What `autocommit = safe` sets for most requests, and the note that nothing else was changed.
_AUTOCOMMIT_ON = {"autocommit": True}
_ONLY_AUTOCOMMIT = "autocommit"


def set_temporarily(conn: Any, session: Mapping[str, Any]) -> None:
    """Set the session for one use, outside of a transaction; `session` is what `set_session()` takes."""
    # A user's own class may have a `set_session()` of its own, which is to be called.
    if session != _AUTOCOMMIT_ON or type(conn) is not PLAIN or conn.is_touched is True:
        conn.set_session(**session)
    elif not conn.autocommit:
        mark(conn, _ONLY_AUTOCOMMIT)  # first: an exception may come in between
        _AUTOCOMMIT.__set__(conn, True)
        if not conn.is_touched:  # psycopg2 has waited for another thread, which has returned the connection
            mark(conn, True)


def has_only_autocommit(conn: Connection, baseline: tuple[object, ...]) -> bool:
    """Whether `set_temporarily` has turned autocommit on, and nothing else has changed."""
    # With an isolation level, or such, psycopg2 sets the server's own as well.
    is_only = getattr(conn, "is_touched", True) == _ONLY_AUTOCOMMIT and baseline[4:] == (None, None, None)
    return is_only and conn.autocommit


def unset(conn: Connection, baseline: tuple[object, ...]) -> None:
    """Undo what `set_temporarily` did, if nothing else has changed. Otherwise `restore` does it."""
    if has_only_autocommit(conn, baseline):
        mark(conn, False)  # first: another thread that still has it may change it meanwhile
        _AUTOCOMMIT.__set__(conn, baseline[1])


def is_watched(conn: Connection) -> bool:
    """Whether changes of the session's settings are noted."""
    return isinstance(conn, Watched)


def is_at_end(conn: Connection) -> bool:
    """Whether the server has hung up on a connection that is open here. Reads what waits there, and does not wait."""
    try:
        for _ in range(2):  # the first read after the server's end may still succeed
            if conn.closed:
                return False
            conn.poll()
    except psycopg2.Error:
        return True
    return False


class Messages(list[object]):
    """Messages of the server for a connection's user: the first one marks the session as changed.

    In the place of psycopg2's own lists: to look into those at each return would take a tenth of it (measured).
    """

    __slots__ = ("_conn",)

    def __init__(self, conn: Connection) -> None:
        super().__init__()
        self._conn = weakref.ref(conn)

    def append(self, message: object) -> None:
        """Called by psycopg2."""
        super().append(message)
        conn = self._conn()
        if conn is not None and isinstance(conn, Watched):
            mark(conn, True)


def forget_messages(conn: Connection) -> None:
    """Leave the next user no messages of the server for this one."""
    for name in ("notices", "notifies"):
        messages = getattr(conn, name)
        if messages or type(messages) is not Messages:
            Connection.__setattr__(conn, name, Messages(conn))


def set_up(conn: Connection, settings: PoolSettings) -> None:
    """Give a new session, or one that was discarded, what is configured. Raises PoolError, and what psycopg2 does."""
    session = {name: getattr(settings, name) for name in SESSION}
    if session["autocommit"] == "safe":
        session["autocommit"] = None  # until a request of a safe method has it
    if settings.refuses_writes and isinstance(conn, Watched) and refuse_writes(conn):
        Connection.__setattr__(conn, "refuses_writes", True)
        session["readonly"] = None  # or psycopg2 sets the server's own back, each time when it leaves autocommit
    if any(value is not None for value in session.values()):
        conn.set_session(**session)
    if settings.configure is not None:
        settings.configure(conn)
        if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            raise PoolError(f"{settings.configure!r} left the connection in a transaction: it must commit")


def refuse_writes(conn: Connection) -> bool:
    """Have the server refuse writes by default; return whether it does. One round trip, outside of any transaction.

    psycopg2's own `readonly` goes with the BEGIN that it sends, and it sends none with autocommit. Behind a pooler,
    whose sessions have other numbers, nothing is changed: the session may be another client's next.
    """
    autocommit, conn.autocommit = conn.autocommit, True
    with conn.cursor(cursor_factory=cursor) as curs:
        curs.execute(
            "SELECT set_config('default_transaction_read_only', 'on', false) WHERE pg_backend_pid() = %s",
            (conn.get_backend_pid(),),
        )
        refuses = bool(curs.rowcount)
    conn.autocommit = autocommit
    return refuses


def does_refuse_writes(conn: Connection) -> bool:
    """Whether the server refuses writes by default, as PostgreSQL >= 14 reports by itself."""
    return not conn.closed and conn.get_parameter_status("default_transaction_read_only") == "on"


def only_reads(conn: Connection) -> bool:
    """Whether transactions are read-only by default: psycopg2's setting, or the server's."""
    return bool(_OWN.__get__(conn)) or does_refuse_writes(conn)


def is_demoted(conn: Connection) -> bool:
    """Ask the server, after an error, whether it takes no writes: a standby, or made read-only since the connect.

    Not whether this session, or its transaction, was made read-only by its user. Ends the transaction.
    """
    try:
        roll_back(conn)
        with conn.cursor(cursor_factory=cursor) as curs:
            curs.execute(
                "SELECT pg_is_in_recovery() OR reset_val = 'on' "
                "AND source NOT IN ('session', 'client', 'user', 'database', 'database user') "
                "FROM pg_settings WHERE name = 'default_transaction_read_only'"
            )
            [(is_demoted,)] = curs.fetchall()
        roll_back(conn)
    except psycopg2.Error:
        return False
    return bool(is_demoted)


def restore(conn: Any, baseline: tuple[object, ...], refuses_writes: bool) -> None:
    """Bring the settings back to `baseline`. Takes a round trip where the encoding was changed.

    refuses_writes -- whether the server shall refuse writes, by `refuse_writes`: where it does not, another round trip.
    """
    _, autocommit, encoding, cursor_factory, isolation_level, deferrable, readonly = baseline
    if conn.cursor_factory is not cursor_factory:
        conn.cursor_factory = cursor_factory
    is_kept = conn.encoding == encoding and (not refuses_writes or does_refuse_writes(conn))
    if is_kept and session_of(conn)[4:] == baseline[4:] == (None, None, None):
        conn.autocommit = autocommit  # what users change most: the rest takes 18 µs more
        return
    conn.autocommit = False
    conn.isolation_level = conn.readonly = conn.deferrable = None
    if refuses_writes and not does_refuse_writes(conn):
        refuse_writes(conn)
    conn.autocommit = autocommit
    # After it: what is set before, psycopg2 forgets with autocommit. Not None: for that it sets the server's default.
    for name, value in (("isolation_level", isolation_level), ("readonly", readonly), ("deferrable", deferrable)):
        if value is not None:
            setattr(conn, name, value)
    if conn.encoding != encoding:
        conn.set_client_encoding(encoding)


def roll_back(conn: Connection) -> None:
    """End the transaction, however it was begun."""
    try:
        conn.rollback()
    except psycopg2.ProgrammingError:
        conn.tpc_rollback()  # begun by tpc_begin(), where rollback() is refused
    if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
        # autocommit and a BEGIN of the user's own: psycopg2 believes that there is nothing to roll back.
        with conn.cursor(cursor_factory=cursor) as curs:
            curs.execute("ROLLBACK")


def check_two_phase(conn: Connection, title: str) -> None:
    """Raise PoolError where a prepared transaction cannot be, or could not be told of after a crash.

    Now rather than with the first commit (PostgreSQL documentation, "max_prepared_transactions"). What stands between
    us and the server has numbers of its own for its sessions: then it would be unknown, after a crash, whether the
    session that prepared a transaction is still there.
    """
    with conn.cursor(cursor_factory=cursor) as curs:
        curs.execute("SELECT current_setting('max_prepared_transactions')::int, pg_backend_pid()")
        most, pid = curs.fetchone() or (0, 0)
    conn.rollback()
    if most == 0:
        raise PoolError(
            f"{title} has twophase=True, but the server's max_prepared_transactions is 0: set it to at least the "
            "number of connections, in postgresql.conf, and restart the server"
        )
    if pid != conn.get_backend_pid():
        raise PoolError(
            f"{title} has twophase=True, but there is a pooler between it and the server: connect to the server itself"
        )
