"""How a query of another thread is ended: the server is asked to cancel it, then its socket is cut."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from queue import Empty
from queue import SimpleQueue
from time import monotonic
from time import sleep

from .entry import Entry
from .libpq import CancelHandle
from .workers import cancellers


#: What `cancel()` may take when a connection is closed during a query, in seconds: it dials the server once more.
CANCEL = 1.0

#: How long a query may take to end after it was cancelled, in seconds, before its socket is ended. A COPY that was
#: broken off never does.
CANCELLED = 0.1


def hang_up(entries: Iterable[Entry]) -> None:
    """End the queries that run on `entries`, so that closing them does not wait.

    The server is asked to cancel: otherwise it would count the session until the query is done. Then it is told that
    nothing more comes, and read until it hangs up: a COPY that was broken off may fill the socket, and a server that
    waits for room there neither cancels nor ends. Where it does not hang up, the socket is cut.
    Takes `CANCEL` and twice `CANCELLED` seconds at most.
    """
    busy = [entry for entry in entries if entry.is_active]
    cancel(busy)
    deadline = monotonic() + CANCELLED
    while busy and monotonic() < deadline:
        busy = [entry for entry in busy if entry.is_active]
        sleep(0.001)
    deadline = monotonic() + CANCELLED
    for entry in busy:
        if not entry.let_end(deadline):
            entry.cut()


def cut_late(entries: Iterable[Entry], is_done: threading.Event) -> None:
    """End the queries of `entries`, and their sockets, if something is not done within `CANCEL` seconds."""
    if not is_done.wait(CANCEL):
        cancel(entries, CANCELLED)
        for entry in entries:
            entry.cut()


def cancel(entries: Iterable[Entry], timeout: float = CANCEL) -> int:
    """Ask the server to end the queries that run on `entries`, and wait for so long until it is told.

    Returns how many it is asked for: as many at a time as there are threads for that.
    """
    deadline = monotonic() + timeout
    sent: SimpleQueue[None] = SimpleQueue()
    asked = sum(cancellers.try_run(partial(_cancel, entry.cancel_handle, sent)) for entry in entries if entry.is_active)
    if timeout > 0:
        with suppress(Empty):
            for _ in range(asked):
                sent.get(timeout=max(0.0, deadline - monotonic()))
    return asked


def _cancel(handle: CancelHandle, sent: SimpleQueue[None]) -> None:
    try:
        handle.send()
    finally:
        sent.put(None)
