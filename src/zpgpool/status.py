"""The status page: which request holds which connection, since when, and why others wait. Also as JSON and metrics.

Open to this machine, and to clients that send the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from string import Template
from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl
from urllib.parse import quote

from webob import Request
from webob import Response
from zope.interface.registry import Components

from .monitor import begin
from .monitor import Beside
from .monitor import describe
from .monitor import draw
from .monitor import draw_site
from .monitor import Folder
from .monitor import history_of
from .monitor import join_server
from .monitor import Json
from .monitor import list_pools
from .monitor import merge
from .monitor import name_blockers
from .monitor import only
from .monitor import package_version
from .monitor import Peers
from .monitor import Share
from .monitor import time_of_day
from .monitor import title
from .monitor import total
from .monitor import VERSION
from .settings import SettingError


if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIEnvironment


POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

#: What a proxy adds: REMOTE_ADDR is then the proxy's, not the client's.
FORWARDED = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST", "HTTP_X_REAL_IP")

STATIC = {"/status.css": "text/css", "/status.js": "text/javascript", "/icon.svg": "image/svg+xml"}


class StatusApp:
    """Shows the pools of this process: `/` the page, `/json` the same as data, `/metrics` for Prometheus.

    token -- opens it to clients that send `Authorization: Bearer <token>`; without, it is open to this machine's own
        addresses only, and for a `Host` that names this machine, and not through a proxy that says that it is one.
    loopback -- False: not for this machine's own addresses either. A proxy on this machine that adds no header makes
        every client look local.
    show_sql -- with the text of the queries that run.
    registry -- where the pools are registered; by default the global registry.
    share -- a folder by which the processes of a site find each other: the page, the JSON and the metrics are of all of
        them, whichever answers. It belongs to the site's user, and no other user can write to it.
    listen -- HOST:PORT, as "127.0.0.1:8091": there the page is served, too, by threads of its own, in whichever process
        has the port.
    peers -- the URLs of the status pages of other machines, with the same token: the page and the JSON have their
        processes, too.

    Raises SettingError when no client could see it.
    """

    def __init__(
        self,
        token: str | None = None,
        show_sql: bool = False,
        registry: Components | None = None,
        loopback: bool = True,
        share: str | None = None,
        listen: str | None = None,
        peers: Sequence[str] = (),
    ) -> None:
        if not loopback and not token:
            raise SettingError("option 'loopback': expected true where no token is given: no client could see the page")
        folder = files(__package__) / "monitor" / "static"
        self._page = Template((folder / "status.html").read_text("utf-8"))
        self._static = {path: (folder / path[1:]).read_bytes() for path in STATIC}
        self._token = token.encode() if token else None
        self._is_loopback_open = loopback
        self._show_sql = show_sql
        self._registry = registry
        self._word = secrets.token_hex(8)
        try:
            self._peers = Peers(peers, token) if peers else None
        except SettingError as error:
            raise SettingError(f"option 'peers': {error}") from None
        self._share = None if share is None else _share(share, registry)
        self._is_site = self._share is not None or self._peers is not None
        self._beside = None if listen is None else Beside(listen, self, self._share.folder if self._share else None)
        self._metrics = _exposition(registry, self._share)
        begin()
        for _, pool in list_pools(registry):
            history_of(pool)
        self._start()

    def _start(self) -> None:
        for each in (self._share, self._beside):
            if each is not None:
                each.start()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self._start()
        response = self._answer(environ)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response(environ, start_response)

    def _answer(self, environ: WSGIEnvironment) -> Response:
        path = environ.get("PATH_INFO") or "/"
        pages: dict[str, Callable[[WSGIEnvironment], Response] | None] = dict.fromkeys(STATIC, self._file)
        pages |= {"/": self._front, "/json": self._json, "/metrics": self._metrics}
        page = pages.get(path) if self._is_open_to(environ) else None
        if page is None:
            return Response("Not found\n", status=404, content_type="text/plain", charset="utf-8")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return Response(
                "Only GET and HEAD\n", status=405, content_type="text/plain", charset="utf-8", allow="GET, HEAD"
            )
        return page(environ)

    def _is_open_to(self, environ: WSGIEnvironment) -> bool:
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if self._token is not None and scheme.lower() == "bearer":
            if hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token):
                return True
        if not self._is_loopback_open or any(name in environ for name in FORWARDED):
            return False
        # The address alone says little: a proxy on this machine may add no header, or the server strip it. But it sends
        # the site's Host on; so does a browser that was told that a foreign name is this machine's.
        return _is_loopback(environ.get("REMOTE_ADDR", "")) and _is_local(environ.get("HTTP_HOST", ""))

    def _front(self, environ: WSGIEnvironment) -> Response:
        offers = Request(environ).accept.acceptable_offers(["text/html", "application/json"])
        if offers and offers[0][0] == "application/json":
            return self._json(environ)
        snapshot = self._take(environ)
        root = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace"))
        links = f' · <a href="{root}/metrics">Metrics</a>' if self._metrics else ""
        if root:
            links += f' · <a href="{root.rpartition("/")[0]}/">Back to the site</a>'
        main = draw_site(snapshot) if self._is_site else draw(snapshot)
        text = self._page.substitute(title=title(snapshot), root=root, links=links, main=main)
        return Response(text, content_type="text/html", charset="utf-8", vary="Accept")

    def _json(self, environ: WSGIEnvironment) -> Response:
        return Response(json.dumps(self._take(environ)).encode(), content_type="application/json", vary="Accept")

    def _file(self, environ: WSGIEnvironment) -> Response:
        path = environ["PATH_INFO"]
        return Response(self._static[path], content_type=STATIC[path], charset="utf-8")

    def _take(self, environ: WSGIEnvironment) -> Json:
        """Return the snapshot: of this process, or of the site; of one process, or one path of it, if that is asked."""
        pools, host = list_pools(self._registry), socket.gethostname()
        silent: list[tuple[int, str, str]] = []
        if self._share is None:
            seen = [describe(name, pool, monotonic()) for name, pool in pools]
            own: Json = {"id": f"{self._word}-{os.getpid()}", "process": os.getpid(), "host": host}
            told = [{**own, "zpgpool": package_version(), "pools": seen}]
        else:
            told, silent = self._share.snapshots()
        wanted = dict(parse_qsl(environ.get("QUERY_STRING", ""), errors="replace"))
        is_peers = "own" in wanted  # the page that asks adds up, and asks the server
        if self._peers is not None and not is_peers:
            theirs, lost = self._peers.snapshots(each["id"] for each in told)
            told, silent = [*told, *theirs], [*silent, *lost]
        site = merge(told, silent)
        process = wanted.get("process", "")
        unknown: list[Json] | None = None
        if not is_peers:
            here = [dict(pools).get(pool["name"]) for pool in site["pools"]]
            unknown = join_server(site["pools"], here, self._show_sql, is_site=self._is_site and not process)
        name_blockers(site["pools"])
        if process:  # after that: it may wait for a backend of another process
            site = merge(
                (each for each in told if str(each["process"]) == process),
                (each for each in silent if str(each[0]) == process),
            )
        snapshot: Json = {"version": VERSION, "at": time_of_day(), "process": os.getpid(), "host": host}
        snapshot["asked"] = {"process": process, "path": wanted.get("path", "")}
        snapshot |= {"unknown": None if unknown is None else len(unknown), "unknown_sessions": unknown or []}
        return only({**snapshot, **total(site), **site})


#: One for each folder and registry: two pages of one process must not count its pools twice.
_shares: dict[tuple[str, Components | None], Share] = {}


def _share(path: str, registry: Components | None) -> Share:
    folder = Folder(path)
    key = (folder.path, registry)
    if key not in _shares:
        _shares[key] = Share(folder, partial(list_pools, registry))
    return _shares[key]


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a unix socket has none: the client is not known
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _is_local(host: str) -> bool:
    """Whether a `Host` header names this machine; one that is missing does not (HTTP/1.0, and odd proxies)."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower() == "localhost" or _is_loopback(name)


def _exposition(registry: Components | None, share: Share | None) -> Callable[[WSGIEnvironment], Response] | None:
    """Return what answers `/metrics`, or None without the extra `metrics`."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client import CONTENT_TYPE_LATEST
        from prometheus_client import generate_latest
    except ImportError:
        return None
    from .metrics import PoolCollector
    from .metrics import SiteCollector

    collectors = CollectorRegistry()
    collectors.register(PoolCollector(registry) if share is None else SiteCollector(share))

    def answer(environ: WSGIEnvironment) -> Response:
        try:
            response = Response(generate_latest(collectors))
        except OSError as error:  # less than what was shown before would be taken for a restart
            text = f"The counters cannot be read: {error.strerror or error}\n"
            return Response(text, status=503, content_type="text/plain", charset="utf-8")
        response.headers["Content-Type"] = CONTENT_TYPE_LATEST
        return response

    return answer
