"""The numbers of a pool as plain data that add up: of several pools, of several processes, of those that have ended."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeGuard

from ..core import lag_of
from .history import BOUNDS
from .history import history_of


if TYPE_CHECKING:
    from ..types import Pool


#: The pools' own counters that are shown.
COUNTERS = (
    "requests_num",
    "requests_queued",
    "requests_errors",
    "returns_bad",
    "connections_num",
    "connections_errors",
    "connections_lost",
)

TIMES = ("create_time", "wait_time", "use_time")

#: A pool's `gauges`, `counters` and `times` (of each: the counts, not cumulative, and the sum).
Reading = dict[str, dict[str, Any]]

#: By the pool's name.
Readings = dict[str, Reading]


def read(pool: Pool) -> Reading:
    """Return the numbers of a pool."""
    stats, history, lag = pool.get_stats(), history_of(pool), lag_of(pool)
    gauges: dict[str, float] = {
        "used": max(0, stats["pool_size"] - stats["pool_available"]),
        "idle": stats["pool_available"],
        "max": stats["pool_max"],
        "idle.min": stats["pool_min"],
        "pending_requests": stats["requests_waiting"],
    }
    if lag is not None and lag.seconds is not None:
        gauges["lag"] = lag.seconds
    return {
        "gauges": gauges,
        "counters": {"timeouts": history.timeouts, **{name: stats[name] for name in COUNTERS}},
        "times": {name: list(history.times[name].read()) for name in TIMES},
    }


def add(many: Iterable[Readings]) -> Readings:
    """Return the sum, pool by pool: all that is counted, and the gauges; of a lag the longest."""
    total: Readings = {}
    for readings in many:
        for name, reading in readings.items():
            into = total.setdefault(name, {"gauges": {}, "counters": {}, "times": {}})
            for kind in ("gauges", "counters"):
                for key, value in reading[kind].items():
                    old = into[kind].get(key, 0)
                    into[kind][key] = max(old, value) if key == "lag" else old + value
            for key, (counts, seconds) in reading["times"].items():
                old_counts, old_seconds = into["times"].get(key, ([0] * len(counts), 0.0))
                sums = [old + count for old, count in zip(old_counts, counts, strict=True)]
                into["times"][key] = [sums, old_seconds + seconds]
    return total


def counted(readings: Readings) -> Readings:
    """Return what outlives a process of its numbers: all but the gauges."""
    return {name: {**reading, "gauges": {}} for name, reading in readings.items()}


def is_readings(value: object) -> TypeGuard[Readings]:
    """Whether `value`, which was read from a file or a socket, is of the form of Readings."""
    return isinstance(value, dict) and all(isinstance(name, str) and _is_reading(each) for name, each in value.items())


def _is_reading(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(kind), dict) for kind in KINDS):
        return False
    numbers = [*value["gauges"].values(), *value["counters"].values()]
    return all(map(_is_number, numbers)) and all(map(_is_time, value["times"].values()))


KINDS = ("gauges", "counters", "times")


def _is_time(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], list)
        and len(value[0]) == len(BOUNDS) + 1
        and all(map(_is_number, [*value[0], value[1]]))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


class Ledger:
    """What the pools of this process have counted: a pool that is there no more stays in it, as it was last seen."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, weakref.ref[Pool]], Reading] = {}
        self._gone: Readings = {}

    def read(self, pools: Iterable[tuple[str, Pool]]) -> Readings:
        """Return the sums by name; the gauges are those of `pools`, (name, pool) pairs."""
        for key in [key for key in self._seen if key[1]() is None]:
            self._gone = add([self._gone, {key[0]: self._seen.pop(key)}])
        for reading in self._seen.values():
            reading["gauges"] = {}
        self._seen.update({(name, weakref.ref(pool)): read(pool) for name, pool in pools})
        return add([self._gone, *({name: reading} for (name, _), reading in self._seen.items())])
