"""The start of a response, held back until a part of the body is there: until then another one can take its place.

PEP 3333, "The start_response() Callable". A server need not support a second call: some raise, some append the headers
(uWSGI, gunicorn, cheroot). So the server is called once, with what the application said last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import TypeAlias


if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse


Headers: TypeAlias = list[tuple[str, str]]


class HeldResponse:
    """The `start_response` that an application gets in place of the server's.

    hook -- called with the headers just before they go to the server; may return others.
    """

    #: The server's; the caller sets it after the construction. Without `__init__` there is a call less in each request.
    start_response: StartResponse

    hook: Callable[[Headers], Headers] | None = None
    status: str | None = None
    headers: Headers
    is_sent = False
    _write: Callable[[bytes], object] | None = None

    def __call__(self, status: str, headers: Headers, exc_info: object = None) -> Callable[[bytes], object]:
        if self.is_sent:
            # The server knows what it has sent, and raises, or replaces what it has not.
            return self.start_response(status, headers, *(() if exc_info is None else (exc_info,)))
        if self.status is not None and exc_info is None:
            raise AssertionError("start_response was called a second time, without exc_info (PEP 3333)")
        self.status, self.headers = status, headers
        return self.write

    def write(self, data: bytes) -> object:
        """Send the start of the response, and a part of its body: what `start_response` returns."""
        self.send()
        assert self._write is not None
        return self._write(data)

    def send(self) -> None:
        """Call the server, if the application has started a response, and that was not done yet."""
        if self.status is not None and not self.is_sent:
            self.is_sent = True
            headers = self.headers if self.hook is None else self.hook(self.headers)
            self._write = self.start_response(self.status, headers)

    def forget(self) -> None:
        """Forget what the application said: another response takes its place."""
        self.status, self.headers = None, []
