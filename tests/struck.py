"""The scenario of `make stress` whose requests are struck: a signal's handler raises at random moments of them."""

from __future__ import annotations

import io
import itertools
import logging
import random
import signal
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import psycopg2
import transaction
from pyramid.config import Configurator
from pyramid.response import Response

import zpgpool
from scenario import Scenario
from zpgpool.datamanager import get_connection as get_transactions_connection
from zpgpool.interfaces import IConnectionPool
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


class Strike(Exception):
    """Raised by a signal, between any two bytecodes."""


class FatalStrike(BaseException):
    """The same, past `except Exception`."""


class Site:
    """Requests that each write rows with their number, and commit those, roll them back, or leave them.

    A row says what its request means to do with it: what is committed and not `ready` was committed by another one.
    """

    JOBS = ("commit", "roll back", "leave", "fail")

    def __init__(self, scenario: Scenario, numbers: Iterator[int]) -> None:
        self._scenario = scenario
        self._numbers = numbers
        self._wsgi = self._make_wsgi(scenario.pool)

    def _make_wsgi(self, pool: Any) -> Any:
        return PoolMiddleware(self._app, pool)

    def close(self) -> None:
        """Undo what was done to this process."""

    def serve(self, dice: random.Random) -> None:
        """Serve one request as a server does: what is raised, is raised after the body was closed."""
        environ = {
            "REQUEST_METHOD": dice.choice(["GET", "POST"]),
            "PATH_INFO": "/",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "stress.job": dice.choice(self.JOBS),
            "stress.streams": dice.random() < 0.5,
        }
        try:
            body = self._wsgi(environ, lambda status, headers, exc_info=None: None)
            try:
                for _ in body:
                    pass
            finally:
                if hasattr(body, "close"):
                    body.close()
        except ZeroDivisionError:
            pass  # the application's own

    def _app(self, environ: Any, start_response: Any) -> Any:
        job, streams = environ["stress.job"], environ["stress.streams"]
        self._begin(lambda: get_connection(environ), "leave" if streams else job)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self._stream(environ, job) if streams else [b"done"]

    def _stream(self, environ: Any, job: str) -> Iterator[bytes]:
        yield b"first"
        get_connection(environ).rollback()
        self._begin(lambda: get_connection(environ), job)
        yield b"last"

    def _begin(self, get: Callable[[], Any], job: str) -> None:
        """Get the request's connection, which must be clean, and do the job with it."""
        with self._scenario.in_time():
            conn = get()
        self._scenario.check_begins(conn)
        number = next(self._numbers)
        with conn.cursor() as cursor:
            cursor.execute("INSERT INTO stress VALUES (%s, 'begun')", [number])
            if job == "commit":
                cursor.execute("UPDATE stress SET state = 'ready' WHERE number = %s", [number])
        self._end(conn, job)

    def _end(self, conn: Any, job: str) -> None:
        if job == "commit":
            conn.commit()
        elif job == "roll back":
            conn.rollback()
        elif job == "fail":
            raise ZeroDivisionError


class PyramidSite(Site):
    """The same with Pyramid, whose pyramid_tm commits. Its streamed bodies begin when that is done."""

    #: What makes the transaction manager of a request; None: it is the thread's.
    manager: str | None = None

    def _make_wsgi(self, pool: Any) -> Any:
        config = Configurator(settings={"tm.manager_hook": self.manager} if self.manager else {})
        config.registry.registerUtility(pool, IConnectionPool)
        config.include("pyramid_tm")
        config.include("zpgpool")
        config.add_route("all", "/*path")
        config.add_view(self._view, route_name="all")
        return config.make_wsgi_app()

    def _view(self, request: Any) -> Response:
        job, streams = request.environ["stress.job"], request.environ["stress.streams"]
        self._begin(lambda: request.pgconn, job)
        if job != "commit":
            request.tm.doom()
        return Response(app_iter=self._pieces(request, job)) if streams else Response("done")

    def _pieces(self, request: Any, job: str) -> Iterator[bytes]:
        yield b"first"
        self._begin(lambda: request.pgconn, "leave")
        yield b"last"

    def _end(self, conn: Any, job: str) -> None:
        if job == "fail":
            raise ZeroDivisionError


class ExplicitPyramidSite(PyramidSite):
    """And with a transaction manager for each request."""

    manager = "pyramid_tm.explicit_manager"


