"""The application's body, whose `close()` ends the request (PEP 3333, "Specification Details")."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sized
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING
from typing import TypeVar

from .failures import close_body
from .failures import reveal
from .lease import Lease
from .lease import local
from .response import HeldResponse
from .shared import Transaction


if TYPE_CHECKING:
    from types import FrameType

    from _typeshed.wsgi import WSGIEnvironment


log = logging.getLogger("zpgpool")

T = TypeVar("T")


def is_complete(body: object, environ: WSGIEnvironment) -> bool:
    """Whether nothing of the application runs after it has returned `body`.

    So for a list or a tuple; and for the server's own file wrapper, which it recognises only as it is, and whose file
    whichever thread sends and closes.
    """
    if type(body) in (list, tuple) or body is None:  # None is the server's to refuse
        return True
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)


class Body:
    """A body that is iterated, in whichever thread, and closed. Its first chunk, if it has one, was taken already.

    environ, key -- where the lease is while the application runs, as in the call that has returned the body. In
        between another one may be there: what is mounted has its own pool of the same name, and the same environ.
    """

    def __init__(
        self,
        body: Iterable[bytes],
        iterator: Iterator[bytes],
        first: list[bytes],
        lease: Lease,
        environ: WSGIEnvironment,
        key: str,
    ) -> None:
        self._body = body
        self._iterator = iterator
        self._first = first
        self._lease = lease
        self._environ = environ
        self._key = key
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first and not self._is_closed:
            return self._first.pop()
        before = self._enter(sys._getframe())
        try:
            return next(self._iterator)
        finally:
            self._leave(before)

    def _enter(self, frame: FrameType) -> tuple[Lease | None, object]:
        before = self._lease.enter(frame)
        known, self._environ[self._key] = self._environ.get(self._key), self._lease
        return before, known

    def _leave(self, before: tuple[Lease | None, object]) -> None:
        self._lease.leave(before[0])
        if before[1] is not None:
            self._environ[self._key] = before[1]

    def close(self) -> None:
        """Close the application's body, then end the request, whatever that raised; once."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._close_body()
        finally:
            self._lease.end()

    def _close_body(self) -> None:
        body, self._body = self._body, ()
        close = getattr(body, "close", None)
        if close is not None:
            before = self._enter(sys._getframe())
            try:
                close()
            finally:
                self._leave(before)

    def __del__(self) -> None:
        is_closed = getattr(self, "_is_closed", None)
        if is_closed is None:
            return  # an exception came before it was made whole
        if is_closed:
            self._lease.end()  # which an exception may have broken off
            return
        if not self._lease.is_over:
            log.warning("%s: the server dropped its body without closing it (PEP 3333)", self._lease)
        self.close()


class InnerBody:
    """The body of a filter within another one's request, which finds in `environ` what its call has found there.

    In between another filter of that name has its own there, with another pool.
    """

    def __init__(self, body: Iterable[bytes], environ: WSGIEnvironment, own: Mapping[str, object]) -> None:
        self._body = body
        self._environ = environ
        self._own = own
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._iterator is None:
            self._iterator = self._run(lambda: iter(self._body))
        return self._run(self._iterator.__next__)

    def close(self) -> None:
        """Close the application's body. The request goes on."""
        self._run(lambda: close_body(self._body))

    def _run(self, function: Callable[[], T]) -> T:
        with swapped(self._environ, self._own):
            return function()


@contextmanager
def swapped(environ: WSGIEnvironment, own: Mapping[str, object]) -> Iterator[None]:
    """Return a context manager that puts `own` into `environ`, and in the end what it has found in its place there."""
    was = {key: environ[key] for key in own if key in environ}
    environ.update(own)
    try:
        yield
    finally:
        environ.update(was)


class SizedBody(Body):
    """A body whose length a server may ask for: waitress keeps a connection alive by it."""

    _body: Sized  # type: ignore[assignment]  # narrower: sized, and iterable, too

    def __len__(self) -> int:
        return len(self._body)


def begin_body(
    body: Iterable[bytes],
    lease: Lease,
    environ: WSGIEnvironment,
    key: str,
    response: HeldResponse,
    original: WSGIEnvironment | None,
) -> Iterable[bytes]:
    """Take the first chunk, with which the response starts; until then another one can take its place."""
    try:
        lease.begin_body()
        iterator = iter(body)
        first = list(islice(iterator, 1))
        if (response.status or "").startswith("5"):
            reveal((), response, lease, original)  # the body is closed below
        response.send()
        return (SizedBody if isinstance(body, Sized) else Body)(body, iterator, first, lease, environ, key)
    except BaseException:
        close_body(body)
        raise


def join_body(transaction: Transaction) -> None:
    """Have the calling thread's request end `transaction`, of a pool that it has no lease on, if it is in its body."""
    for lease in list(local.state.leases.values()):
        if lease.is_streaming and lease.is_running:
            lease.guests = (*(guest for guest in lease.guests if guest.is_joined), transaction)
            return
