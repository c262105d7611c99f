"""The status page beside the site, on a port of its own: for when all threads of the site's server wait.

Each process of a site tries to get the port. The one that has it serves the page of all from two threads of its own,
until it ends; then another one gets it.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from io import BytesIO
from socketserver import TCPServer
from time import monotonic
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.simple_server import WSGIServer

from ..errors import one_line
from ..errors import SettingError
from .folder import Folder
from .process import log
from .process import PerProcess
from .share import SCARCE


if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


#: How many threads serve, and how long a client may take for its request, and again for the answer, in seconds.
THREADS = 2
PATIENCE = 2.0

#: A longer head of a request is refused, in bytes.
LONGEST = 1 << 16

#: How often a process tries to get a port that another one has, in seconds.
EVERY = 0.5


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        """Read the request's head whole: with a timeout for each part, a client that drips keeps the thread."""
        head, until = b"", monotonic() + PATIENCE
        while b"\r\n\r\n" not in head:
            self.request.settimeout(max(0.001, until - monotonic()))
            part = self.request.recv(LONGEST)
            head += part
            if not part or len(head) > LONGEST:
                raise ConnectionError
        self.request.settimeout(PATIENCE)
        super().setup()
        self.rfile = BytesIO(head)

    def log_message(self, *args: object) -> None:
        """Log nothing: the site's server has the log of requests."""


class _Server(WSGIServer):
    allow_reuse_address = True

    def server_bind(self) -> None:
        """Bind as TCPServer does: HTTPServer would look its own name up, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class Beside(PerProcess):
    """Serves `app` at `address`, HOST:PORT. Raises SettingError.

    folder -- what the site shares, if it does: then only the folder's owner serves.
    """

    def __init__(self, address: str, app: WSGIApplication, folder: Folder | None = None) -> None:
        self.address = read_address(address)
        self._folder = folder
        self._app = app
        self._server: _Server | None = None
        super().__init__()

    def __str__(self) -> str:
        return f"the status page at {self.address[0]}:{self.address[1]}"

    def begin(self) -> None:
        """See `PerProcess`: the port may be another process's for as long as that lives.

        A process of root leaves the port to its workers, which run as the site's user, as `Share` does.
        """
        if self._folder is not None and os.geteuid() != self._folder.owner:
            self._pid = 0
            return
        threading.Thread(target=self._get_port, args=(self._pid,), name="zpgpool-listen", daemon=True).start()

    def forget(self) -> None:
        """See `PerProcess`: with a copy of the parent's socket the port would be taken when the parent is gone."""
        server, self._server = self._server, None
        if server is not None:
            server.socket.close()

    def end(self) -> None:
        """See `PerProcess`."""
        server, self._server, self._pid = self._server, None, 0
        if server is not None:
            try:
                server.socket.shutdown(socket.SHUT_RDWR)  # wakes the threads that accept
            except OSError:
                pass
            server.server_close()

    def _get_port(self, pid: int) -> None:
        kind = _Server6 if ":" in self.address[0] else _Server
        while self._pid == pid:
            try:
                server = kind(self.address, _Handler)
            except OSError as error:
                if error.errno != errno.EADDRINUSE and error.errno not in SCARCE:
                    log.warning("%s cannot be served: %s", self, one_line(error))
                    return
                time.sleep(EVERY)
                continue
            server.set_app(self._app)
            self._server = server
            if self._pid != pid:  # it was ended meanwhile
                self.end()
                return
            for number in range(THREADS):
                threading.Thread(
                    target=_serve, args=(server,), name=f"zpgpool-listen-{number + 1}", daemon=True
                ).start()
            return


def _serve(server: _Server) -> None:
    while True:
        try:
            request, address = server.get_request()
        except OSError as error:
            if error.errno not in SCARCE:
                return  # it was closed
            time.sleep(EVERY)
            continue
        try:
            server.finish_request(request, address)
        except OSError:  # the client has disconnected, or says nothing
            pass
        except Exception:
            log.exception("an answer beside the site failed")
        finally:
            server.shutdown_request(request)


def read_address(text: str) -> tuple[str, int]:
    """Return the host and the port of HOST:PORT, [::1]:8091 included. Raises SettingError."""
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise SettingError(f"option 'listen': expected HOST:PORT, as 127.0.0.1:8091, got {text!r}")
    return host, int(port)
