"""ZCML: `<zpgpool:pool name="main" dsn="ENV:APP_DSN" maxconn="8"/>`.

The directive is read from the table of settings, and does its work in an action: an overridden one makes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from zope.component import getSiteManager

from .interfaces import IConnectionPool
from .registry import make_pool
from .settings import list_known
from .settings import read_options
from .settings import SettingError
from .settings import TABLE


try:
    from zope.configuration.exceptions import ConfigurationError
    from zope.interface import Interface
    from zope.interface.interface import InterfaceClass
    from zope.schema import Text
except ImportError as error:
    raise ImportError(f"ZCML needs more packages: pip install 'zpgpool[zcml]' ({error})", name=error.name) from None


if TYPE_CHECKING:
    from zope.configuration.config import ConfigurationContext

    from .types import Pool


#: The keywords of libpq that the schema names; the directive takes every one.
CONNECTION = {
    "dsn": "where to connect: a connection string; `ENV:NAME` reads it from the environment",
    "service": "where to connect: a section of libpq's file pg_service.conf",
    "host": "the server's host, or the directory of its socket",
    "port": "the server's port",
    "dbname": "the database",
    "user": "the database user",
    "passfile": "the file that has the password",
    "sslmode": "whether, and how strictly, TLS is used",
    "application_name": "how the server lists the connections",
    "target_session_attrs": "which of several hosts will do, read-write for example",
    "connect_timeout": "seconds for one attempt to connect",
    "options": "settings of the server for each session: -c work_mem=64MB",
}

KNOWN = {"class", "dsn", *TABLE}


def _fields() -> dict[str, Text]:
    """Return the directive's schema. What a text means is the table's to say, not a field's."""
    rows = {"class_": "the kind of pool: persistent, threaded, simple, or another registered factory's name"}
    rows |= CONNECTION
    rows |= {name: f"{row.metadata['help']} [{row.metadata['unit']}]" for name, row in TABLE.items()}
    return {name: Text(title=name.rstrip("_"), description=help, required=False) for name, help in rows.items()}


IPoolDirective = InterfaceClass("IPoolDirective", (Interface,), _fields(), "Make a pool, and register it.", __name__)
IPoolDirective.setTaggedValue("keyword_arguments", True)


def pool(_context: ConfigurationContext, /, class_: str = "persistent", name: str = "", **options: str) -> None:
    """Handle the directive `pool`: the `IConnectionPool` utility `name` of the registry that is configured."""
    where = repr(_context.info)  # its str() shows the directive's text, and the password with it
    _context.action(
        discriminator=("utility", IConnectionPool, name),  # as <utility> has it: the two conflict
        callable=_make,
        args=(class_, {**options, "name": name}, where),
        info=where,
    )


#: The pools that the directive made, as long as they are in use.
_made: weakref.WeakSet[Pool] = weakref.WeakSet()


def _make(kind: str, options: Mapping[str, str], where: str) -> None:
    try:
        settings, libpq = read_options(options, {"class"})
        if not libpq:
            raise SettingError(f"option 'dsn' is missing ({list_known(KNOWN)})")
        _made.add(make_pool(kind, settings, libpq, getSiteManager(), kind_option="class", info=where))
    except SettingError as error:
        raise ConfigurationError(f"zpgpool:pool: {error}") from None


def close_pools() -> None:
    """Close the pools that ZCML made: between two tests, which have a registry each."""
    for each in list(_made):
        each.close(0)
    _made.clear()


try:
    from zope.testing.cleanup import addCleanUp
except ImportError:
    pass
else:
    addCleanUp(close_pools)
