"""The scenarios of `make stress` that attack the server, the way there, the process, and the connections."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any
from typing import ClassVar

import psycopg2

from invariants import MAXCONN
from proxy import Proxy
from scenario import Scenario


class Shots(Scenario):
    """Exceptions from outside between two bytecodes, and a server whose sessions, and which itself, are ended."""

    are_shot = True

    def weapons(self) -> Sequence[Callable[[], object]]:
        often = [self.kill_one] * 8 + [self.kill_all] * 2 + [self.resize] * 3 + [self.drain] * 2
        return [*often, self.close, self.restart, self.crash]

    def kill_one(self) -> None:
        if pids := sorted(self.sessions()):
            self.query("SELECT pg_terminate_backend(%s)", self.dice.choice(pids))

    def kill_all(self) -> None:
        for pid in self.sessions():
            self.query("SELECT pg_terminate_backend(%s)", pid)

    def restart(self) -> None:
        self.server.halt(signal.SIGINT)
        self.server.launch()
        self.reconnect_watcher()

    def crash(self) -> None:
        self.server.halt(signal.SIGQUIT)
        self.server.launch()
        self.reconnect_watcher()

    def resize(self) -> None:
        self.pool.resize(self.dice.randint(0, 2), self.dice.randint(2, MAXCONN))

    def drain(self) -> None:
        self.pool.drain()

    def close(self) -> None:
        old = self.pool
        old.close(self.dice.choice([0, 1]))
        handoff = old._connections.handoff

        def is_empty() -> bool:  # a connect that was under way counts for the old one
            handoff.forget_lost()
            return not len(handoff)

        self.expect(is_empty, lambda: f"a closed pool keeps {handoff.slots}")
        self.pool = self.make_pool()


class Network(Scenario):
    """A proxy between pool and server that falls silent, is slow, forgets its flows, and cuts them."""

    # What was forgotten answers nobody: the limit ends the query that waits for it.
    options: ClassVar = {"hold_limit": 1.5, "check_idle": 0.5, "connect_timeout": 3}
    is_counted = False  # a session whose end was lost on its way

    def begin(self) -> None:
        assert self.server.port
        self.proxy = Proxy(self.server.port)
        self.dsn = self.proxy.dsn(self.dsn)
        self.well_at = 0.0

    def weapons(self) -> Sequence[Callable[[], object]]:
        return [self.freeze, self.delay, self.proxy.forget, self.proxy.rst, self.proxy.fin, self.rest, self.rest]

    def step(self) -> bool:
        if self.well_at and time.monotonic() > self.well_at:
            self.recover()
        return super().step()

    def freeze(self) -> None:
        self.proxy.is_forwarding = False
        self.well_at = time.monotonic() + self.dice.uniform(0.05, 3)

    def delay(self) -> None:
        self.proxy.delay = self.dice.uniform(0.001, 0.05)
        self.well_at = time.monotonic() + self.dice.uniform(0.1, 1)

    def rest(self) -> None:
        """Let the pool recover, so that there is something to attack."""

    def recover(self) -> None:
        self.proxy.delay, self.proxy.is_forwarding, self.well_at = 0.0, True, 0.0

    def end(self) -> None:
        self.recover()

    def check_end(self) -> None:
        super().check_end()
        self.proxy.close()


class Stopped(Scenario):
    """Backends that are stopped (SIGSTOP), and the server's main process, so that nobody is let in: then they go on."""

    options: ClassVar = {"hold_limit": 1.5, "check_idle": 0.5, "connect_timeout": 3}
    is_counted = False  # a session that was closed, and whose process stands still

    def begin(self) -> None:
        self.stopped: dict[int, float] = {}

    def weapons(self) -> Sequence[Callable[[], object]]:
        return [self.stop_one] * 4 + [self.stop_all, self.stop_server] + [self.rest] * 3

    def step(self) -> bool:
        now = time.monotonic()
        self.go_on([pid for pid, until in self.stopped.items() if now > until])
        return super().step()

    def stop(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return
        self.stopped[pid] = time.monotonic() + self.dice.uniform(0.05, 3)

    def stop_one(self) -> None:
        if pids := sorted(self.sessions()):
            self.stop(self.dice.choice(pids))

    def stop_all(self) -> None:
        for pid in self.sessions():
            self.stop(pid)

    def stop_server(self) -> None:
        assert self.server._process
        self.stop(self.server._process.pid)

    def rest(self) -> None:
        """Let the pool recover, so that there is something to attack."""

    def go_on(self, pids: list[int]) -> None:
        for pid in pids:
            del self.stopped[pid]
            with suppress(ProcessLookupError):  # the server has ended it meanwhile
                os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        self.go_on(list(self.stopped))


class Forks(Scenario):
    """Forks under load; and a process that forks without Python's hooks, as uWSGI does. Each child uses the pool."""

    is_counted = False  # the children have sessions of their own

    def weapons(self) -> Sequence[Callable[[], object]]:
        return [self.fork, self.fork_master]

    def fork(self) -> None:
        self.expect_well(self.make_child(os.fork, self.be_child), "fork")

    def fork_master(self) -> None:
        """Fork a process that forks without hooks. Not this one: a child has no thread to hand the interpreter to."""
        self.expect_well(self.make_child(os.fork, self.be_master, 60), "fork_master")

    def expect_well(self, pid: int, how: str) -> None:
        _, status = os.waitpid(pid, 0)
        if status:
            self.problems.append(f"a child of {how}() ended with {status}")

    def make_child(self, fork: Callable[[], int], function: Callable[[set[int]], int], seconds: int = 20) -> int:
        parents = set(self.pool.backend_pids())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = fork()
        if pid == 0:
            status = 4
            try:
                faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)  # one that hangs says where
                signal.alarm(seconds)
                status = function(parents)
            finally:
                os._exit(status)
        return pid

    def be_child(self, parents: set[int]) -> int:
        """Use the pool, and return the status to end with: 0 where it gave a connection of this process."""
        conn = self.pool.getconn(timeout=20)
        with conn.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            if cursor.fetchone()[0] in parents:
                return 3
        conn.rollback()
        self.pool.putconn(conn)
        return 5 if self.pool.holders() else 0

    def be_master(self, parents: set[int]) -> int:
        # As in a master of uWSGI the pool starts no threads here: a fork while another one wants the interpreter's lock
        # leaves the child one that nobody gives back.
        master = os.getpid()
        sys.modules["uwsgi"] = uwsgi = ModuleType("uwsgi")
        vars(uwsgi).update(masterpid=lambda: master, worker_id=lambda: 0)
        status = self.be_child(parents)
        pids = [self.make_child(ctypes.PyDLL(None).fork, self.be_child) for _ in range(3)]
        statuses = [status, self.be_child(parents), *(os.waitpid(pid, 0)[1] for pid in pids)]
        return 6 if any(statuses) else 0


