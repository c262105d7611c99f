"""`zpgpool check`: whether a server and a fleet of pools fit together, line by line."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import closing
from time import monotonic
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING
from typing import TypeAlias

import psycopg2
from psycopg2.extensions import make_dsn
from psycopg2.extensions import parse_dsn

from .dsn import check_dsn
from .dsn import read_environment
from .errors import one_line
from .settings import SettingError
from .settings import TABLE


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    #: The row of `FACTS`: of texts, numbers and truths.
    Facts: TypeAlias = tuple[Any, ...]


#: How bad a line is: the worst one is the exit status.
OK, ADVICE, WRONG = range(3)
LEVELS = ("ok", "advice", "wrong")

#: How long the server may take to answer, in seconds, where the connection string does not say.
CONNECT = 5

#: The first version that says by itself when it has become a standby.
TELLS_DEMOTION = 140000

FACTS = """
SELECT current_setting('server_version'), pg_backend_pid(), pg_is_in_recovery(), rolsuper, rolconnlimit, datconnlimit,
       (SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datid IS NOT NULL)
FROM pg_roles, pg_database WHERE rolname = current_user AND datname = current_database()
"""


class Finding(NamedTuple):
    """A line of the report."""

    level: int
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{LEVELS[self.level]:7} {self.subject:36} {self.text}"


def size_pool(threads: int, processes: int, max_connections: int, reserved: int = 0) -> int:
    """Return the `maxconn` for the pool in each of `processes` processes with `threads` threads; 0: they do not fit.

    A thread uses one connection at a time, so more than `threads` are never in use. And when every thread of every
    process is busy, all of them together must find room on the server: `max_connections` less those that are
    `reserved`, for superusers and by others. With fewer than `threads` some wait, first come first served.
    """
    return max(0, min(threads, (max_connections - reserved) // processes))


def check(args: argparse.Namespace) -> int:
    """Print what is found, and return the worst level."""
    worst = OK
    for finding in examine(args.dsn, args.threads, args.processes, args.maxconn):
        print(finding, flush=True)
        worst = max(worst, finding.level)
    return worst


def examine(dsn: str, threads: int = 4, processes: int = 1, maxconn: int | None = None) -> Iterator[Finding]:
    """Yield what is found of the server at `dsn`, for `processes` processes that have `threads` threads each.

    maxconn -- of the pool in each process; by default as many as there are threads.
    """
    try:
        dsn = read_environment(dsn)
        check_dsn(dsn)
        parts = parse_dsn(dsn)
        start = monotonic()
        conn = psycopg2.connect(make_dsn(dsn, **({"connect_timeout": CONNECT} | parts)))
    except SettingError as error:
        yield Finding(WRONG, "connection string", str(error))
        return
    except psycopg2.OperationalError as error:
        yield Finding(WRONG, "reachable", one_line(error))
        return
    with closing(conn):
        yield Finding(OK, "reachable", f"within {(monotonic() - start) * 1000:.0f} ms")
        conn.autocommit = True
        facts, settings = _ask(conn)
        yield from _server(conn, facts)
        yield from _network(conn, parts)
        yield from _room(facts, settings, threads, processes, maxconn or threads)
        yield from _timeouts(settings)
        yield from _two_phase(settings, processes * (maxconn or threads))


def _ask(conn: Connection) -> tuple[Facts, dict[str, int]]:
    with conn.cursor() as cursor:
        cursor.execute(FACTS)
        facts = cursor.fetchall()[0]
        cursor.execute("SELECT name, setting::bigint FROM pg_settings WHERE vartype = 'integer'")
        return facts, dict(cursor.fetchall())


def _server(conn: Connection, facts: Facts) -> Iterator[Finding]:
    version, backend_pid, is_standby, is_superuser, *_ = facts
    if conn.info.server_version < TELLS_DEMOTION:
        yield Finding(ADVICE, "server", f"PostgreSQL {version}: only 14 and later say so when they become a standby")
    else:
        yield Finding(OK, "server", f"PostgreSQL {version}")
    # A pooler invents the numbers that it tells its clients; a server, and a proxy that only forwards, cannot.
    if conn.get_backend_pid() != backend_pid:
        yield Finding(
            ADVICE,
            "pooler",
            "one is in between: its limits (max_client_conn) count, too; in transaction mode sessions keep nothing, "
            "and the status page cannot join the server's side",
        )
    else:
        yield Finding(OK, "pooler", "none in between")
    if is_standby:
        yield Finding(ADVICE, "standby", "the server is a standby: nothing can be written here")
    if is_superuser:
        yield Finding(ADVICE, "role", "a superuser: an application needs less, and takes the reserved connections, too")
    else:
        yield Finding(OK, "role", "no superuser")


def _network(conn: Connection, parts: Mapping[str, str]) -> Iterator[Finding]:
    if _is_local(conn.info.host or ""):
        yield Finding(OK, "TLS", f"not needed: the server is on this machine{', but used' * conn.info.ssl_in_use}")
        return
    if not conn.info.ssl_in_use:
        yield Finding(ADVICE, "TLS", "not in use: passwords and data are open to the network; set sslmode=verify-full")
    elif parts.get("sslmode", "prefer") in ("allow", "prefer"):
        yield Finding(ADVICE, "TLS", "in use, but by chance: set sslmode=verify-full, or require at least")
    else:
        yield Finding(OK, "TLS", f"in use, sslmode={parts['sslmode']}")
    if parts.get("keepalives") != "0" and ("keepalives_idle" in parts or "tcp_user_timeout" in parts):
        yield Finding(OK, "keepalives", "set in the connection string")
    else:
        yield Finding(
            ADVICE,
            "keepalives",
            "left to the system, two hours as a rule: a query whose server vanished hangs for so long (check_idle "
            "looks at idle connections only); set keepalives_idle=60, or tcp_user_timeout",
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.startswith(("/", "@")) or host in ("", "localhost")


def _room(facts: Facts, settings: dict[str, int], threads: int, processes: int, maxconn: int) -> Iterator[Finding]:
    *_, role_limit, database_limit, others = facts
    reserved = settings["superuser_reserved_connections"] + settings.get("reserved_connections", 0)
    server = settings["max_connections"] - reserved
    limits = {
        f"max_connections {settings['max_connections']} less {reserved} reserved": server,
        "the role's connection limit": role_limit,
        "the database's connection limit": database_limit,
    }
    why, room = min(((why, limit) for why, limit in limits.items() if limit >= 0), key=lambda each: each[1])
    worst = processes * maxconn
    fleet = f"{processes} x {maxconn} = {worst} connections at worst, room for {room} ({why})"
    best = size_pool(threads, processes, room)
    if worst > room:
        yield Finding(WRONG, "max_connections", f"{fleet}: maxconn = {best} would fit" if best else f"{fleet}")
    elif worst + others > server:
        yield Finding(ADVICE, "max_connections", f"{fleet}, but {others} other sessions are there now")
    else:
        yield Finding(OK, "max_connections", fleet)
    if maxconn > threads:
        yield Finding(ADVICE, "maxconn", f"{maxconn}, but {threads} threads never use more than {threads} at a time")
    elif maxconn < threads:
        yield Finding(ADVICE, "maxconn", f"{maxconn} for {threads} threads: some wait when all are busy")
    else:
        yield Finding(OK, "maxconn", f"{maxconn}, one for each thread")


def _timeouts(settings: dict[str, int]) -> Iterator[Finding]:
    for name, danger in (
        ("idle_in_transaction_session_timeout", "a stuck request keeps its locks for ever; set some minutes"),
        ("statement_timeout", "a query may run, and hold its connection, for ever; set it for this role"),
    ):
        milliseconds = settings.get(name, 0)
        if milliseconds:
            yield Finding(OK, name, f"{milliseconds / 1000:g} s")
        else:
            yield Finding(ADVICE, name, f"off: {danger}")
    ends, rests = settings.get("idle_session_timeout", 0) / 1000, TABLE["idle_timeout"].metadata["in_files"]
    if 0 < ends <= rests:
        yield Finding(
            ADVICE,
            "idle_session_timeout",
            f"{ends:g} s: the server ends idle connections before the pool does; set idle_timeout below (it is "
            f"{rests:g} by default), and minconn = 0",
        )
    else:
        text = f"{ends:g} s, the pool's idle_timeout is {rests:g}" if ends else "off"
        yield Finding(OK, "idle_session_timeout", text)


def _two_phase(settings: dict[str, int], worst: int) -> Iterator[Finding]:
    most = settings["max_prepared_transactions"]
    if 0 < most < worst:
        text = f"{most}, but {worst} connections may prepare one at a time"
        yield Finding(ADVICE, "max_prepared_transactions", text)
    else:
        text = str(most) if most else "0: fine, unless twophase = true, which is refused then"
        yield Finding(OK, "max_prepared_transactions", text)
