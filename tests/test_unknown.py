"""Sessions on the server that no process of the site knows: counted and shown, and never one that somebody knows."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn
from zope.interface.registry import Components

import zpgpool
from bouncer import PgBouncer
from browser import Browser
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import Outside
from conftest import own_database
from conftest import run
from serving import waitress
from test_pgbouncer import bouncer as bouncer
from test_site import app as app
from test_site import folder as folder
from test_site import serving
from test_site import share as share
from test_status import ask
from test_status import browser as browser
from test_status import BUILD
from test_status import Reader
from test_third_party import PlainPool
from zpgpool.__main__ import main
from zpgpool.core import NoAnswer
from zpgpool.monitor import snapshot
from zpgpool.status import _shares
from zpgpool.status import StatusApp


pytestmark = pytest.mark.usefixtures("measured")

MakePool = Callable[..., Any]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show a session however young it is."""
    monkeypatch.setattr("zpgpool.monitor.snapshot.YOUNG", 0.0)


@pytest.fixture
def stray(dsn: str) -> Iterator[Any]:
    with closing(psycopg2.connect(dsn)) as conn:
        yield conn


@pytest.fixture
def pool(make_pool: MakePool) -> Any:
    """A registered pool with a connection that is in use, and one that is idle."""
    pool = make_pool(zpgpool.ThreadedConnectionPool, 0, 4, name="main", idle_timeout=600)
    zpgpool.register_pool(pool, "main")
    held, idle = pool.getconn(), pool.getconn()
    pool.putconn(idle)
    assert pool.get_stats()["pool_available"] == 1
    pool.held = held
    return pool


def unknown(app: Any, query: str = "") -> dict[int, dict[str, Any]]:
    """Return the unknown sessions by their backends, which are as many as is said."""
    seen = json.loads(ask(app, "/json", QUERY_STRING=query).body)
    assert seen["unknown"] == len(seen["unknown_sessions"])
    return {each["backend_pid"]: each for each in seen["unknown_sessions"]}


@pytest.mark.usefixtures("at_once")
def test_a_connection_made_outside_any_pool(
    dsn: str, stray: Any, app: StatusApp, pool: Any, outside: Outside, capsys: Any
) -> None:
    pid = stray.info.backend_pid
    run(stray, "SELECT 'secret of the stray'")
    found = unknown(app)
    assert pid in found
    assert outside.conn.info.backend_pid in found  # the role is ours, though its application name is another one
    assert not set(found) & set(pool.backend_pids())
    assert len(pool.backend_pids()) == 2
    assert "zpgpool status" not in {each["application_name"] for each in found.values()}
    assert found[pid]["state"] == "idle in transaction"
    assert found[pid]["application_name"] == outside.application_name
    assert (found[pid]["pool"], found[pid]["query"]) == ("main", None)
    assert 0 <= found[pid]["seconds"] <= found[pid]["age"] < 600
    assert list(found) == sorted(found, key=lambda each: -found[each]["age"])
    page = ask(app)
    text = Reader(page.text).text
    told = re.search(r"The server has (\d+) sessions that no process knows\.", text)
    assert told is not None, text
    assert int(told[1]) >= 2  # sessions of others come and go
    assert "idle in transaction, for" in text
    assert "secret" not in page.text
    shown = StatusApp(show_sql=True, share=str(app._share.folder))  # type: ignore[union-attr]
    assert "secret of the stray" in unknown(shown)[pid]["query"]
    assert "secret of the stray" in ask(shown).text
    stray.close()
    eventually(lambda: pid not in unknown(app))


@pytest.mark.usefixtures("at_once", "pool")
def test_in_a_browser_however_it_is_named(dsn: str, app: StatusApp, browser: Browser) -> None:
    name = "<script>alert(1)</script>" + "x" * 30
    with closing(psycopg2.connect(make_dsn(dsn, application_name=name))), waitress(app) as port:
        assert "<script>alert" not in ask(app).text
        browser.forget()
        for dark, width in ((False, 360), (True, 1200)):
            browser.open(f"http://127.0.0.1:{port}/", width=width, dark=dark)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert name in browser.run("document.querySelector('main').textContent")
            browser.shoot(BUILD / f"unknown{'-dark' if dark else '-phone'}.png")
        assert browser.complaints == []


@pytest.mark.usefixtures("at_once", "pool")
def test_whose_they_may_be(dsn: str, app: StatusApp, outside: Outside) -> None:
    """Of our role or our application name in our database; of neither, or in another database, they are not ours."""
    name = f"zpgpool_stranger_{os.getpid()}"
    outside.query(f"CREATE ROLE {name} LOGIN")
    try:
        with own_database(dsn, f"{name}_db") as other:
            kinds = {
                "role": make_dsn(dsn, application_name="psql"),
                "name": make_dsn(dsn, user=name),
                "neither": make_dsn(dsn, user=name, application_name="psql"),
                "database": other,
            }
            conns = {kind: psycopg2.connect(there) for kind, there in kinds.items()}
            found = unknown(app)
            assert [kind for kind, conn in conns.items() if conn.info.backend_pid in found] == ["role", "name"]
            for conn in conns.values():
                conn.close()
    finally:
        outside.query(f"DROP ROLE {name}")


