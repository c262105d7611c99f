"""The scenario of `make stress` whose requests are struck: a signal's handler raises at random moments of them."""

from __future__ import annotations

import itertools
import random
import signal
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import psycopg2

from scenario import Scenario
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

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._numbers = itertools.count()
        self._middleware: Any = PoolMiddleware(self._app, scenario.pool)

    def serve(self, dice: random.Random) -> None:
        """Serve one request as a server does: what is raised, is raised after the body was closed."""
        environ = {
            "REQUEST_METHOD": dice.choice(["GET", "POST"]),
            "PATH_INFO": "/",
            "stress.job": dice.choice(self.JOBS),
            "stress.streams": dice.random() < 0.5,
        }
        try:
            body = self._middleware(environ, lambda status, headers, exc_info=None: None)
            try:
                for _ in body:
                    pass
            finally:
                if hasattr(body, "close"):
                    body.close()
        except ZeroDivisionError:
            pass  # the application's own

    def _app(self, environ: Any, start_response: Any) -> Any:
        with self._scenario.in_time():
            conn = get_connection(environ)
        self._scenario.check_begins(conn)
        number, job, streams = next(self._numbers), environ["stress.job"], environ["stress.streams"]
        self._write(environ, number, job if not streams else "leave")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self._stream(environ, number, job) if streams else [b"done"]

    def _stream(self, environ: Any, number: int, job: str) -> Iterator[bytes]:
        yield b"first"
        get_connection(environ).rollback()
        self._write(environ, number, job)
        yield b"last"

    @staticmethod
    def _write(environ: Any, number: int, job: str) -> None:
        conn = get_connection(environ)
        with conn.cursor() as cursor:
            cursor.execute("INSERT INTO stress VALUES (%s, 'begun')", [number])
            if job == "commit":
                cursor.execute("UPDATE stress SET state = 'ready' WHERE number = %s", [number])
                conn.commit()
            elif job == "roll back":
                conn.rollback()
            elif job == "fail":
                raise ZeroDivisionError


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
        self.site = Site(self)
        return pool

    def strike(self, number: int, frame: Any) -> None:
        if self.is_armed:
            self.is_armed = False
            self.strikes += 1
            raise Strike if self.strikes % 2 else FatalStrike

    def helpers(self) -> Sequence[Callable[[], object]]:
        return [self.keep_serving] * self.users

    def keep_serving(self) -> None:
        dice = random.Random(self.dice.random())
        while not self.is_over.is_set():
            try:
                self.site.serve(dice)
            except psycopg2.Error as error:
                self.count(type(error).__name__)
            else:
                self.count("request beside")

    def step(self) -> bool:
        try:
            self.serve_struck(self.dice.uniform(1e-6, 1.2 * self.length))
        except (Strike, FatalStrike):
            pass
        except psycopg2.Error as error:
            self.count(type(error).__name__)
        self.is_armed = False
        self.requests += 1
        if self.requests % 100 == 0:
            self.measure()
        return True

    def serve_struck(self, seconds: float) -> None:
        """In a frame of its own: a loop's own jump may stand outside of its try (3.13)."""
        self.is_armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self.site.serve(self.dice)
        self.is_armed = False

    def measure(self) -> None:
        start = time.monotonic()
        self.site.serve(self.dice)
        self.length = 0.9 * self.length + 0.1 * min(0.1, time.monotonic() - start)

    def end(self) -> None:
        self.is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.handler)
        sys.unraisablehook = self.hook
        self.site.serve(self.dice)  # what the last strike left, is the next request's to clear
        self.counts |= {"struck": self.strikes, "request": self.requests}

    def check_end(self) -> None:
        super().check_end()
        [(foreign, rows)] = self.query("SELECT count(*) FILTER (WHERE state != 'ready'), count(*) FROM stress")
        self.counts["row"] = rows
        if foreign:
            self.problems.append(f"{foreign} rows were committed by another request")
