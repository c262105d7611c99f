"""What a checkout and a return may cost, counted in calls: the figure that does not depend on the machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from pyramid.config import Configurator

import zpgpool
from conftest import Call
from conftest import KINDS
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


pytestmark = pytest.mark.usefixtures("nobody_observes")

OURS = str(Path(zpgpool.__file__).parent)


def calls(function: Callable[[], object]) -> tuple[int, int]:
    """Return how many Python frames of ours, and how many C calls, one call of `function` takes."""
    frames = c_calls = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal frames, c_calls
        is_ours = frame.f_code.co_filename.startswith(OURS)
        frames += event == "call" and is_ours
        c_calls += event == "c_call" and is_ours

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return frames, c_calls


@pytest.mark.parametrize(
    ("kind", "autocommit", "most"),
    [
        ("persistent", None, 12),
        ("persistent", True, 11),
        ("persistent", "safe", 24),
        ("threaded", None, 18),
        ("threaded", True, 17),
        ("threaded", "safe", 33),
    ],
)
def test_a_warm_request(make_pool: Any, kind: str, autocommit: Any, most: int) -> None:
    pool = make_pool(KINDS[kind], 1, 4, idle_timeout=60, autocommit=autocommit)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        with get_connection(environ).cursor() as cursor:
            cursor.execute("SELECT 1")
        start_response("200 OK", [])
        return [b""]

    site = PoolMiddleware(app, pool)

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        return None

    def serve() -> None:
        site({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": ""}, start)

    def warm() -> int:
        for _ in range(3):
            serve()
        return calls(serve)[0]

    # In a thread of its own: a body that a test has not closed is looked for at each request of its thread.
    assert Call(warm).result() <= most


@pytest.mark.parametrize("names", [[""], ["", "reports", "users"]])
def test_a_request_of_pyramids_takes_two_calls_more(names: list[str]) -> None:
    """The middleware is made once, and is the plain one. Two calls are what the policy's application takes."""
    config = Configurator(settings={f"zpgpool.{name}{'.' * bool(name)}dsn": "dbname=x" for name in names})

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b""]

    config.set_execution_policy(lambda environ, router: app)
    config.include("zpgpool")
    router = config.make_wsgi_app()
    plain: Any = app
    for name in names:
        plain = PoolMiddleware(plain, name=name, registry=config.registry)

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        return None

    def count(app: Any) -> int:
        def serve() -> None:
            app({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": ""}, start)

        serve()
        return calls(serve)[0]

    assert Call(count, router).result() - Call(count, plain).result() == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", [0.0, 0.01])
def test_a_hit_and_a_clean_return(make_pool: Any, monkeypatch: pytest.MonkeyPatch, kind: str, rest: float) -> None:
    pool = make_pool(KINDS[kind], 1, 4, idle_timeout=60)
    for _ in range(3):
        pool.putconn(pool.getconn())
    pool._watch_at = math.inf  # the timer's part is not measured
    from time import monotonic

    for module in ("persistent", "keyed"):
        monkeypatch.setattr(f"zpgpool.core.{module}.monotonic", monotonic)
    conns: list[Any] = []
    for entry in pool._connections.handoff.slots:
        entry.look_at = -math.inf if rest else math.inf  # with, and without, the look at the socket
    frames, c_calls = calls(lambda: conns.append(pool.getconn()))
    assert frames <= 1
    assert c_calls <= 4
    frames, _ = calls(lambda: pool.putconn(conns.pop()))
    assert frames <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_prune_with_nothing_to_close_is_as_fast_with_many_connections(make_pool: Any, kind: str) -> None:
    few, many = (make_pool(KINDS[kind], size, size, idle_timeout=60) for size in (2, 12))
    assert calls(many.prune) == calls(few.prune)
