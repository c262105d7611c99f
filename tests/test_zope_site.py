"""A site in a real Zope, as its owner sees it: error pages that query, retries, several pools, the management pages."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from benchmarks.harness import free_port

import books
from books import get
from books import rows
from conftest import eventually
from conftest import Outside
from zope_instance import Instance


PAGES = ["trouble", "lost", "sleeper", "locked", "absent", "exhausted", "streamed", "held"]

#: `side` has no filter.
CONFIGURE = f"""<configure
    xmlns="http://namespaces.zope.org/zope"
    xmlns:browser="http://namespaces.zope.org/browser"
    xmlns:zpgpool="http://namespaces.zope.org/zpgpool">
  <include package="zpgpool" />
  <include package="zpgpool.zsql" />
  <zpgpool:pool name="main" dsn="ENV:BOOKS_DSN" maxconn="4" />
  <zpgpool:pool name="reader" dsn="ENV:BOOKS_DSN" maxconn="4" readonly="true" />
  <zpgpool:pool name="side" class="threaded" dsn="ENV:BOOKS_DSN" maxconn="2" timeout="2" />
  <zpgpool:pool name="absent" host="127.0.0.1" port="{free_port()}" timeout="1" outage_wait="0" />
  <browser:page for="site_pages.Trouble" name="index.html" class="site_pages.TroubleView" permission="zope2.Public" />
  {
    "".join(
        f'<browser:page for="OFS.interfaces.IFolder" name="{name}" class="site_pages.Page" permission="zope2.Public" />'
        for name in PAGES
    )
}
</configure>
"""

SCRIPT = """
import transaction
from OFS.Folder import Folder
from Products.PageTemplates.ZopePageTemplate import ZopePageTemplate
from Products.ZSQLMethods.SQL import SQL

app._setObject("site", Folder("site"))
site = app.site
site.manage_permission("Use Database Methods", ["Anonymous"])
site.manage_addProduct["zpgpool.zsql"].add_connection("db", "The books", "main")
site.manage_addProduct["zpgpool.zsql"].add_connection("reader", "The readers", "reader")
for name, sql in {
    "menu": "SELECT 'the menu' AS word",
    "bad": "SELECT nonsense",
    "same": "INSERT INTO rows VALUES ('a', 'same'), ('b', 'same')",
    "add_row": "INSERT INTO rows VALUES ('added', 'added')",
}.items():
    site._setObject(name, SQL(name, "", "db", "", sql))
    site._setObject(f"read_{name}", SQL(f"read_{name}", "", "reader", "", sql))
for name, text in {
    "standard_error_message": "<h1>An error page with <b tal:content='python:here.menu()[0].word' /></h1>"
                              "<p tal:content='options/error_value|nothing' />",
    "failed": "<p tal:content='python:here.bad()' />",
    "vote": "<p tal:content='python:here.same()' />",
    "onerror": "<i tal:on-error='string:swallowed' tal:content='python:here.bad()' />"
               "<b tal:content='python:here.menu()[0].word' />",
    "reading": "<i tal:on-error='string:swallowed' tal:content='python:here.read_bad()' />"
               "<b tal:content='python:here.read_menu()[0].word' />",
    "lossy": "<u tal:content='python:here.add_row()' />"
             "<i tal:on-error='string:swallowed' tal:content='python:here.bad()' />"
             "<b tal:content='python:here.menu()[0].word' />",
}.items():
    site._setObject(name, ZopePageTemplate(name))
    site[name].pt_edit(text, "text/html")
