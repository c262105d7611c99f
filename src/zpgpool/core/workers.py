"""Threads for what may hang: closing and cancelling have few, a connect has one of its own.

All have names, and are daemons: none keeps a process alive.

Knows nothing of pools. A signal's handler may raise between any two lines here, in the main thread: so nothing rests on
a counter that two lines keep, or on `threading.Event` and `Condition`, whose locks such an exception leaves taken.
"""

from __future__ import annotations

import _thread
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from queue import SimpleQueue


log = logging.getLogger("zpgpool")

#: After so many seconds without work a thread ends.
IDLE = 2.0

Task = Callable[[], object]


def start(task: Task, name: str) -> bool:
    """Run `task` in a thread of its own; return whether one could be started.

    None can in an exit handler (CPython 3.12 and newer), or at a limit of processes; none should before a `will_fork`.
    """
    if will_fork():
        return False
    try:
        # Not from here: `Thread.start()` waits for the new thread, which hangs when an exception breaks that off.
        _thread.start_new_thread(_start, (task, name))
    except RuntimeError:
        return False
    return True


def will_fork() -> bool:
    """Whether this process is one of uWSGI that loads the application, and makes its workers of itself.

    It does not hold the interpreter's lock while it forks. Where another thread has it at that moment, the new worker
    waits for that thread for ever: it is not there.
    """
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is None or not hasattr(uwsgi, "masterpid"):  # somebody else's module may have the name
        return False
    return uwsgi.worker_id() == 0 and uwsgi.masterpid() in (0, os.getpid())


def _start(task: Task, name: str) -> None:
    try:
        threading.Thread(target=task, name=name, daemon=True).start()
    except RuntimeError:
        task()


class Gate:
    """Threads wait here until it is opened, once. An Event that an exception in a waiter cannot break."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let all threads pass from now on; may be repeated."""
        with suppress(RuntimeError):  # a thread is passing just now, or has opened it
            self._lock.release()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for so long, or for ever; return whether it is open."""
        if not self._lock.acquire(timeout=-1 if seconds is None else max(0.0, min(seconds, threading.TIMEOUT_MAX))):
            return False
        self.open()
        return True


class Opening:
    """A connect that is under way."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.has_ended = Gate()


class Workers:
    """At most `most` threads of the process, which do what they are given, in order."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        # In a forked child, too: the threads are gone, and the lock may be held by one of them.
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        #: The threads, each added and removed by itself; and how many of them have nothing to do.
        self._threads: set[threading.Thread] = set()
        self._idle = 0

    def run(self, task: Task) -> None:
        """Have `task` done soon. What it raises is logged."""
        if self._process != os.getpid():  # forked by C code, which does not call Python's hooks
            self._forget()
        self._tasks.put(task)
        if not self._see_to_threads():
            with suppress(Empty):
                while True:
                    self._do(self._tasks.get_nowait())

    def _see_to_threads(self) -> bool:
        """Start a thread if there are more tasks than threads for them; return whether that was possible.

        Asked after a task was put, and after a thread is no longer idle: without a lock, either of the two sees the
        other. One thread too many, started by two at a time, ends at once.
        """
        is_short = len(self._threads) < self._most and self._tasks.qsize() > self._idle
        return not is_short or start(self._work, self._name)

    def try_run(self, task: Task) -> bool:
        """Have `task` done now, unless all threads are busy; return whether it will be."""
        if len(self._threads) >= self._most and self._tasks.qsize() >= self._idle:
            return False
        self.run(task)
        return True

    def _work(self) -> None:
        me = threading.current_thread()
        with self._lock:
            if len(self._threads) >= self._most:
                return
            self._threads.add(me)
            self._idle += 1
        while True:
            try:
                task = self._tasks.get(timeout=IDLE)
            except Empty:
                with self._lock:
                    # Leave first, then look: a thread that puts a task after the look sees that this one is gone. The
                    # other way round it would count on this one, and nobody would do the task.
                    self._threads.discard(me)
                    self._idle -= 1
                    if self._tasks.empty():
                        return
                    self._threads.add(me)
                    self._idle += 1
                continue
            with self._lock:
                self._idle -= 1
            self._see_to_threads()  # for what was put while this one still counted as idle
            self._do(task)
            del task  # it may hold a pool
            with self._lock:
                self._idle += 1

    def _do(self, task: Task) -> None:
        try:
            task()
        except BaseException:  # a SystemExit of some subscriber must not end what closes connections
            log.exception("%s: %r failed", self._name, task)


#: Closes connections whose server may be silent: each takes three seconds at most.
closers = Workers("zpgpool-close", most=4)

#: Sends cancel requests: libpq waits without limit for a server that accepts them and says nothing.
cancellers = Workers("zpgpool-cancel", most=8)
