"""Beside Products.ZPsycopgDA, which has the same job: what each does, measured, as the documentation says."""

from __future__ import annotations

import csv
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import transaction
from Products.ZPsycopgDA import pool as zpsycopgda_pool
from Products.ZPsycopgDA.db import DB
from psycopg2.extensions import DATE
from psycopg2.extensions import ISOLATION_LEVEL_REPEATABLE_READ
from psycopg2.extensions import TIME
from transaction.interfaces import TransientError

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import Outside
from zpgpool.zsql import Database


TABLE = Path(__file__).parent.parent / "docs" / "zpsycopgda.csv"

IDLE = 4


class Ours:
    """A site with zpgpool."""

    name = "zpgpool"

    def __init__(self, dsn: str) -> None:
        self.pool = zpgpool.PersistentConnectionPool(0, 8, dsn, idle_timeout=60, isolation_level="repeatable read")
        zpgpool.register_pool(self.pool)
        self.database: Any = Database("", zdatetime=False)

    def status(self) -> list[int]:
        """Return the transaction status of what rests in the pool."""
        return [entry.conn.info.transaction_status for entry in self.pool._parked.values()]

    def close(self) -> None:
        self.pool.closeall()


class Theirs:
    """A site with Products.ZPsycopgDA."""

    name = "Products.ZPsycopgDA"

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.database: Any = DB(dsn, ISOLATION_LEVEL_REPEATABLE_READ, (psycopg2.DATETIME, DATE, TIME))
        self.database.open()

    def status(self) -> list[int]:
        return [conn.info.transaction_status for conn in zpsycopgda_pool.getpool(self.dsn)._pool]

    def close(self) -> None:
        zpsycopgda_pool.getpool(self.dsn).closeall()


class Objects:
    """Stands for ZODB, and is asked when that would be: says whether it has committed."""

    transaction_manager = transaction.manager
    has_committed = False

    def sortKey(self) -> str:
        return "/site/var/Data.fs:1"  # of a FileStorage

    def tpc_finish(self, txn: object) -> None:
        self.has_committed = True

    abort = tpc_begin = commit = tpc_vote = tpc_abort = lambda self, txn: None


def rows(outside: Outside) -> list[int]:
    return [number for (number,) in outside.query("SELECT id FROM beside ORDER BY id")]


def insert(site: Any, number: int) -> None:
    site.database.query(f"INSERT INTO beside VALUES ({number})")


def success(site: Any, outside: Outside) -> str:
    """A request that succeeds."""
    insert(site, 1)
    transaction.commit()
    return f"stored: {rows(outside)}"


def failure(site: Any, outside: Outside) -> str:
    """A request that raises."""
    insert(site, 1)
    transaction.abort()
    return f"stored: {rows(outside)}"


def deferred(site: Any, outside: Outside) -> str:
    """A deferred constraint that fails with the commit, beside an object in ZODB."""
    insert(site, 1)
    transaction.commit()
    objects = Objects()
    transaction.get().join(objects)
    insert(site, 1)
    with pytest.raises(psycopg2.IntegrityError):
        transaction.commit()
    transaction.abort()
    return "the object is stored, the row is lost" if objects.has_committed else "neither is stored"


def swallowed(site: Any, outside: Outside) -> str:
    """Row 1, an SQL error that the page swallows, row 2, commit."""
    insert(site, 1)
    try:
        site.database.query("SELECT nonsense")
    except psycopg2.Error:
        pass
    try:
        insert(site, 2)
    except psycopg2.Error:
        pass
    try:
        transaction.commit()
    except psycopg2.Error:
        transaction.abort()
        return f"the commit raises, stored: {rows(outside)}"
    return f"the commit succeeds, stored: {rows(outside)}"


def conflict(site: Any, outside: Outside) -> str:
    """Two requests update the same row."""
    insert(site, 1)
    transaction.commit()
    site.database.query("SELECT * FROM beside")
    in_thread(outside.query, "UPDATE beside SET id = 2")
    return retries(site, "UPDATE beside SET id = 3")


