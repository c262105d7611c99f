"""`zpgpool demo`: starts what the demo needs, serves it, and leaves nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterable
from configparser import InterpolationError
from functools import partial
from importlib.resources import as_file
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psycopg2
from webob import Request
from webob.util import html_escape

from .. import query_pool
from .. import unregister_pool
from ..dsn import check_dsn
from ..dsn import read_environment
from ..errors import CommandError
from ..errors import one_line
from ..settings import SettingError
from .app import DemoApp
from .app import draw
from .server import EmbeddedServer
from .server import ServerError


if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIApplication
    from _typeshed.wsgi import WSGIEnvironment


log = logging.getLogger("zpgpool.demo")

#: How many threads waitress gets: as many as `maxconn` in demo.ini, so that none has to wait.
THREADS = 8


def data_folder() -> Path:
    """Return the folder that keeps the demo's database, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "zpgpool" / "demo"


def serve(args: argparse.Namespace) -> None:
    """Run the demo until SIGINT or SIGTERM. Raises CommandError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("waitress").setLevel(logging.WARNING)
    # From here on a signal is an exception, wherever we are: the stack below cleans up.
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts us in the background ignores SIGINT for us
        signal.signal(number, _interrupt)
    try:
        with contextlib.ExitStack() as stack:
            _serve(args, stack)
    except KeyboardInterrupt:
        pass
    except (ServerError, SettingError) as error:
        raise CommandError(str(error)) from None
    for number in (signal.SIGINT, signal.SIGTERM):  # all is cleaned up: another Ctrl-C shall draw no traceback
        signal.signal(number, signal.SIG_IGN)
    print("Stopped.", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _serve(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    try:
        from paste.deploy import loadapp
        from waitress.server import create_server
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'zpgpool[demo]'") from None
    listening = stack.enter_context(_listen(args.host, args.port))
    dsn = args.dsn
    if dsn is None:
        print("Starting PostgreSQL ...", flush=True)
        DemoApp.own_server = stack.enter_context(EmbeddedServer(args.data or data_folder()))
        dsn = DemoApp.own_server.dsn
    else:
        _try(dsn)
    os.environ["ZPGPOOL_DEMO_DSN"] = read_environment(dsn)
    ini = args.ini
    if ini is None:
        ini = stack.enter_context(as_file(files("zpgpool.demo") / "demo.ini"))
    if not Path(ini).is_file():
        raise CommandError(f"there is no file {ini}")
    stack.callback(_close_pool)
    try:
        app = loadapp(f"config:{Path(ini).absolute()}")
    except SettingError:
        raise
    except Exception as error:
        # The error of a misplaced % quotes what follows it, which may be a password.
        what = "a % in a value is written %%" if isinstance(error, InterpolationError) else one_line(error)
        raise CommandError(f"cannot load {ini}: {what}") from None
    server = create_server(partial(_show_errors, app), sockets=[listening], threads=THREADS, ident="zpgpool demo")
    stack.callback(server.close)
    # A query that runs is cancelled with its pool; waitress would wait 5 seconds for it before.
    dispatcher = server.task_dispatcher
    dispatcher.shutdown = partial(dispatcher.shutdown, timeout=1)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if DemoApp.own_server is not None:
        print(f"Its PostgreSQL: psql '{dsn}'")
    print(f"Serving on http://{shown}:{port}/  (Ctrl-C stops it)", flush=True)
    server.run()


def _show_errors(app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer with a page that leads back, outside of the middleware, which has rolled back."""
    try:
        return app(environ, start_response)
    except Exception as error:
        log.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
        main = f'<p class="lead">500 Internal Server Error: {html_escape(error)}.</p>'
        return draw(Request(environ), "Failed", main, "Nothing was stored", status=500)(environ, start_response)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise CommandError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None


def _try(dsn: str) -> None:
    dsn = read_environment(dsn)
    check_dsn(dsn)
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError as error:
        raise CommandError(f"cannot connect: {' '.join(str(error).split())}") from None


def _close_pool() -> None:
    if query_pool() is not None:
        unregister_pool().close(timeout=1.0)
