"""The snapshots of all processes of a site as one: added up, pool by pool, and who blocks whom across processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeAlias
from urllib.parse import urlsplit

from .history import EVERY
from .history import INCIDENTS
from .history import SPAN
from .snapshot import Json


#: Of the JSON: nothing that it has is taken away, or gets another meaning, under the same number.
VERSION = 1

#: What `fits` asks for: see there.
Form: TypeAlias = type | tuple[type, ...] | list["Form"] | dict[str, "Form"]

NUMBER: Form = (int, float)
MAYBE: Form = (int, float, type(None))

SERVER: dict[str, Form] = {
    "application_name": (str, type(None)),
    "state": (str, type(None)),
    "wait_event_type": (str, type(None)),
    "wait_event": (str, type(None)),
    "seconds": MAYBE,
    "blocked_by": (list, type(None)),
    "query": (str, type(None)),
}

WAITER: dict[str, Form] = {"seconds": NUMBER, "request": str, "thread": str, "line": str}

#: The form of what a process tells of a pool: what comes from a socket is looked at before it is drawn.
POOL: Form = {
    "name": str,
    "kind": str,
    "is_closed": bool,
    "max": int,
    "min": int,
    "size": int,
    "idle": int,
    "used": int,
    "waiting": int,
    "last_connect_error": str,
    "outage_seconds": MAYBE,
    "server_note": str,
    "backends": (list, type(None)),
    "lag": (dict, type(None)),
    "holders": [{**WAITER, "status": str, "backend_pid": int, "server": type(None)}],
    "waiters": [WAITER],
    "incidents": [{"at": str, "kind": str, "text": str, "count": int}],
    "samples": [{"ago": NUMBER, "used": int, "idle": int, "waiting": int, "wait": NUMBER, "lag": MAYBE}],
    "stats": dict,
}

DOCUMENT: Form = {"id": str, "process": int, "host": str, "zpgpool": str, "is_bare": bool, "pools": [POOL]}

#: No number of ours is as large: more than that, infinity and what is no number cannot be shown.
LARGEST = 1e18

LAG: Form = {"seconds": MAYBE, "ago": MAYBE, "trouble": str}


def fits(value: object, form: Form) -> bool:
    """Whether `value` has the form: a type, several, a mapping of at least these keys, or a list of such."""
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(each, form[0]) for each in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], each) for key, each in form.items())
    types = form if isinstance(form, tuple) else (form,)
    if isinstance(value, bool) and bool not in types:
        return False
    return isinstance(value, types) and not (isinstance(value, int | float) and not abs(value) < LARGEST)


def is_document(value: object) -> bool:
    """Whether `value` is what a process of this version tells of itself."""
    return (
        isinstance(value, dict)
        and fits(value, DOCUMENT)
        and all(
            (pool["lag"] is None or fits(pool["lag"], LAG))
            and fits(pool["backends"] or [], [int])
            and all(fits(each, NUMBER) for each in pool["stats"].values())
            for pool in value["pools"]
        )
    )


# Adding up -----------------------------------------------------------------------------------------------------------


def merge(documents: Iterable[Json], silent: Iterable[tuple[int, str, str]] = ()) -> Json:
    """Return the `processes` and the `pools` of a site.

    documents -- what its processes tell of themselves.
    silent -- the processes that tell nothing: the number, the host, and why.
    """
    told = sorted(documents, key=lambda each: (each["host"], each["process"]))
    processes = [_process(each) for each in told]
    processes += [_silent(*each) for each in sorted(silent)]
    by_name: dict[str, list[Json]] = {}
    for process in processes:
        for pool in process["pools"]:
            for each in (*pool["holders"], *pool["waiters"], *pool["incidents"]):
                each["process"] = process["process"]
                each["host"] = process["host"]
            by_name.setdefault(pool["name"], []).append(pool)
    _mark_odd(processes)
    return {"processes": processes, "pools": [_merge_pools(by_name[name]) for name in sorted(by_name)]}


def total(snapshot: Json) -> Json:
    """Return the sums over all pools, as they stand at the top of a snapshot."""
    pools = snapshot["pools"]
    sums: Json = {name: sum(pool[name] for pool in pools) for name in ("used", "idle", "max", "waiting")}
    waiters = [waiter["seconds"] for pool in pools for waiter in pool["waiters"]]
    return {**sums, "open": sums["used"] + sums["idle"], "longest_wait": max(waiters, default=0.0)}


def _process(document: Json) -> Json:
    shown = {key: document[key] for key in ("id", "process", "host", "zpgpool", "pools")}
    return {**shown, **total(document), "trouble": "", "is_odd": False}


def _silent(process: int, host: str, why: str) -> Json:
    shown = {"id": "", "process": process, "host": host, "zpgpool": "", "pools": []}
    return {**shown, **total(shown), "trouble": why, "is_odd": True}


def _mark_odd(processes: Sequence[Json]) -> None:
    """Mark those that are not as most are: somebody waits there, or all is in use, or the server is out of reach."""
    moods = [_mood(process) for process in processes if not process["trouble"]]
    [(most, count)] = Counter(moods).most_common(1) or [("", 0)]
    for process in processes:
        if not process["trouble"] and count * 2 > len(moods):
            process["is_odd"] = _mood(process) != most


def _mood(process: Json) -> str:
    if any(pool["last_connect_error"] for pool in process["pools"]):
        return "no server"
    if process["waiting"]:
        return "waits"
    return "full" if any(pool["used"] >= pool["max"] for pool in process["pools"]) else "well"


def _merge_pools(pools: Sequence[Json]) -> Json:
    """Return pools of one name as one: of one pool that itself."""
    if len(pools) == 1:
        return pools[0]
    stats: Json = {}
    for pool in pools:
        for key, value in pool["stats"].items():
            stats[key] = stats.get(key, 0) + value
    outages = [pool["outage_seconds"] for pool in pools if pool["outage_seconds"] is not None]
    lags = [pool["lag"] for pool in pools if pool["lag"] is not None]
    incidents = [incident for pool in pools for incident in pool["incidents"]]
    backends = [pool["backends"] for pool in pools if pool["backends"] is not None]
    return {
        "name": pools[0]["name"],
        "kind": " / ".join(sorted({pool["kind"] for pool in pools})),
        "is_closed": all(pool["is_closed"] for pool in pools),
        **{key: sum(pool[key] for pool in pools) for key in ("max", "min", "size", "idle", "used", "waiting")},
        "last_connect_error": next((each for pool in pools if (each := pool["last_connect_error"])), ""),
        "outage_seconds": max(outages, default=None),
        "server_note": "",
        "backends": [pid for each in backends for pid in each] if len(backends) == len(pools) else None,
        "lag": max(lags, key=lambda lag: (bool(lag["trouble"]), lag["seconds"] or 0.0), default=None),
        "holders": _oldest_first(holder for pool in pools for holder in pool["holders"]),
        "waiters": _oldest_first(waiter for pool in pools for waiter in pool["waiters"]),
        "incidents": sorted(incidents, key=lambda each: each["at"], reverse=True)[:INCIDENTS],
        "samples": _add_samples([pool["samples"] for pool in pools]),
        "stats": stats,
    }


def _oldest_first(those: Iterable[Json]) -> list[Json]:
    return sorted(those, key=lambda each: -each["seconds"])


def _add_samples(many: Iterable[Sequence[Json]]) -> list[Json]:
    """Return the sums of samples that were taken at about the same time, the oldest first; waits and lags at most."""
    slots: dict[int, list[Json]] = {}
    for samples in many:
        # One of each process in a slot: two would count twice.
        for slot, sample in {round(each["ago"] / EVERY): each for each in samples if 0 <= each["ago"] <= SPAN}.items():
            slots.setdefault(slot, []).append(sample)
    return [
        {
            "ago": slot * EVERY,
            **{key: sum(each[key] for each in those) for key in ("used", "idle", "waiting")},
            "wait": max(each["wait"] for each in those),
            "lag": max((each["lag"] for each in those if each["lag"] is not None), default=None),
        }
        for slot, those in sorted(slots.items(), reverse=True)
    ]


# What is asked for ---------------------------------------------------------------------------------------------------


def name_blockers(pools: Iterable[Json]) -> None:
    """Add to what the server says of each holder who the backends are that it waits for, as far as they are ours."""
    for pool in pools:
        known = {holder["backend_pid"]: holder for holder in pool["holders"] if holder["backend_pid"]}
        for holder in pool["holders"]:
            if holder["server"] is not None:
                holder["server"]["blockers"] = [
                    {key: known[pid].get(key) for key in ("backend_pid", "process", "host", "request", "thread")}
                    for pid in holder["server"]["blocked_by"] or []
                    if pid in known
                ]


def only(snapshot: Json) -> Json:
    """Return a snapshot with the holders and waiters only whose path is asked for; the numbers are of all."""
    path = snapshot["asked"]["path"]
    if not path:
        return snapshot

    def choose(pools: Iterable[Json]) -> list[Json]:
        return [
            {**pool, **{kind: [each for each in pool[kind] if is_of(each, path)] for kind in ("holders", "waiters")}}
            for pool in pools
        ]

    processes = [{**process, "pools": choose(process["pools"])} for process in snapshot["processes"]]
    return {**snapshot, "processes": processes, "pools": choose(snapshot["pools"])}


def is_of(each: Json, path: str) -> bool:
    """Whether the path of a holder's or waiter's request begins with `path`."""
    words = each["request"].split(" ", 1)
    with suppress(ValueError):
        return bool(urlsplit(words[-1]).path.startswith(path))
    return False
