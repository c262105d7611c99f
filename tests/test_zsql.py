"""The database connection object: real Z SQL Methods over a pool, in the test's process and in its transaction."""

from __future__ import annotations

import datetime
import decimal
import socket
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import psycopg2
import pytest
import transaction
from AccessControl.SecurityManagement import newSecurityManager
from AccessControl.SecurityManagement import noSecurityManager
from AccessControl.users import system
from Acquisition import aq_base
from DateTime import DateTime
from OFS.Folder import Folder
from Products.ZSQLMethods.SQL import SQL
from Products.ZSQLMethods.SQL import SQLConnectionIDs
from transaction.interfaces import TransientError

import zpgpool
from conftest import in_thread
from conftest import Outside
from zpgpool.core import query
from zpgpool.datamanager import connection
from zpgpool.zsql import Connection


MakePool = Callable[..., Any]


WHERE = "<dtml-sqlgroup where><dtml-sqltest word type=string optional></dtml-sqlgroup>"


@pytest.fixture
def pool(make_pool: MakePool, outside: Outside) -> Iterator[Any]:
    outside.query("SET lock_timeout = '5s'")
    outside.query("DROP TABLE IF EXISTS zsql; CREATE TABLE zsql (id int PRIMARY KEY, word text)")
    pool = make_pool(zpgpool.PersistentConnectionPool, 0, 2, idle_timeout=60)
    zpgpool.register_pool(pool, "main")
    yield pool
    transaction.abort()
    assert pool.holders() == []
    outside.query("DROP TABLE zsql")


@pytest.fixture
def folder(pool: Any) -> Any:
    """A folder with a connection object and some methods."""
    folder = Folder("folder")
    folder._setObject("db", Connection("db", "The database", "main"))
    folder._setObject("zdb", Connection("zdb", pool_name="main", zdatetime=True))
    for name, arguments, template in [
        ("add", "id:int word", "INSERT INTO zsql VALUES (<dtml-sqlvar id type=int>, <dtml-sqlvar word type=string>)"),
        (
            "find",
            "word",
            "SELECT * FROM zsql <dtml-sqlgroup where><dtml-sqltest word type=string optional></dtml-sqlgroup>",
        ),
        ("many", "", "SELECT generate_series(1, 5000) AS number"),
        ("two", "", "INSERT INTO zsql VALUES (8, 'a')<dtml-var sql_delimiter>SELECT count(*) AS n FROM zsql"),
        ("bad", "", "SELECT nonsense"),
        ("unlike", "", "SELECT 1 AS a<dtml-var sql_delimiter>SELECT 'x' AS b"),
    ]:
        folder._setObject(name, SQL(name, "", "db", arguments, template))
    return folder


def test_a_method_stores_and_finds(folder: Any, outside: Outside) -> None:
    folder.add(id=1, word="it's")
    folder.add(id=2, word="\\' OR 1 = 1 --")
    assert [(row.id, row.word) for row in folder.find(word="it's")] == [(1, "it's")]
    assert len(folder.find()) == 2
    transaction.abort()
    assert outside.query("SELECT * FROM zsql") == []
    folder.add(id=3, word="kept")
    transaction.commit()
    assert outside.query("SELECT * FROM zsql") == [(3, "kept")]


def test_it_is_the_transactions_connection(folder: Any) -> None:
    folder.add(id=1, word="x")
    with connection("main").cursor() as cursor:
        cursor.execute("SELECT count(*) FROM zsql")
        assert cursor.fetchone() == (1,)


def test_max_rows(folder: Any) -> None:
    assert len(folder.many()) == 1000  # a Z SQL Method's default
    folder.many.max_rows_ = 0
    assert len(folder.many()) == 5000


def test_several_statements(folder: Any) -> None:
    assert folder.two()[0].n == 1
    with pytest.raises(psycopg2.ProgrammingError, match="different columns"):
        folder.unlike()


def test_parameters(folder: Any) -> None:
    _, rows = folder.db().query("SELECT %(a)s || '%%'", query_data={"a": "x"})
    assert rows == [("x%",)]
    _, rows = folder.db().query("SELECT '%'")
    assert rows == [("%",)]


def test_a_swallowed_error_commits_nothing(folder: Any, outside: Outside) -> None:
    """With ZPsycopgDA the first row is lost and the second stored."""
    folder.add(id=1, word="first")
    with pytest.raises(psycopg2.ProgrammingError):
        folder.bad()
    folder.add(id=2, word="second")
    with pytest.raises(psycopg2.errors.InFailedSqlTransaction):
        transaction.commit()
    transaction.abort()
    assert outside.query("SELECT * FROM zsql") == []


def test_a_conflict_is_for_zope_to_retry(folder: Any, outside: Outside) -> None:
    folder.add(id=1, word="x")
    transaction.commit()
    folder.db().query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    folder.find()
    in_thread(outside.query, "UPDATE zsql SET word = 'y'")
    with pytest.raises(psycopg2.errors.SerializationFailure) as caught:
        folder.db().query("UPDATE zsql SET word = 'z'")
    assert isinstance(caught.value, TransientError)


TYPES = """SELECT 1::int2 AS i2, 2 AS i4, 3::int8 AS i8, 1.5 AS n, 2.5::float8 AS f, true AS b, 'x'::text AS t,
    'y'::varchar(9) AS v, '2020-01-02'::date AS d, '2020-01-02 03:04:05+00'::timestamptz AS tz, '03:04:05'::time AS ti,
    'infinity'::timestamp AS inf, NULL::date AS nd, NULL::time AS nt, '{}'::jsonb AS j"""