@pytest.mark.usefixtures("at_once")
def test_a_worker_of_a_parallel_query_is_no_session(app: StatusApp, pool: Any, outside: Outside) -> None:
    [(version,)] = outside.query("SHOW server_version_num")
    run(pool.held, f"SET {'debug_parallel_query' if int(version) >= 160000 else 'force_parallel_mode'} = on")
    query = Call(run, pool.held, "SELECT pg_sleep(600)")
    workers = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'parallel worker' AND application_name = %s"
    [(worker,)] = eventually(lambda: outside.query(workers, outside.application_name))
    assert worker not in unknown(app)
    pool.cancel(pool.held)
    with pytest.raises(psycopg2.Error):
        query.result()


@pytest.mark.usefixtures("at_once")
def test_two_pools_count_by_their_database(dsn: str, app: StatusApp, make_pool: MakePool, stray: Any) -> None:
    name = f"zpgpool_second_{os.getpid()}"
    with own_database(dsn, name) as other, closing(psycopg2.connect(other)) as there:
        pools: list[Any] = []
        conns = []
        for label, its in (("one", dsn), ("same", dsn), ("two", other)):
            pools.append(make_pool(zpgpool.ThreadedConnectionPool, 0, 2, name=label, dsn=its))
            zpgpool.register_pool(pools[-1], label)
            conns.append(pools[-1].getconn())
        found = unknown(app)
        assert not set(found) & {pid for pool in pools for pid in pool.backend_pids()}
        assert found[there.info.backend_pid]["pool"] == "two"
        assert found[stray.info.backend_pid]["pool"] == "one"
        pools[2].closeall()


