"""`zpgpool zope-migrate`: connection objects of Products.ZPsycopgDA become ones of zpgpool, and go back.

An object keeps its id, its place, and all that it has of any object: permissions, local roles, its owner. What only
ZPsycopgDA's have is kept in it for the way back.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

import psycopg2
import transaction
from Acquisition import aq_base
from psycopg2.extensions import make_dsn
from psycopg2.extensions import parse_dsn

from ..errors import CommandError
from ..errors import one_line
from ..registry import query_pool
from . import Connection


if TYPE_CHECKING:
    from OFS.ObjectManager import ObjectManager


META_TYPE = "Z Psycopg 2 Database Connection"

#: What only ZPsycopgDA's objects have.
THEIRS = ("connection_string", "tilevel", "encoding")

#: psycopg2's numbers, which ZPsycopgDA stores, and the names that pools have for them.
LEVELS = {1: "read committed", 2: "repeatable read", 3: "serializable", 4: "read uncommitted"}


class Found(NamedTuple):
    """A connection object: where it is, and in which folder. Zope's classes have no types."""

    path: str
    folder: ObjectManager
    id: str

    @property
    def object(self) -> Any:
        return aq_base(self.folder._getOb(self.id))


def migrate(args: argparse.Namespace) -> None:
    """Show what would be done, or do it. Raises CommandError."""
    pools = dict(_read_pool(each) for each in args.pool)
    their_class, app = _open_site(args.conf)
    found = list(_find(app, Connection.meta_type if args.back else META_TYPE))
    problems = []
    if args.back:
        for each in [each for each in found if not hasattr(each.object, "migrated")]:
            print(f"{each.path}\n    stays: it never was one of ZPsycopgDA's")
            found.remove(each)
    else:
        problems = [
            f"--pool {path}={name}: no connection object of ZPsycopgDA is there, or below"
            for path, name in pools.items()
            if path and found and not any(f"{each.path}/".startswith(f"{path}/") for each in found)
        ]
    for each in found:
        if args.back:
            print(f"{each.path}\n    back to {_without_password(each.object.migrated['connection_string'])}")
            continue
        name = _pool_of(each.path, pools)
        print(f"{each.path}\n    {_without_password(each.object.connection_string)}: by pool {name!r}")
        needs, problem = _compare(each.object, name, args.any_pool)
        print("\n".join(f"    {line}" for line in [needs, problem] if line))
        problems += [f"{each.path}: {problem}"] if problem else []
    if problems:
        raise CommandError(f"nothing was changed: {'; '.join(problems)}")
    if not args.yes:
        print(f"{len(found)} objects; nothing was changed: --yes does it")
        return
    for each in found:
        new = _back(each.object, their_class) if args.back else _forth(each.object, _pool_of(each.path, pools))
        _replace(each, new)
    transaction.commit()
    print(f"{len(found)} objects were replaced")


def _read_pool(text: str) -> tuple[str, str]:
    path, _, name = text.rpartition("=")
    return path.rstrip("/"), name


def _pool_of(path: str, pools: dict[str, str]) -> str:
    """Return the pool that was named for the object, or for the nearest folder; by default the unnamed one."""
    while path and path not in pools:
        path = path.rpartition("/")[0]
    return pools.get(path, "")


def _open_site(conf: str) -> tuple[type[object], ObjectManager]:
    """Return ZPsycopgDA's class, and the root of the site."""
    if not Path(conf).is_file():
        raise CommandError(f"there is no file {conf}")
    try:
        from Products.ZPsycopgDA.DA import Connection as TheirConnection
    except ImportError:
        raise CommandError("Products.ZPsycopgDA must be installed until its objects are replaced") from None
    import Zope2
    from zc.lockfile import LockError
    from Zope2.Startup.run import make_wsgi_app

    TheirConnection.connect_on_load = False
    try:
        make_wsgi_app({}, conf)
    except LockError:
        raise CommandError("the site's ZODB is in use: stop the site first") from None
    except Exception as error:  # whatever its products raise
        raise CommandError(
            f"the site of {conf} cannot be opened: {one_line(error)} (the command needs the site's environment)"
        ) from None
    return TheirConnection, Zope2.app()


def _find(folder: ObjectManager, meta_type: str, path: str = "") -> Iterator[Found]:
    for id, each in folder.objectItems():
        if getattr(aq_base(each), "meta_type", None) == meta_type:
            yield Found(f"{path}/{id}", folder, id)
        elif hasattr(aq_base(each), "objectItems"):
            yield from _find(each, meta_type, f"{path}/{id}")


def _compare(theirs: Any, name: str, any_pool: bool) -> tuple[str, str]:
    """Return what the pool needs to do the same, and why it does not; `any_pool`: it need not be registered here."""
    level = LEVELS.get(theirs.tilevel)
    if level is None:
        return "", "it does autocommit, which no transaction can: leave it, or change its isolation level"
    needs = f'needs isolation_level="{level}"'
    if (theirs.encoding or "utf-8").lower().replace("-", "") not in ("utf8", "unicode"):
        needs += f' client_encoding="{theirs.encoding}"'
    pool = query_pool(name)
    if pool is None:
        return (
            needs,
            "" if any_pool else f"no pool is registered as {name!r} here: if the filter makes it, say --any-pool",
        )
    has = (pool.settings.isolation_level or "the default").lower()
    return needs, "" if has == level else f"pool {name!r} has isolation_level={has!r}, not {level!r}"


def _forth(theirs: Any, name: str) -> object:
    state = {**theirs.__getstate__()}
    kept = {attribute: state.pop(attribute, "") for attribute in THEIRS}
    return _make(Connection, {**state, "zdatetime": bool(theirs.zdatetime), "pool_name": name, "migrated": kept})


def _back(ours: Any, their_class: type[object]) -> object:
    state = {**ours.__getstate__()}
    del state["pool_name"]
    return _make(their_class, state | state.pop("migrated"))


def _make(new_class: Any, state: dict[str, object]) -> object:
    """Return an object that has this state; its constructor, and `__setstate__`, would do more."""
    new = new_class.__new__(new_class)
    new.__dict__.update(state)
    return new


def _replace(found: Found, new: object) -> None:
    """Put `new` in the object's place, without events and changes of ownership."""
    folder = found.folder
    order = [info["id"] for info in folder._objects]
    folder._delObject(found.id, suppress_events=True)
    folder._setObject(found.id, new, set_owner=0, suppress_events=True)
    if order:  # other kinds of folders have no order
        folder._objects = tuple(sorted(folder._objects, key=lambda info: order.index(info["id"])))


def _without_password(dsn: str) -> str:
    if dsn.startswith("ENV:"):  # a name only, which ZPsycopgDA reads as we do
        return dsn
    try:
        return str(make_dsn(**{key: value for key, value in parse_dsn(dsn).items() if key != "password"}))
    except psycopg2.Error:
        return "an unreadable connection string"
