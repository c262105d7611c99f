"""Whether something waits on a socket: one system call, during which this thread keeps the interpreter's lock.

`select.poll` gives the lock away for a call that takes 0.3 µs, and a thread of a busy server waits for its turn to get
it back: that cost 3 to 4 of 100 requests (docs/performance.rst).
"""

from __future__ import annotations

import ctypes
import select
import socket
from collections.abc import Callable
from functools import cache
from functools import partial


class _PollFd(ctypes.Structure):
    """POSIX, `poll.h`."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


@cache
def _poll() -> Callable[..., int]:
    return ctypes.PyDLL(None).poll


def make_look(sock: socket.socket) -> Callable[[int], int]:
    """Return a function of milliseconds, which must be few: 0 while nothing waits on `sock`, and nobody has hung up."""
    return partial(_poll(), ctypes.byref(_PollFd(sock.fileno(), select.POLLIN, 0)), 1)
