"""ZCML: what a directive may say, when it does it, and what it is told when it says something else."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import parse_dsn
from zope.component import getGlobalSiteManager
from zope.component import getSiteManager
from zope.component import getUtility
from zope.configuration import xmlconfig
from zope.configuration.config import ConfigurationConflictError
from zope.configuration.exceptions import ConfigurationError
from zope.interface.registry import Components
from zope.interface.verify import verifyObject
from zope.testing.cleanup import cleanUp

import zpgpool
from conftest import eventually
from conftest import in_thread
from conftest import KINDS
from conftest import Outside
from conftest import run
from zpgpool.interfaces import IConnectionPool
from zpgpool.interfaces import IConnectionPoolFactory
from zpgpool.settings import TABLE
from zpgpool.zcml import IPoolDirective


#: Stands in no message, log or repr.
SECRET = "hunter2"

HEAD = """<configure
    xmlns="http://namespaces.zope.org/zope"
    xmlns:zpgpool="http://namespaces.zope.org/zpgpool">
  <include package="zpgpool" />
"""

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
    monkeypatch.setenv("TEST_DSN", dsn)
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a ZCML file with these directives, and return its path."""

    def write(body: str, name: str = "site.zcml") -> Path:
        path = tmp_path / name
        path.write_text(f"{HEAD}{body}\n</configure>\n")
        return path

    return write


@pytest.fixture
def load(write: Write) -> Callable[..., Any]:
    """Write a ZCML file with these directives, and do what it says."""

    def load(body: str, **options: Any) -> Any:
        return xmlconfig.file(str(write(body)), **options)

    return load


def directive(attributes: str = 'dsn="ENV:TEST_DSN"') -> str:
    return f"  <zpgpool:pool {attributes} />"