class Threads(Scenario):
    """Threads that live for one checkout, as some servers make one for each request; many end in the middle of it."""

    users = 2
    abandons = 0.2
    pause = (0, 0.01)

    def weapons(self) -> Sequence[Callable[[], object]]:
        return [self.run_some]

    def run_some(self) -> None:
        threads = [threading.Thread(target=self.one_turn, args=(self.dice.random(),)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.count("threads", len(threads))

    def one_turn(self, seed: float) -> None:
        try:
            self.turn(random.Random(seed))
        except psycopg2.Error as error:
            self.count(type(error).__name__)


class Use:
    """One use of a connection in the scenario below."""

    def __init__(self, pool: Any, conn: Any) -> None:
        self.pool = pool
        self.conn = conn
        self.since = time.monotonic()


class Cancels(Scenario):
    """Races of cancel, close, `putconn(close=True)`, `hold_limit` and closeall: nobody else's query is cancelled."""

    options: ClassVar = {"hold_limit": 0.1}
    users = 8
    pause = (0, 0.02)
    is_counted = False  # a close that does not wait for the server

    def begin(self) -> None:
        self.uses: dict[int, Use] = {}
        #: Until when a cancel of each connection may be under way, by the id of that.
        self.asked: dict[int, float] = {}

    def weapons(self) -> Sequence[Callable[[], object]]:
        return [self.drain] + [self.close_one] * 30 + [self.closeall] * 2

    def helpers(self) -> Sequence[Callable[[], object]]:
        return [*super().helpers(), self.keep_cancelling, self.keep_cancelling]

    def keep_cancelling(self) -> None:
        dice = random.Random(self.dice.random())
        while not self.is_over.is_set():
            time.sleep(dice.choice([0, 0.001, 0.003]))
            if uses := list(self.uses.values()):
                use = dice.choice(uses)
                number = id(use.conn)
                self.asked[number] = float("inf")
                if use.pool.cancel(use.conn, dice.choice([0, 1])):
                    self.count("cancel")
                self.asked[number] = time.monotonic()

    def drain(self) -> None:
        self.pool.drain()

    def close_one(self) -> None:
        """Close a connection that another thread uses just now."""
        if uses := list(self.uses.values()):
            self.dice.choice(uses).conn.close()

    def closeall(self) -> None:
        old, self.pool = self.pool, self.make_pool()
        old.closeall()

    def turn(self, dice: random.Random) -> bool:
        pool, me = self.pool, threading.get_ident()
        with self.in_time():
            conn = pool.getconn()
        use = Use(pool, conn)
        try:
            self.check_begins(conn)
            self.uses[me] = use
            with conn.cursor() as cursor:
                for _ in range(dice.choice([1, 1, 1, 3])):
                    cursor.execute("SELECT pg_sleep(%s)", [dice.choice([0, 0, 0.001, 0.002, 0.004, 0.01, 0.2])])
            if dice.random() < 0.1:
                conn.close()
        except psycopg2.errors.QueryCanceled:
            self.judge(use)
        finally:
            self.uses.pop(me, None)
            pool.putconn(conn, close=dice.random() < 0.2)
        self.count("checkout")
        return True

    def judge(self, use: Use) -> None:
        """See that it was this use that was to be cancelled, not one before it."""
        self.count("cancelled")
        is_late = time.monotonic() - use.since >= self.options["hold_limit"]
        is_asked = self.asked.get(id(use.conn), 0.0) >= use.since
        if not (is_late or is_asked or use.pool.closed):
            self.problems.append("a query was cancelled that nobody had asked for")
