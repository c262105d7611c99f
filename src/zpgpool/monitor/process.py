"""What has threads of its own in each process of a site: it begins again in a process that was forked."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from abc import ABC
from abc import abstractmethod

from ..core import will_fork
from ..errors import one_line


log = logging.getLogger("zpgpool")


class PerProcess(ABC):
    """Begins once in each process, and ends with it. Another class says what that is."""

    def __init__(self) -> None:
        self._pid = 0
        self._starting = threading.Lock()
        #: Whether this process has made others by os.fork().
        self.has_forked = False
        _all.append(self)

    def start(self) -> None:
        """Begin in this process, if that is not done yet: each request calls it, for forks that no hook tells of."""
        if self._pid != os.getpid() and not will_fork():
            with self._starting:
                if self._pid != os.getpid():
                    if self._pid:
                        self.forget()
                    self._pid = os.getpid()
                    self.has_forked = False
                    try:
                        self.begin()
                    except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
                        log.warning("%s cannot begin: %s", self, one_line(error))

    def close(self) -> None:
        """End for good."""
        if self in _all:
            _all.remove(self)
        if self._pid == os.getpid():
            self.end()

    @abstractmethod
    def begin(self) -> None:
        """Start what is to run in this process."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of what a fork has brought along, without harm to the parent that has it."""

    @abstractmethod
    def end(self) -> None:
        """End what runs in this process, which ends."""


_all: list[PerProcess] = []


def _forked_child() -> None:
    for each in _all:
        each._starting = threading.Lock()  # another thread of the parent may have held it
        if each._pid:
            each.start()


def _forked_parent() -> None:
    for each in _all:
        each.has_forked = True


def _end_all() -> None:
    for each in _all:
        if each._pid == os.getpid():
            each.end()


os.register_at_fork(after_in_child=_forked_child, after_in_parent=_forked_parent)
atexit.register(_end_all)