transaction.commit()
"""


@pytest.fixture(scope="module")
def dsn(server_dsn: str) -> Iterator[str]:
    with books.database(server_dsn, "zpgpool_site") as dsn:
        yield dsn


@pytest.fixture(scope="module")
def outside(dsn: str) -> Iterator[Outside]:
    outside = Outside(dsn)
    outside.query("CREATE TABLE locked ()")
    yield outside
    outside.conn.close()


@pytest.fixture(scope="module")
def zope(dsn: str, outside: Outside, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    zope = Instance(tmp_path_factory.mktemp("site") / "instance", dsn, CONFIGURE)
    zope.edit("zope.ini", "use = egg:zpgpool", "use = egg:zpgpool\nname = main")
    zope.run_script(SCRIPT)
    zope.start()
    yield zope
    zope.stop()


@pytest.fixture(autouse=True)
def nothing_is_left(zope: Instance) -> Iterator[None]:
    """At the end nobody holds a connection."""
    yield
    eventually(lambda: get(zope.port, "/site/held") == (200, b"[]"))


@pytest.mark.parametrize(
    ("page", "shows"),
    [
        ("failed", "An error page with <b>the menu</b>"),
        ("vote", "An error page with <b>the menu</b>"),
        ("trouble", "In trouble, with the menu"),
        ("onerror", "An error page with <b>the menu</b>"),
        ("lossy", "An error page with <b>the menu</b>"),
        pytest.param("lost?key=0&always=1", "An error page with <b>the menu</b>", marks=pytest.mark.slow),  # retries
    ],
)
def test_an_error_page_queries(zope: Instance, outside: Outside, page: str, shows: str) -> None:
    """As with Products.ZPsycopgDA; and what has failed is not committed, nor a part of it."""
    before = rows(outside)
    status, body = get(zope.port, f"/site/{page}")
    assert (status, shows in body.decode()) == (500, True), body
    assert rows(outside) == before


def test_an_error_is_swallowed_where_nothing_can_be_lost(zope: Instance) -> None:
    """`tal:on-error`, in a session that only reads."""
    status, body = get(zope.port, "/site/reading")
    assert (status, body) == (200, b"<i>swallowed</i><b>the menu</b>")


def test_a_connection_lost_between_two_statements(zope: Instance, outside: Outside) -> None:
    """Zope runs it again, and again."""
    assert [get(zope.port, f"/site/lost?key={key}")[0] for key in (1, 2, 3)] == [200, 200, 200]
    assert {"lost 1", "lost 2", "lost 3"} <= set(rows(outside))


def test_nothing_is_held_while_zope_sleeps(zope: Instance) -> None:
    """Between two attempts, for up to 4 seconds."""
    assert get(zope.port, "/site/sleeper") == (200, b"[]")


def test_a_lock_that_is_not_to_be_had(zope: Instance, dsn: str, outside: Outside) -> None:
    with closing(psycopg2.connect(dsn)) as conn:
        conn.cursor().execute("LOCK TABLE locked")
        assert get(zope.port, "/site/locked")[0] == 200


def test_a_server_that_is_absent_is_503(zope: Instance) -> None:
    """Where the site has an error page, and that has a connection."""
    with closing(http.client.HTTPConnection("127.0.0.1", zope.port, timeout=30)) as conn:
        conn.request("POST", "/site/absent")
        response = conn.getresponse()
        assert (response.status, response.getheader("Retry-After")) == (503, "5")


def test_an_exhausted_pool_is_503(zope: Instance) -> None:
    """Of a pool without a filter, while the site's error page has a connection."""
    assert get(zope.port, "/site/exhausted")[0] == 503


@pytest.mark.parametrize("pool", ["main", "side"])
def test_streamed_bodies_do_not_exhaust_a_pool(zope: Instance, pool: str) -> None:
    """One filter will do: with what a body has begun, its request ends."""
    bodies = [get(zope.port, f"/site/streamed?pool={pool}") for _ in range(9)]
    assert bodies == [(200, b"0\n1\n2\n")] * 9


@pytest.mark.parametrize("name", ["connected", "connect", "title_or_id", "title_and_id", "pool_names", "pool_state"])
def test_visitors_cannot_ask_the_server(zope: Instance, name: str) -> None:
    assert get(zope.port, f"/site/db/{name}")[0] in (401, 404)
    assert get(zope.port, f"/manage_addProduct/zpgpool.zsql/{name}")[0] in (401, 404)


