"""How the tests and `make stress` wait for what others do, and judge how long something took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for what another process or thread does, and return it: the one place where tests wait for real time."""
    start = time.monotonic()
    while not (result := condition()):
        assert is_within(time.monotonic() - start, seconds), f"not within {seconds} s"
        time.sleep(0.002)
    return result


def is_within(seconds: float, bound: float) -> bool:
    """Whether something took less than `bound` seconds, or would have on a machine that had nothing else to do.

    Only who exceeds the bound is asked how busy the machine is: on a quiet one it stands as it is.
    """
    return seconds < bound or seconds < bound * max(_slowness() for _ in range(5))


def _slowness() -> float:
    """Return how many times longer than its own time work takes now."""
    start, began = time.monotonic(), time.thread_time()
    while (worked := time.thread_time() - began) < 0.1:
        pass
    return (time.monotonic() - start) / worked
