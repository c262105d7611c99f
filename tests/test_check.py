"""`zpgpool check`: what it finds of a real server, of one that it cannot reach, and through a pooler."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from typing import cast
from typing import TYPE_CHECKING

import psycopg2
import pytest
from benchmarks.harness import free_port
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn

import zpgpool
from bouncer import PgBouncer
from conftest import open_to_all
from conftest import Outside
from proxy import Proxy
from test_pgbouncer import MODES
from zpgpool.__main__ import main
from zpgpool.check import _is_local
from zpgpool.check import _network
from zpgpool.check import examine
from zpgpool.check import LEVELS
from zpgpool.check import size_pool
from zpgpool.core.probe import NoAnswer
from zpgpool.demo.server import EmbeddedServer
from zpgpool.monitor.snapshot import ask_server


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


SECRET = "hunter2"


def found(dsn: str, *args: Any, **options: Any) -> dict[str, tuple[str, str]]:
    """Return level and text of each line by its subject."""
    return {line.subject: (LEVELS[line.level], line.text) for line in examine(dsn, *args, **options)}


@pytest.fixture
def role(outside: Outside, dsn: str) -> Iterator[str]:
    """The connection string of an ordinary role with sensible timeouts."""
    name = f"check_{os.getpid()}"
    outside.query(f"CREATE ROLE {name} LOGIN")
    for setting in ("idle_in_transaction_session_timeout = '5min'", "statement_timeout = '30s'"):
        outside.query(f"ALTER ROLE {name} SET {setting}")
    yield make_dsn(dsn, user=name)
    outside.query(f"DROP ROLE {name}")


def test_a_server_that_fits(role: str) -> None:
    lines = found(role, threads=4, processes=2)
    assert {subject: level for subject, (level, _) in lines.items()} == dict.fromkeys(lines, "ok")
    assert list(lines) == [
        "reachable",
        "server",
        "pooler",
        "role",
        "TLS",
        "max_connections",
        "maxconn",
        "idle_in_transaction_session_timeout",
        "statement_timeout",
        "idle_session_timeout",
        "max_prepared_transactions",
    ]
    assert lines["server"][1].startswith("PostgreSQL ")
    assert "2 x 4 = 8 connections at worst, room for" in lines["max_connections"][1]


def test_a_superuser_without_timeouts(dsn: str) -> None:
    lines = found(dsn)
    assert lines["role"][0] == "advice"
    assert lines["statement_timeout"] == (
        "advice",
        "off: a query may run, and hold its connection, for ever; set it for this role",
    )
    assert lines["idle_in_transaction_session_timeout"][0] == "advice"


def test_more_connections_than_there_is_room_for(role: str) -> None:
    level, text = found(role, threads=8, processes=40)["max_connections"]
    assert level == "wrong"
    assert "40 x 8 = 320 connections at worst" in text
    assert "maxconn = 3 would fit" in text
    assert "would fit" not in found(role, threads=8, processes=4000)["max_connections"][1]


def test_limits_of_the_role_and_of_others(role: str, outside: Outside) -> None:
    name = psycopg2.extensions.parse_dsn(role)["user"]
    outside.query(f"ALTER ROLE {name} CONNECTION LIMIT 5")
    level, text = found(role, threads=6)["max_connections"]
    assert (level, "the role's connection limit" in text) == ("wrong", True)
    assert found(role, threads=5)["max_connections"][0] == "ok"
    outside.query(f"ALTER ROLE {name} CONNECTION LIMIT -1")
    [(room,)] = outside.query(
        "SELECT sum(CASE name WHEN 'max_connections' THEN setting::int ELSE -setting::int END)::int FROM pg_settings "
        "WHERE name IN ('max_connections', 'reserved_connections', 'superuser_reserved_connections')"
    )
    level, text = found(role, threads=room)["max_connections"]
    assert (level, "other sessions are there now" in text) == ("advice", True)


@pytest.mark.parametrize(("maxconn", "level"), [(3, "advice"), (4, "ok"), (5, "advice")])
def test_maxconn_beside_threads(role: str, maxconn: int, level: str) -> None:
    assert found(role, threads=4, maxconn=maxconn)["maxconn"][0] == level


@pytest.mark.parametrize(("setting", "level"), [("10s", "advice"), ("600s", "advice"), ("601s", "ok")])
def test_sessions_that_the_server_ends_before_the_pool_does(role: str, setting: str, level: str) -> None:
    dsn = make_dsn(role, options=f"-c idle_session_timeout={setting}")
    assert found(dsn)["idle_session_timeout"][0] == level


def test_prepared_transactions(role: str) -> None:
    most = int(found(role)["max_prepared_transactions"][1])
    assert found(role, threads=most + 1)["max_prepared_transactions"][0] == "advice"


@pytest.mark.parametrize(
    ("dsn", "subject"),
    [
        ("ENV:NOT_THERE", "connection string"),
        (f"password={SECRET} nonsense", "connection string"),
        (f"host=127.0.0.1 port={{port}} password={SECRET}", "reachable"),
        (f"host=nowhere.invalid password={SECRET}", "reachable"),
    ],
)
def test_what_cannot_be_reached_is_one_line(dsn: str, subject: str) -> None:
    [line] = examine(dsn.format(port=free_port()))
    assert (LEVELS[line.level], line.subject) == ("wrong", subject)
    assert "\n" not in line.text
    assert SECRET not in str(line)


def test_a_proxy_that_only_forwards_is_none(own_server: EmbeddedServer) -> None:
    proxy = Proxy(own_server.port or 0)
    try:
        assert found(proxy.dsn(own_server.dsn))["pooler"] == ("ok", "none in between")
    finally:
        proxy.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_pooler_is_known_by_the_numbers_that_it_invents(
    own_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory, mode: str
) -> None:
    folder = tmp_path_factory.mktemp("bouncer")
    open_to_all(folder)
    bouncer = PgBouncer(folder, own_server, mode)
    try:
        level, text = found(bouncer.dsn)["pooler"]
        assert (level, text.startswith("one is in between")) == ("advice", True)
        pool = zpgpool.ThreadedConnectionPool(0, 1, bouncer.dsn)
        conn = pool.getconn()
        with pytest.raises(NoAnswer, match="a pooler is in between"):
            ask_server(pool, [conn.info.backend_pid], time.monotonic() + 20)
        pool.closeall()
    finally:
        bouncer.stop()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("/tmp", True),
        ("@abstract", True),
        ("", True),
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("db.example", False),
    ],
)
def test_where_TLS_is_not_needed(host: str, is_local: bool) -> None:
    assert _is_local(host) is is_local


class Remote:
    """A connection to another machine."""

    def __init__(self, ssl_in_use: bool) -> None:
        self.info = self
        self.host = "db.example"
        self.ssl_in_use = ssl_in_use


@pytest.mark.parametrize(
    ("ssl_in_use", "parts", "levels"),
    [
        (False, {}, ["advice", "advice"]),
        (True, {}, ["advice", "advice"]),
        (True, {"sslmode": "prefer"}, ["advice", "advice"]),
        (True, {"sslmode": "verify-full"}, ["ok", "advice"]),
        (True, {"sslmode": "require", "keepalives_idle": "60"}, ["ok", "ok"]),
        (True, {"sslmode": "require", "tcp_user_timeout": "60000"}, ["ok", "ok"]),
        (True, {"sslmode": "require", "keepalives_idle": "60", "keepalives": "0"}, ["ok", "advice"]),
    ],
)
def test_the_network_to_another_machine(ssl_in_use: bool, parts: dict[str, str], levels: list[str]) -> None:
    assert [LEVELS[line.level] for line in _network(cast("Connection", Remote(ssl_in_use)), parts)] == levels


counts = st.integers(1, 1000)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # however busy the machine is
@given(threads=counts, processes=counts, most=counts, reserved=st.integers(0, 20))
def test_a_size_fits_and_no_larger_one_would(threads: int, processes: int, most: int, reserved: int) -> None:
    size = size_pool(threads, processes, most, reserved)
    assert 0 <= size <= threads
    assert size * processes <= max(0, most - reserved)
    assert size == threads or (size + 1) * processes > most - reserved


class TestCommand:
    def test_the_status_is_that_of_the_worst_line(self, role: str, dsn: str, capsys: Any) -> None:
        assert main(["check", role]) == 0
        assert main(["check", dsn]) == 1
        assert main(["check", role, "--threads", "8", "--processes", "40"]) == 2
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines} == {"ok", "advice", "wrong"}

    @pytest.mark.parametrize("args", [["--threads", "0"], ["--processes", "-1"], ["--maxconn", "x"]])
    def test_called_wrongly(self, args: list[str], capsys: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["check", "dbname=x", *args])
        assert caught.value.code == 2
        assert args[0] in capsys.readouterr().err

    def test_as_a_process_with_the_environment(self, role: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "zpgpool", "check", "ENV:CHECK_DSN", "--maxconn", "4"],
            env={**os.environ, "CHECK_DSN": role},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("ok      reachable ")
