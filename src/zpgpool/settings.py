"""The settings of a pool: one table for all who read them (keywords, ini files, ZCML, the command line, the docs).

Knows nothing of the front ends. A value may come as text (from a file) or as itself (from Python); what is refused is
refused with the name of the option, never with the text of a connection string.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from importlib import import_module
from typing import Any
from typing import Literal

from psycopg2.extensions import connection as Connection

from .dsn import check_dsn
from .dsn import is_libpq_keyword
from .dsn import Options as Options
from .dsn import read_environment
from .errors import SettingError as SettingError


NOTHING = ("", "none")


def is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in NOTHING)


def number(value: object) -> float:
    """Return a finite number, 0 or more."""
    result = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            result = float(value)
        except (ValueError, OverflowError):
            pass
    if not (math.isfinite(result) and result >= 0):
        raise ValueError("a number, 0 or more")
    return result


def interval(value: object) -> float:
    """Return a finite number above 0."""
    try:
        result = number(value)
    except ValueError:
        result = 0.0
    if result == 0:
        raise ValueError("a number above 0")
    return result


def count(value: object) -> int:
    """Return a whole number, 0 or more."""
    try:
        result = number(value)
    except ValueError:
        result = 0.5
    if not result.is_integer():
        raise ValueError("a whole number, 0 or more")
    return int(result)


def flag(value: object) -> bool:
    """Return a truth value."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    result = words.get(str(value).strip().lower())
    if result is None:
        raise ValueError("true or false")
    return result


def text(value: object) -> str:
    """Return text."""
    if not isinstance(value, str):
        raise ValueError("text")
    return value


LEVELS = ("read uncommitted", "read committed", "repeatable read", "serializable")


def level(value: object) -> str:
    """Return the name of an isolation level as SQL has it."""
    result = str(value).strip().lower().replace("-", " ").replace("_", " ")
    if result not in LEVELS:
        raise ValueError(f"one of {', '.join(LEVELS)}")
    return result.upper()


POOLERS = ("pgbouncer-session", "pgbouncer-transaction")


def pooler(value: object) -> str:
    """Return what stands between the pool and the server."""
    if value not in POOLERS:
        raise ValueError(f"one of {', '.join(POOLERS)}")
    return str(value)


def hook(value: object) -> Callable[..., object]:
    """Return a callable, given itself or by its dotted name: `package.module:function`, or with a dot there."""
    if isinstance(value, str):
        module, _, attribute = value.strip().replace(":", ".").rpartition(".")
        try:
            value = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"a dotted name that can be imported ({error})") from None
    if not callable(value):
        raise ValueError("a callable, or its dotted name")
    return value


def when_to_commit(value: object) -> bool | str:
    """Return a truth value, or "safe"."""
    if isinstance(value, str) and value.strip().lower() == "safe":
        return "safe"
    try:
        return flag(value)
    except ValueError:
        raise ValueError("true, false or safe") from None


def reset_hook(value: object) -> object:
    """Return "discard", or a callable."""
    if value == "discard":
        return value
    try:
        return hook(value)
    except ValueError as error:
        raise ValueError(f"'discard', or {error}") from None


def optional(convert: Callable[[object], object]) -> Callable[[object], object]:
    """Return a converter that knows None, too (in files: `none`, or nothing)."""

    def convert_or_none(value: object) -> object:
        if is_nothing(value):
            return None
        try:
            return convert(value)
        except ValueError as error:
            raise ValueError(f"{error}, or none") from None

    return convert_or_none


Reset = Literal["discard"] | Callable[[Connection], object] | None


def row(convert: Callable[[object], object], default: object, unit: str, help: str, *, in_files: object = ...) -> Any:
    """Return a row of the table.

    `convert` takes text or a value and returns the value, or raises ValueError saying what it expects; `default` is
    for Python, `in_files` for the front ends, where that differs.
    """
    in_files = default if in_files is ... else in_files
    return field(
        default=default, metadata={"convert": convert, "in_files": in_files, "unit": unit, "help": help}, kw_only=True
    )


