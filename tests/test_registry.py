"""Pools and factories as utilities, and the interfaces that their classes keep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from zope.component import getGlobalSiteManager
from zope.component import getUtility
from zope.component import queryUtility
from zope.interface import implementer
from zope.interface import Interface
from zope.interface import provider
from zope.interface.interface import InterfaceClass
from zope.interface.interfaces import ComponentLookupError
from zope.interface.registry import Components
from zope.interface.verify import verifyClass
from zope.interface.verify import verifyObject

import zpgpool
from conftest import KINDS
from conftest import run
from zpgpool import interfaces
from zpgpool.interfaces import IConnectionPool
from zpgpool.interfaces import IConnectionPoolFactory
from zpgpool.interfaces import IKeyedConnectionPool
from zpgpool.interfaces import IPersistentConnectionPool


MakePool = Callable[..., Any]

IMPLEMENTERS = [
    (IKeyedConnectionPool, zpgpool.SimpleConnectionPool),
    (IKeyedConnectionPool, zpgpool.ThreadedConnectionPool),
    (IPersistentConnectionPool, zpgpool.PersistentConnectionPool),
]


class Dictish(Components, dict):  # type: ignore[type-arg]  # a bare dict, as Pyramid's is
    """A registry as Pyramid's is, a dict: without the `__bool__` that Pyramid gives its own."""


@pytest.fixture(params=["global", "own", "dictish"])
def registry(request: pytest.FixtureRequest) -> Components | None:
    """The registries that a caller may give; None is the global one."""
    return {"global": None, "own": Components("own"), "dictish": Dictish("dictish")}[request.param]


class TestInterfaces:
    @pytest.mark.parametrize(("interface", "cls"), IMPLEMENTERS)
    def test_the_classes_have_every_method_with_its_signature(self, interface: InterfaceClass, cls: type) -> None:
        """Pitfall 25."""
        assert verifyClass(interface, cls)
        assert verifyClass(IConnectionPool, cls)

    @pytest.mark.parametrize(("interface", "cls"), IMPLEMENTERS)
    def test_the_objects_have_the_attributes_too(
        self, make_pool: MakePool, interface: InterfaceClass, cls: type
    ) -> None:
        """Pitfall 25."""
        pool = make_pool(cls, name="main")
        assert verifyObject(interface, pool)
        assert verifyObject(IConnectionPool, pool)

    @pytest.mark.parametrize("cls", KINDS.values())
    def test_the_classes_are_the_factories(self, cls: type, dsn: str) -> None:
        """Pitfall 25."""
        assert verifyObject(IConnectionPoolFactory, cls)
        with cls(0, 1, dsn) as pool:
            assert IConnectionPool.providedBy(pool)

    def test_no_interface_is_left_out_here(self) -> None:
        every = {
            value for value in vars(interfaces).values() if isinstance(value, InterfaceClass) and value is not Interface
        }
        elsewhere = {each for each in every if each.isOrExtends(interfaces.IPoolEvent)}
        elsewhere |= {interfaces.ICheckout, interfaces.IObserver, interfaces.IHolder, interfaces.IWaiter}
        elsewhere |= {interfaces.IMaintained, interfaces.IPoolManagement, interfaces.IPoolInternals}
        here = {IConnectionPool, IConnectionPoolFactory, *(interface for interface, _ in IMPLEMENTERS)}
        assert every == here | elsewhere

    @pytest.mark.parametrize("interface", [IConnectionPool, IKeyedConnectionPool, IPersistentConnectionPool])
    def test_every_name_says_what_it_is_for(self, interface: InterfaceClass) -> None:
        assert interface.__doc__
        for name, element in interface.namesAndDescriptions(all=True):
            assert element.__doc__, name

    @pytest.mark.parametrize("cls", KINDS.values())
    def test_a_pool_is_true_even_when_it_is_empty(self, make_pool: MakePool, cls: type) -> None:
        assert make_pool(cls)