def test_names_are_not_ambiguous(zope: Instance) -> None:
    assert "Ambiguous name" not in zope.log()


@pytest.mark.parametrize("page", ["db/manage_main", "db/manage_properties", "manage_addProduct/zpgpool.zsql/add_form"])
def test_the_known_pools_are_offered(zope: Instance, page: str) -> None:
    status, body = get(zope.port, f"/site/{page}", "admin:admin")
    assert status == 200
    offered = body.decode().partition('<select id="pool_name"')[2].partition("</select>")[0]
    assert re.findall(r'<option value="(\w*)"', offered) == ["absent", "main", "reader", "side"]


@pytest.mark.parametrize(
    "page",
    ["db/manage_edit?title=x&pool_name=typo", "manage_addProduct/zpgpool.zsql/add_connection?id=x&pool_name=typo"],
)
def test_a_pool_that_is_not_known_is_refused(zope: Instance, page: str) -> None:
    status, body = get(zope.port, f"/site/{page}", "admin:admin")
    assert (status, "no pool is registered as" in body.decode()) == (400, True)
    assert "selected" in get(zope.port, "/site/db/manage_main", "admin:admin")[1].decode()


def test_an_object_is_added_and_opened(zope: Instance) -> None:
    add = "/site/manage_addProduct/zpgpool.zsql/add_connection"
    assert get(zope.port, f"{add}?id=away&title=Away&pool_name=absent", "admin:admin")[0] == 302
    assert "Connection refused" in get(zope.port, "/site/away/manage_open_connection", "admin:admin")[1].decode()
    assert "AttributeError" not in zope.log()
    status, body = get(zope.port, "/site/menu/manage_main", "admin:admin")
    assert (status, re.findall(r"(\w+ \(\w+\), which is [\w ]+)", body.decode())) == (
        200,
        [
            "Away (away), which is not connected",
            "books (db), which is connected",
            "readers (reader), which is connected",
        ],
    )


def test_the_pipeline_of_the_documentation(zope: Instance) -> None:
    """It is the one of these tests, whose streams leave no warning: `content_length` closes no body."""
    page = (Path(__file__).parent.parent / "docs" / "zope.rst").read_text()
    ini = (zope.path / "etc" / "zope.ini").read_text()
    assert pipeline(page) == pipeline(ini) == ["egg:Zope#httpexceptions", "translogger", "pgpool", "zope"]


def pipeline(text: str) -> list[str]:
    lines = text.partition("pipeline =")[2].partition("\n\n")[0].splitlines()
    return [line.strip() for line in lines if line and not line.startswith("#")]


def test_the_control_panel_shows_the_pools(zope: Instance) -> None:
    """The status page, its files and its data, under Zope's own permission."""
    assert "Connection pools</a>" in get(zope.port, "/Control_Panel/manage_main", "admin:admin")[1].decode()
    status, body = get(zope.port, "/Control_Panel/zpgpool", "admin:admin")
    page = body.decode()
    assert status == 200
    assert all(name in page for name in ("absent", "main", "side"))
    files = re.findall(r'(?:href|src)="(/Control_Panel/zpgpool/[^"]+)"', page)
    assert len(files) >= 4
    assert [get(zope.port, path, "admin:admin")[0] for path in files] == [200] * len(files)
    assert [get(zope.port, path)[0] for path in ["/Control_Panel/zpgpool", *files]] == [401] * (1 + len(files))
    assert get(zope.port, "/Control_Panel/zpgpool/nothing", "admin:admin")[0] == 404
    told = json.loads(get(zope.port, "/Control_Panel/zpgpool/json", "admin:admin")[1])
    assert [pool["name"] for pool in told["pools"]] == ["absent", "main", "reader", "side"]