@dataclass(frozen=True)
class PoolSettings:
    """The settings of one pool, which cannot be changed. Raises SettingError for a value that cannot be."""

    minconn: int = row(count, ..., "connections", "opened at the start, and kept open", in_files=0)
    maxconn: int = row(count, ..., "connections", "never more than these are open or being opened", in_files=10)
    idle_timeout: float | None = row(
        optional(number),
        0.0,
        "seconds",
        "how long an idle connection is kept; 0: not at all, beyond minconn; none: for ever",
        in_files=600.0,
    )
    timeout: float = row(
        number, 0.0, "seconds", "longest wait of a getconn() in all; 0: raise the error at once", in_files=30.0
    )
    max_waiting: int | None = row(
        optional(count),
        None,
        "threads",
        "how many threads may wait at a time; further ones get TooManyRequests at once",
    )
    outage_wait: float = row(
        number,
        0.0,
        "seconds",
        "how long getconn() waits for a server that is down, from the outage's beginning; 0: raise the error at once",
        in_files=10.0,
    )
    max_lifetime: float | None = row(
        optional(interval),
        None,
        "seconds",
        "how long a connection is used before a new one takes its place; up to 5 % less, at random",
        in_files=3600.0,
    )
    check: Callable[[Connection], object] | None = row(
        optional(hook),
        None,
        "callable",
        "called with each idle connection before a user gets it; raises an error when the connection is unusable",
    )
    check_idle: float | None = row(
        optional(number),
        1.0,
        "seconds",
        "a connection that was idle for longer must answer a ping; none: only its socket is checked",
    )
    configure: Callable[[Connection], object] | None = row(
        optional(hook), None, "callable", "called with each new connection, to set up its session"
    )
    reset: Reset = row(
        optional(reset_hook),
        None,
        "discard or callable",
        "called with a returned connection after the rollback; discard: DISCARD ALL",
    )
    autocommit: bool | Literal["safe"] | None = row(
        optional(when_to_commit),
        None,
        "true, false or safe",
        "autocommit of each session; safe: on for requests of safe methods (GET, HEAD, OPTIONS) only",
    )
    isolation_level: str | None = row(optional(level), None, "name", "isolation level of each session")
    readonly: bool | None = row(optional(flag), None, "true or false", "make each session read-only")
    pooler: str | None = row(
        optional(pooler), None, "name", "pooler in front of the server; incompatible settings are rejected"
    )
    twophase: bool = row(
        flag, False, "true or false", "transactions joined by zpgpool.datamanager commit in two phases (PREPARE)"
    )
    verify_commit: bool = row(
        flag,
        False,
        "true or false",
        "ask the server what became of a COMMIT whose answer was lost; one round trip more for each transaction",
    )
    replica: str = row(
        text, "", "name", "the pool of a standby, from which requests of safe methods (GET, HEAD, OPTIONS) read"
    )
    primary_after_write: float = row(
        number,
        5.0,
        "seconds",
        "with replica: after a write, serve that client's reads from here for this long; 0: not at all",
    )
    max_lag: float | None = row(
        optional(number),
        3.0,
        "seconds",
        "with replica: skip it while it is further behind; none: never skip it for that",
    )
    prune_interval: float = row(interval, 30.0, "seconds", "longest time between two rounds of maintenance")
    leak_after: float | None = row(
        optional(interval),
        None,
        "seconds",
        "log a warning when a connection is held this long: thread, request, source line",
    )
    hold_limit: float | None = row(
        optional(interval), None, "seconds", "cancel the query and close the connection when it is held this long"
    )
    name: str = row(text, "", "text", "the pool's name in messages, and by which code asks for it")

    def __post_init__(self) -> None:
        for name in TABLE:
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        check_sizes(self.minconn, self.maxconn)
        if self.twophase and self.autocommit is True:
            raise SettingError("option 'twophase' cannot be kept with option 'autocommit': there is no transaction")
        if self.replica and self.replica == self.name:
            raise SettingError(f"option 'replica': {self.name!r} is this pool itself")
        self._check_pooler()

    @property
    def refuses_writes(self) -> bool:
        """Whether the server itself shall refuse writes: not where its sessions are other clients' too."""
        return bool(self.readonly) and self.pooler != "pgbouncer-transaction"

    def _check_pooler(self) -> None:
        """Refuse what a pooler makes untrue (PgBouncer documentation, "SQL feature map for pooling modes")."""
        refused = {}
        if self.pooler is not None:
            # The server's session is not the pool's: after a crash it would be unknown whose transaction is prepared.
            refused["twophase"] = self.twophase
        if self.pooler == "pgbouncer-transaction":
            # They would change whichever session of the server comes next, for its next user.
            refused["reset"] = self.reset == "discard"
            refused["isolation_level"] = bool(self.autocommit and self.isolation_level)
            refused["readonly"] = bool(self.autocommit and self.readonly is not None)
        for name, is_refused in refused.items():
            if is_refused:
                which = " with autocommit" if name in ("isolation_level", "readonly") else ""
                raise SettingError(f"option {name!r}{which} cannot be kept with option 'pooler' {self.pooler!r}")


