"""The database backend: what Django's own pool does there with psycopg 3, a pool of zpgpool does with psycopg2.

Django closes its connection at the end of each request, which here returns it to the pool.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from itertools import count
from typing import Any
from typing import TYPE_CHECKING

import psycopg2
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.postgresql import base
from django.db.backends.postgresql.psycopg_any import is_psycopg3

from ..core import ThreadedConnectionPool
from ..errors import PoolError
from ..errors import SettingError
from ..registry import query_pool
from ..registry import register_pool
from ..registry import unregister_pool
from ..settings import Options
from ..settings import read_options
from ..settings import TABLE
from . import Unavailable


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


if is_psycopg3:
    raise ImproperlyConfigured(
        "zpgpool.django is for psycopg2, but psycopg 3 is installed, and Django prefers it: pip uninstall psycopg, or "
        "use the ENGINE django.db.backends.postgresql, which has a pool for psycopg 3 in OPTIONS['pool']"
    )

#: The pools of this process, by what tells their connections apart.
_pools: dict[tuple[object, ...], ThreadedConnectionPool] = {}


class DatabaseWrapper(base.DatabaseWrapper):
    """A connection of Django's: a connection of the pool, as long as it is open.

    `OPTIONS["zpgpool"]` has the settings of the pool, with the defaults for files. There is a pool for each set of
    connection parameters, registered under the alias that used it first.

    Raises ImproperlyConfigured for settings that cannot be kept with a pool, or cannot be.
    """

    #: psycopg2's connection, if there is one now.
    connection: Any  # None where Django knows that there is one, too

    #: Where it came from, and goes back to.
    _source: ThreadedConnectionPool | None = None

    def __init__(self, settings_dict: Options, alias: str = DEFAULT_DB_ALIAS) -> None:
        super().__init__(settings_dict, alias)
        if settings_dict.get("CONN_MAX_AGE", 0) != 0:
            raise ImproperlyConfigured(
                f"DATABASES[{alias!r}]: CONN_MAX_AGE must be 0 with zpgpool.django, so that each request returns its "
                "connection: how long the pool keeps it is said by OPTIONS['zpgpool'], in idle_timeout and max_lifetime"
            )
        if settings_dict.get("OPTIONS", {}).get("pool"):
            raise ImproperlyConfigured(
                f"DATABASES[{alias!r}]: OPTIONS['pool'] is for psycopg 3; the settings of zpgpool.django are in "
                "OPTIONS['zpgpool']"
            )

    @property
    def pool(self) -> ThreadedConnectionPool | None:
        """The pool of these connection parameters, which Django's own code uses where there is one."""
        if self.alias == NO_DB_ALIAS:
            return None
        return self._source or self._find_pool()

    def close_pool(self) -> None:
        """Give the pools of this database up: Django does so before it copies or drops one that is for tests.

        What is idle is closed now, and what others use when they return it, as without a pool.
        """
        database = _database_of(self.get_connection_params())
        for key, pool in _pools.copy().items():
            if key[0] == database:
                del _pools[key]
                if query_pool(pool.name) is pool:
                    unregister_pool(pool.name)
                with suppress(PoolError):  # it was closed
                    if pool.holders():
                        pool.resize(0, pool.maxconn)  # or it would open others
                        pool.drain()
                    else:
                        pool.close(0)

    def ensure_timezone(self) -> bool:
        """Give the connection the time zone that is wanted now; another one gets it when it comes from the pool."""
        return self.connection is not None and bool(self._configure_timezone(self.connection))

    def get_connection_params(self) -> Options:
        """Return what `psycopg2.connect()` takes."""
        parameters: Options = super().get_connection_params()
        parameters.pop("zpgpool", None)
        return parameters

    def get_new_connection(self, conn_params: Options) -> Any:
        """Return a connection of the pool. Raises Unavailable when there is none."""
        self._source = None  # Django may have forgotten a connection without closing it
        self._source = self.pool
        try:
            return super().get_new_connection(conn_params)
        except BaseException as error:
            self._source = None
            if isinstance(error, PoolError | psycopg2.OperationalError):
                raise Unavailable(str(error)) from error
            raise

    def init_connection_state(self) -> None:
        """Give the connection the time zone, which its last user may have changed: known without asking the server."""
        super().init_connection_state()
        if self._source is not None and self._configure_timezone(self.connection) and not self.get_autocommit():
            self.connection.commit()

    def _set_autocommit(self, autocommit: bool) -> None:
        # It is as Django wants it when it comes from the pool. To set it again would have the pool compare the session.
        if self.connection.closed or self.connection.autocommit != autocommit:
            super()._set_autocommit(autocommit)

    def _close(self) -> None:
        source, self._source = self._source, None
        if source is None:
            super()._close()
        elif self.connection is not None:
            # Django's reference first: nobody may use what somebody else has.
            conn, self.connection = self.connection, None
            with suppress(PoolError):  # the pool was closed, or the process has forked
                source.putconn(conn)

    def _find_pool(self) -> ThreadedConnectionPool:
        parameters = self.get_connection_params()
        options = self.settings_dict["OPTIONS"]
        own = options.get("zpgpool", {})
        database, role = _database_of(parameters), options.get("assume_role")
        key = (database, _freeze(parameters), _freeze(own), role)
        found = _pools.get(key)
        if found is None:
            made = self._make_pool(parameters, own)
            found = _pools.setdefault(key, made)  # another thread may have been here, too
            if found is made:
                with suppress(PoolError):  # another thread may have taken the name just now
                    register_pool(made, made.name)
        return found

    def _make_pool(self, parameters: Options, own: object) -> ThreadedConnectionPool:
        try:
            if not isinstance(own, Mapping):
                kind = type(own).__name__  # not itself: it may be a connection string
                raise SettingError(f"OPTIONS['zpgpool']: expected a mapping of the pool's options, not {kind}")
            if misplaced := sorted(TABLE.keys() & parameters.keys()):
                raise SettingError(f"option {misplaced[0]!r} belongs into OPTIONS['zpgpool']")
            settings, libpq = read_options(dict(own))
            if libpq:
                raise SettingError(f"option {min(libpq)!r} belongs into OPTIONS itself, or is one of Django's own")
            settings["name"] = _free_name(settings["name"] or self.alias)
            if self.settings_dict["AUTOCOMMIT"] and "isolation_level" not in self.settings_dict["OPTIONS"]:
                settings["autocommit"] = True  # as Django wants it
            template, configure = self.copy(), settings["configure"]

            def set_up(conn: Connection) -> None:
                # Another one for each connection: several are opened at a time, each in a thread of its own.
                wrapper = template.copy(NO_DB_ALIAS)
                wrapper.connection = conn
                wrapper._configure_role(conn)
                if configure is not None:
                    configure(conn)
                if not conn.autocommit:
                    conn.commit()

            return ThreadedConnectionPool(open=False, **settings | {"configure": set_up}, **parameters)
        except SettingError as error:
            raise ImproperlyConfigured(f"DATABASES[{self.alias!r}]: {error}") from error


def _free_name(name: str) -> str:
    """Return the name, with a number where another pool has it."""
    return next(each for each in chain([name], (f"{name}-{n}" for n in count(2))) if query_pool(each) is None)


def _database_of(parameters: Options) -> tuple[object, ...]:
    return tuple(parameters.get(name) for name in ("service", "host", "port", "dbname"))


def _freeze(options: object) -> Hashable:
    """Return what is equal for equal options, whatever somebody has put there."""
    if isinstance(options, Mapping):
        return frozenset((name, _freeze(value)) for name, value in options.items())
    return options if isinstance(options, Hashable) else repr(options)