def test_other_processes_that_are_asked_that_are_frozen_and_that_were_killed(
    folder: Path, dsn: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    with serving(folder, dsn, "--threads=16", workers=2) as site:

        def look(timeout: float = 30) -> dict[str, Any]:
            """Return what a process says that is not the stopped one."""
            with suppress(OSError):
                return dict(json.loads(site.get("/status/json", timeout)))
            return {}

        calls = [Call(site.get, "/hold/0?sql=SELECT+pg_sleep(600)")]
        [first] = eventually(site.sleepers)
        os.kill(first["process"], signal.SIGSTOP)  # requests go where the kernel likes: this one to the other process
        try:
            calls.append(Call(site.get, "/hold/1?sql=SELECT+pg_sleep(600)"))
            eventually(
                lambda: (seen := look(1)) and "GET /hold/1" in [each["request"] for each in seen["pools"][0]["holders"]]
            )
        finally:
            os.kill(first["process"], signal.SIGCONT)
        eventually(lambda: len(site.sleepers()) == 2)
        with closing(psycopg2.connect(dsn)) as stray:
            pids = eventually(
                lambda: (
                    (seen := site.whole())
                    and (pids := {each["backend_pid"] for each in seen["unknown_sessions"]})
                    and stray.info.backend_pid in pids
                    and pids
                ),
                20,
            )
            assert min(each["age"] for each in site.whole()["unknown_sessions"]) > snapshot.YOUNG
            owners = {each["backend_pid"]: each["process"] for each in site.whole()["pools"][0]["holders"]}
            assert not set(owners) & pids
            assert main(["top", f"{site.url}/status", "--once"]) == 0
            assert "no process knows" in capsys.readouterr().out
            frozen = next(iter(owners.values()))
            theirs = {pid for pid, process in owners.items() if process == frozen}
            os.kill(frozen, signal.SIGSTOP)
            try:
                eventually(
                    lambda: (
                        (seen := look(1))
                        and theirs <= {each["backend_pid"] for each in seen["unknown_sessions"]}
                        and frozen in {each["process"] for each in seen["processes"] if each["trouble"]}
                    ),
                    30,
                )

                def page() -> str:
                    with suppress(OSError):
                        return Reader(site.get("/status/", 1)).text
                    return ""

                words = f"may belong to process {frozen} (no answer within 300 ms)"
                eventually(lambda: words in page(), 30)
            finally:
                os.kill(frozen, signal.SIGCONT)
            eventually(lambda: not theirs & {each["backend_pid"] for each in site.whole()["unknown_sessions"]}, 20)
            os.kill(frozen, signal.SIGKILL)  # the server goes on with its queries, until they end
            eventually(
                lambda: (
                    (seen := site.whole())
                    and frozen not in {each["process"] for each in seen["processes"]}
                    and theirs <= {each["backend_pid"] for each in seen["unknown_sessions"]}
                ),
                20,
            )
        site.stop()
        for call in calls:
            with suppress(Exception):
                call.result()


@pytest.mark.usefixtures("at_once", "pool")
def test_a_peers_sessions_are_known(folder: Path, app: StatusApp, make_pool: MakePool, stray: Any) -> None:
    """And a list of peers that has the page itself counts nobody twice."""
    (folder / "theirs").mkdir(0o700)
    registry = Components()
    theirs = make_pool(zpgpool.ThreadedConnectionPool, 0, 2, name="main")
    zpgpool.register_pool(theirs, "main", registry=registry)
    held = theirs.getconn()
    pid = held.info.backend_pid
    other = StatusApp(share=str(folder / "theirs"), registry=registry)
    try:
        assert pid in unknown(app)
        with waitress(other) as port, waitress(app) as own:
            urls = [f"http://127.0.0.1:{each}/" for each in (port, own)]
            both = StatusApp(share=str(app._share.folder), peers=urls)  # type: ignore[union-attr]
            eventually(lambda: stray.info.backend_pid in (found := unknown(both)) and pid not in found)
            seen = json.loads(ask(both, "/json").body)
            assert len(seen["processes"]) == len({each["id"] for each in seen["processes"]}) == 2
            assert (seen["used"], seen["max"]) == (2, 6)
            assert len(seen["pools"][0]["holders"]) == 2
    finally:
        _shares.pop((str(folder / "theirs"), registry)).close()


@pytest.mark.usefixtures("at_once")
def test_behind_a_pooler_nothing_is_said(bouncer: PgBouncer, app: StatusApp, make_pool: MakePool) -> None:
    pool = make_pool(dsn=bouncer.dsn, idle_timeout=60, pooler=f"pgbouncer-{bouncer.mode}")  # type: ignore[attr-defined]
    zpgpool.register_pool(pool, "main")
    for has_holder in (False, True):  # while nobody holds a connection, and while somebody does
        seen = json.loads(ask(app, "/json").body)
        assert (seen["unknown"], seen["unknown_sessions"]) == (None, [])
        assert "no process knows" not in ask(app).text
        assert ("a pooler is in between" in seen["pools"][0]["server_note"]) == has_holder
        held = pool.getconn()
    assert held.info.backend_pid


def test_a_silent_server_keeps_the_page_of_an_idle_pool_for_a_moment_only(app: StatusApp, make_pool: MakePool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = make_dsn(host="127.0.0.1", port=silent.getsockname()[1], dbname="postgres", user="postgres")
        for name in ("one", "two", "three"):
            zpgpool.register_pool(make_pool(name=name, dsn=there), name)
        start = time.monotonic()
        seen = json.loads(ask(app, "/json").body)
        assert is_within(time.monotonic() - start, 0.5)
    assert (seen["unknown"], {each["server_note"] for each in seen["pools"]}) == (None, {""})


def test_the_server_is_asked_for_whoever_looks_at_the_page_of_a_site_only(
    app: StatusApp, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    zpgpool.register_pool(make_pool(name="main"), "main")
    asked = []

    def query(*args: Any) -> Any:
        asked.append(args)
        raise NoAnswer("it was counted")

    monkeypatch.setattr(snapshot, "query", query)
    for page, path, search in ((app, "/metrics", ""), (app, "/json", "own=1"), (StatusApp(), "/json", "")):
        ask(page, path, QUERY_STRING=search)
    assert asked == []
    assert json.loads(ask(app, "/json").body)["unknown"] is None
    ask(app, "/json", QUERY_STRING="process=1")
    assert len(asked) == 1
    gone = make_pool(name="gone", dsn="host=127.0.0.1 port=1 connect_timeout=2", open=False)
    zpgpool.register_pool(gone, "gone")
    with pytest.raises(psycopg2.OperationalError):
        gone.getconn()
    ask(app, "/json")
    assert len(asked) == 2  # not the one that cannot be reached


@pytest.mark.usefixtures("at_once", "pool", "stray")
def test_a_pool_that_cannot_tell_its_sessions_lets_nobody_say(dsn: str, app: StatusApp) -> None:
    assert unknown(app)
    plain = PlainPool(dsn)
    zpgpool.register_pool(plain, "plain")
    assert json.loads(ask(app, "/json").body)["unknown"] is None
    plain.closeall()


def test_backends_are_numbered_by_each_server() -> None:
    def pool(name: str, *backends: int) -> dict[str, Any]:
        return {"name": name, "backends": list(backends)}

    def look(server: str, *pids: int) -> snapshot.Look:
        return snapshot.Look(server, {}, [{"backend_pid": pid, "age": 10.0 + pid} for pid in pids])

    seen = [pool("a", 1), pool("b", 2), pool("c", 3)]
    looks = [look("one", 2, 3, 4, 5), look("two", 1, 4), None]
    found = snapshot.find_unknown(seen, looks)
    assert found is not None
    assert [(each["pool"], each["backend_pid"]) for each in found] == [("a", 5), ("a", 4), ("b", 4), ("a", 2), ("b", 1)]
    assert snapshot.find_unknown(seen, [None, None, None]) is None
