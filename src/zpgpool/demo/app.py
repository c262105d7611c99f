"""The demo's application: notes in a database, one page for each promise of the middleware."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template

from psycopg2.extensions import connection as Connection
from webob import Request
from webob import Response
from webob.dec import wsgify
from webob.exc import HTTPBadRequest
from webob.exc import HTTPMethodNotAllowed
from webob.exc import HTTPNotFound
from webob.exc import HTTPSeeOther
from webob.util import html_escape

from .. import get_pool
from ..core import AbstractConnectionPool
from ..wsgi import get_connection
from .load import Load
from .load import LOCKED
from .load import SECONDS
from .load import Tally
from .server import EmbeddedServer


#: One table; the lock keeps two processes from making it at the same time, which IF NOT EXISTS does not.
SCHEMA = """
SELECT pg_advisory_xact_lock(7410231);
CREATE TABLE IF NOT EXISTS notes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), note text NOT NULL)
"""

#: How long a note may be, in characters, and how many the page shows.
LONGEST = 500
SHOWN = 100

#: The buttons: the path, the words, and what comes of it.
BUTTONS = {
    "/load": (f"Make {SECONDS:g} seconds of load", "more users than connections: some wait their turn"),
    "/lock": (
        "Hold a lock",
        f"for {LOCKED:g} seconds: some of the load waits for it",
    ),
    "/kill": ("Kill a backend", "the process of the server that the oldest request uses"),
    "/fill": ("Fill the queue", "until nobody else may wait: this very request is answered 503"),
    "/restart": ("Restart the database", "under load: its requests wait until it is back"),
}

#: Where demo.ini has the status page.
STATUS = "/status"

#: How many rows a chunk of the stream has.
CHUNK = 1000

POLICY = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'"


def app_factory(global_conf: Mapping[str, str]) -> DemoApp:
    """Return the application (PasteDeploy's `paste.app_factory`)."""
    return DemoApp()


class DemoApp:
    """`/` notes, `/stream` rows while they come, `/slow` keeps its connection, `/fail` stores nothing; and the BUTTONS.

    `/restart` is there where the database is the demo's own: `own_server`.
    """

    #: Set by `serve`.
    own_server: EmbeddedServer | None = None

    def __init__(self) -> None:
        self._style = (files(__package__) / "style.css").read_bytes()
        self._lock = threading.Lock()
        self._is_ready = False
        self._load = Load()

    @wsgify
    def __call__(self, request: Request) -> Response:
        pages = {
            "/": self.notes,
            "/stream": self.stream,
            "/slow": self.slow,
            "/fail": self.fail,
            "/load": self.load,
            "/lock": self.lock,
            "/kill": self.kill,
            "/fill": self.fill,
            "/restart": self.restart,
            "/style.css": self.style,
        }
        try:
            path = request.path_info
        except UnicodeDecodeError:
            raise HTTPBadRequest("The path is not UTF-8.") from None
        page = pages.get(path)
        if page is None:
            raise HTTPNotFound()
        allowed = ["POST"] if path in BUTTONS else ["GET", "HEAD", "POST"] if path == "/" else ["GET", "HEAD"]
        if request.method not in allowed:
            raise HTTPMethodNotAllowed(headers={"Allow": ", ".join(allowed)})
        return page(request)

    def notes(self, request: Request) -> Response:
        """Show the notes, or store one."""
        conn = self._connect(request)
        with conn.cursor() as cursor:
            if request.method == "POST":
                note = request.POST.get("note", "")
                note = note.strip().replace("\0", "") if isinstance(note, str) else ""
                if not 0 < len(note) <= LONGEST:
                    raise HTTPBadRequest(f"A note has 1 to {LONGEST} characters.")
                cursor.execute("INSERT INTO notes (note) VALUES (%s)", [note])
                conn.commit()
                raise HTTPSeeOther(location=request.path_url)
            cursor.execute(
                "SELECT to_char(at, 'YYYY-MM-DD HH24:MI:SS'), note FROM notes ORDER BY id DESC LIMIT %s", [SHOWN]
            )
            rows = cursor.fetchall()
        items = "\n".join(f"<li>{html_escape(note)}<time>{html_escape(at)}</time></li>" for at, note in rows)
        return self._answer(
            request,
            conn,
            "Notes",
            '<p class="lead">Each note is a row in PostgreSQL, each page comes over the connection of its thread.</p>\n'
            f'<form method="post" action="{html_escape(request.path_url)}">'
            f'<input name="note" maxlength="{LONGEST}" aria-label="A note" placeholder="A note" required autofocus>'
            "<button>Add</button></form>\n" + (f"<ol>{items}</ol>" if rows else "<p>No notes yet.</p>") + "\n"
            "<h2>What can happen to it</h2>\n"
            + "\n".join(
                f'<form method="post" action="{html_escape(request.script_name)}{path}">'
                f"<button>{button}</button> <span>{html_escape(what)}</span></form>"
                for path, (button, what) in BUTTONS.items()
                if path != "/restart" or self.own_server
            ),
        )

    def stream(self, request: Request) -> Response:
        """Send `rows` rows while a named cursor fetches them: the connection is the request's until the last one."""
        count = _number(request, "rows", 10_000, 10_000_000)
        return Response(
            app_iter=self._rows(self._connect(request), int(count)), content_type="text/plain", charset="utf-8"
        )

    def _rows(self, conn: Connection, count: int) -> Iterator[bytes]:
        with conn.cursor(name="stream") as cursor:
            cursor.execute("SELECT number, md5(number::text) FROM generate_series(1, %s) AS number", [count])
            while rows := cursor.fetchmany(CHUNK):
                yield "".join(f"{number} {digest}\n" for number, digest in rows).encode()

    def slow(self, request: Request) -> Response:
        """Keep the connection busy for `seconds`."""
        seconds = _number(request, "seconds", 2, 60)
        conn = self._connect(request)
        with conn.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [seconds])
        return self._answer(request, conn, "Slow", f"<p>The server slept for {seconds:g} seconds.</p>")

    def fail(self, request: Request) -> Response:
        """Write, then raise: the middleware rolls back."""
        with self._connect(request).cursor() as cursor:
            cursor.execute("INSERT INTO notes (note) VALUES ('never stored')")
        raise RuntimeError("this page fails after it has written: nothing is stored")

    def load(self, request: Request) -> Response:
        """Have more threads than there are connections use the pool for a while, and show it meanwhile."""
        self._load.start(_pool())
        raise HTTPSeeOther(location=f"{request.application_url}{STATUS}")

    def lock(self, request: Request) -> Response:
        """Have a request hold a lock for which others wait, and show it meanwhile."""
        self._load.lock(_pool())
        raise HTTPSeeOther(location=f"{request.application_url}{STATUS}")

    def kill(self, request: Request) -> Response:
        """End a process of the server, and tell what became of the requests."""
        killed, tally = self._load.kill(_pool())
        was = f"It served <code>{html_escape(killed)}</code>, which then ran again. " if killed else ""
        return self._tell(request, "Killed", f"One process of the server was ended. {was}", tally)

    def fill(self, request: Request) -> Response:
        """Fill the queue, and then ask for a connection: the answer is the 503 of `unavailable`."""
        pool = _pool()
        if pool.settings.max_waiting is None:
            raise HTTPBadRequest("This pool has no max_waiting: its queue is never full.")
        self._load.fill(pool, pool.settings.max_waiting)
        conn = self._connect(request)
        return self._answer(request, conn, "Served", "<p>The queue was not full any more: this request was served.</p>")

    def restart(self, request: Request) -> Response:
        """Restart the database under that load, and tell what became of its requests."""
        if self.own_server is None:
            raise HTTPNotFound()
        down, tally = self._load.restart(_pool(), self.own_server)
        return self._tell(request, "Restarted", f"PostgreSQL was down for {down:.1f} seconds. ", tally)

    def _tell(self, request: Request, title: str, what: str, tally: Tally) -> Response:
        return self._answer(
            request,
            self._connect(request),
            title,
            f'<p class="lead">{what}Of {tally.requests} requests meanwhile '
            f"<strong>{tally.failed or 'none'} failed</strong>; the longest took {tally.longest:.1f} seconds, "
            "of which its own query takes up to one.</p>\n"
            f'<p>See <a href="{html_escape(request.script_name)}{STATUS}">what the pool says of it</a>.</p>',
        )

    def style(self, request: Request) -> Response:
        """Return the style sheet: no connection is taken for it."""
        return Response(self._style, content_type="text/css", charset="utf-8", cache_control="max-age=3600")

    def _connect(self, request: Request) -> Connection:
        conn = get_connection(request.environ)
        if not self._is_ready:
            with self._lock, conn.cursor() as cursor:
                cursor.execute(SCHEMA)
                conn.commit()
                self._is_ready = True
        return conn

    def _answer(self, request: Request, conn: Connection, title: str, main: str) -> Response:
        served = (
            f"Served by thread <code>{html_escape(threading.current_thread().name)}</code>"
            f" over backend <code>{conn.info.backend_pid}</code>"
        )
        return draw(request, title, main, served)


