"""From Products.ZPsycopgDA to zpgpool and back, in a Zope instance of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import books
from zope_instance import Instance


pytestmark = pytest.mark.slow  # a site starts for each step

CONFIGURE = """<configure
    xmlns="http://namespaces.zope.org/zope"
    xmlns:zpgpool="http://namespaces.zope.org/zpgpool">
  <include package="zpgpool" />
  <include package="zpgpool.zsql" />
  <zpgpool:pool name="main" dsn="ENV:BOOKS_DSN" maxconn="4" isolation_level="repeatable read" />
  <zpgpool:pool name="old" dsn="ENV:BOOKS_DSN" maxconn="4" isolation_level="serializable" client_encoding="LATIN1" />
  <zpgpool:pool name="loose" dsn="ENV:BOOKS_DSN" maxconn="4" />
</configure>
"""

#: Five connection objects and 20 methods. Each has a connection string of its own: ZPsycopgDA keeps the first one's
#: settings for all that have the same.
SITE = """
import os
import transaction
from OFS.Folder import Folder
from Products.ZSQLMethods.SQL import SQL

shop = app._setObject("shop", Folder("shop")) and app.shop
archive = shop._setObject("archive", Folder("archive")) and shop.archive
for folder, id, options in [
    (app, "db", {}),
    (app, "zdb", {"zdatetime": 1, "encoding": "UTF-8"}),
    (shop, "shop_db", {}),
    (archive, "latin", {"tilevel": 3, "encoding": "LATIN1"}),
    (archive, "zlatin", {"tilevel": 3, "encoding": "LATIN1", "zdatetime": 1}),
]:
    dsn = f"{os.environ['BOOKS_DSN']} application_name={id} password=secret"
    folder.manage_addProduct["ZPsycopgDA"].manage_addZPsycopgConnection(id, f"Title of {id}", dsn, **options)
    folder._setObject(f"after_{id}", Folder(f"after_{id}"))
    folder[id].manage_permission("Use Database Methods", ["Authenticated", "Owner"], acquire=0)
    folder[id].manage_setLocalRoles("admin", ["Owner"])
    for number, sql in enumerate([
        "SELECT 1 AS a, 2.5::numeric AS b, 'x'::text AS c, NULL AS d",
        "SELECT '2020-01-02'::date AS day, '2020-01-02 03:04'::timestamp AS at, true AS yes",
        "SELECT current_setting('transaction_isolation') AS level, U&'caf\\\\00e9' AS coffee",
        "SELECT n, n * 2 AS m FROM generate_series(1, 5) n",
    ]):
        folder._setObject(f"{id}_{number}", SQL(f"{id}_{number}", "", id, "", sql))
transaction.commit()
"""

LOOK = """
import json
from Acquisition import aq_base

told = {"results": {}, "objects": {}}
for folder in (app, app.shop, app.shop.archive):
    told["objects"]["/".join(folder.getPhysicalPath())] = list(folder.objectIds())
    for method in folder.objectValues("Z SQL Method"):
        result = method()
        told["results"][method.id] = repr((result.names(), [list(row) for row in result]))
    for each in folder.objectValues():
        if getattr(each, "_isAnSQLConnection", False):
            state = dict(aq_base(each).__getstate__())
            told["objects"][each.id] = [each.meta_type, {key: repr(value) for key, value in state.items()}]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def dsn(server_dsn: str) -> Iterator[str]:
    with books.database(server_dsn, "zpgpool_migrate") as dsn:
        yield dsn


@pytest.fixture
def zope(dsn: str, tmp_path: Path) -> Instance:
    zope = Instance(tmp_path / "instance", dsn, CONFIGURE)
    zope.edit("zope.ini", "use = egg:zpgpool", "use = egg:zpgpool\nname = main")
    zope.run_script(SITE)
    return zope


def look(zope: Instance) -> Any:
    return json.loads(zope.run_script(LOOK).splitlines()[-1])


def migrate(zope: Instance, *args: str) -> str:
    return zope.run("zpgpool", "zope-migrate", str(zope.path / "etc" / "zope.conf"), *args)


