"""What is to be seen of pools at a moment, as plain data: for the page, for JSON, for the terminal.

Takes no pooled connection: the server is asked over one of its own, for a short time.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from datetime import timezone
from time import monotonic
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING
from typing import TypeAlias
from typing import TypeGuard

from zope.component import getGlobalSiteManager
from zope.interface.interface import InterfaceClass
from zope.interface.registry import Components

from ..core import lag_of
from ..core import NoAnswer
from ..core import query
from ..errors import one_line
from ..interfaces import IConnectionPool
from ..interfaces import IHolder
from ..interfaces import IPoolInternals
from ..interfaces import IPoolManagement
from ..interfaces import IWaiter
from .history import history_of
from .history import waiters_of


if TYPE_CHECKING:
    from ..types import ObservedPool
    from ..types import Pool


#: An object of the JSON. What is in it, docs/site.rst lists, `site.fits` checks where it comes from outside, and a test
#: holds to; a class for each would say it a fourth time.
Json: TypeAlias = dict[str, Any]


#: How long the servers of all pools together may be asked, in seconds; a statement there takes half of that at most.
LOOK = 2.0

#: How long, where nobody holds a connection, in seconds: the page is to be there within half a second even where a
#: process and the server are silent both.
BRIEF = 0.2

#: A session as young as that, in seconds, may belong to a process that told of its connections before it was opened:
#: longer than a peer's answer takes (`remote.DEADLINE`), is shown again (`remote.FRESH`), and the server is asked.
YOUNG = 5.0

#: How many characters of a text of somebody else's are shown.
LONGEST = 300

#: SET LOCAL holds to the end of the string, which the server takes for one transaction.
ACTIVITY = """
SET LOCAL statement_timeout = '1s';
SELECT pid, pid = pg_backend_pid(), pg_postmaster_start_time()::text, application_name, state, wait_event_type,
       wait_event, extract(epoch FROM clock_timestamp() - query_start)::float8,
       CASE WHEN wait_event_type = 'Lock' AND pid = ANY(%(held)s) THEN pg_blocking_pids(pid) END,
       CASE WHEN %(show_sql)s THEN query END,
       host(client_addr), extract(epoch FROM clock_timestamp() - state_change)::float8,
       extract(epoch FROM clock_timestamp() - backend_start)::float8
FROM pg_stat_activity WHERE pid = ANY(%(held)s) OR pid = pg_backend_pid() OR (
    %(is_site)s AND pid <> ALL(%(known)s) AND backend_type = 'client backend' AND datname = current_database()
    AND clock_timestamp() - backend_start > %(young)s * interval '1 second'
    AND (usename = session_user OR application_name IN (
        SELECT application_name FROM pg_stat_activity WHERE pid = ANY(%(known)s) AND application_name <> '')))
"""

SERVER_COLUMNS = ("application_name", "state", "wait_event_type", "wait_event", "seconds", "blocked_by", "query")


class Look(NamedTuple):
    """What a server says: when it was started, of the holders' sessions, and of those that the pool does not know."""

    server: str
    sessions: dict[int, Json]
    others: list[Json]


def list_pools(registry: Components | None = None) -> list[tuple[str, Pool]]:
    """Return the registered pools by their names."""
    registry = getGlobalSiteManager() if registry is None else registry
    pools = registry.getUtilitiesFor(IConnectionPool)
    # Some that look at this cannot encode half of a surrogate pair.
    return sorted(((name.encode(errors="replace").decode(), pool) for name, pool in pools), key=lambda each: each[0])


def take(pools: Iterable[tuple[str, Pool]], now: float, show_sql: bool = False) -> Json:
    """Return what is to be seen of `pools`, (name, pool) pairs, at `now` (monotonic seconds): numbers, text, None.

    show_sql -- with the text of the queries that the holders run.
    """
    pools = list(pools)
    seen = [describe(name, pool, now) for name, pool in pools]
    join_server(seen, [pool for _, pool in pools], show_sql)
    return {"at": time_of_day(), "process": os.getpid(), "pools": seen}


def time_of_day() -> str:
    """Return what time it is, for a snapshot."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe(name: str, pool: Pool, now: float) -> Json:
    """Return what is to be seen of a pool without asking its server: each holder's `server` is None."""
    history = history_of(pool)
    history.maintain(now)
    stats = pool.get_stats()
    holders = [_plain(holder, IHolder) for holder in pool.holders()] if IPoolManagement.providedBy(pool) else []
    for holder in holders:
        holder["server"] = None
    waiters = [_plain(waiter, IWaiter) for waiter in waiters_of(pool)]
    for each in (*holders, *waiters):
        each.update({key: readable(value) for key, value in each.items() if isinstance(value, str)})
    lag = None if pool.closed else lag_of(pool)
    return {
        "name": readable(name),
        "kind": type(pool).__name__,
        "is_closed": pool.closed,
        "max": stats["pool_max"],
        "min": stats["pool_min"],
        "size": stats["pool_size"],
        "idle": stats["pool_available"],
        "used": max(0, stats["pool_size"] - stats["pool_available"]),
        "waiting": len(waiters),
        "last_connect_error": _connect_error(pool),
        "outage_seconds": pool.outage_seconds if not pool.closed and IPoolManagement.providedBy(pool) else None,
        "server_note": "",
        "backends": list(pool.backend_pids()) if IPoolInternals.providedBy(pool) else None,
        "lag": lag and {**(shown := lag.show(now)), "trouble": readable(str(shown["trouble"]))},
        "holders": sorted(holders, key=lambda each: -each["seconds"]),
        "waiters": waiters,
        "incidents": [
            {
                "at": datetime.fromtimestamp(incident.at, timezone.utc).isoformat(timespec="seconds"),
                "kind": incident.kind,
                "text": readable(incident.text, 4 * LONGEST),
                "count": incident.count,
            }
            for incident in reversed(history.incidents)
        ],
        "samples": [
            {"ago": now - at, "used": used, "idle": idle, "waiting": waiting, "wait": wait, "lag": behind}
            for at, used, idle, waiting, wait, behind in list(history.samples)
        ],
        "stats": stats,
    }


