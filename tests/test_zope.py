"""A real Zope, made by mkwsgiinstance and served by its own runwsgi: objects and rows are stored together or not."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import books
from books import check_books
from books import get
from books import rows
from books import STREAMED
from conftest import Call
from conftest import eventually
from conftest import Outside
from zope_instance import Instance


MAXCONN = 6

PAGES = [*(job for job in books.JOBS if job != "abandon"), "conflict", "conflict-late", "method"]

#: The pool, and the pages that use it.
CONFIGURE = f"""<configure
    xmlns="http://namespaces.zope.org/zope"
    xmlns:browser="http://namespaces.zope.org/browser"
    xmlns:zpgpool="http://namespaces.zope.org/zpgpool">
  <include package="zpgpool" />
  <include package="zpgpool.zsql" />
  <zpgpool:pool class="persistent" dsn="ENV:BOOKS_DSN" maxconn="1" />
  {
    "".join(
        f'<browser:page for="OFS.interfaces.IApplication" name="{name}" class="zope_pages.{view}"'
        ' permission="zope2.Public" />'
        for name, view in [*((page, "Page") for page in PAGES), ("books", "Books"), ("outage", "Outage")]
    )
}
</configure>
"""

OVERRIDES = f"""<configure xmlns:zpgpool="http://namespaces.zope.org/zpgpool">
  <zpgpool:pool dsn="ENV:BOOKS_DSN" maxconn="{MAXCONN}" idle_timeout="none" verify_commit="true" />
</configure>
"""

#: What an administrator runs, without a server or a filter: makes the shelves for the objects, too.
SCRIPT = f"""
import transaction
from persistent.mapping import PersistentMapping
from Products.ZSQLMethods.SQL import SQL

import books
import zpgpool
from conftest import run
from zpgpool.datamanager import connection

app.manage_addProduct["zpgpool.zsql"].add_connection("db", "Books")
sql = "INSERT INTO rows (key) VALUES (<dtml-sqlvar key type=string>)"
app._setObject("add_row", SQL("add_row", "", "db", "key", sql))
app.shelves = PersistentMapping({{str(number): PersistentMapping() for number in range({books.CLIENTS})}})
app.shelves["0"]["from the console"] = "an object"
books.store_row(connection(), "from the console")
transaction.commit()
app.shelves["0"]["lost"] = "an object"
books.store_row(connection(), "lost")
transaction.abort()
pool = zpgpool.get_pool()
with pool.connection() as conn:
    print("rows:", run(conn, "SELECT count(*) FROM rows"))
print("maxconn:", pool.maxconn, "holders:", pool.holders())
"""


@pytest.fixture(scope="module")
def dsn(server_dsn: str) -> Iterator[str]:
    with books.database(server_dsn, "zpgpool_zope") as dsn:
        yield dsn


@pytest.fixture(scope="module")
def outside(dsn: str) -> Iterator[Outside]:
    outside = Outside(dsn)
    yield outside
    outside.conn.close()


@pytest.fixture(scope="module")
def instance(dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    return Instance(tmp_path_factory.mktemp("zope") / "instance", dsn, CONFIGURE, OVERRIDES)


@pytest.fixture(scope="module")
def console(instance: Instance, outside: Outside) -> str:
    """What `zconsole run` prints."""
    return instance.run_script(SCRIPT)


@pytest.fixture(scope="module")
def zope(instance: Instance, console: str) -> Iterator[Instance]:
    """The instance while it is served."""
    instance.start()
    yield instance
    instance.stop()


@pytest.fixture
def stored(outside: Outside) -> list[str]:
    """What is stored before the test."""
    return rows(outside)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """At the end nobody holds a connection, and the log has nothing that says so of the pool or a transaction."""
    yield
    if "zope" in request.fixturenames:
        zope = request.getfixturevalue("zope")
        eventually(lambda: zope.books()["holders"] == [])
        # The page that ends its own session loses it again each time.
        told = re.findall(r"(?:WARNING|ERROR|CRITICAL) \[zpgpool.*|.*CRITICAL.*", zope.log())
        assert [line for line in told if "GET /kill has lost its connection, and begins again" not in line] == []


def test_zconsole_needs_no_filter(console: str, outside: Outside) -> None:
    """Pitfall 23: the pool is ZCML's, and the transaction has its connection as long as it lasts."""
    assert console.splitlines()[-2:] == ["rows: 1", f"maxconn: {MAXCONN} holders: []"]
    assert "from the console" in rows(outside)


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page == "kill" else [])  # seven seconds
        for page in PAGES
        if page in books.JOBS
    ],
)
def test_both_or_neither(zope: Instance, outside: Outside, stored: list[str], job: str) -> None:
    _, expected, is_stored = books.JOBS[job]
    status, body = get(zope.port, f"/{job}?key=one-{job}")
    assert status == expected
    assert rows(outside) == zope.objects() == sorted([*stored, f"one-{job}"] if is_stored else stored)
    if job == "stream":
        assert [int(line) for line in body.split()] == list(range(STREAMED))
    assert get(zope.port, f"/store?key=after-{job}")[0] == 200
    check_books(outside, rows(outside), zope.objects, MAXCONN)


@pytest.mark.parametrize("job", ["conflict", "conflict-late"])
def test_a_conflict_between_two_requests_is_retried(
    zope: Instance, outside: Outside, stored: list[str], job: str
) -> None:
    """Pitfall 33: Zope's publisher retries for a TransientError only."""
    before = len(zope.books()["attempts"])
    calls = [Call(get, zope.port, f"/{job}?key={key}-{job}&client={key}") for key in "01"]
    assert [call.result(60)[0] for call in calls] == [200, 200]
    check_books(outside, sorted([*stored, f"0-{job}", f"1-{job}"]), zope.objects, MAXCONN)
    assert sorted(zope.books()["attempts"][before:])[:3] == [0, 0, 1]


@pytest.mark.slow
def test_two_thousand_requests(zope: Instance, outside: Outside, stored: list[str]) -> None:
    expected = sorted(stored + books.load(zope.port, 2000))
    check_books(outside, expected, zope.objects, MAXCONN)
    stats = zope.books()["stats"]
    assert stats["pool_size"] <= MAXCONN
    assert stats["requests_errors"] == 0


def test_a_z_sql_method(zope: Instance, outside: Outside, stored: list[str]) -> None:
    """Beside an object of the ZODB, in Zope's transaction."""
    status, _ = get(zope.port, "/method?key=by-a-method")
    assert status == 200
    check_books(outside, sorted([*stored, "by-a-method"]), zope.objects, MAXCONN)
    assert get(zope.port, "/method?key=by-a-method")[0] == 500  # it is there already
    check_books(outside, sorted([*stored, "by-a-method"]), zope.objects, MAXCONN)


@pytest.mark.parametrize(
    ("page", "shows"),
    [
        ("/db/manage_main", "PersistentConnectionPool"),
        ("/db/manage_browse", "rows"),
        ("/db/manage_testForm", "Test"),
        ("/manage_addProduct/zpgpool.zsql/add_form", "Add zpgpool Database Connection"),
    ],
)
def test_the_management_pages(zope: Instance, page: str, shows: str) -> None:
    status, body = get(zope.port, page, "admin:admin")
    assert status == 200
    assert shows in body.decode()
    assert get(zope.port, page)[0] == 401


def test_its_properties_are_edited(zope: Instance) -> None:
    assert get(zope.port, "/db/manage_edit?title=Other+books&pool_name=", "admin:admin")[0] == 302
    assert "Other books" in get(zope.port, "/db/manage_main", "admin:admin")[1].decode()
