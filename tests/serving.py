"""Real servers, for as long as a test wants them."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from waitress import wasyncore
from waitress.server import create_server

from conftest import Call


@contextmanager
def waitress(app: Any, **options: Any) -> Iterator[int]:
    """Run `app` under a real waitress in a thread, and give its port."""
    # Its buffers for slow clients stay in memory: the files that it uses otherwise it forgets to close.
    server: Any = create_server(app, host="127.0.0.1", port=0, outbuf_overflow=1 << 30, **options)
    is_over = threading.Event()

    def run_loop() -> None:  # as server.run() does, but it can be ended
        while not is_over.is_set():
            wasyncore.loop(0.05, map=server._map, count=1)

    loop = Call(run_loop)
    try:
        yield int(server.effective_port)
    finally:
        server.task_dispatcher.shutdown()
        is_over.set()
        loop.result()
        wasyncore.close_all(server._map)


def end(process: subprocess.Popen[Any], how: signal.Signals = signal.SIGTERM, seconds: float = 20) -> None:
    """Ask a server to end, and wait; kill one that has missed the signal.

    A worker of gunicorn that is just being forked does, and its master then waits for it (benoitc/gunicorn#1910).
    """
    process.send_signal(how)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