class ZopeSite(Site):
    """And with Zope's publisher, which commits the thread's transaction; without a ZODB."""

    def _make_wsgi(self, pool: Any) -> Any:
        # Not at the top: the tests install Zope, `make stress` does without.
        from ZPublisher import WSGIPublisher

        zpgpool.register_pool(pool)
        name = f"stress-{id(self)}"
        WSGIPublisher._MODULES[name] = (lambda: ZopeRoot(self._page), None, False)
        publish = partial(WSGIPublisher.publish_module, _module_name=name)
        return PoolMiddleware(publish, pool)

    def serve(self, dice: random.Random) -> None:
        from zope.security.management import endInteraction

        endInteraction()  # a strike in Zope's own leaves one, and the thread's next request is refused
        super().serve(dice)

    def close(self) -> None:
        zpgpool.unregister_pool()

    def _page(self, request: Any) -> str:
        job = request.environ["stress.job"]
        self._begin(get_transactions_connection, job)
        if job != "commit":
            transaction.doom()
        return "done"

    def _end(self, conn: Any, job: str) -> None:
        if job == "fail":
            raise ZeroDivisionError


class ZopeRoot:
    """What is published: a root without folders."""

    def __init__(self, page: Callable[[Any], str]) -> None:
        self._page = page
        self._p_jar = self.__allow_groups__ = self

    def validate(self, *args: object) -> Any:
        """Let everybody in, as a user folder does."""
        from AccessControl.users import nobody

        return nobody

    def setDebugInfo(self, *args: object) -> None:
        pass

    def close(self) -> None:
        pass

    def index_html(self, REQUEST: Any) -> str:  # noqa: N803
        """Be published."""
        return self._page(REQUEST)


class Signals(Scenario):
    """A SIGALRM whose handler raises at random moments of requests; others, in other threads, are not struck."""

    is_counted = False  # a strike may end the wait for a closed session's end
    users = 3

    def begin(self) -> None:
        self.query("DROP TABLE IF EXISTS stress")
        self.query("CREATE TABLE stress (number int, state text)")
        self.is_armed = False
        self.strikes = self.requests = 0
        #: How long a request takes, about: the strikes shall be spread over it.
        self.length = 0.001
        # Where a strike hits a finalizer, Python reports it, and goes on.
        self.hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        self.handler = signal.signal(signal.SIGALRM, self.strike)

    def make_pool(self) -> Any:
        self.pool = pool = super().make_pool()
        numbers = itertools.count()
        kinds = [Site, Site, PyramidSite, ExplicitPyramidSite, *([ZopeSite] if find_spec("ZPublisher") else [])]
        self.sites = [kind(self, numbers) for kind in kinds]
        for site in self.sites:
            site.serve(self.dice)  # the first one imports
        return pool

    def strike(self, number: int, frame: Any) -> None:
        if self.is_armed:
            self.is_armed = False
            while frame is not None:
                # Python's own locks stay taken, where an exception comes between one and its `try`.
                if frame.f_code.co_filename.startswith((logging.__file__, "<frozen importlib")):
                    return
                frame = frame.f_back
            self.strikes += 1
            raise Strike if self.strikes % 2 else FatalStrike

    def helpers(self) -> Sequence[Callable[[], object]]:
        return [self.keep_serving] * self.users

    def keep_serving(self) -> None:
        dice = random.Random(self.dice.random())
        while not self.is_over.is_set():
            try:
                dice.choice(self.sites).serve(dice)
            except psycopg2.Error as error:
                self.count(type(error).__name__)
            else:
                self.count("request beside")

    def step(self) -> bool:
        before = self.strikes
        try:
            self.serve_struck(self.dice.uniform(1e-6, 1.2 * self.length))
        except (Exception, FatalStrike) as error:
            if before == self.strikes and not isinstance(error, psycopg2.Error):
                raise
            self.count(type(error).__name__)  # what was struck may end in an error of its own
        self.is_armed = False
        self.requests += 1
        if self.requests % 100 == 0:
            self.counts |= {"struck": self.strikes, "request": self.requests}
            self.measure()
        return True

    def serve_struck(self, seconds: float) -> None:
        """In a frame of its own: a loop's own jump may stand outside of its try (3.13)."""
        self.is_armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self.dice.choice(self.sites).serve(self.dice)
        self.is_armed = False

    def measure(self) -> None:
        start = time.monotonic()
        self.dice.choice(self.sites).serve(self.dice)
        self.length = 0.9 * self.length + 0.1 * min(0.1, time.monotonic() - start)

    def end(self) -> None:
        self.is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.handler)
        sys.unraisablehook = self.hook
        for site in self.sites:  # what the last strike left, is the thread's next request's to clear
            site.serve(self.dice)
            site.close()
        self.counts |= {"struck": self.strikes, "request": self.requests}

    def check_end(self) -> None:
        super().check_end()
        [(foreign, rows)] = self.query("SELECT count(*) FILTER (WHERE state != 'ready'), count(*) FROM stress")
        self.counts["row"] = rows
        if foreign:
            self.problems.append(f"{foreign} rows were committed by another request")
