"""Restarts and kills seen through TLS, where a readable socket may hold a ticket, and a dead one a farewell."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from benchmarks.harness import free_port

import zpgpool
from conftest import DEFAULTS
from conftest import missing
from conftest import Outside
from conftest import run
from test_liveness import IDLE
from test_liveness import use_twice
from zpgpool.demo.server import EmbeddedServer


def binaries_with_openssl() -> Path:
    """Return the folder of Debian's newest PostgreSQL."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        missing("A PostgreSQL with OpenSSL (the embedded one has none)", "apt-get install postgresql")
    return found[-1].parent


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    binaries = binaries_with_openssl()
    data = tmp_path_factory.mktemp("tls") / "data"
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    with EmbeddedServer(data, port=free_port(), options={"fsync": "off"}, binaries=binaries) as server:
        owner = data.stat()
        for name, pem in {
            "server.crt": certificate.cert_chain_pems[0],
            "server.key": certificate.private_key_pem,
        }.items():
            pem.write_to_path(data / name)
            os.chmod(data / name, 0o600)
            os.chown(data / name, owner.st_uid, owner.st_gid)
        server.halt()
        server.options["ssl"] = "on"
        server.launch()
        yield server


@pytest.fixture
def pool(tls_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(DEFAULTS, "timer", None)
    dsn = f"{tls_server.dsn} host=127.0.0.1 sslmode=require application_name=tls"
    with zpgpool.ThreadedConnectionPool(IDLE, IDLE, dsn, idle_timeout=600, check_idle=None) as pool:
        with pool.connection() as conn:
            assert conn.info.ssl_in_use
        yield pool


def test_a_tls_ticket_that_waits_is_not_death(pool: Any) -> None:
    use_twice(pool)
    assert pool.get_stats()["connections_num"] == IDLE


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_a_restart_costs_no_error(tls_server: EmbeddedServer, pool: Any, how: signal.Signals) -> None:
    tls_server.halt(how)
    tls_server.launch()
    use_twice(pool)


@pytest.mark.parametrize("share", [1, 2])
def test_terminated_backends_cost_no_error(tls_server: EmbeddedServer, pool: Any, share: int) -> None:
    outside = Outside(f"{tls_server.dsn} application_name=tls")
    outside.terminate(*sorted(outside.backends())[: IDLE // share])
    use_twice(pool)
    outside.conn.close()


def test_a_notify_that_waits_is_not_death(tls_server: EmbeddedServer, pool: Any) -> None:
    conns = [pool.getconn() for _ in range(IDLE)]
    for conn in conns:
        run(conn, "LISTEN news")
        conn.commit()
        pool.putconn(conn)
    outside = Outside(tls_server.dsn)
    outside.query("NOTIFY news")
    outside.conn.close()
    use_twice(pool)
    assert pool.get_stats()["connections_num"] == IDLE