class Factory:
    """A factory of pools that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> Any:
        self.calls.append(options)
        return zpgpool.ThreadedConnectionPool(**options)


@pytest.fixture
def factory() -> Factory:
    """A factory that is registered as `theirs`."""
    factory = Factory()
    getGlobalSiteManager().registerUtility(factory, IConnectionPoolFactory, "theirs")
    return factory


class TestDirective:
    def test_makes_a_utility(self, load: Callable[..., Any], outside: Outside) -> None:
        load(directive('name="main" class="persistent" dsn="ENV:TEST_DSN" maxconn="8"'))
        pool: Any = getUtility(IConnectionPool, "main")
        assert zpgpool.get_pool("main") is pool
        assert type(pool) is zpgpool.PersistentConnectionPool
        assert (pool.name, pool.maxconn) == ("main", 8)
        verifyObject(IConnectionPool, pool)
        assert outside.backends() == set()
        conn = pool.getconn()
        assert outside.backends() == {run(conn, "SELECT pg_backend_pid()")}
        pool.putconn(conn)

    def test_alone_makes_the_unnamed_persistent_pool_with_the_front_ends_defaults(
        self, load: Callable[..., Any]
    ) -> None:
        """Pitfall 22."""
        load(directive())
        pool: Any = zpgpool.get_pool()
        settings = pool.settings
        assert type(pool) is zpgpool.PersistentConnectionPool
        assert (settings.minconn, settings.maxconn, settings.idle_timeout, settings.timeout) == (0, 10, 600, 30)
        assert (settings.max_lifetime, settings.prune_interval, settings.name) == (3600, 30, "")

    @pytest.mark.parametrize("kind", KINDS)
    def test_makes_every_kind(self, load: Callable[..., Any], kind: str) -> None:
        load(directive(f'class="{kind}" dsn="ENV:TEST_DSN"'))
        pool: Any = zpgpool.get_pool()
        assert type(pool) is KINDS[kind]

    def test_makes_what_another_factory_makes(self, load: Callable[..., Any], factory: Factory, dsn: str) -> None:
        load(directive('name="x" class="theirs" dsn="ENV:TEST_DSN" maxconn="3"'))
        (options,) = factory.calls
        assert (options["name"], options["minconn"], options["maxconn"], options["dsn"]) == ("x", 0, 3, dsn)
        assert options["open"] is False
        assert set(options) == {*TABLE, "dsn", "open"}

    def test_values_are_read_by_the_table(self, load: Callable[..., Any]) -> None:
        load(
            directive(
                'dsn="ENV:TEST_DSN" idle_timeout="none" check_idle="" readonly="on" isolation_level="serializable"'
                ' configure="test_zcml.configure" max_lifetime="1.5" reset="discard"'
            )
        )
        pool: Any = zpgpool.get_pool()
        settings = pool.settings
        assert (settings.idle_timeout, settings.check_idle, settings.readonly) == (None, None, True)
        assert (settings.isolation_level, settings.max_lifetime, settings.reset) == ("SERIALIZABLE", 1.5, "discard")
        assert settings.configure is configure

    def test_libpqs_keywords_go_to_the_connect(self, load: Callable[..., Any], dsn: str) -> None:
        parts = " ".join(f'{name}="{value}"' for name, value in parse_dsn(dsn).items())
        load(directive(f'{parts} options="-c work_mem=123kB" keepalives_idle="60"'))
        with zpgpool.get_pool().connection() as conn:
            assert run(conn, "SHOW work_mem") == "123kB"
            assert conn.get_dsn_parameters()["keepalives_idle"] == "60"

    def test_the_schema_is_the_table_and_says_what_each_is(self) -> None:
        fields = {name: IPoolDirective[name] for name in IPoolDirective}
        assert set(TABLE) | {"class_", "dsn"} <= set(fields)
        for name, row in TABLE.items():
            assert row.metadata["help"] in fields[name].description
        assert not [name for name, field in fields.items() if field.required or not field.description]

    def test_the_registration_tells_where_it_comes_from(self, load: Callable[..., Any], write: Write) -> None:
        load(directive(f'dsn="ENV:TEST_DSN" password="{SECRET}"'))
        (registration,) = [each for each in getSiteManager().registeredUtilities() if each.provided is IConnectionPool]
        assert registration.info.startswith(f'File "{write("")}", line 5.2')
        assert SECRET not in repr(registration)


def configure(conn: Any) -> None:
    """Set up a new connection: a hook that a ZCML file names."""


class TestConflicts:
    """Pitfall 22."""

    @pytest.mark.parametrize("name", ["", "main"])
    def test_one_name_twice(self, load: Callable[..., Any], factory: Factory, name: str) -> None:
        attributes = f'name="{name}" class="theirs" dsn="ENV:TEST_DSN password={SECRET}"'
        with pytest.raises(ConfigurationConflictError) as caught:
            load(directive(attributes) + "\n" + directive(attributes))
        message = str(caught.value)
        assert IConnectionPool.__identifier__ in message
        assert ", line 5.2-" in message
        assert ", line 6.2-" in message
        assert SECRET not in message
        assert factory.calls == []

    def test_one_name_in_two_files(self, load: Callable[..., Any], write: Write) -> None:
        write(directive(), "one.zcml")
        write(directive(), "two.zcml")
        with pytest.raises(ConfigurationConflictError):
            load('<include file="one.zcml" /><include file="two.zcml" />')

    def test_different_names_do_not(self, load: Callable[..., Any]) -> None:
        load(directive() + directive('name="reports" dsn="ENV:TEST_DSN"'))
        assert zpgpool.get_pool() is not zpgpool.get_pool("reports")

    def test_with_a_utility_of_that_name(self, load: Callable[..., Any]) -> None:
        utility = '<utility component="test_zcml.theirs" provides="zpgpool.interfaces.IConnectionPool" name="main" />'
        with pytest.raises(ConfigurationConflictError):
            load(directive('name="main" dsn="ENV:TEST_DSN"') + utility)

    def test_the_including_file_wins(self, load: Callable[..., Any], write: Write, factory: Factory) -> None:
        write(directive('class="theirs" dsn="ENV:NOT_SET" maxconn="3"'), "package.zcml")
        load('<include file="package.zcml" />' + directive('class="theirs" dsn="ENV:TEST_DSN" maxconn="4"'))
        assert [call["maxconn"] for call in factory.calls] == [4]

    def test_overrides_win_and_only_the_winner_is_made(
        self, load: Callable[..., Any], write: Write, factory: Factory
    ) -> None:
        """What is overridden need not even work here: its variable may not be set, its service be unknown."""
        write(directive('class="theirs" dsn="ENV:NOT_SET" maxconn="3"'), "package.zcml")
        write(directive('class="theirs" dsn="ENV:TEST_DSN" maxconn="4"'), "overrides.zcml")
        load('<include file="package.zcml" /><includeOverrides file="overrides.zcml" />')
        assert [call["maxconn"] for call in factory.calls] == [4]
        assert zpgpool.get_pool().maxconn == 4

    def test_a_utility_may_override_it(self, load: Callable[..., Any], write: Write, factory: Factory) -> None:
        write(directive('name="main" class="theirs" dsn="ENV:TEST_DSN"'), "package.zcml")
        write(
            '<utility component="test_zcml.theirs" provides="zpgpool.interfaces.IConnectionPool" name="main" />',
            "overrides.zcml",
        )
        load('<include file="package.zcml" /><includeOverrides file="overrides.zcml" />')
        assert factory.calls == []
        assert zpgpool.get_pool("main") is theirs

    def test_including_twice_is_harmless(self, load: Callable[..., Any], write: Write, factory: Factory) -> None:
        write(directive('class="theirs" dsn="ENV:TEST_DSN"'), "package.zcml")
        load('<include file="package.zcml" /><include file="package.zcml" /><include package="zpgpool" />')
        assert len(factory.calls) == 1

    def test_loading_twice_does_not_replace_a_pool_silently(self, load: Callable[..., Any]) -> None:
        """Pitfall 24."""
        load(directive('name="main" dsn="ENV:TEST_DSN"'))
        pool = zpgpool.get_pool("main")
        with pytest.raises(ConfigurationError, match=r"option 'name': a pool is registered as 'main' already"):
            load(directive('name="main" dsn="ENV:TEST_DSN"'))
        assert zpgpool.get_pool("main") is pool
        assert not pool.closed


class Theirs:
    """Somebody's own pool, or what is put in its place."""