class TestPools:
    def test_a_registered_pool_is_a_utility(self, make_pool: MakePool, registry: Components | None) -> None:
        pool = make_pool()
        zpgpool.register_pool(pool, "main", registry)
        where = getGlobalSiteManager() if registry is None else registry
        assert where.getUtility(IConnectionPool, "main") is pool
        assert zpgpool.get_pool("main", registry) is pool
        assert zpgpool.query_pool("main", registry) is pool

    def test_by_default_under_no_name_in_the_global_registry(self, make_pool: MakePool) -> None:
        pool = make_pool()
        zpgpool.register_pool(pool)
        assert getUtility(IConnectionPool) is pool
        assert zpgpool.get_pool() is zpgpool.query_pool() is pool
        assert zpgpool.unregister_pool() is pool

    def test_registries_know_nothing_of_each_other(self, make_pool: MakePool) -> None:
        """Pitfall 24."""
        pools = [(registry, make_pool()) for registry in (None, Components("one"), Dictish("two"))]
        for registry, pool in pools:
            zpgpool.register_pool(pool, "main", registry)
        for registry, pool in pools:
            assert zpgpool.get_pool("main", registry) is pool
        for registry, pool in pools:
            assert zpgpool.unregister_pool("main", registry) is pool

    def test_one_pool_may_have_two_names(self, make_pool: MakePool) -> None:
        pool = make_pool()
        zpgpool.register_pool(pool, "a")
        zpgpool.register_pool(pool, "b")
        assert zpgpool.get_pool("a") is zpgpool.get_pool("b")

    def test_a_name_that_is_taken_is_refused_and_the_pool_there_stays(
        self, make_pool: MakePool, registry: Components | None
    ) -> None:
        """Pitfall 24."""
        first, second = make_pool(), make_pool()
        zpgpool.register_pool(first, "main", registry)
        with pytest.raises(zpgpool.PoolError, match="'main' already: unregister_pool\\('main'\\) first"):
            zpgpool.register_pool(second, "main", registry)
        with pytest.raises(zpgpool.PoolError, match="already"):
            zpgpool.register_pool(first, "main", registry)
        assert zpgpool.get_pool("main", registry) is first
        assert not first.closed

    def test_a_name_that_nobody_has_is_told_with_those_that_are_known(
        self, make_pool: MakePool, registry: Components | None
    ) -> None:
        with pytest.raises(ComponentLookupError, match=r"^no pool is registered as 'x' \(registered: none\)$"):
            zpgpool.get_pool("x", registry)
        assert zpgpool.query_pool("x", registry) is None
        for name in ("main", "", "other"):
            zpgpool.register_pool(make_pool(), name, registry)
        with pytest.raises(ComponentLookupError, match=r"\(registered: '', 'main', 'other'\)$"):
            zpgpool.get_pool("x", registry)

    def test_an_unregistered_pool_is_returned_open_as_it_was(
        self, make_pool: MakePool, registry: Components | None
    ) -> None:
        """Pitfall 24."""
        pool = make_pool()
        zpgpool.register_pool(pool, "main", registry)
        conn = pool.getconn()
        assert zpgpool.unregister_pool("main", registry) is pool
        assert not pool.closed
        assert run(conn, "SELECT 1") == 1
        pool.putconn(conn)
        assert zpgpool.query_pool("main", registry) is None
        zpgpool.register_pool(make_pool(), "main", registry)

    def test_unregistering_nothing_is_an_error(self, registry: Components | None) -> None:
        with pytest.raises(ComponentLookupError, match="no pool is registered as 'main'"):
            zpgpool.unregister_pool("main", registry)

    def test_what_a_base_registry_has_is_not_unregistered_silently(self, make_pool: MakePool) -> None:
        base = Components("base")
        child = Components("child", (base,))
        pool = make_pool()
        zpgpool.register_pool(pool, "main", base)
        assert zpgpool.get_pool("main", child) is pool
        with pytest.raises(ComponentLookupError, match="'main'"):
            zpgpool.unregister_pool("main", child)
        assert zpgpool.get_pool("main", base) is pool


class TestFactories:
    def test_are_utilities_named_by_their_kind(self, registry: Components | None) -> None:
        zpgpool.register_factories(registry)
        where = getGlobalSiteManager() if registry is None else registry
        assert dict(where.getUtilitiesFor(IConnectionPoolFactory)) == KINDS

    def test_make_pools(self, dsn: str) -> None:
        zpgpool.register_factories()
        for name in KINDS:
            with getUtility(IConnectionPoolFactory, name)(0, 2, dsn, idle_timeout=5) as pool, pool.connection() as conn:
                assert run(conn, "SELECT 1") == 1

    def test_registering_them_may_be_repeated(self) -> None:
        zpgpool.register_factories()
        before = list(getGlobalSiteManager().registeredUtilities())
        zpgpool.register_factories()
        assert list(getGlobalSiteManager().registeredUtilities()) == before

    def test_replaces_nothing(self, registry: Components | None) -> None:
        @provider(IConnectionPoolFactory)
        def theirs(minconn: int, maxconn: int, *args: Any, **kwargs: Any) -> Any:
            pytest.fail("nobody asks this factory for a pool")

        where = getGlobalSiteManager() if registry is None else registry
        where.registerUtility(theirs, IConnectionPoolFactory, "threaded")
        zpgpool.register_factories(registry)
        assert where.getUtility(IConnectionPoolFactory, "threaded") is theirs
        assert where.getUtility(IConnectionPoolFactory, "simple") is zpgpool.SimpleConnectionPool

    def test_a_third_partys_factory_and_pool_stand_beside_ours(self, make_pool: MakePool) -> None:
        @implementer(IPersistentConnectionPool)
        class Loud(zpgpool.PersistentConnectionPool):
            """Another's kind of pool."""

        @provider(IConnectionPoolFactory)
        def loud(minconn: int, maxconn: int, *args: Any, **kwargs: Any) -> Any:
            return make_pool(Loud, minconn, maxconn, *args, **kwargs)

        getGlobalSiteManager().registerUtility(loud, IConnectionPoolFactory, "loud")
        zpgpool.register_factories()
        pool = getUtility(IConnectionPoolFactory, "loud")(0, 1)
        zpgpool.register_pool(pool, "loud")
        assert type(zpgpool.get_pool("loud")) is Loud
        assert verifyObject(IPersistentConnectionPool, pool)


def test_importing_the_package_registers_nothing_and_starts_nothing() -> None:
    """In a fresh process, with every module that has no further requirements."""
    code = """
import threading
import zpgpool, zpgpool.wsgi, zpgpool.paste, zpgpool.interfaces, zpgpool.settings
from zope.component import getGlobalSiteManager
registry = getGlobalSiteManager()
print([*registry.registeredUtilities(), *registry.registeredAdapters(), *registry.registeredHandlers()])
print(threading.active_count(), zpgpool.core.timer.is_running)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "1 False"]
    assert result.stderr == ""


def test_the_package_exports_what_it_says() -> None:
    assert all(hasattr(zpgpool, name) for name in zpgpool.__all__)
    assert queryUtility(IConnectionPool) is None
