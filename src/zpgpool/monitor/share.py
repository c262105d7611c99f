"""A process that can be asked for its pools by the others of its site: over a socket, from threads of its own.

So it answers while all threads of its server wait for a connection.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version

from ..errors import one_line
from ..types import Pool
from .ask import Answers
from .ask import ask_all
from .ask import DEADLINE
from .ask import FORMAT
from .counters import add
from .counters import counted
from .counters import is_readings
from .counters import Ledger
from .counters import Readings
from .folder import Folder
from .folder import Place
from .past import add_up
from .past import is_kept
from .past import read_past
from .process import log
from .process import PerProcess
from .site import is_document
from .snapshot import describe
from .snapshot import Json


Pools = Sequence[tuple[str, Pool]]

SILENT = f"no answer within {DEADLINE * 1000:.0f} ms"
OTHER = "its answer is of another version of zpgpool"

#: What a process cannot get for a moment: a descriptor, or memory.
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


@cache
def package_version() -> str:
    """Return the version of the package: looking it up takes longer than all else that a process tells."""
    return version("zpgpool")


class Share(PerProcess):
    """Answers in `folder`, and asks the others there. `pools` returns the (name, pool) pairs of this process."""

    def __init__(self, folder: Folder, pools: Callable[[], Pools]) -> None:
        self.folder = folder
        self._pools = pools
        self._word = secrets.token_hex(8)
        self._reset()
        super().__init__()

    def __str__(self) -> str:
        return f"the answers to the site's other processes in {self.folder}"

    def _reset(self) -> None:
        self._place: Place | None = None
        self._server: socket.socket | None = None
        self._counting = threading.RLock()
        self._ledger = Ledger()
        self._written: Readings = {}
        self._cannot_write = False

    def begin(self) -> None:
        """See `PerProcess`. A process of root does not take part; its workers do, which run as the site's user."""
        if os.geteuid() != self.folder.owner:
            self._pid = 0  # not begun: a worker that becomes that user later begins with its next request
            return
        self._place = Place(os.getpid(), secrets.token_hex(8))
        self._server = self.folder.listen(self._place)
        threading.Thread(target=self._serve, args=(self._server,), name="zpgpool-share", daemon=True).start()

    def forget(self) -> None:
        """See `PerProcess`: a copy of the parent's socket would make it look alive when the parent is gone."""
        if self._server is not None:
            self._server.close()
        self._reset()

    def end(self) -> None:
        """See `PerProcess`: what was counted since the last question is kept, if there has ever been one."""
        server, place, self._server, self._place = self._server, self._place, None, None
        if server is None or place is None:
            return
        with suppress(OSError), self._counting:
            if is_kept(self.folder):
                self.folder.write(place.name("json"), counted(self._ledger.read(self._pools())))
        self.folder.remove(place.name("sock"))
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        server.close()

    # Answering

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError as error:
                if error.errno not in SCARCE:
                    return
                time.sleep(DEADLINE)
                continue
            try:
                threading.Thread(target=self._answer, args=(peer,), name="zpgpool-answer", daemon=True).start()
            except RuntimeError:  # no thread can be started now
                peer.close()

    def _answer(self, peer: socket.socket) -> None:
        with peer:
            try:
                peer.settimeout(DEADLINE)
                form, _, what = peer.recv(1000).decode("ascii", "replace").strip().partition(" ")
                # To a process of another version: its page then shows which process this is.
                document = self.document(what if form == str(FORMAT) else "")
                peer.sendall(json.dumps(document).encode())
            except OSError:  # the process that asked is gone, or is stopped
                pass
            except Exception:
                log.exception("the answer to another process of the site failed")

    def document(self, what: str) -> Json:
        """Return what this process tells of itself: with its `pools`, its `numbers`, or neither."""
        told: Json = {"format": FORMAT, "zpgpool": package_version(), "process": os.getpid()}
        # The number makes it another one in a fork.
        told |= {"id": f"{self._word}-{os.getpid()}", "host": socket.gethostname(), "is_bare": self._is_bare()}
        if what == "pools":
            now = time.monotonic()
            told["pools"] = [describe(name, pool, now) for name, pool in self._pools()]
        elif what == "numbers":
            told["numbers"] = self._count()
        return told

    def _is_bare(self) -> bool:
        """Whether this process only makes others: a server that loads the application before it forks its workers."""
        stats = [pool.get_stats() for _, pool in self._pools()] if self.has_forked else []
        return self.has_forked and not any(each["requests_num"] or each["connections_num"] for each in stats)

    def _count(self) -> Readings:
        """Return the numbers of this process: the counters as they were written down, so that they outlive it."""
        with self._counting:
            numbers = self._ledger.read(self._pools())
            try:
                if self._place is not None:
                    self.folder.write(self._place.name("json"), counted(numbers))
            except OSError as error:
                if not self._cannot_write:
                    log.warning("cannot write counters into %s, they stand still: %s", self.folder, one_line(error))
                self._cannot_write = True
                return {
                    name: {**self._written.get(name, {"counters": {}, "times": {}}), "gauges": reading["gauges"]}
                    for name, reading in numbers.items()
                }
            self._cannot_write, self._written = False, counted(numbers)
            return numbers

    # Asking

    def _ask(self, what: str) -> Answers:
        self.start()
        answers = ask_all(self.folder, what, self._place)
        own = self._place or Place(os.getpid(), "")
        answers.documents[own] = self.document(what)
        return answers

    def snapshots(self) -> tuple[list[Json], list[tuple[int, str, str]]]:
        """Return what all processes tell of their pools, and those that tell nothing, as `merge` takes them."""
        return sort_out(self._ask("pools"))

    def numbers(self) -> Readings:
        """Return the numbers of the site: the gauges of those that live, all that was ever counted. Raises OSError."""
        answers = self._ask("numbers")
        told = {
            place: document["numbers"]
            for place, document in answers.documents.items()
            if document.get("format") == FORMAT and is_readings(document.get("numbers"))
        }
        numbers = [
            counted(readings) if answers.documents[place].get("is_bare") else readings
            for place, readings in told.items()
        ]
        total = add([read_past(self.folder, told), *numbers])
        with suppress(OSError):
            add_up(self.folder, answers.ended)
        return total


def sort_out(answers: Answers) -> tuple[list[Json], list[tuple[int, str, str]]]:
    """Return the documents that can be shown, and the silent processes: number, host, and why."""
    host = socket.gethostname()
    good, silent = [], [(place.process, host, SILENT) for place in answers.silent]
    for place, document in answers.documents.items():
        if document.get("format") == FORMAT and is_document(document):
            if not document["is_bare"]:
                good.append(document)
        else:
            silent.append((place.process, host, OTHER))
    return good, silent