def restart(site: Any, outside: Outside) -> str:
    """Four idle connections whose backends have ended; then four requests at once."""
    barrier = threading.Barrier(IDLE)
    errors: list[Exception] = []

    def work() -> None:
        barrier.wait(10)
        try:
            site.database.query("SELECT 1")
        except Exception as error:
            errors.append(error)
        barrier.wait(10)
        transaction.abort()

    def together() -> None:
        threads = [threading.Thread(target=work) for _ in range(IDLE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together()
    outside.terminate()
    together()
    return "requests fail" if errors else "no request fails"


def recycled(site: Any, outside: Outside) -> str:
    """A thread ends in the middle of a transaction; the next one gets its number."""
    together = threading.Barrier(8)  # whoever has the dead thread's number is among so many

    def die() -> int:
        insert(site, 1)
        return threading.get_ident()

    def look(ident: int) -> str:
        together.wait(10)
        if threading.get_ident() != ident:
            return ""
        _, [(seen,)] = site.database.query("SELECT count(*) FROM beside")
        transaction.abort()
        return "sees what the dead thread did" if seen else "has a clean connection"

    insert(site, 2)  # whatever starts with the first connection has its number
    transaction.abort()

    def among_all() -> str:
        ident = in_thread(die)  # each time: the system gives away the numbers that came free last
        if isinstance(site, Ours):
            site.pool.run_maintenance(time.monotonic())
        calls = [Call(look, ident) for _ in range(together.parties)]
        return "".join(call.result() for call in calls)

    return str(eventually(among_all))


def browsing(site: Any, outside: Outside) -> str:
    """The tables are browsed, and the transaction ends."""
    site.database.tables()
    status = site.status()
    transaction.commit()
    return "rests in a transaction meanwhile" if any(status) else "nothing rests in a transaction"


def answer(site: Any) -> str:
    """Do what an error page does."""
    try:
        site.database.query("SELECT 1")
    except psycopg2.Error as error:
        return f"gets {type(error).__name__}"
    return "gets its rows"


def error_page(site: Any, outside: Outside) -> str:
    """An SQL error; then the error page queries, before the abort."""
    insert(site, 1)
    with pytest.raises(psycopg2.Error):
        site.database.query("SELECT nonsense")
    return answer(site)


def error_page_of_commit(site: Any, outside: Outside) -> str:
    """The commit fails; then the error page queries, before the abort."""
    insert(site, 1)
    insert(site, 1)
    with pytest.raises(psycopg2.Error):
        transaction.commit()
    return answer(site)


def lost(site: Any, outside: Outside) -> str:
    """The connection is lost between two statements."""
    insert(site, 1)
    outside.terminate()
    return retries(site, "SELECT 1")


def locked(site: Any, outside: Outside) -> str:
    """A lock is not to be had within lock_timeout."""
    site.database.query("SET LOCAL lock_timeout = '20ms'")
    in_thread(outside.query, "BEGIN; LOCK TABLE beside")
    try:
        return retries(site, "INSERT INTO beside VALUES (1)")
    finally:
        in_thread(outside.query, "ROLLBACK")


def retries(site: Any, sql: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        site.database.query(sql)
    return "Zope retries" if isinstance(caught.value, TransientError) else "Zope does not retry"


SCENARIOS: list[Callable[[Any, Outside], str]] = [
    success,
    failure,
    deferred,
    swallowed,
    conflict,
    restart,
    recycled,
    browsing,
    error_page,
    error_page_of_commit,
    lost,
    locked,
]


@pytest.fixture
def outside(dsn: str) -> Iterator[Outside]:
    outside = Outside(dsn)
    outside.query("SET lock_timeout = '5s'")
    outside.query("DROP TABLE IF EXISTS beside")
    outside.query("CREATE TABLE beside (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    yield outside
    transaction.abort()
    outside.terminate()
    outside.query("DROP TABLE beside")
    outside.conn.close()


def said() -> dict[str, dict[str, str]]:
    """Return what the documentation says."""
    with TABLE.open(newline="") as file:
        return {row["what happens"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("make", [Ours, Theirs], ids=["ours", "theirs"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_as_the_documentation_says(scenario: Any, make: Any, dsn: str, outside: Outside) -> None:
    logging.getLogger("Products.ZPsycopgDA").setLevel(logging.CRITICAL)
    site = make(dsn)
    try:
        outcome = scenario(site, outside)
    finally:
        transaction.abort()
        site.close()
    assert outcome == said()[scenario.__doc__][make.name]


def test_the_table_has_what_is_measured() -> None:
    assert list(said()) == [scenario.__doc__ for scenario in SCENARIOS]