def _plain(report: object, interface: InterfaceClass) -> Json:
    return {name: getattr(report, name) for name in interface}


def readable(text: str, most: int = LONGEST) -> str:
    """Return text of somebody else's fit for a page or a terminal: short, decoded, without control characters."""
    with suppress(UnicodeError):
        text = text.encode("latin-1").decode()  # as WSGI has what the client sent (PEP 3333, "Unicode Issues")
    shown = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text[:most])
    return shown if len(text) <= most else f"{shown}…"


# The server ----------------------------------------------------------------------------------------------------------


def _has_server(pool: Pool) -> TypeGuard[ObservedPool]:
    return not pool.closed and bool(IPoolInternals.providedBy(pool))


def _connect_error(pool: Pool) -> str:
    if _has_server(pool) and (error := pool.last_connect_error):
        return readable(pool.scrub(one_line(error)))
    return ""


def join_server(
    seen: Sequence[Json], pools: Iterable[Pool | None], show_sql: bool = False, is_site: bool = False
) -> list[Json] | None:
    """Add to each holder what the server says of its backend, or to the pool's `server_note` why that is missing.

    pools -- for each of `seen` the pool whose server is asked; None where there is no such pool here.
    is_site -- whether `seen` is of all processes: then return the sessions that none of them knows, as `find_unknown`.
    """
    start = monotonic()
    looks: list[Look | None] = []
    for each, pool in zip(seen, pools, strict=True):
        looks.append(None)
        pids = [holder["backend_pid"] for holder in each["holders"] if holder["backend_pid"]]
        if not pids and (not is_site or each["last_connect_error"]):
            continue
        try:
            if pool is None:
                raise NoAnswer("the process that was asked has no such pool")
            if _has_server(pool):
                known = each["backends"] if is_site else None
                looks[-1] = ask_server(pool, pids, start + (LOOK if pids else BRIEF), show_sql, known)
        except NoAnswer as error:
            each["server_note"] = readable(str(error)) if pids else ""
        if (look := looks[-1]) is not None:
            for holder in each["holders"]:
                holder["server"] = look.sessions.get(holder["backend_pid"])
    return find_unknown(seen, looks) if is_site else None


def ask_server(
    pool: ObservedPool,
    held: Collection[int],
    until: float,
    show_sql: bool = False,
    known: Collection[int] | None = None,
) -> Look:
    """Return what pg_stat_activity has of these backends, over a connection of its own that is closed again.

    known -- the backends that the site's processes have in this pool; if given, return the others in its database, too,
        that have the pool's role, or the application name of one of these.

    Raises NoAnswer, at `until` (monotonic seconds) at the latest.
    """
    args = {"held": list(held), "show_sql": show_sql, "is_site": known is not None, "known": list(known or ())}
    args["young"] = YOUNG
    rows, own_pid = query(pool, "zpgpool status", ACTIVITY, args, until)
    if own_pid not in [pid for pid, is_own, *_ in rows if is_own]:
        raise NoAnswer("a pooler is in between: the server knows these backends by other numbers")
    look, ours = Look(rows[0][2], {}, []), {*held, own_pid}
    for pid, _, _, *values in rows:
        *server, client, idle, age = (readable(each) if isinstance(each, str) else each for each in values)
        look.sessions[pid] = dict(zip(SERVER_COLUMNS, server, strict=True))
        if pid not in ours:
            session = {key: value for key, value in look.sessions[pid].items() if key != "blocked_by"}
            look.others.append({**session, "backend_pid": pid, "client": client or "", "seconds": idle, "age": age})
    return look


def find_unknown(seen: Sequence[Json], looks: Sequence[Look | None]) -> list[Json] | None:
    """Return the sessions that no process of the site knows, the oldest first; None where nobody can tell.

    looks -- for each of `seen` what its server says, or None.
    """
    if not any(looks) or any(each["backends"] is None for each in seen):
        return None
    found: dict[tuple[str, int], Json] = {}
    for each, look in zip(seen, looks, strict=True):
        if look is None:
            continue
        # Other pools may have sessions of the same role there, those included whose server is not known.
        of_server = [pool for pool, its in zip(seen, looks, strict=True) if its is None or its.server == look.server]
        known = {pid for pool in of_server for pid in pool["backends"]}
        for session in look.others:
            if session["backend_pid"] not in known:
                found.setdefault((look.server, session["backend_pid"]), {**session, "pool": each["name"]})
    return sorted(found.values(), key=lambda session: -session["age"])
