"""The pages of the Zope site of test_zope_site.py, which run in its process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
from Products.Five.browser import BrowserView
from transaction.interfaces import TransientError
from zope.interface import implementer
from ZPublisher.Iterators import IUnboundStreamIterator

import zpgpool
import zpgpool.zsql
from conftest import run
from zpgpool.datamanager import connection


#: No answer of the server's is late on a busy machine.
zpgpool.zsql.PATIENCE = 20.0

#: What `look` has seen.
looks: list[list[object]] = []


def look() -> None:
    looks.append(list(zpgpool.get_pool("main").holders()))


class Trouble(Exception):
    """What has an exception view of its own."""


class TroubleView(BrowserView):  # type: ignore[misc]  # Zope's classes have no types
    """The exception view, which queries."""

    def __call__(self) -> str:
        word = run(connection("main"), "SELECT 'the menu'")
        return f"In trouble, with {word}"


class Page(BrowserView):  # type: ignore[misc]
    """Does what its name says."""

    def __call__(self) -> Any:
        return getattr(self, f"do_{self.__name__}")()

    @property
    def is_first(self) -> bool:
        return bool(self.request.retry_count == 0)

    def do_trouble(self) -> None:
        try:
            run(connection("main"), "SELECT nonsense")
        except psycopg2.Error:
            raise Trouble from None

    def do_lost(self) -> str:
        """Lose the connection between two statements, on the first attempt; with `always`, on each."""
        run(connection("main"), "INSERT INTO rows VALUES (%s, %s)", *[f"lost {self.request['key']}"] * 2)
        if self.is_first or "always" in self.request.form:
            run(connection("main"), "SELECT pg_terminate_backend(pg_backend_pid())")
        return "done"

    def do_sleeper(self) -> str:
        """Be in conflict once; then tell who has held connections while Zope slept."""
        run(connection("main"), "SELECT 1")
        if self.is_first:
            self.request.delay_retry = look
            raise TransientError
        return repr(looks.pop())

    def do_locked(self) -> str:
        """Wait for a lock, not for long; the second attempt does not ask for it."""
        conn = connection("main")
        run(conn, "SET LOCAL lock_timeout = '50ms'")
        if self.is_first:
            run(conn, "LOCK TABLE locked")
        return "done"

    def do_absent(self) -> object:
        """Use a pool whose server is not there."""
        return run(connection("absent"), "SELECT 1")

    def do_exhausted(self) -> object:
        """Use a pool all of whose connections are in use."""
        pool = zpgpool.get_pool("side")
        held = [pool.checkout() for _ in range(pool.maxconn)]
        try:
            return run(connection("side"), "SELECT 1")
        finally:
            for each in held:
                each.putconn()

    def do_streamed(self) -> Stream:
        """Query a pool without a filter, after the commit, while the body is sent."""
        self.request.response.setHeader("Content-Type", "text/plain")
        return Stream(self.request.form.get("pool", "side"))

    def do_held(self) -> str:
        """Tell who holds connections."""
        return repr([holder for name in ("main", "reader", "side") for holder in zpgpool.get_pool(name).holders()])


@implementer(IUnboundStreamIterator)
class Stream:
    """A body that queries."""

    def __init__(self, name: str) -> None:
        self._rows = self._query(name)

    def _query(self, name: str) -> Iterator[bytes]:
        for number in range(3):
            yield b"%d\n" % run(connection(name), "SELECT %s", number)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> bytes:
        return next(self._rows)
