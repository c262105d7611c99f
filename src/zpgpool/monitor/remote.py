"""Status pages of other machines, asked by HTTP: all at once, and none is waited for longer than the deadline."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterable
from http.client import HTTPException
from time import monotonic
from urllib.error import HTTPError
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import build_opener
from urllib.request import HTTPRedirectHandler
from urllib.request import Request

from ..errors import CommandError
from ..errors import SettingError
from .site import is_document
from .snapshot import Json


#: How long all answers together may take, in seconds, and for how long they are shown again.
DEADLINE = 1.0
FRESH = 1.0

#: How large an answer may be, in bytes.
LONGEST = 10_000_000

SILENT = f"no answer within {DEADLINE:g} s"
OTHER = "what answers is no status page of this version of zpgpool"


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        """Follow no redirect: the token is for one address."""


def request_for(url: str, token: str | None = None, query: str = "") -> Request:
    """Return the request for the JSON of the status page at `url`. Raises SettingError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise SettingError("expected the URL of a status page, as http://localhost:8080/status")
    path = parts.path.rstrip("/").removesuffix("/json")
    request = Request(parts._replace(path=f"{path}/json", query=query, fragment="").geturl())
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def fetch(request: Request, timeout: float) -> Json:
    """Return the snapshot that the status page has. Raises CommandError.

    timeout -- of the connect, and of each part of the answer, in seconds.
    """
    try:
        with build_opener(_NoRedirect).open(request, timeout=timeout) as answer:
            snapshot = json.loads(answer.read(LONGEST))
            if not isinstance(snapshot["pools"], list):
                raise TypeError
            return dict(snapshot)
    except HTTPError as error:
        error.close()
        hint = ": is this its address, and may this machine see it?" if error.code == 404 else ""
        raise CommandError(f"the server answers {error.code}{hint}") from None
    except URLError as error:
        raise CommandError(f"no answer: {error.reason}") from None
    except OSError as error:
        raise CommandError(f"no answer: {error}") from None
    except (HTTPException, ValueError, TypeError, KeyError, RecursionError):
        raise CommandError("what answers there is no status page of zpgpool") from None


class Peer:
    """One page: what it has told, and the thread that is asking it."""

    def __init__(self, url: str, token: str | None) -> None:
        # It tells of its own site only: no peer asks a peer's peers.
        self._request = request_for(url, token, "own=1")
        self.address = urlsplit(url).netloc
        self._pid = 0
        self._thread: threading.Thread | None = None
        self.snapshot: Json | None = None
        self.trouble = SILENT

    def begin(self) -> None:
        """Ask it, in a thread of its own: looking a name up has no deadline. One that is asked still is left alone."""
        if self._thread is None or not self._thread.is_alive() or self._pid != os.getpid():
            self.snapshot, self.trouble, self._pid = None, SILENT, os.getpid()
            self._thread = threading.Thread(target=self._ask, name="zpgpool-peer", daemon=True)
            self._thread.start()

    def _ask(self) -> None:
        try:
            self.snapshot = fetch(self._request, DEADLINE)
        except CommandError as error:
            self.trouble = str(error)

    def wait(self, until: float) -> None:
        """Wait for its answer until then (monotonic seconds), at most."""
        if self._thread is not None:
            self._thread.join(max(0.0, until - monotonic()))


class Peers:
    """The pages at `urls`, which have the same token; asked at most once a second. Raises SettingError."""

    def __init__(self, urls: Iterable[str], token: str | None = None) -> None:
        self._peers = [Peer(url, token) for url in urls]
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._found: list[tuple[list[Json], list[tuple[int, str, str]]]] = []
        self._pid = os.getpid()

    def snapshots(self, own: Iterable[str] = ()) -> tuple[list[Json], list[tuple[int, str, str]]]:
        """Return what the processes there tell of their pools, and those that tell nothing, as `merge` takes them.

        own -- the `id` of each process that is known already. A page that has one of these is of the same folder, and
            left out: a machine that is among its own peers, or has two addresses, does not count twice.
        """
        told: list[Json] = []
        silent: list[tuple[int, str, str]] = []
        known = set(own)
        for good, bad in self._fresh():
            ids = {each["id"] for each in good}
            if not ids & known:
                known |= ids
                told += good
                silent += bad
        return told, silent

    def _fresh(self) -> list[tuple[list[Json], list[tuple[int, str, str]]]]:
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()  # another thread of the parent may have held it
        with self._lock:
            if monotonic() - self._asked_at > FRESH:
                self._found = self._ask()
                self._asked_at = monotonic()
            return copy.deepcopy(self._found)  # the caller adds to them

    def _ask(self) -> list[tuple[list[Json], list[tuple[int, str, str]]]]:
        for peer in self._peers:
            try:
                peer.begin()
            except RuntimeError:  # no thread can be started now
                pass
        until = monotonic() + DEADLINE
        for peer in self._peers:
            peer.wait(until)
        return [
            ([], [(0, peer.address, peer.trouble)])
            if (snapshot := peer.snapshot) is None  # once: its thread may still be at it
            else _sort_out(snapshot, peer.address)
            for peer in self._peers
        ]


def _sort_out(snapshot: Json, address: str) -> tuple[list[Json], list[tuple[int, str, str]]]:
    """Return the documents of a peer's processes, and those that are silent there."""
    good: list[Json] = []
    silent: list[tuple[int, str, str]] = []
    processes = snapshot.get("processes")
    for process in processes if isinstance(processes, list) else [None]:
        document = {**process, "is_bare": False} if isinstance(process, dict) else {}
        if not is_document(document):
            silent.append((0, address, OTHER))
        elif document.get("trouble"):
            silent.append((document["process"], document["host"], str(document["trouble"])))
        else:
            good.append(document)
    return good, silent