def fail(zope: Instance, *args: str) -> str:
    """Return what the command says when it fails."""
    command = [sys.executable, "-m", "zpgpool", "zope-migrate", str(zope.path / "etc" / "zope.conf"), *args]
    failed = subprocess.run(command, env=zope.environ, capture_output=True, text=True)
    assert failed.returncode == 1
    return failed.stderr.splitlines(keepends=True)[-1]


POOLS = ["--pool", "main", "--pool", "/shop/archive=old"]


def test_there_and_back(zope: Instance) -> None:
    before = look(zope)
    assert len(before["results"]) == 20

    shown = migrate(zope, *POOLS)
    assert "/shop/archive/latin\n" in shown
    assert "by pool 'old'" in shown
    assert 'needs isolation_level="serializable" client_encoding="LATIN1"' in shown
    assert "5 objects; nothing was changed" in shown
    assert "secret" not in shown
    assert look(zope) == before

    assert "5 objects were replaced" in migrate(zope, *POOLS, "--yes")
    between = look(zope)
    assert between["results"] == before["results"]
    for path in ("", "/shop", "/shop/archive"):
        assert between["objects"][path] == before["objects"][path]
    for id in ("db", "zdb", "shop_db", "latin", "zlatin"):
        (kind, state), (_, old) = between["objects"][id], before["objects"][id]
        assert kind == "zpgpool Database Connection"
        own = {"pool_name", "migrated", "zdatetime"}
        assert state.keys() - own == old.keys() - {"connection_string", "tilevel", "encoding", "zdatetime"}
        assert all(state[key] == old[key] for key in state.keys() - own)
    assert "0 objects; nothing was changed" in migrate(zope, *POOLS)

    assert "5 objects; nothing was changed" in migrate(zope, "--back")
    assert "5 objects were replaced" in migrate(zope, "--back", "--yes")
    assert without_none(look(zope)) == without_none(before)


def without_none(told: Any) -> Any:
    """Return what was told, with `zdatetime` as ZPsycopgDA takes it: true or not."""
    for each in told["objects"].values():
        if isinstance(each[1], dict):
            each[1]["zdatetime"] = each[1]["zdatetime"] in ("1", "True")
    return told


def test_a_pool_that_is_different_is_refused(zope: Instance) -> None:
    before = look(zope)
    for args, words in (
        (["--pool", "loose"], "pool 'loose' has isolation_level='the default', not 'repeatable read'"),
        (["--pool", "elsewhere"], "no pool is registered as 'elsewhere' here: if the filter makes it, say --any-pool"),
        ([*POOLS, "--pool", "shop=main"], "--pool shop=main: no connection object of ZPsycopgDA is there, or below"),
    ):
        for more in ([], ["--yes"]):
            assert words in fail(zope, *args, *more)
    assert "5 objects; nothing was changed: --yes" in migrate(zope, "--pool", "elsewhere", "--any-pool")
    assert look(zope) == before


def test_an_object_that_reads_the_environment(zope: Instance) -> None:
    zope.run_script("app.db.connection_string = 'ENV:BOOKS_DSN'; import transaction; transaction.commit()")
    assert "/db\n    ENV:BOOKS_DSN: by pool 'main'\n" in migrate(zope, *POOLS)
    del zope.environ["BOOKS_DSN"]
    said = fail(zope, *POOLS)
    assert "option 'dsn': the environment has no variable 'BOOKS_DSN'" in said
    assert said.endswith("(the command needs the site's environment)\n")


def test_the_site_must_be_stopped(zope: Instance) -> None:
    command = [sys.executable, "-m", "zpgpool", "zope-migrate", str(zope.path / "etc" / "zope.conf")]
    zope.start()
    try:
        failed = subprocess.run(command, env=zope.environ, capture_output=True, text=True)
    finally:
        zope.stop()
    assert (failed.returncode, "stop the site first" in failed.stderr) == (1, True)
    failed = subprocess.run([*command[:-1], "nowhere.conf"], env=zope.environ, capture_output=True, text=True)
    assert failed.stderr == "zpgpool zope-migrate: there is no file nowhere.conf\n"
