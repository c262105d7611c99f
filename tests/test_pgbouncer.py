"""Behind a real PgBouncer (Debian's), in session and in transaction mode."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import zpgpool
from bouncer import PgBouncer
from conftest import Call
from conftest import eventually
from conftest import is_within
from conftest import open_to_all
from conftest import run
from zpgpool.demo.server import EmbeddedServer


MakePool = Callable[..., Any]

MODES = ["session", "transaction"]


@pytest.fixture(scope="module", params=MODES)
def bouncer(request: pytest.FixtureRequest, own_server: EmbeddedServer, tmp_path_factory: Any) -> Iterator[PgBouncer]:
    folder = tmp_path_factory.mktemp("bouncer")
    open_to_all(folder)
    bouncer = PgBouncer(folder, own_server, request.param)
    bouncer.mode = request.param  # type: ignore[attr-defined]
    yield bouncer
    bouncer.stop()


@pytest.fixture(params=[zpgpool.ThreadedConnectionPool, zpgpool.PersistentConnectionPool])
def pool(request: pytest.FixtureRequest, make_pool: MakePool, bouncer: PgBouncer) -> Any:
    mode = bouncer.mode  # type: ignore[attr-defined]
    return make_pool(request.param, 0, 4, dsn=bouncer.dsn, idle_timeout=60, timeout=20, pooler=f"pgbouncer-{mode}")


def use(pool: Any) -> int:
    with pool.connection() as conn:
        return int(run(conn, "SELECT 1"))


DIRTY = [
    lambda conn: run(conn, "SELECT 1"),
    lambda conn: setattr(conn, "autocommit", True),
    lambda conn: conn.set_session(isolation_level="SERIALIZABLE", readonly=True),
    lambda conn: conn.set_client_encoding("LATIN1"),
    lambda conn: conn.close(),
]


@pytest.mark.parametrize("make_dirty", DIRTY)
def test_what_comes_back_is_clean(pool: Any, make_dirty: Callable[[Any], object]) -> None:
    conn = pool.getconn()
    make_dirty(conn)
    pool.putconn(conn)
    with pool.connection() as conn:
        assert not conn.autocommit
        assert conn.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
        assert run(conn, "SHOW transaction_isolation") == "read committed"
        assert run(conn, "SHOW transaction_read_only") == "off"
        assert run(conn, "SHOW client_encoding") == "UTF8"


def test_a_failed_transaction(pool: Any) -> None:
    conn = pool.getconn()
    with pytest.raises(psycopg2.ProgrammingError):
        run(conn, "SELECT nonsense")
    pool.putconn(conn)
    assert use(pool) == 1


def test_a_ping_after_a_rest(pool: Any) -> None:
    conn = pool.getconn()
    pool.putconn(conn)
    [entry] = pool._parked.values()
    entry.since -= 10
    entry.look_at = -math.inf
    assert use(pool) == 1
    assert pool.get_stats()["connections_num"] == 1


def test_a_restart_of_pgbouncer_costs_nobody_an_error(pool: Any, bouncer: PgBouncer) -> None:
    use(pool)
    bouncer.stop()
    bouncer.start()
    assert [use(pool) for _ in range(8)] == [1] * 8


def test_a_restart_of_the_server_behind_it(pool: Any, own_server: EmbeddedServer) -> None:
    use(pool)
    own_server.halt()
    own_server.launch()

    def works() -> bool:
        """PgBouncer finds out by itself which of its connections are dead: one user pays for each."""
        try:
            return use(pool) == 1
        except psycopg2.Error:
            return False

    eventually(works)
    assert [use(pool) for _ in range(8)] == [1] * 8
    assert pool.holders() == []


@pytest.mark.parametrize("bouncer", ["transaction"], indirect=True)  # in session mode PAUSE waits for the clients
def test_pause_and_resume_cost_nobody_an_error(pool: Any, bouncer: PgBouncer) -> None:
    use(pool)
    bouncer.command("PAUSE")
    calls = [Call(use, pool) for _ in range(4)]
    time.sleep(0.5)  # real time: nobody is served during the pause
    assert all(call.is_running for call in calls)
    bouncer.command("RESUME")
    assert [call.result() for call in calls] == [1] * 4


def test_closing_during_a_query(pool: Any) -> None:
    def sleep() -> None:
        with pool.connection() as conn:
            run(conn, "SELECT pg_sleep(60)")

    user = Call(sleep)
    eventually(lambda: any(holder.status == "in a query" for holder in pool.holders()))
    start = time.monotonic()
    pool.close(0)
    assert is_within(time.monotonic() - start, 5)
    with pytest.raises(psycopg2.Error):
        user.result()


def test_two_phases_are_refused(make_pool: MakePool, bouncer: PgBouncer) -> None:
    """Whoever forgot to say that there is a pooler is told at the start, too."""
    with pytest.raises(zpgpool.PoolError, match="there is a pooler between it and the server"):
        make_pool(zpgpool.ThreadedConnectionPool, 1, 2, dsn=bouncer.dsn, twophase=True)


@pytest.mark.parametrize(
    ("pooler", "options", "named"),
    [
        ("pgbouncer-session", {"twophase": True}, "twophase"),
        ("pgbouncer-transaction", {"twophase": True}, "twophase"),
        ("pgbouncer-transaction", {"reset": "discard"}, "reset"),
        ("pgbouncer-transaction", {"autocommit": True, "readonly": True}, "readonly"),
        ("pgbouncer-transaction", {"autocommit": True, "isolation_level": "serializable"}, "isolation_level"),
    ],
)
def test_what_cannot_be_kept_is_refused(make_pool: MakePool, pooler: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"option '{named}'.*option 'pooler' '{pooler}'"):
        make_pool(open=False, pooler=pooler, **options)


@pytest.mark.parametrize("options", [{}, {"autocommit": True}, {"readonly": True}, {"reset": lambda conn: None}])
def test_what_can_be_kept(make_pool: MakePool, options: dict[str, Any]) -> None:
    assert make_pool(open=False, pooler="pgbouncer-transaction", **options).settings.pooler == "pgbouncer-transaction"
    with pytest.raises(ValueError, match="one of pgbouncer-session"):
        make_pool(open=False, pooler="odyssey")


#: One of several processes: each thread marks its session in a transaction, and looks for others' marks.
WORKER = """
import sys, threading
import zpgpool
dsn, requests = sys.argv[1], int(sys.argv[2])
pool = zpgpool.PersistentConnectionPool(
    0, 8, dsn, idle_timeout=60, timeout=30, pooler="pgbouncer-transaction", connect_timeout=20
)
errors, done = [], []

