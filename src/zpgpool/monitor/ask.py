"""Asks all processes of a folder at once, and waits for none of them longer than the deadline."""

from __future__ import annotations

import json
import os
import selectors
import socket
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from .folder import Folder
from .folder import Place
from .snapshot import Json


#: How long all answers together may take, in seconds, and how large one may be, in bytes.
DEADLINE = 0.3
LARGEST = 4_000_000

#: That many are asked at a time: each costs a descriptor, of which the site may be short.
AT_A_TIME = 128

#: The form of what is asked and answered.
FORMAT = 1


class Answers(NamedTuple):
    """What came of it: the documents of those that answered, those that did not, and those that have ended."""

    documents: dict[Place, Json]
    silent: list[Place]
    ended: list[Place]


def ask_all(folder: Folder, what: str, own: Place | None = None, seconds: float = DEADLINE) -> Answers:
    """Ask each process of `folder` but `own` for `what`. The sockets of those that have ended are removed."""
    # Those that can answer come first.
    places = sorted((place for place in folder.places("sock") if place != own), key=lambda each: not each.is_running())
    texts, refused = _ask(folder, places, f"{FORMAT} {what}\n".encode(), monotonic() + seconds)
    answers = Answers({}, [], [])
    for place in places:
        if (document := _document(texts.get(place))) is not None:
            answers.documents[place] = document
        elif place.is_running():
            # A process that runs, but refuses, has got the number of one that ended; or it is just starting, or ending.
            (answers.ended if place in refused else answers.silent).append(place)
        else:
            answers.ended.append(place)
            if place in refused and os.geteuid() == folder.owner:
                folder.remove(place.name("sock"))
    return answers


def _document(text: bytes | None) -> Json | None:
    if text:
        with suppress(ValueError, RecursionError):
            document = json.loads(text)
            if isinstance(document, dict):
                return document
    return None


def _ask(
    folder: Folder, places: Iterable[Place], question: bytes, until: float
) -> tuple[dict[Place, bytes], set[Place]]:
    """Return the complete answers, and the processes that refused."""
    waiting, refused, parts, done = list(reversed(list(places))), set(), dict[Place, bytearray](), dict[Place, bytes]()
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                while waiting and len(selector.get_map()) < AT_A_TIME:
                    place = waiting.pop()
                    try:
                        peer = _connect(folder, place, question)
                        selector.register(peer, selectors.EVENT_READ, (peer, place))
                    except (ConnectionRefusedError, FileNotFoundError):
                        refused.add(place)
                    except OSError:  # it is as good as silent
                        pass
                left = until - monotonic()
                if left <= 0 or not selector.get_map():
                    return done, refused
                for key, _ in selector.select(left):
                    peer, place = key.data
                    part = _receive(peer)
                    parts.setdefault(place, bytearray()).extend(part)
                    if not part or len(parts[place]) > LARGEST:
                        selector.unregister(peer)
                        peer.close()
                        text = parts.pop(place)
                        if not part:
                            done[place] = bytes(text)
        finally:
            for key in list(selector.get_map().values()):
                key.data[0].close()


def _connect(folder: Folder, place: Place, question: bytes) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        peer.connect(folder.join(place.name("sock")))
        peer.send(question)
    except OSError:
        peer.close()
        raise
    return peer


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 18)
    except OSError:  # it has ended in the middle
        return b""