theirs: Any = Theirs()


class TestPackage:
    def test_configure_registers_the_factories(self, load: Callable[..., Any]) -> None:
        load("")
        assert dict(getGlobalSiteManager().getUtilitiesFor(IConnectionPoolFactory)) == KINDS

    def test_a_factory_can_be_overridden(self, load: Callable[..., Any], write: Write) -> None:
        write(
            '<utility component="test_zcml.theirs" provides="zpgpool.interfaces.IConnectionPoolFactory"'
            ' name="simple" />',
            "overrides.zcml",
        )
        load('<includeOverrides file="overrides.zcml" />')
        assert getUtility(IConnectionPoolFactory, "simple") is theirs

    def test_meta_alone_is_enough_for_the_directive(self, tmp_path: Path) -> None:
        path = tmp_path / "site.zcml"
        path.write_text(
            HEAD.replace('package="zpgpool"', 'package="zpgpool" file="meta.zcml"') + directive() + "</configure>"
        )
        xmlconfig.file(str(path))
        assert not zpgpool.get_pool().closed

    def test_cleaning_up_between_tests_closes_the_pools(
        self, load: Callable[..., Any], outside: Outside, make_pool: Callable[..., Any]
    ) -> None:
        load(directive() + directive('name="reports" class="threaded" dsn="ENV:TEST_DSN"'))
        pools = [zpgpool.get_pool(), zpgpool.get_pool("reports")]
        others = make_pool()
        for pool in pools:
            pool.putconn(pool.getconn())
        assert len(outside.backends()) == 2
        cleanUp()
        assert [pool.closed for pool in pools] == [True, True]
        assert not others.closed
        assert zpgpool.query_pool() is None
        load(directive())
        assert zpgpool.get_pool() not in pools

    def test_needs_neither_zope_security_nor_zope_testing(self, write: Write) -> None:
        """Pitfall 22."""
        script = f"""
import sys
sys.modules["zope.security"] = sys.modules["zope.testing"] = None
from zope.configuration import xmlconfig
import zpgpool
xmlconfig.file({str(write(directive()))!r})
with zpgpool.get_pool().connection() as conn:
    print(conn.info.transaction_status)
"""
        assert subprocess.check_output([sys.executable, "-c", script], text=True, env=dict(os.environ)) == "0\n"

    @pytest.mark.parametrize("missing", ["zope.configuration", "zope.schema"])
    def test_without_the_extra_says_so(self, missing: str) -> None:
        script = f"import sys; sys.modules[{missing!r}] = None; import zpgpool; import zpgpool.zcml"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        line = result.stderr.splitlines()[-1]
        assert line.startswith("ImportError: ZCML needs more packages: pip install 'zpgpool[zcml]' (")
        assert missing in line