def test_types(folder: Any) -> None:
    items, [row] = folder.db().query(TYPES.replace("'infinity'::timestamp", "'2020-01-02'::timestamp"))
    assert "".join(item["type"] for item in items) == "iiinnnssddddd" + "ds"
    assert [item["name"] for item in items][:3] == ["i2", "i4", "i8"]
    assert set(items[0]) == {"name", "type", "width", "precision", "scale", "null"}
    assert row[3:6] == (decimal.Decimal("1.5"), 2.5, True)
    assert row[8] == datetime.date(2020, 1, 2)
    assert row[10] == datetime.time(3, 4, 5)


def test_zopes_datetime(folder: Any) -> None:
    _, [row] = folder.zdb().query(TYPES)
    assert isinstance(row[8], DateTime)
    assert row[8].ISO()[:10] == "2020-01-02"
    assert row[9] == DateTime("2020-01-02 03:04:05+00")
    assert (row[10].h_24(), row[10].minute(), row[10].second()) == (3, 4, 5)
    assert row[11] == "infinity"
    assert row[12] is None
    assert row[13] is None
    _, [row] = folder.db().query(TYPES.replace("'infinity'::timestamp", "'2020-01-02'::timestamp"))
    assert row[8] == datetime.date(2020, 1, 2)  # of the other object, on the same connection


def test_tables_and_columns(folder: Any, pool: Any) -> None:
    database = folder.db()
    [table] = [table for table in database.tables() if table["table_name"] == "zsql"]
    assert table["table_type"] == "TABLE"
    assert table["owner"]
    assert [(column["name"], column["short_type"]) for column in database.columns("zsql")] == [
        ("id", "int4"),
        ("word", "text"),
    ]
    assert database.columns('"; DROP TABLE zsql') == []
    assert next(each for each in folder.db.browse() if each["table_name"] == "zsql")["columns"][0]["name"] == "id"
    transaction.commit()
    assert pool.holders() == []  # ZPsycopgDA puts its connection back in a transaction


@pytest.fixture
def manager() -> Iterator[None]:
    """The test is a manager of the site."""
    newSecurityManager(None, system)
    yield
    noSecurityManager()


@pytest.mark.usefixtures("manager")
def test_an_object_whose_pool_is_not_there(folder: Any, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zpgpool.zsql.PATIENCE", 20.0)
    assert folder.db.connected()
    assert folder.db.title_or_id() == "The database (connected)"
    assert folder.db.title_and_id() == "The database (db), which is connected"
    assert "PersistentConnectionPool" in folder.db.pool_state()
    assert folder.db.pool_state().endswith(", connected")
    assert SQLConnectionIDs(folder) == [
        ("The database (db), which is connected", "db"),
        ("zdb, which is connected", "zdb"),
    ]
    folder.db.edit("", "elsewhere")
    assert not folder.db.connected()
    assert folder.db.title_or_id() == "db (not connected)"
    assert folder.db.pool_state() == "no pool is registered as 'elsewhere'"
    assert folder.db.pool_names() == ["elsewhere", "main"]
    assert folder.db.browse() == []
    with pytest.raises(LookupError, match="no pool is registered as 'elsewhere' \\(registered: 'main'\\)"):
        folder.find()


@pytest.mark.usefixtures("manager")
def test_an_object_whose_server_does_not_answer(
    folder: Any, make_pool: MakePool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the pool's state is meant: the server is asked, once for all objects."""
    asked = Mock(side_effect=query)
    monkeypatch.setattr("zpgpool.zsql.query", asked)
    monkeypatch.setattr("zpgpool.zsql.ANSWER_LASTS", 600)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pool = make_pool(dsn=f"host=127.0.0.1 port={silent.getsockname()[1]}")
        zpgpool.register_pool(pool, "silent")
        folder.db.edit("", "silent")
        titles = [folder.db.title_or_id() for _ in range(9)]
        assert set(titles) == {"db (not connected)"}
        assert folder.db.pool_state().endswith(", not connected: the server does not answer")
        folder.db.manage_open_connection()
        assert "AttributeError" not in caplog.text
        assert "the server does not answer" in caplog.text
        pool.close(0)
        assert folder.db.pool_state().endswith(", not connected: the pool is closed")
    assert asked.call_count == 1


def test_visitors_do_not_ask_the_server(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of the site may list objects by their titles."""
    monkeypatch.setattr("zpgpool.zsql.query", None)
    assert folder.db.title_or_id() == "The database"
    assert folder.db.title_and_id() == "The database (db)"


def test_a_pool_of_another_class_tells_no_more(folder: Any) -> None:
    class Minimal:
        closed = False

    zpgpool.register_pool(Minimal(), "minimal")  # type: ignore[arg-type]  # what is asked for here, and no more
    folder.db.edit("", "minimal")
    assert folder.db.connected()


def test_nothing_of_the_database_is_in_the_zodb(folder: Any) -> None:
    folder.find()
    assert sorted(aq_base(folder.db).__dict__) == ["id", "pool_name", "title", "zdatetime"]


def test_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.delitem(sys.modules, "zpgpool.zsql")
    monkeypatch.setitem(sys.modules, "Shared.DC.ZRDB.Connection", None)
    with pytest.raises(ImportError, match=r"zpgpool\[zsql\]"):
        importlib.import_module("zpgpool.zsql")
