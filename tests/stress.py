"""Shoot at the pools while threads use them: `make stress SECONDS=... SEED=...`; the tests run it for a moment.

Dice decide what each thread does next: a query, a kill, a restart of the server, an exception from outside between two
bytecodes, its own end with a connection in hand, a fork, a resize, a drain, or the close of the pool. Throughout: no
connection has two holders, and the server never counts more than `maxconn`. In the end: the full capacity is there,
nobody waits, and the memory has not grown.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psycopg2

import zpgpool
from zpgpool.demo.server import EmbeddedServer


MAXCONN = 6
THREADS = 12


class Shot(Exception):
    """Raised in a thread from outside."""


class Stress:
    """One run, over one kind of pool."""

    def __init__(self, server: EmbeddedServer, factory: Any, seed: int) -> None:
        self.server = server
        self.factory = factory
        self.seed = seed
        self.application_name = f"stress-{factory.__name__}"
        self.pool = self.make_pool()
        self.is_over = threading.Event()
        self.lock = threading.Lock()
        self.holders: dict[int, int] = {}
        self.targets: set[int] = set()
        self.counts: dict[str, int] = {}
        self.memory = 0
        self.problems: list[str] = []
        self.watcher = self.connect("stress-outside")

    def make_pool(self) -> Any:
        dsn = f"{self.server.dsn} application_name={self.application_name}"
        return self.factory(0, MAXCONN, dsn, idle_timeout=5, timeout=10, max_lifetime=20, leak_after=60, open=False)

    def connect(self, application_name: str) -> Any:
        conn = psycopg2.connect(f"{self.server.dsn} application_name={application_name}")
        conn.autocommit = True
        return conn

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1

    # What the threads do ----------------------------------------------------------------------------------------------

    def work(self, dice: random.Random) -> None:
        me = threading.get_ident()
        self.targets.add(me)
        try:
            while not self.is_over.is_set():
                try:
                    if not self.turn(dice):
                        return
                except Shot:
                    self.count("shot")
                except (psycopg2.Error, zpgpool.PoolError) as error:
                    self.count(type(error).__name__)
                    time.sleep(0.001)
        finally:
            with self.lock:
                self.targets.discard(me)

    def turn(self, dice: random.Random) -> bool:
        """Use a connection once; False when the thread shall end with it in its hands."""
        pool = self.pool
        conn = pool.getconn()
        me = threading.get_ident()
        # The object's id, not the backend's: a kill may give the number of a backend away.
        if self.holders.setdefault(id(conn), me) != me:
            self.problems.append("one connection has two holders")
        try:
            status = conn.info.transaction_status
            if status != psycopg2.extensions.TRANSACTION_STATUS_IDLE and not conn.closed:
                self.problems.append(f"a connection came with transaction status {status}")
            roll = dice.random()
            with conn.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(%s)", [dice.choice([0, 0, 0.001, 0.005])])
            if roll < 0.4:
                conn.commit()
            elif roll < 0.42:
                conn.autocommit = not conn.autocommit if not conn.info.transaction_status else conn.autocommit
            elif roll < 0.425:
                self.count("ended thread")
                self.holders.pop(id(conn), None)
                return False
            elif roll < 0.43:
                conn.close()
        except BaseException:
            # A thread that was shot, or whose query failed, gives back what it has, as a request's end does.
            self.holders.pop(id(conn), None)
            pool.putconn(conn)
            raise
        self.holders.pop(id(conn), None)
        pool.putconn(conn, close=dice.random() < 0.05)
        self.count("checkout")
        return True

    def keep_threads(self, dice: random.Random) -> list[threading.Thread]:
        threads: list[threading.Thread] = []
        while not self.is_over.is_set():
            threads = [thread for thread in threads if thread.is_alive()]
            while len(threads) < THREADS:
                threads.append(threading.Thread(target=self.work, args=(random.Random(dice.random()),), daemon=True))
                threads[-1].start()
            time.sleep(0.02)
            if dice.random() < 0.3:
                target = dice.choice(threads)
                with self.lock:  # not one that has ended: a thread of somebody else may have its number by now
                    if target.ident in self.targets:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target.ident), ctypes.py_object(Shot))
        return threads

    # What is done to them ---------------------------------------------------------------------------------------------

    def shoot(self, dice: random.Random, seconds: float) -> None:
        """In the main thread: the server ends with the thread that has started it."""
        weapons = [self.kill_one] * 8 + [self.kill_all] * 2 + [self.fork] * 3 + [self.resize] * 3 + [self.drain] * 2
        weapons += [self.close, self.restart, self.crash]
        start = said = time.monotonic()
        while (now := time.monotonic()) - start < seconds:
            time.sleep(dice.uniform(0.05, 0.4))
            if not self.memory and now - start > seconds / 2:
                self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if now - said > 5:
                said = now
                print(
                    f"  {now - start:4.0f} s  {self.counts.get('checkout', 0):,} checkouts  {self.pool!r}", flush=True
                )
            weapon = dice.choice(weapons)
            try:
                weapon(dice)
            except psycopg2.Error:
                self.reconnect_watcher()
            self.count(weapon.__name__)

    def reconnect_watcher(self) -> None:
        while not self.is_over.is_set():
            try:
                self.watcher = self.connect("stress-outside")
                return
            except psycopg2.Error:
                time.sleep(0.05)

    def query(self, sql: str) -> Any:
        with self.watcher.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def kill_one(self, dice: random.Random) -> None:
        pids = [pid for (pid,) in self.query(f"SELECT pid FROM pg_stat_activity WHERE {self.mine}")]
        if pids:
            self.query(f"SELECT pg_terminate_backend({dice.choice(pids)})")

    def kill_all(self, dice: random.Random) -> None:
        self.query(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {self.mine}")

    @property
    def mine(self) -> str:
        return f"application_name = '{self.application_name}'"

    def restart(self, dice: random.Random) -> None:
        self.server.halt(signal.SIGINT)
        self.server.launch()
        self.reconnect_watcher()

    def crash(self, dice: random.Random) -> None:
        self.server.halt(signal.SIGQUIT)
        self.server.launch()
        self.reconnect_watcher()

    def resize(self, dice: random.Random) -> None:
        self.pool.resize(dice.randint(0, 2), dice.randint(2, MAXCONN))

    def drain(self, dice: random.Random) -> None:
        self.pool.drain()

    def close(self, dice: random.Random) -> None:
        old = self.pool
        old.close(dice.choice([0, 1]))
        deadline = time.monotonic() + 20
        while old.get_stats()["pool_size"]:  # a connect that was under way counts for the old one
            old._connections.handoff.forget_lost()
            if time.monotonic() > deadline:
                self.problems.append(f"a closed pool keeps {old._connections.handoff.slots}")
                break
            time.sleep(0.001)
        self.pool = self.make_pool()

    def fork(self, dice: random.Random) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(10)
                os._exit(0 if not self.pool.holders() else 3)
            except BaseException:
                os._exit(4)
        _, status = os.waitpid(pid, 0)
        if status:
            self.problems.append(f"a forked child ended with {status}")

    def watch(self) -> None:
        """Sample how many sessions the server counts.

        One too many for a moment is no problem here: a shot may end the wait for a closed session's end.
        """
        conn = self.connect("stress-watch")
        most, over = 0, 0
        while not self.is_over.is_set():
            try:
                with conn.cursor() as cursor:
                    cursor.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {self.mine}")
                    sessions = cursor.fetchone()[0]
                over = over + 1 if sessions > MAXCONN else 0
                if over > 20:
                    most = max(most, sessions)
            except psycopg2.Error:
                time.sleep(0.05)
                try:
                    conn = self.connect("stress-watch")
                except psycopg2.Error:
                    continue
            time.sleep(0.002)
        self.counts["sessions above maxconn"] = most
        conn.close()

    # The run ----------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> list[str]:
        dice = random.Random(self.seed)
        kept: list[list[threading.Thread]] = []
        helpers = [
            threading.Thread(target=lambda: kept.append(self.keep_threads(random.Random(dice.random())))),
            threading.Thread(target=self.watch),
        ]
        for helper in helpers:
            helper.start()
        self.shoot(random.Random(dice.random()), seconds)
        self.is_over.set()
        for thread in [*helpers, *(thread for threads in kept for thread in threads)]:
            thread.join(30)
            if thread.is_alive():
                self.problems.append(f"thread {thread.name} has not ended")
        for threads in kept:
            for thread in threads:
                thread.join(30)
        self.check_end()
        return self.problems

    def check_end(self) -> None:
        pool = self.pool
        pool.resize(0, MAXCONN)
        pool.run_maintenance(time.monotonic())
        deadline = time.monotonic() + 5
        while pool.last_connect_error is not None and time.monotonic() < deadline:
            try:  # the last shot may have hit the server
                with pool.connection():
                    pass
            except psycopg2.Error:
                time.sleep(0.05)
        barrier = threading.Barrier(MAXCONN)
        pids = set()

        def hold() -> None:
            with pool.connection() as conn:
                barrier.wait(15)
                pids.add(conn.info.backend_pid)
                barrier.wait(15)

        threads = [threading.Thread(target=hold) for _ in range(MAXCONN)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(pids) != MAXCONN:
            self.problems.append(f"only {len(pids)} of {MAXCONN} places are left")
        if pool.get_stats()["requests_waiting"]:
            self.problems.append("somebody still waits")
        if self.counts["sessions above maxconn"]:
            self.problems.append(f"the server counted {self.counts['sessions above maxconn']} sessions")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory
        if grown > 20_000:
            self.problems.append(f"the memory has grown by {grown} KiB in the second half")
        pool.close(1)
        self.watcher.close()


def main(seconds: float, seed: int) -> int:
    """Run over both kinds of shared pool; return 1 when something was wrong."""
    logging.getLogger("zpgpool").setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: None if args.exc_type is Shot else threading.__excepthook__(args)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for factory in (zpgpool.PersistentConnectionPool, zpgpool.ThreadedConnectionPool):
            with EmbeddedServer(Path(folder) / factory.__name__, options={"fsync": "off"}) as server:
                print(f"{factory.__name__}, seed {seed}, {seconds / 2:g} s", flush=True)
                stress = Stress(server, factory, seed)
                problems = stress.run(seconds / 2)
                print("  " + ", ".join(f"{name} {count:,}" for name, count in sorted(stress.counts.items())))
                for problem in sorted(set(problems)):
                    print(f"  WRONG: {problem} ({problems.count(problem)} times)")
                bad += bool(problems)
    print("failed" if bad else "all well")
    return min(bad, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.seconds + 90, exit=True)  # a run that hangs says where
    sys.exit(main(args.seconds, args.seed))