class TestRegistries:
    """Pitfall 24: the pool goes where ZCML goes."""

    @pytest.fixture
    def registry(self) -> Iterator[Components]:
        """A registry that ZCML writes into, as z3c.baseregistry's `registerIn` and Pyramid's `hook_zca` have it."""
        registry = Components("theirs", (getGlobalSiteManager(),))
        getSiteManager.sethook(lambda context=None: registry)
        yield registry
        getSiteManager.reset()

    def test_one_that_is_not_global(self, load: Callable[..., Any], registry: Components) -> None:
        load(directive())
        pool = zpgpool.get_pool(registry=registry)
        assert not pool.closed
        assert getGlobalSiteManager().queryUtility(IConnectionPool) is None
        with pool.connection() as conn:
            assert run(conn, "SELECT 1") == 1

    def test_one_that_hides_a_pool_of_its_base(self, load: Callable[..., Any], registry: Components) -> None:
        zpgpool.register_pool(theirs)
        load(directive())
        assert zpgpool.get_pool() is theirs
        assert zpgpool.get_pool(registry=registry) is not theirs

    def test_a_factory_may_stand_in_the_base(
        self, load: Callable[..., Any], factory: Factory, registry: Components
    ) -> None:
        load(directive('class="theirs" dsn="ENV:TEST_DSN"'))
        assert len(factory.calls) == 1

    def test_the_timer_needs_none(self, load: Callable[..., Any], outside: Outside) -> None:
        load(directive('dsn="ENV:TEST_DSN" idle_timeout="3" class="threaded"'))
        pool: Any = zpgpool.unregister_pool()
        pool.putconn(pool.getconn())
        in_thread(pool.run_maintenance, 10.0**9)
        eventually(lambda: not outside.backends())


