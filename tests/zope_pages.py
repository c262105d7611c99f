"""The pages of the Zope instance of test_zope.py, which run in its process: see `books`."""

from __future__ import annotations

import json
import threading
from typing import Any

from Products.Five.browser import BrowserView
from zope.interface import implementer
from zope.publisher.interfaces import IPublishTraverse
from ZPublisher.Iterators import IStreamIterator

import books
import outages
import zpgpool
from conftest import run
from zpgpool.datamanager import connection
from zpgpool.wsgi import get_connection


barrier = threading.Barrier(2)

#: The attempts of the requests that are in conflict.
attempts: list[int] = []


class Page(BrowserView):  # type: ignore[misc]
    """Stores an object and a row, and ends as its name says."""

    def __call__(self) -> Any:
        job, key = self.__name__, self.request["key"]
        if job != "read":
            self.context.shelves[self.request.get("client", "0")][key] = "an object"
        if job.startswith("conflict"):
            self.conflict(key, is_late=job == "conflict-late")
        elif job == "method":
            self.context.add_row(key=key)
        elif job == "stream":
            books.store_row(connection(), key)
            self.request.response.setHeader("Content-Type", "text/plain")  # without, Zope says 204 No Content
            return Numbers(self.request.environ)
        else:
            books.store_row_for(job, connection(), key)
        return "done"

    def conflict(self, key: str, is_late: bool) -> None:
        """Do in two requests at once what can be done only one after the other."""
        conn, attempt = connection(), self.request.retry_count
        attempts.append(attempt)
        run(conn, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        run(conn, "SELECT count(*) FROM rows")
        if attempt == 0 and not is_late:
            barrier.wait(20)
        books.store_row(conn, key)
        if attempt == 0 and is_late:
            barrier.wait(20)


@implementer(IPublishTraverse)
class Outage(BrowserView):  # type: ignore[misc]
    """Reads, or writes what the path names: for the load of test_outages.py."""

    names: tuple[str, ...] = ()

    def publishTraverse(self, request: Any, name: str) -> Outage:
        self.names += (name,)
        return self

    def __call__(self) -> str:
        do = outages.read if self.request.method == "GET" else outages.write
        do(connection(), "/".join(["", *self.names]))
        return "done"


@implementer(IStreamIterator)
class Numbers:
    """A body that queries after Zope's commit, while it is sent."""

    def __init__(self, environ: Any) -> None:
        self._chunks = (chunk for chunk in books.numbers(get_connection(environ)))

    def __iter__(self) -> Numbers:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def __len__(self) -> int:
        return sum(len(f"{n}\n") for n in range(books.STREAMED))


class Books(BrowserView):  # type: ignore[misc]
    """Tells what is stored, and how the pool is."""

    def __call__(self) -> str:
        pool = zpgpool.get_pool()
        told = {
            "objects": sorted(key for shelf in self.context.shelves.values() for key in shelf),
            "holders": [repr(holder) for holder in pool.holders()],
            "stats": pool.get_stats(),
            "attempts": attempts,
        }
        self.request.response.setHeader("Content-Type", "application/json")
        return json.dumps(told)
