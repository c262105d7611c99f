"""A TCP proxy for faults on the wire: it forwards, falls silent, breaks off, or puts in messages of its own."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from waiting import eventually


class Proxy:
    """Forwards connections to `port` on this host."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._ever: list[socket.socket] = []
        self._forgotten: list[tuple[socket.socket, threading.Thread]] = []
        self.accepted = 0
        #: Called with each chunk a client sends, returns what goes on: a wire tap.
        self.tap: Callable[[bytes], None] = lambda data: None
        #: False: nothing is forwarded any more, and nothing is closed.
        self.is_forwarding = True
        #: How long each chunk takes on its way, in seconds: one after another, for all clients.
        self.delay = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._is_closed = False
        self._is_listening = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def dsn(self, dsn: str) -> str:
        from psycopg2.extensions import make_dsn

        return make_dsn(dsn, host="127.0.0.1", port=self.port, sslmode="disable", gssencmode="disable")

    def _run(self) -> None:
        while not self._is_closed:
            listeners = [self._listener] if self._is_listening else []
            sockets = [*listeners, *(sock for pair in list(self._pairs) for sock in pair)]
            try:
                readable, _, _ = select.select(sockets if self.is_forwarding else listeners, [], [], 0.02)
            except (OSError, ValueError):
                continue
            for sock in readable:
                if sock is self._listener:
                    self._accept()
                else:
                    self._forward(sock)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.accepted += 1
        try:
            pair = client, socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # the server is down
            client.close()
            return
        self._pairs.append(pair)
        self._ever.extend(pair)

    def _forward(self, sock: socket.socket) -> None:
        for pair in list(self._pairs):
            if sock in pair:
                other = pair[1] if sock is pair[0] else pair[0]
                try:
                    data = sock.recv(65536)
                    if self.delay:
                        time.sleep(self.delay)
                    if data and sock is pair[0]:
                        self.tap(data)
                    if data:
                        other.sendall(data)
                        return
                except OSError:
                    pass
                self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        if self._take(pair):
            for sock in pair:
                sock.close()

    def _take(self, pair: tuple[socket.socket, socket.socket]) -> bool:
        """Whether the pair is the caller's, to close or to forget: the proxy's thread and the test's may both try."""
        try:
            self._pairs.remove(pair)
        except ValueError:
            return False
        return True

    def inject(self, message: bytes) -> None:
        """Send `message` to every client, as if it came from the server."""
        for client, _ in self._pairs:
            client.sendall(message)

    def fin(self) -> None:
        """End every connection, politely."""
        self._stop_and(lambda client: None)

    def refuse(self) -> None:
        """Refuse who connects from now on: libpq tries its next host then, and only then."""
        self._is_listening = False
        self._listener.close()

    def rst(self) -> None:
        """End every connection with a reset."""
        self._stop_and(self._linger)

    @staticmethod
    def _linger(client: socket.socket) -> None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _stop_and(self, prepare: Callable[[socket.socket], None]) -> None:
        for pair in list(self._pairs):
            if self._take(pair):
                prepare(pair[0])
                for sock in pair:
                    sock.close()

    def forget(self) -> None:
        """Forget the flows as a firewall does: nothing is told, and who sends gets a reset."""
        for client, upstream in [pair for pair in list(self._pairs) if self._take(pair)]:
            upstream.close()
            thread = threading.Thread(target=self._reset_on_send, args=(client,), daemon=True)
            thread.start()
            self._forgotten.append((client, thread))

    def _reset_on_send(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if client.recv(1):
                self._linger(client)

    def close(self) -> None:
        self._is_closed = True
        self._thread.join()
        for client, thread in self._forgotten:
            with suppress(OSError):  # it has sent, and was reset
                client.shutdown(socket.SHUT_RDWR)
            thread.join()
        for sock in [*self._ever, self._listener]:
            sock.close()

    def wait_for(self, connections: int) -> None:
        eventually(lambda: len(self._pairs) == connections)
