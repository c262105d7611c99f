"""Where each thread is now: the line of the user's code, and what that waits in."""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
import threading
from types import FrameType


#: Where the user's code is not: this package, except for its demo; Python itself; what pip has installed.
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_DEMO = os.path.join(_PACKAGE, "demo", "")
_PYTHON = (sysconfig.get_path("stdlib") + os.sep, "<")
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

ENDED = "(its thread has ended)"
UNKNOWN = "(not known in a process that C code has forked)"

#: CPython's issue 106883: a garbage collection inside `sys._current_frames()` may wait for ever for a lock that a
#: thread has which is just being started.
HAS_FRAMES_BUG = sys.version_info[:2] == (3, 11) and sys.version_info < (3, 11, 9)

#: CPython since 3.11 looks for a thread's frame on its C stack. In a child that was forked without Python's hooks the
#: parent's threads are still listed, while their stacks belong to new threads (SIGSEGV, on 3.11, 3.12 and 3.13).
HAS_FRAMES_ON_STACKS = sys.version_info >= (3, 11)

#: The process in which the threads that are listed are.
_process = os.getpid()

_frames_lock = threading.RLock()

#: Whether the collector is off because of us.
_is_collector_off = False


def _renew_frames_lock() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _frames_lock, _is_collector_off, _process
    _process = os.getpid()
    _frames_lock = threading.RLock()
    if _is_collector_off:
        _is_collector_off = False
        gc.enable()


os.register_at_fork(after_in_child=_renew_frames_lock)


def current_lines() -> dict[int, str]:
    """Return the line that each thread is at, by the thread's number: once for a whole report.

    Not the frames: a frame that is kept keeps what it refers to, and a connection that its user has lost with it.
    """
    if HAS_FRAMES_ON_STACKS and _process != os.getpid():
        return {thread.ident or 0: UNKNOWN for thread in threading.enumerate()}
    return {number: line_of(frame) for number, frame in _current_frames().items()}


def line_of(frame: FrameType) -> str:
    """Return the innermost line of the user's code; behind it the innermost of all, where that is another one."""
    users: FrameType | None = frame
    while users is not None and not is_users(users.f_code.co_filename):
        users = users.f_back
    if users is None or users is frame:
        return _text(frame)
    return f"{_text(users)}, inside {_text(frame)}"


def is_users(path: str) -> bool:
    """Whether the source file is the user's own: none of this package, of Python, or of what pip has installed."""
    if path.startswith(_PACKAGE):
        return path.startswith(_DEMO)
    return not any(part in path for part in _INSTALLED) and not path.startswith(_PYTHON)


def _text(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _current_frames() -> dict[int, FrameType]:
    global _is_collector_off
    if not HAS_FRAMES_BUG:
        return sys._current_frames()
    with _frames_lock:
        was_enabled = gc.isenabled()
        try:
            _is_collector_off = was_enabled
            gc.disable()
            return sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()
            _is_collector_off = False
