"""The counters of processes that have ended, or do not answer: each wrote them to a file before they were shown.

A file for each process, and one for all whose files were added up and removed. A reader takes no lock: a process
that is stopped may hold it.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterable

from .counters import add
from .counters import counted
from .counters import is_readings
from .counters import Readings
from .folder import Folder
from .folder import Place


SUM = "zpgpool-past.json"
LOCK = "zpgpool-past.lock"

#: That many files of ended processes are added up.
MANY = 16

#: How often a reader begins again because another process is adding up.
TRIES = 20


def read_past(folder: Folder, shown: Collection[Place]) -> Readings:
    """Return the sum of what all others than `shown` have counted. Raises OSError."""
    for _ in range(TRIES):
        stamp = folder.stamp(SUM)
        total, added = _read_sum(folder)
        others = [place for place in folder.places("json") if place not in shown and place.token not in added]
        files = [_readings(folder.read(place.name("json"))) for place in others]
        # The sum is written before what went into it is removed: if it is the same still, nothing is missing.
        if folder.stamp(SUM) == stamp:
            return counted(add([total, *files]))
    raise OSError("the counters of ended processes are being added up without an end")


def is_kept(folder: Folder) -> bool:
    """Whether the counters are kept: a process has written some. Raises OSError."""
    return bool(folder.stamp(SUM) or folder.places("json"))


def add_up(folder: Folder, ended: Iterable[Place]) -> None:
    """Put the files of many ended processes into the sum. Raises OSError."""
    doomed = set(ended) & set(folder.places("json"))
    if len(doomed) < MANY:
        return
    with folder.locked(LOCK) as is_mine:
        if not is_mine:
            return
        there = {place.token: place for place in folder.places("json")}
        total, added = _read_sum(folder)
        fresh = [place for place in doomed if place.token in there and place.token not in added]
        files = [_readings(folder.read(place.name("json"))) for place in fresh]
        added = (added & there.keys()) | {place.token for place in fresh}
        folder.write(SUM, {"numbers": counted(add([total, *files])), "added": sorted(added)})
        for token in added:
            folder.remove(there[token].name("json"))


def _read_sum(folder: Folder) -> tuple[Readings, set[str]]:
    value = folder.read(SUM)
    if not isinstance(value, dict) or not isinstance(value.get("added"), list):
        return {}, set()
    return _readings(value.get("numbers")), {each for each in value["added"] if isinstance(each, str)}


def _readings(value: object) -> Readings:
    return value if is_readings(value) else {}
