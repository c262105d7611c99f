"""Attack the pools while threads use them: `make stress SECONDS=... SEED=... SCENARIO=...`.

Each scenario runs over both kinds of shared pool, for its part of the time; dice decide what happens next. The tests
run it for a moment.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg2
from benchmarks.harness import free_port

import zpgpool
from attacks import Cancels
from attacks import Forks
from attacks import Network
from attacks import Shots
from attacks import Stopped
from attacks import Threads
from scenario import Scenario
from scenario import Shot
from soak import Soak
from struck import Signals
from zpgpool.demo.server import EmbeddedServer


SCENARIOS: dict[str, type[Scenario]] = {
    each.name(): each for each in (Shots, Network, Stopped, Forks, Threads, Cancels, Signals, Soak)
}

FACTORIES = (zpgpool.PersistentConnectionPool, zpgpool.ThreadedConnectionPool)

SERVER_OPTIONS = {"fsync": "off", "max_connections": "150"}


def main(names: list[str], seconds: float, seed: int, patience: float) -> int:
    """Run these scenarios, each for its part of the time; return 1 when something was wrong."""
    logging.disable()
    threading.excepthook = lambda args: None if args.exc_type is Shot else threading.__excepthook__(args)
    runs = [(SCENARIOS[name], factory) for name in names for factory in FACTORIES]
    share = seconds / len(runs)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with EmbeddedServer(Path(folder) / "data", port=free_port(), options=SERVER_OPTIONS) as server:
            psycopg2.connect(server.dsn).close()  # what a process does once is no scenario's
            for scenario, factory in runs:
                # A text is the same in each process, unlike its hash.
                dice = random.Random(f"{seed} {scenario.name()} {factory.__name__}")
                attack = scenario(server, factory, dice, patience)
                attack.is_alone = len(names) == 1
                start = time.monotonic()
                problems = attack.run(share)
                took = time.monotonic() - start
                print(f"{scenario.name()}, {factory.__name__}, {took:.0f} s: {attack.summary()}", flush=True)
                for problem in sorted(set(problems)):
                    print(f"  WRONG: {problem} ({problems.count(problem)} times)", flush=True)
                bad += bool(problems)
    chosen = f" SCENARIO={names[0]}" if len(names) == 1 else ""
    print(f"failed; again: make stress SECONDS={seconds:g} SEED={seed}{chosen}" if bad else "all well")
    return min(bad, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="in all; the soak on its own takes its time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenario", choices=SCENARIOS, help="only this one")
    parser.add_argument("--patience", type=float, default=1, help="multiplies the bounds of time: for valgrind")
    args = parser.parse_args()
    chosen = [args.scenario] if args.scenario else list(SCENARIOS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    faulthandler.enable()
    seconds = max(args.seconds, 3600) if args.scenario == Soak.name() else args.seconds
    faulthandler.dump_traceback_later(seconds + 240 * args.patience, exit=True)  # a run that hangs says where
    sys.exit(main(chosen, args.seconds, args.seed, args.patience))
