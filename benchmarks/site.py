"""A waitress on one processor, with one way to its connections: `python -m benchmarks.site WAY DSN THREADS PROCESSOR`.

Prints its port. `/one` runs SELECT 1, `/page` reads 20 rows, `/none` does not ask the database.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import waitress.server

import zpgpool
from benchmarks import peers
from zpgpool.paste import filter_app_factory
from zpgpool.status import StatusApp
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


PAGES = {
    "/one": "SELECT 1",
    "/page": "SELECT n, md5(n::text) FROM generate_series(1, 20) AS n",
}

#: A page that reads with GET, and writes with POST: a query of five milliseconds each.
OUTAGE = "/outage"
READ, WRITE = "SELECT pg_sleep(0.005)", "INSERT INTO written SELECT gen_random_uuid()::text FROM pg_sleep(0.005)"

WAYS: dict[str, Callable[[str, int], peers.Peer]] = {
    "limit": peers.thread_local,
    "psycopg2.pool": peers.theirs_psycopg2,
    "psycopg2-pool": peers.theirs_psycopg2_pool,
    "psycopg_pool": peers.theirs_psycopg_pool,
    "psycopg_pool + check": peers.theirs_psycopg_pool_check,
    "SQLAlchemy": peers.theirs_sqlalchemy,
    "SQLAlchemy + pre_ping": peers.theirs_sqlalchemy_ping,
    "DBUtils PersistentDB": peers.theirs_dbutils_persistent,
    "connect per request": peers.connect_each,
}


def respond(conn: Any, path: str) -> bytes:
    """Return what a page shows."""
    cursor = conn.cursor()
    cursor.execute(PAGES[path])
    rows = cursor.fetchall()
    cursor.close()
    return repr(rows).encode()


def answer(start_response: Any, body: bytes) -> list[bytes]:
    """Send a page."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def with_peer(peer: peers.Peer) -> Any:
    """Return an application that gets and puts its connections itself, and leaves them idle."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        path = environ["PATH_INFO"]
        if path not in PAGES and path != OUTAGE:
            return answer(start_response, b"nothing")
        conn = peer.get()
        try:
            if path == OUTAGE:
                use(conn, environ["REQUEST_METHOD"])
                conn.commit()
                body = b"done"
            else:
                body = respond(conn, path)
            if not getattr(conn, "autocommit", False):
                conn.rollback()
        finally:
            peer.put(conn)
        return answer(start_response, body)

    return app


def use(conn: Any, method: str) -> None:
    """Do what the page of an outage does."""
    cursor = conn.cursor()
    cursor.execute(READ if method == "GET" else WRITE)
    cursor.close()


def with_filter(dsn: str, runs_transactions: bool) -> Any:
    """Return an application behind our filter with its defaults."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        method = environ["REQUEST_METHOD"]
        if method == "POST" and runs_transactions:
            zpgpool.get_pool().run_transaction(lambda conn: use(conn, method))
        else:
            conn = get_connection(environ)
            use(conn, method)
            conn.commit()
        return answer(start_response, b"done")

    return filter_app_factory(app, {}, dsn=dsn, verify_commit=str(runs_transactions))


def with_middleware(pool: Any) -> Any:
    """Return an application behind our middleware."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        path = environ["PATH_INFO"]
        if path not in PAGES:
            return answer(start_response, b"nothing")
        return answer(start_response, respond(get_connection(environ), path))

    return PoolMiddleware(app, pool)


def with_status(site: Any) -> Any:
    """Return an application with the status page, its JSON and its metrics below `/status`."""
    status = StatusApp()

    def app(environ: Any, start_response: Any) -> Any:
        if not environ["PATH_INFO"].startswith("/status"):
            return site(environ, start_response)
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = "/status", environ["PATH_INFO"].removeprefix("/status")
        return status(environ, start_response)

    return app


def make_app(way: str, dsn: str, threads: int) -> Any:
    """Return the application that goes this way."""
    autocommit = way.endswith("autocommit")
    if way in ("zpgpool defaults", "zpgpool run_transaction"):
        return with_filter(dsn, way.endswith("run_transaction"))
    if way == "zpgpool watched":
        zpgpool.register_pool(zpgpool.PersistentConnectionPool(0, threads, dsn, idle_timeout=600, timeout=30))
        return with_status(with_middleware(zpgpool.get_pool()))
    if way.startswith("zpgpool"):
        factory = zpgpool.ThreadedConnectionPool if "threaded" in way else zpgpool.PersistentConnectionPool
        options = {"autocommit": "safe" if way.endswith("safe") else True} if autocommit or way.endswith("safe") else {}
        return with_middleware(factory(0, threads, dsn, idle_timeout=600, max_lifetime=3600, timeout=30, **options))
    if way == "limit autocommit":
        return with_peer(peers.thread_local_autocommit(dsn, threads))
    return with_peer(WAYS[way](dsn, threads))


def main(way: str, dsn: str, threads: int, processor: int) -> None:
    """Serve until killed."""
    if processor >= 0:
        os.sched_setaffinity(0, {processor})
    server: Any = waitress.server.create_server(make_app(way, dsn, threads), host="127.0.0.1", port=0, threads=threads)
    print(server.effective_port, flush=True)
    server.run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
