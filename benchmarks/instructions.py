"""Instructions of the hit path, counted by valgrind: a figure that does not depend on the neighbours.

`python -m benchmarks.instructions PEER DSN PAIRS` is what is counted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.harness import Figure
from benchmarks.harness import Question
from benchmarks.harness import QUICK
from benchmarks.harness import say
from benchmarks.harness import tell


PEERS = ["ours", "ours_threaded", "theirs_psycopg2", "thread_local"]
FEW, MANY = 2_000, 12_000


def count(peer: str, dsn: str, pairs: int) -> int:
    """Return the instructions of a process that does so many pairs."""
    command = [
        "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
        sys.executable, "-m", "benchmarks.instructions", peer, dsn, str(pairs),
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"Collected\s*:\s*(\d+)", output)
    assert found is not None, output
    return int(found[1])


def all_of(server: Any) -> list[Question]:
    """Ask all that is asked here."""
    if QUICK:
        return []
    if shutil.which("valgrind") is None:
        say("\nNo instructions counted: valgrind is missing (apt-get install valgrind)")
        return []
    from benchmarks import peers

    figures = []
    for peer in PEERS:
        say(f"  counting {peer} ...")
        per_pair = (count(peer, server.dsn, MANY) - count(peer, server.dsn, FEW)) / (MANY - FEW)
        made = getattr(peers, peer)(server.dsn, 1)
        figures.append(Figure(made.name, per_pair, per_pair, per_pair))
        made.close()
    reference = next(figure.value for figure in figures if figure.peer == "psycopg2.pool")
    for figure in figures:
        figure.ratio = figure.value / reference
    return [
        tell(
            Question(
                "instructions", "Instructions of one checkout and return", "instructions", figures, "psycopg2.pool"
            )
        )
    ]


def main(peer: str, dsn: str, pairs: int) -> None:
    """Do the pairs."""
    from benchmarks import peers

    made = getattr(peers, peer)(dsn, 1)
    get, put = made.get, made.put
    for _ in range(pairs):
        put(get())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
