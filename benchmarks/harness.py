"""Measuring in alternation, and what is kept of it.

These machines have neighbours: a figure alone says little. So all peers of a question are measured in the same run, one
after the other, many short rounds; told are medians, and the median of each round's ratio to the reference.
"""

from __future__ import annotations

import json
import math
import os
import random
import socket
import statistics
import sys
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any


#: For breakage, not for figures.
QUICK = bool(os.environ.get("QUICK"))

ROUNDS = 3 if QUICK else 11

#: Of how many runs the order of the peers is kept.
RUNS = 3


@dataclass
class Figure:
    """What one peer was measured at: a median, its quartiles, and the median of its ratios to the reference.

    between -- the interval in which that median lies with 95 % certainty, whatever the ratios' distribution is.
    """

    peer: str
    value: float
    low: float
    high: float
    ratio: float | None = None
    more: dict[str, float] = field(default_factory=dict)
    #: Moments of what is counted, in seconds since the beginning.
    marks: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


@dataclass
class Question:
    """A table: one row for each peer, the best first."""

    name: str
    title: str
    unit: str
    figures: list[Figure]
    reference: str = ""
    is_less_better: bool = True
    note: str = ""
    #: The peers, the best first, in each of the last runs.
    orders: list[list[str]] = field(default_factory=list)

    def remember(self, before: list[list[str]]) -> None:
        """Add the order of this run to those of the runs before."""
        self.orders = [*before, [figure.peer for figure in self.figures]][-RUNS:]

    def figure(self, peer: str) -> Figure:
        """Return the row of one peer."""
        return next(figure for figure in self.figures if figure.peer == peer)


def say(text: str = "") -> None:
    """Tell of progress."""
    print(text, flush=True)


def compare(
    name: str,
    title: str,
    unit: str,
    measures: dict[str, Callable[[], float]],
    reference: str,
    is_less_better: bool = True,
    rounds: int = ROUNDS,
    note: str = "",
    more: Callable[[str], dict[str, float]] = lambda peer: {},
    ideal: float | None = None,
) -> Question:
    """Measure all peers in alternation. What `more` says of a peer in the end is kept beside it.

    The ratios are to the peer `reference`, or to the figure `ideal`, if that is given.
    """
    say(f"\nmeasuring: {title} ...")
    found: dict[str, list[float]] = {peer: [] for peer in measures}
    for number in range(rounds):
        # Each round in another order: a peer finds the machine, and the server's caches, as the one before left them.
        for peer in random.Random(number).sample(list(measures), len(measures)):
            found[peer].append(measures[peer]())
    figures = []
    for peer, values in found.items():
        others = found[reference] if ideal is None else [ideal] * rounds
        ratios = [value / other for value, other in zip(values, others, strict=True)]
        low, _, high = statistics.quantiles(values, n=4)
        between = median_interval(ratios)
        ratio = statistics.median(ratios)
        figures.append(Figure(peer, statistics.median(values), low, high, ratio, more(peer), between=between))
    return tell(Question(name, title, unit, figures, reference, is_less_better, note))


def median_interval(values: list[float]) -> list[float]:
    """Return the ends of the 95 % interval of the median, two of the values; nothing where they are too few."""
    ordered, count = sorted(values), len(values)
    # The median is below the k-th value with the chance that fewer than k of `count` tosses of a coin are heads.
    chance = [math.comb(count, heads) / 2**count for heads in range(count + 1)]
    outside = next((rank for rank in range(count // 2, -1, -1) if 2 * sum(chance[: rank + 1]) <= 0.05), None)
    return [] if outside is None else [ordered[outside], ordered[-1 - outside]]


def tell(question: Question) -> Question:
    """Sort the rows of a question, print them, and return it."""
    say(f"\n{question.title}")
    question.figures.sort(key=lambda figure: figure.value, reverse=not question.is_less_better)
    for figure in question.figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:6.2f} x {question.reference}"
        ratio += f" ({figure.between[0]:.2f} to {figure.between[1]:.2f})" if figure.between else ""
        more = "  ".join(f"{name} {value:,.4g}" for name, value in figure.more.items())
        say(f"  {figure.peer:28} {figure.value:10.2f} {question.unit:12} {ratio}  {more}".rstrip())
    return question


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that is not below `percent` of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def free_port() -> int:
    """Return a port that nobody listens on, and that nobody else is given while this process lives.

    It stays bound, which on Linux keeps it from everyone who asks for any port, and from every outgoing connection; a
    server that is told to listen on it may, as servers set SO_REUSEADDR.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port: int = sock.getsockname()[1]
    if sys.platform == "linux":
        sock.detach()
    else:
        sock.close()
    return port


def write(path: Path, about: dict[str, Any], questions: list[Question]) -> None:
    """Keep a run as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"about": about, "questions": [asdict(each) for each in questions]}, indent=1) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Question]]:
    """Read a run that was kept."""
    kept = json.loads(path.read_text())
    questions = [
        Question(**{**each, "figures": [Figure(**figure) for figure in each["figures"]]}) for each in kept["questions"]
    ]
    return kept["about"], questions