def work(number):
    for request in range(requests // 8):
        try:
            with pool.connection() as conn, conn.cursor() as cursor:
                cursor.execute("SELECT current_setting('zpgpool.mark', true), pg_current_xact_id_if_assigned()")
                mark, xid = cursor.fetchone()
                if mark or xid or conn.autocommit:
                    errors.append(f"seen: {mark} {xid}")
                cursor.execute("SELECT set_config('zpgpool.mark', %s, true)", [str(number)])
                if request % 3:
                    conn.commit()
                done.append(1)
                if (number, request) == (0, 12):
                    print("in the middle", flush=True)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(done), *errors, sep="|")
"""


@pytest.mark.parametrize(
    "meanwhile", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("nothing", "pause")), "restart"]
)
def test_four_processes_over_ten_connections(own_server: EmbeddedServer, tmp_path: Path, meanwhile: str) -> None:
    """20,000 requests: no error, nothing seen of another client; through a restart only those in flight fail."""
    open_to_all(tmp_path)
    requests = 20_000 if meanwhile == "nothing" else 8_000
    bouncer = PgBouncer(tmp_path, own_server, "transaction")
    log = (tmp_path / "stderr").open("w")
    try:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, bouncer.dsn, str(requests // 4)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        outputs: list[str] = []
        # Not communicate(): one that has ended already has the rest in the buffer of readline().
        readers = [threading.Thread(target=lambda p=p: outputs.append(p.stdout.read())) for p in processes]
        for reader in readers:
            reader.start()
        if meanwhile != "nothing":
            if meanwhile == "pause":
                bouncer.command("PAUSE")
                time.sleep(0.5)  # real time
                bouncer.command("RESUME")
            else:
                bouncer.stop()
                bouncer.start()
        for reader in readers:
            reader.join()
        assert [process.wait(10) for process in processes] == [0] * 4, Path(log.name).read_text()
        done = sum(int(out.split("|")[0]) for out in outputs)
        errors = [error for out in outputs for error in out.strip().split("|")[1:]]
        assert "Traceback" not in Path(log.name).read_text()
        assert not [error for error in errors if error.startswith("seen")]
        assert done + len(errors) == requests
        if meanwhile == "restart":
            in_flight = [error for error in errors if "Connection refused" not in error]
            assert 0 < len(in_flight) <= 32, in_flight  # one for each thread; the others were told who is missing
        else:
            assert errors == []
    finally:
        log.close()
        for process in processes:
            if process.stdout is not None:
                process.stdout.close()
        bouncer.stop()
