"""The folder by which the processes of a site find each other. What in it is not ours is neither read nor removed.

Ours are sockets and files of a name of ours, of the folder's owner. Each process has a name of its own: its number, and
a word drawn at random, since numbers come again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from typing import NamedTuple

from ..errors import SettingError


NAME = re.compile(r"zpgpool-([1-9][0-9]{0,9})-([0-9a-f]{16})\.(sock|json)")

#: A larger file is none of ours, in bytes.
LARGEST = 1_000_000

#: What fits into the address of a unix socket, in bytes, less our longest name.
LONGEST_PATH = 107 - len("zpgpool-1234567890-0123456789abcdef.sock/")


class Place(NamedTuple):
    """What a process is known by in the folder."""

    process: int
    token: str

    def name(self, kind: str) -> str:
        """Return the name of its socket (`sock`), or of its counters (`json`)."""
        return f"zpgpool-{self.process}-{self.token}.{kind}"

    def is_running(self) -> bool:
        """Whether this machine has a process of that number."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
        return True


class Folder:
    """A folder that is safe to share. Raises SettingError for one that is not."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        if len(os.fsencode(self.path)) > LONGEST_PATH:
            raise SettingError(f"option 'share': the path is longer than {LONGEST_PATH} bytes: {path!r}")
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise SettingError(f"option 'share': there is no such folder: {path!r} ({error.strerror})") from None
        if not stat.S_ISDIR(status.st_mode):
            raise SettingError(f"option 'share': there is no such folder: {path!r} (it is something else)")
        self.owner = status.st_uid
        # Root may look into the folder of a site, and begin processes that become its owner.
        if os.geteuid() not in (0, self.owner):
            raise SettingError(f"option 'share': the folder is of another user: {path!r} (number {self.owner})")
        if status.st_mode & 0o022:
            mode = stat.S_IMODE(status.st_mode)
            raise SettingError(f"option 'share': others can write to the folder: {path!r} (mode {mode:o})")

    def __str__(self) -> str:
        return self.path

    def join(self, name: str) -> str:
        """Return the path of `name` here."""
        return os.path.join(self.path, name)

    def places(self, kind: str) -> list[Place]:
        """Return the processes that have a socket here (`sock`), or counters (`json`)."""
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                match = NAME.fullmatch(entry.name)
                if match and match[3] == kind and self._is_ours(entry, kind):
                    found.append(Place(int(match[1]), match[2]))
        return sorted(found)

    def _is_ours(self, entry: os.DirEntry[str], kind: str) -> bool:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # it is gone
            return False
        return status.st_uid == self.owner and (
            stat.S_ISSOCK(status.st_mode) if kind == "sock" else stat.S_ISREG(status.st_mode)
        )

    def remove(self, name: str) -> None:
        """Remove a name of ours, if it is there."""
        with suppress(OSError):
            os.unlink(self.join(name))

    def listen(self, place: Place) -> socket.socket:
        """Return a socket that listens under the name of `place`."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # No process finds it before it answers: it would take the socket for one of a process that has ended.
        early = self.join(f"zpgpool-{place.process}-{place.token}.new")
        try:
            server.bind(early)
            os.chmod(early, 0o600)
            server.listen(128)
            os.rename(early, self.join(place.name("sock")))
        except OSError:
            server.close()
            with suppress(OSError):
                os.unlink(early)
            raise
        return server

    def read(self, name: str) -> object:
        """Return the JSON of a file of ours; None where there is none that can be ours. Raises OSError."""
        try:
            file = os.open(self.join(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES):
                return None
            raise
        with open(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != self.owner or status.st_size > LARGEST:
                return None
            with suppress(ValueError, RecursionError):
                return json.loads(opened.read(LARGEST))
        return None

    def write(self, name: str, value: object) -> None:
        """Write a file of ours, whole or not at all. Raises OSError."""
        path = self.join(name)
        new = f"{path}.new"
        try:
            with suppress(FileNotFoundError):
                os.unlink(new)
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(file, "wb") as opened:
                opened.write(json.dumps(value).encode())
            os.rename(new, path)
        except OSError:
            with suppress(OSError):
                os.unlink(new)
            raise

    def stamp(self, name: str) -> tuple[int, ...]:
        """Return what differs whenever the file was written again."""
        try:
            status = os.lstat(self.join(name))
        except FileNotFoundError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size

    @contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Return a context manager that holds a lock, if no other process does: it gives whether it does."""
        file = os.open(self.join(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(file)
