"""What is to be seen of pools at a moment, as plain data: for the page, for JSON, for the terminal.

Takes no pooled connection: the server is asked over one of its own, for a short time.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from datetime import timezone
from time import monotonic
from typing import Any
from typing import TypeAlias

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


#: An object of the JSON. What is in it, docs/site.rst lists, `site.fits` checks where it comes from outside, and a test
#: holds to; a class for each would say it a fourth time.
Json: TypeAlias = dict[str, Any]


#: How long the servers of all pools together may be asked, in seconds; a statement there takes half of that at most.
LOOK = 2.0

#: How many characters of a text of somebody else's are shown.
LONGEST = 300

#: SET LOCAL holds to the end of the string, which the server takes for one transaction.
ACTIVITY = """
SET LOCAL statement_timeout = '1s';
SELECT pid, pid = pg_backend_pid(), application_name, state, wait_event_type, wait_event,
       extract(epoch FROM clock_timestamp() - query_start)::float8,
       CASE wait_event_type WHEN 'Lock' THEN pg_blocking_pids(pid) END,
       CASE WHEN %s THEN query END
FROM pg_stat_activity WHERE pid = ANY(%s) OR pid = pg_backend_pid()
"""

SERVER_COLUMNS = ("application_name", "state", "wait_event_type", "wait_event", "seconds", "blocked_by", "query")


def list_pools(registry: Components | None = None) -> list[tuple[str, Any]]:
    """Return the registered pools by their names."""
    registry = getGlobalSiteManager() if registry is None else registry
    pools = registry.getUtilitiesFor(IConnectionPool)
    # Some that look at this cannot encode half of a surrogate pair.
    return sorted(((name.encode(errors="replace").decode(), pool) for name, pool in pools), key=lambda each: each[0])


def take(pools: Iterable[tuple[str, Any]], now: float, show_sql: bool = False) -> Json:
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


def describe(name: str, pool: Any, now: float) -> Json:
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
    error = pool.last_connect_error if _has_server(pool) else None
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
        "last_connect_error": readable(pool.scrub(one_line(error))) if error else "",
        "outage_seconds": pool.outage_seconds if not pool.closed and IPoolManagement.providedBy(pool) else None,
        "server_note": "",
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


def _has_server(pool: Any) -> bool:
    return not pool.closed and IPoolInternals.providedBy(pool)


def join_server(seen: Iterable[Json], pools: Iterable[Any], show_sql: bool = False) -> None:
    """Add to each holder what the server says of its backend, or to the pool's `server_note` why that is missing.

    pools -- for each of `seen` the pool whose server is asked; None where there is no such pool here.
    """
    until = monotonic() + LOOK
    for each, pool in zip(seen, pools, strict=True):
        pids = [holder["backend_pid"] for holder in each["holders"] if holder["backend_pid"]]
        if not pids or (pool is not None and not _has_server(pool)):
            continue
        try:
            if pool is None:
                raise NoAnswer("the process that was asked has no such pool")
            found = ask_server(pool, pids, until, show_sql)
        except NoAnswer as error:
            each["server_note"] = readable(str(error))
        else:
            for holder in each["holders"]:
                holder["server"] = found.get(holder["backend_pid"])


def ask_server(pool: Any, pids: Collection[int], until: float, show_sql: bool = False) -> dict[int, Json]:
    """Return what pg_stat_activity has of these backends, over a connection of its own that is closed again.

    Raises NoAnswer, at `until` (monotonic seconds) at the latest.
    """
    rows, own_pid = query(pool, "zpgpool status", ACTIVITY, (show_sql, list(pids)), until)
    if own_pid not in [pid for pid, is_own, *_ in rows if is_own]:
        raise NoAnswer("a pooler is in between: the server knows these backends by other numbers")
    shown = {pid: [readable(value) if isinstance(value, str) else value for value in rest] for pid, _, *rest in rows}
    return {pid: dict(zip(SERVER_COLUMNS, values, strict=True)) for pid, values in shown.items()}
