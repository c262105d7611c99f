"""What the scenarios of `make stress` share: threads that use a pool while it is attacked."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import ClassVar

import psycopg2
from psycopg2.extensions import make_dsn

import zpgpool
from invariants import Invariants
from invariants import MAXCONN
from invariants import memory
from invariants import TIMEOUT
from zpgpool.demo.server import EmbeddedServer


#: How much the memory may grow in the second half, in KiB.
GROWTH = 20_000

#: How often a long run says how it goes, in seconds.
SAY_EVERY = 30.0


class Shot(Exception):
    """Raised in a thread from outside."""


class Scenario(Invariants):
    """One attack on one pool. A subclass says what its weapons are.

    server -- a server that this process has started, and that the scenario may attack, too.
    factory -- the class of the pool.
    dice -- decides all that is decided.
    patience -- multiplies the bounds of time: for a machine that is emulated.
    """

    #: Further settings of the pool.
    options: ClassVar[dict[str, Any]] = {}
    #: How many threads use it.
    users = 12
    #: How many of their turns end with the thread, and the connection in its hands.
    abandons = 0.005
    #: Between two weapons, in seconds, at least and at most.
    pause = (0.05, 0.4)
    #: Whether asynchronous exceptions are raised in the threads.
    are_shot = False
    #: Whether the server never counts more than `maxconn` sessions, a moment excepted.
    is_counted = True
    #: Whether it is the only one of this run.
    is_alone = False

    def __init__(self, server: EmbeddedServer, factory: Any, dice: random.Random, patience: float = 1.0) -> None:
        self.server = server
        self.factory = factory
        self.dice = dice
        super().__init__(f"stress-{self.name()}-{factory.__name__}", patience)
        self.dsn = make_dsn(server.dsn, application_name=self.application_name)
        self.is_over = threading.Event()
        self.lock = threading.Lock()
        self.holders: dict[int, int] = {}
        self.targets: set[int] = set()
        self.counts: dict[str, int] = {}
        self.memory = 0

    @classmethod
    def name(cls) -> str:
        return cls.__name__.lower()

    def make_pool(self) -> Any:
        options = {"idle_timeout": 5, "timeout": TIMEOUT, "max_lifetime": 20, "leak_after": 60, **self.options}
        return self.factory(0, MAXCONN, self.dsn, open=False, **options)

    def connect(self) -> Any:
        conn = psycopg2.connect(make_dsn(self.server.dsn, application_name="stress-outside"))
        conn.autocommit = True
        return conn

    def count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + number

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
        has_key = self.factory is zpgpool.ThreadedConnectionPool and dice.random() < 0.3
        key = [object()] if has_key else []
        with self.in_time():
            conn = pool.getconn(*key)
        me = threading.get_ident()
        # The object's id, not the backend's: a kill may give the number of a backend away.
        if self.holders.setdefault(id(conn), me) != me:
            self.problems.append("one connection has two holders")
        try:
            self.check_begins(conn)
            if not self.use(conn, dice):
                self.count("ended thread")
                self.holders.pop(id(conn), None)
                return False
        except BaseException:
            # A thread that was shot, or whose query failed, gives back what it has, as a request's end does.
            self.holders.pop(id(conn), None)
            pool.putconn(conn, *key)
            raise
        self.holders.pop(id(conn), None)
        pool.putconn(conn, *key, close=dice.random() < 0.05)
        self.count("checkout")
        return True

    def use(self, conn: Any, dice: random.Random) -> bool:
        """Do something with a connection; False: end with it in the hands."""
        roll = dice.random()
        with conn.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [dice.choice([0, 0, 0.001, 0.005])])
        if roll < 0.4:
            conn.commit()
        elif roll < 0.42:
            conn.autocommit = not conn.autocommit if not conn.info.transaction_status else conn.autocommit
        elif roll < 0.425:
            conn.close()
        return roll < 1 - self.abandons

    def keep_users(self, dice: random.Random) -> None:
        """Have so many threads use the pool, and shoot at them, until it is over; then wait for them."""
        threads: list[threading.Thread] = []
        while not self.is_over.is_set():
            threads = [thread for thread in threads if thread.is_alive()]
            while len(threads) < self.users:
                threads.append(threading.Thread(target=self.work, args=(random.Random(dice.random()),), daemon=True))
                threads[-1].start()
            time.sleep(0.02)
            if self.are_shot and dice.random() < 0.3:
                target = dice.choice(threads)
                with self.lock:  # not one that has ended: a thread of somebody else may have its number by now
                    if target.ident in self.targets:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target.ident), ctypes.py_object(Shot))
        for thread in threads:
            thread.join(30 * self.patience)
            if thread.is_alive():
                self.problems.append(f"thread {thread.name} has not ended")

    # What is done to them ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare what the scenario needs."""

    def weapons(self) -> Sequence[Callable[[], object]]:
        """Return what is done to the pool: the dice choose one of these, again and again."""
        return []

    def helpers(self) -> Sequence[Callable[[], object]]:
        """Return what runs beside that, in threads of its own, until it is over."""
        users = random.Random(self.dice.random())
        return [lambda: self.keep_users(users), *([self.watch] if self.is_counted else [])]

    def step(self) -> bool:
        """Do one thing, in the main thread: the server ends with the thread that has started it. False: no more."""
        time.sleep(self.dice.uniform(*self.pause))
        weapon = self.dice.choice(self.weapons())
        try:
            weapon()
        except psycopg2.Error:
            self.reconnect_watcher()
        self.count(getattr(weapon, "__name__", "step"))
        return True

    def end(self) -> None:
        """Undo what the scenario has done to the server, and to the way there."""

    def reconnect_watcher(self) -> None:
        while True:
            try:
                self.watcher = self.connect()
                return
            except psycopg2.Error:
                time.sleep(0.05)

    def watch(self) -> None:
        """Sample how many sessions the server counts.

        One too many for a moment is no problem here: a shot may end the wait for a closed session's end.
        """
        conn = self.connect()
        over = 0
        while not self.is_over.is_set():
            try:
                with conn.cursor() as cursor:
                    cursor.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [self.application_name]
                    )
                    sessions = cursor.fetchone()[0]
                over = over + 1 if sessions > MAXCONN else 0
                if over > 20 * self.patience:
                    self.problems.append(f"the server counted {sessions} sessions")
            except psycopg2.Error:
                time.sleep(0.05)
                try:
                    conn = self.connect()
                except psycopg2.Error:
                    continue
            time.sleep(0.002)
        conn.close()

    # The run ----------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> list[str]:
        """Attack for so long; return what was wrong."""
        before = self.footprint()
        self.watcher = self.connect()
        self.begin()
        self.pool = self.make_pool()
        helpers = [threading.Thread(target=helper) for helper in self.helpers()]
        for helper in helpers:
            helper.start()
        try:
            self.attack(seconds)
        finally:
            self.end()
            self.is_over.set()
        for thread in helpers:
            thread.join()
        grown = memory() - self.memory
        if self.memory and grown > GROWTH:
            self.problems.append(f"the memory has grown by {grown} KiB in the second half")
        self.check_end()
        self.watcher.close()
        self.check_left(*before)
        return self.problems

    def attack(self, seconds: float) -> None:
        start = said = time.monotonic()
        while (now := time.monotonic()) - start < seconds:
            if not self.memory and now - start > seconds / 2:
                self.memory = memory()
            if now - said > SAY_EVERY:
                said = now
                print(f"  {now - start:4.0f} s  {self.summary()}  {self.pool!r}", flush=True)
            if not self.step():
                break

    def summary(self) -> str:
        with self.lock:
            counts = sorted(self.counts.items())
        return ", ".join(f"{name} {count:,}" for name, count in counts) + f"; longest getconn {self.longest:.2f} s"
