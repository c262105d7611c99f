"""Pools and their factories as utilities.

Every function takes the registry to use, any `zope.interface.registry.Components`; without one it is the global one:
not the current site's, which depends on the thread.
"""

from __future__ import annotations

from typing import Any
from typing import cast
from typing import TypeAlias

from zope.component import getGlobalSiteManager
from zope.interface import directlyProvides
from zope.interface.interfaces import ComponentLookupError
from zope.interface.registry import Components

from .core import AbstractConnectionPool
from .core import PersistentConnectionPool
from .core import SimpleConnectionPool
from .core import ThreadedConnectionPool
from .errors import PoolError
from .interfaces import IConnectionPool
from .interfaces import IConnectionPoolFactory
from .interfaces import IPoolInternals
from .settings import Options
from .settings import SettingError
from .types import Pool


#: What a look-up returns, as type checkers know it: they cannot know of a pool of another class that was registered.
Ours: TypeAlias = AbstractConnectionPool

FACTORIES: dict[str, type[AbstractConnectionPool]] = {
    "simple": SimpleConnectionPool,
    "threaded": ThreadedConnectionPool,
    "persistent": PersistentConnectionPool,
}

for factory in FACTORIES.values():
    directlyProvides(factory, IConnectionPoolFactory)


def register_factories(registry: Components | None = None) -> None:
    """Register the pool classes as `IConnectionPoolFactory` utilities `simple`, `threaded` and `persistent`.

    May be repeated; a factory that is registered already under one of these names stays.
    """
    registry = getGlobalSiteManager() if registry is None else registry  # a registry may be an empty dict, too
    for name, factory in FACTORIES.items():
        if registry.queryUtility(IConnectionPoolFactory, name) is None:
            registry.registerUtility(factory, IConnectionPoolFactory, name)


def register_pool(pool: Pool, name: str = "", registry: Components | None = None, *, info: str = "") -> None:
    """Register `pool` as the `IConnectionPool` utility `name`; `info` says what asked for that, and where.

    Raises PoolError when the name is taken: the pool there may be in use, and would never be closed. One in a base of
    the registry is left alone, and hidden here.
    """
    registry = getGlobalSiteManager() if registry is None else registry
    own: Any = registry  # its own utilities, which have no types
    if own.utilities.registered((), IConnectionPool, name) is not None:
        raise PoolError(f"a pool is registered as {name!r} already: unregister_pool({name!r}) first")
    if IPoolInternals.providedBy(pool):
        pool.adopt_name(name)
    registry.registerUtility(pool, IConnectionPool, name, info)


def make_pool(
    kind: str,
    settings: Options,
    libpq: Options,
    registry: Components | None = None,
    *,
    kind_option: str = "pool",
    info: str = "",
) -> Ours:
    """Make a pool by the factory that is registered as `kind`, and register it: what every front end does.

    `settings` and `libpq` are as `read_options` returns them, `kind_option` is the name that the user has for `kind`.
    Nothing connects. Raises SettingError when there is no such factory, or the name is taken.
    """
    registry = getGlobalSiteManager() if registry is None else registry
    register_factories(registry)
    factory = registry.queryUtility(IConnectionPoolFactory, kind)
    if factory is None:
        kinds = ", ".join(sorted(name for name, _ in registry.getUtilitiesFor(IConnectionPoolFactory)))
        raise SettingError(f"option {kind_option!r}: expected one of {kinds}, got {kind!r}")
    pool = cast("Ours", factory(open=False, **settings, **libpq))
    try:
        register_pool(pool, settings["name"], registry, info=info)
    except PoolError as error:
        raise SettingError(f"option 'name': {error}") from None
    return pool


def get_pool(name: str = "", registry: Components | None = None) -> Ours:
    """Return the pool registered as `name`. Raises ComponentLookupError, naming those that are."""
    registry = getGlobalSiteManager() if registry is None else registry
    pool = query_pool(name, registry)
    if pool is None:
        known = ", ".join(repr(known) for known, _ in sorted(registry.getUtilitiesFor(IConnectionPool))) or "none"
        raise ComponentLookupError(f"no pool is registered as {name!r} (registered: {known})")
    return pool


def check_replica(name: str, registry: Components | None = None) -> None:
    """Raise SettingError when the replica that the pool `name` names is not registered: a name that was mistyped."""
    settings = getattr(query_pool(name, registry), "settings", None)  # pools of other classes need not have any
    if replica := getattr(settings, "replica", ""):
        try:
            get_pool(replica, registry)
        except ComponentLookupError as error:
            raise SettingError(f"option 'replica': {error}") from None


def query_pool(name: str = "", registry: Components | None = None) -> Ours | None:
    """Return the pool registered as `name`, or None."""
    registry = getGlobalSiteManager() if registry is None else registry
    return cast("Ours | None", registry.queryUtility(IConnectionPool, name))


def unregister_pool(name: str = "", registry: Components | None = None) -> Ours:
    """Unregister the pool `name` and return it, open as it was. Raises ComponentLookupError when there is none."""
    registry = getGlobalSiteManager() if registry is None else registry
    pool = get_pool(name, registry)
    if not registry.unregisterUtility(pool, IConnectionPool, name):
        raise ComponentLookupError(f"{name!r} is registered in a base of this registry, not in itself")
    return pool