class TestErrors:
    """Pitfalls 20 and 22: each names the option, the file and the line, and shows no secret."""

    PASSWORD = f'dsn="host=x password={SECRET}"'

    @pytest.fixture
    def refuse(self, load: Callable[..., Any], write: Write, caplog: pytest.LogCaptureFixture) -> Callable[[str], str]:
        """Load a directive that must be refused, and return what is said, after the checks that hold for every one."""

        def refuse(attributes: str) -> str:
            caplog.set_level("DEBUG")
            with pytest.raises(ConfigurationError) as caught:
                load(f"\n{directive(attributes)}")
            shown = "".join(traceback.format_exception(caught.value))
            assert SECRET not in str(caught.value) + repr(caught.value) + shown + caplog.text
            assert list(getGlobalSiteManager().getUtilitiesFor(IConnectionPool)) == []
            said, where = str(caught.value).split("\n")
            assert where.strip().startswith(f'File "{write("")}", line 6.2-6.')
            assert said.startswith("zpgpool:pool: ")
            return said.removeprefix("zpgpool:pool: ")

        return refuse

    def test_an_unknown_option(self, refuse: Callable[[str], str]) -> None:
        said = refuse(f'{self.PASSWORD} maxcon="5"')
        assert said.startswith("unknown option 'maxcon', did you mean 'maxconn'? (known: ")
        for name in (*TABLE, "class", "dsn"):
            assert f" {name}," in said.replace("(known:", ",")
        assert said.endswith(", and libpq's connection keywords)")

    @pytest.mark.parametrize(
        ("option", "expected"),
        [
            ('maxconn="many"', "option 'maxconn': expected a whole number, 0 or more, got 'many'"),
            ('max_lifetime="-3"', "option 'max_lifetime': expected a number above 0, or none, got '-3'"),
            ('readonly="perhaps"', "option 'readonly': expected true or false, or none, got 'perhaps'"),
            ('maxconn="0"', "maxconn must be 1 or more, and minconn not above it: got 0 and 0"),
            ('class="eternal"', "option 'class': expected one of persistent, simple, threaded, got 'eternal'"),
            ('class=""', "option 'class': expected one of persistent, simple, threaded, got ''"),
        ],
    )
    def test_a_bad_value(self, refuse: Callable[[str], str], option: str, expected: str) -> None:
        assert refuse(f"{self.PASSWORD} {option}") == expected

    def test_a_hook_that_cannot_be_imported(self, refuse: Callable[[str], str]) -> None:
        said = refuse(f'{self.PASSWORD} check="test_zcml.nothing"')
        assert said.startswith("option 'check': expected a dotted name that can be imported (")

    @pytest.mark.parametrize(
        "dsn", [f"host=x {SECRET}", f"pasword={SECRET}", f"postgresql://u:{SECRET}@[h/db", f"host=x&#10;{SECRET}"]
    )
    def test_a_connection_string_that_libpq_cannot_read(self, refuse: Callable[[str], str], dsn: str) -> None:
        assert refuse(f'dsn="{dsn}"') == "option 'dsn': libpq cannot read this connection string"

    def test_a_variable_that_the_environment_does_not_have(self, refuse: Callable[[str], str]) -> None:
        assert refuse('dsn="ENV:NOT_SET"') == "option 'dsn': the environment has no variable 'NOT_SET'"

    def test_nowhere_to_connect(self, refuse: Callable[[str], str]) -> None:
        assert refuse('name="main"').startswith("option 'dsn' is missing (known: autocommit, check,")

    def test_a_name_that_is_the_handlers_own(self, refuse: Callable[[str], str]) -> None:
        assert refuse(f'{self.PASSWORD} _context="5"').startswith("unknown option '_context'")

    def test_an_option_that_is_given_to_python_only(self, refuse: Callable[[str], str]) -> None:
        assert refuse(f'{self.PASSWORD} open="true"').startswith("unknown option 'open'")

    def test_what_a_factory_raises_shows_no_more(self, load: Callable[..., Any]) -> None:
        def broken(**options: Any) -> Any:
            raise RuntimeError("broken")

        getGlobalSiteManager().registerUtility(broken, IConnectionPoolFactory, "broken")
        with pytest.raises(ConfigurationError, match=r"line 5\.2-(.|\n)*RuntimeError: broken") as caught:
            load(directive(f'class="broken" dsn="password={SECRET}"'))
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_a_password_is_nowhere_while_it_runs(
        self, load: Callable[..., Any], caplog: pytest.LogCaptureFixture, dsn: str
    ) -> None:
        caplog.set_level("DEBUG")
        context = load(directive(f'dsn="{dsn} password={SECRET}"'), execute=False)
        assert SECRET not in caplog.text + repr([action["info"] for action in context.actions])
        context.execute_actions()
        assert SECRET not in repr(vars(zpgpool.get_pool())) + repr(context.actions) + caplog.text
