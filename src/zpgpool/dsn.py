"""Connection strings: checked before libpq reads them, and kept out of messages.

Knows libpq, and no pool.
"""

from __future__ import annotations

import os
import re
from typing import Any
from typing import TypeAlias
from typing import TypeVar

import psycopg2
from psycopg2.extensions import make_dsn
from psycopg2.extensions import parse_dsn

from .errors import SettingError


#: Options and keywords by their names: which has which type, `settings.TABLE` and libpq know, and no type checker.
Options: TypeAlias = dict[str, Any]

Given = TypeVar("Given")


def is_libpq_keyword(name: str) -> bool:
    """Whether libpq knows `name` as part of a connection string (PostgreSQL documentation, section 32.1.2)."""
    try:
        make_dsn(**{name: "x"})
    except (psycopg2.ProgrammingError, TypeError):
        return False
    return True


def read_environment(dsn: Given) -> Given | str:
    """Return `dsn`, or, where it is `ENV:NAME`, what the environment has under NAME.

    Raises SettingError when the environment has nothing there.
    """
    if not isinstance(dsn, str) or not dsn.startswith("ENV:"):
        return dsn
    name = dsn.removeprefix("ENV:").strip()
    if not os.environ.get(name):
        raise SettingError(f"option 'dsn': the environment has no variable {name!r}")
    return os.environ[name]


def check_dsn(dsn: object) -> None:
    """Raise SettingError when libpq cannot read `dsn`, without showing any of it."""
    try:
        ports = parse_dsn(dsn).get("port", "")  # type: ignore[arg-type]  # it says itself what it cannot take
    except (psycopg2.Error, TypeError):
        ports = "none"
    if not re.fullmatch(r"[\d,]*", ports):
        raise SettingError("option 'dsn': libpq cannot read this connection string")
    # Of a password with a slash in it libpq takes a part for the port, of one with an @ for the host: its errors, and
    # our messages, would show that.
    if isinstance(dsn, str) and _is_misread(dsn):
        raise SettingError(
            "option 'dsn': this connection string is ambiguous: in a password an @ is written %40, a / is written %2F"
        )


def _is_misread(dsn: str) -> bool:
    """Whether `dsn` is a URI that libpq splits at an @ or / of the password (PostgreSQL documentation, 32.1.1.2)."""
    scheme, separator, rest = dsn.partition("://")
    if not separator or scheme.strip() not in ("postgresql", "postgres"):
        return False
    before_parameters = rest.partition("?")[0]
    authority, _, database = before_parameters.partition("/")
    return authority.count("@") > 1 or "@" in database


#: The parts of a connection string that tell where the server is, and which user connects.
PRIVATE = ("password", "user", "host", "hostaddr", "dbname", "service", "passfile", "sslpassword", "sslkey")

QUOTED = re.compile(r'"[^"]*"|«[^»]*»|»[^«]*«|„[^“]*“|\([0-9a-f.:]+\)')


def scrub(text: str, keywords: Options) -> str:
    """Return a message of libpq or the server without what `psycopg2.connect(**keywords)` told them.

    Without what they quote, too: the default of a part that is not given is quoted as well.
    """
    libpq = {
        name: value
        for name, value in keywords.items()
        if name not in ("connection_factory", "cursor_factory") and not callable(value)
    }
    try:
        parts = parse_dsn(make_dsn(**libpq))
    except (psycopg2.Error, TypeError):
        parts = {}
    values = {part for name in PRIVATE if name in parts for part in (parts[name], *parts[name].split(","))}
    for value in sorted(values - {""}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "***", text)
    return QUOTED.sub('"***"', text)


#: How long a connect may take to each host, in seconds, where the connection string does not say: one that the network
#: swallows would keep its slot for ever.
CONNECT_TIMEOUT = 10


def resolve(keywords: Options) -> dict[str, object]:
    """Return what `psycopg2.connect()` gets now: what a `dsn` or `password` that is callable returns, and a timeout."""
    resolved = dict(keywords)
    if callable(given := resolved.get("dsn")):
        del resolved["dsn"]
        given = given()
        resolved |= {"dsn": given} if isinstance(given, str) else given
    if callable(password := resolved.get("password")):
        resolved["password"] = password()
    if "connect_timeout" not in resolved and "PGCONNECT_TIMEOUT" not in os.environ:
        known = {**parse_dsn(resolved.get("dsn") or ""), **resolved}
        if "connect_timeout" not in known and "service" not in known:
            resolved["connect_timeout"] = CONNECT_TIMEOUT
    return resolved