TABLE = {each.name: each for each in fields(PoolSettings)}


def check_sizes(minconn: int, maxconn: int) -> None:
    """Raise SettingError for limits that no pool can keep."""
    if maxconn == 0 or minconn > maxconn:
        raise SettingError(f"maxconn must be 1 or more, and minconn not above it: got {minconn} and {maxconn}")


#: What `psycopg2.connect()` takes besides libpq's keywords.
CONNECT_KEYWORDS = ("dsn", "connection_factory", "cursor_factory")


def convert(name: str, value: object) -> Any:
    """Return the value of setting `name`. Raises SettingError."""
    return convert_with(TABLE[name].metadata["convert"], name, value)


def convert_with(convert: Callable[[object], object], name: str, value: object) -> Any:
    """Return what `convert` makes of the value of option `name`. Raises SettingError."""
    try:
        return convert(value)
    except ValueError as error:
        raise SettingError(f"option {name!r}: expected {error}, got {value!r}") from None


def sort_keywords(args: tuple[object, ...], keywords: Options) -> tuple[Options, Options]:
    """Sort what a pool is constructed with: its own options, and the keywords that go to `psycopg2.connect()`.

    `args` are the first of CONNECT_KEYWORDS. Raises SettingError for an unknown keyword, and a connection
    string that libpq cannot read; TypeError for an argument too many, or given twice.
    """
    options = {name: value for name, value in keywords.items() if name in TABLE}
    connect = {name: value for name, value in keywords.items() if name not in TABLE}
    strange = [name for name in connect if name not in CONNECT_KEYWORDS and not is_libpq_keyword(name)]
    if strange:
        raise unknown(strange, {*TABLE, *CONNECT_KEYWORDS, "open"})
    by_place = dict(zip(CONNECT_KEYWORDS, args, strict=False))
    if len(args) > len(CONNECT_KEYWORDS) or by_place.keys() & connect.keys():
        raise TypeError(f"psycopg2.connect() takes {CONNECT_KEYWORDS} by place, and each once")
    connect |= by_place
    if connect.get("dsn") is not None and not callable(connect["dsn"]):
        connect["dsn"] = read_environment(connect["dsn"])
        check_dsn(connect["dsn"])  # now: libpq's own error would quote a part of it
    return options, connect


def unknown(names: Collection[str], known: Collection[str]) -> SettingError:
    """Return the error for unknown options."""
    name = min(names)
    close = difflib.get_close_matches(name, known, 1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return SettingError(f"unknown option {name!r}{hint} ({list_known(known)})")


def list_known(names: Collection[str]) -> str:
    """Return what an error says of the options that there are."""
    return f"known: {', '.join(sorted(names))}, and libpq's connection keywords"


def read_options(options: Mapping[str, str], also_known: Collection[str] = ()) -> tuple[Options, Options]:
    """Sort a front end's text options into settings of the table, with its defaults, and libpq's connection keywords.

    `also_known` are the front end's own options: left out, but named among the known ones.
    Raises SettingError for an unknown name, a bad value, or a connection string that libpq cannot read.
    """
    libpq = {name: value for name, value in options.items() if name not in TABLE and name not in also_known}
    strange = [name for name in libpq if name != "dsn" and not is_libpq_keyword(name)]
    if strange:
        raise unknown(strange, {*TABLE, *also_known, "dsn"})
    if "dsn" in libpq:
        libpq["dsn"] = read_environment(libpq["dsn"])
        check_dsn(libpq["dsn"])
    settings = {name: convert(name, options.get(name, row.metadata["in_files"])) for name, row in TABLE.items()}
    check_sizes(settings["minconn"], settings["maxconn"])
    return settings, libpq
