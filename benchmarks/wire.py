"""A relay before the server that counts round trips, each of which ends with a ReadyForQuery, and may delay them."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any


#: "Z", its length, and then the transaction's status (PostgreSQL documentation, "Message Formats").
READY = b"Z\x00\x00\x00\x05"


class Wire:
    """Listens on `port`, and passes all on to the server's port on this machine, after `delay` seconds each way."""

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self._target = target
        self._delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.round_trips = 0

    def settled(self) -> int:
        """Return the count when nothing has come for a moment."""
        seen = -1
        while seen != self.round_trips:
            seen = self.round_trips
            time.sleep(0.02)
        return seen

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, is_server in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass_on, args=(source, sink, is_server), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_server: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_server:
                    self.round_trips += data.count(READY)
                if self._delay:
                    time.sleep(self._delay)
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._listener.close()