@cache
def _template() -> Template:
    return Template((files(__package__) / "page.html").read_text("utf-8"))


def draw(request: Request, title: str, main: str, served: str, status: int = 200) -> Response:
    """Return a page of the demo."""
    root = html_escape(request.script_name)
    text = _template().substitute(title=title, root=root, status=STATUS, main=main, served=served)
    response = Response(text, status=status, cache_control="no-store")
    response.headers["Content-Security-Policy"] = POLICY
    return response


@wsgify
def unavailable(request: Request) -> Response:
    """Answer in place of the middleware's own 503: its option `unavailable` in demo.ini."""
    main = (
        '<p class="lead">503 Service Unavailable: no connection came free in time, or the server gave none. '
        "The response says <code>Retry-After: 5</code>, and the log says who holds the connections.</p>\n"
        f'<p>See <a href="{html_escape(request.script_name)}{STATUS}">what the pool says of it</a>, or '
        f'<a href="{html_escape(request.script_name)}/">try again</a>.</p>'
    )
    response = draw(request, "Not now", main, "Served without a connection", status=503)
    response.headers["Retry-After"] = "5"
    return response


def _pool() -> AbstractConnectionPool:
    pool = get_pool()
    assert isinstance(pool, AbstractConnectionPool)
    return pool


def _number(request: Request, name: str, default: float, most: float) -> float:
    try:
        value = float(request.GET.get(name, default))
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise HTTPBadRequest(f"{name} is a number from 0 to {most:g}.")
    return value
