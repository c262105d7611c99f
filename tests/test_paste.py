"""PasteDeploy: what an ini file may say, and what it is told when it says something else."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urlencode

import pytest
from paste.deploy import loadapp
from psycopg2.extensions import parse_dsn
from webtest import TestApp
from zope.component import getGlobalSiteManager
from zope.interface import provider

import zpgpool
from conftest import KINDS
from conftest import Outside
from conftest import run
from zpgpool.interfaces import IConnectionPool
from zpgpool.interfaces import IConnectionPoolFactory
from zpgpool.settings import SettingError
from zpgpool.settings import TABLE
from zpgpool.wsgi import get_connection
from zpgpool.wsgi import PoolMiddleware


Load = Callable[..., Any]

TestApp.__test__ = False  # it is not a test

#: Stands in no message, log or repr.
SECRET = "hunter2"

SIMPLE = """
    [app:main]
    use = call:test_paste:app_factory
    filter-with = pool

    [filter:pool]
    use = egg:zpgpool
    dsn = ENV:TEST_DSN
"""

ALONE = """
    [app:main]
    use = call:test_paste:app_factory
    filter-with = pool

    [filter:pool]
    use = egg:zpgpool
"""


def app_factory(global_conf: dict[str, str], name: str = "") -> Any:
    """An application that tells the number of its backend."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        conn = get_connection(environ, name)
        pid = run(conn, "SELECT pg_backend_pid()")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(pid).encode()]

    return app


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, dsn: str) -> Iterator[None]:
    monkeypatch.setenv("TEST_DSN", dsn)
    yield
    for _, pool in getGlobalSiteManager().getUtilitiesFor(IConnectionPool):
        pool.close(0)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write an ini file, and return the application that it describes."""

    def load(ini: str, **options: Any) -> Any:
        path = tmp_path / "site.ini"
        path.write_text(dedent(ini))
        return loadapp(f"config:{path}", **options)

    return load


@pytest.fixture
def refuse(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Load an ini file that must be refused, and return what is said, after the checks that hold for every error."""

    def refuse(ini: str, **options: Any) -> str:
        caplog.set_level("DEBUG")
        with pytest.raises(SettingError) as caught:
            load(ini, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("zpgpool filter: ")
        assert message.endswith(f" (in {tmp_path / 'site.ini'})")
        shown = "".join(traceback.format_exception(caught.value))
        assert SECRET not in message + repr(caught.value) + shown + caplog.text
        return message.removeprefix("zpgpool filter: ").rpartition(" (in ")[0]

    return refuse


def with_option(line: str) -> str:
    return f"{SIMPLE}    {line}\n"


class TestLoading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_three_kinds_by_name(self, load: Load, kind: str) -> None:
        app = load(with_option(f"pool = {kind}"))
        environ = {"wsgi.multithread": False}
        assert TestApp(app, extra_environ=environ).get("/").text.isdigit()
        assert isinstance(zpgpool.get_pool(), KINDS[kind])

    def test_the_persistent_pool_by_default(self, load: Load) -> None:
        load(SIMPLE)
        assert isinstance(zpgpool.get_pool(), zpgpool.PersistentConnectionPool)

    def test_a_third_partys_factory_by_its_name(self, load: Load, dsn: str) -> None:
        calls = []

        @provider(IConnectionPoolFactory)
        def factory(minconn: int, maxconn: int, **options: Any) -> Any:
            calls.append(options | {"minconn": minconn, "maxconn": maxconn})
            return zpgpool.ThreadedConnectionPool(minconn, maxconn, **options)

        getGlobalSiteManager().registerUtility(factory, IConnectionPoolFactory, "theirs")
        app = load(with_option("pool = theirs\n    maxconn = 3"))
        assert TestApp(app).get("/").text.isdigit()
        (options,) = calls
        assert (options["minconn"], options["maxconn"], options["dsn"], options["open"]) == (0, 3, dsn, False)
        assert set(options) == {*TABLE, "dsn", "open"}

    PIPELINE = """
        [pipeline:main]
        pipeline = pool app

        [filter:pool]
        use = egg:zpgpool
        dsn = ENV:TEST_DSN

        [app:app]
        use = call:test_paste:app_factory
    """

    ENTRY_POINT = PIPELINE.replace("egg:zpgpool", "egg:zpgpool#main")

    NAMED_FACTORY = PIPELINE.replace("use = egg:zpgpool", "paste.filter_app_factory = zpgpool.paste:filter_app_factory")

    FILTER_APP = """
        [filter-app:main]
        use = egg:zpgpool
        next = app
        dsn = ENV:TEST_DSN

        [app:app]
        use = call:test_paste:app_factory
    """

    COPIED = """
        [pipeline:main]
        pipeline = pool app

        [filter:base]
        use = egg:zpgpool
        dsn = ENV:TEST_DSN
        maxconn = 3

        [filter:pool]
        use = base
        maxconn = 4

        [app:app]
        use = call:test_paste:app_factory
    """

    @pytest.mark.parametrize(
        "ini",
        [SIMPLE, PIPELINE, ENTRY_POINT, NAMED_FACTORY, FILTER_APP, COPIED],
        ids=["filter-with", "pipeline", "entry-point", "factory", "filter-app", "copied"],
    )
    def test_every_way_to_name_a_filter(self, load: Load, ini: str) -> None:
        """Pitfall 21."""
        app = load(ini)
        assert isinstance(app, PoolMiddleware)
        assert TestApp(app).get("/").text.isdigit()
        assert zpgpool.get_pool().maxconn == (4 if ini is self.COPIED else 10)

    def test_two_named_pools_in_one_pipeline(self, load: Load) -> None:
        """Pitfall 14."""
        app = load("""
            [pipeline:main]
            pipeline = main-pool reports app

            [filter:main-pool]
            use = egg:zpgpool
            dsn = ENV:TEST_DSN

            [filter:reports]
            use = egg:zpgpool
            name = reports
            dsn = ENV:TEST_DSN
            maxconn = 2

            [app:app]
            use = call:test_paste:app_factory
            name = reports
        """)
        TestApp(app).get("/")
        assert zpgpool.get_pool("reports").get_stats()["requests_num"] == 1
        assert zpgpool.get_pool().get_stats()["requests_num"] == 0
        assert zpgpool.get_pool("reports").name == "reports"

    def test_the_pool_connects_on_first_use_only(self, load: Load, outside: Outside) -> None:
        app = load(with_option("minconn = 2"))
        assert outside.backends() == set()
        assert int(TestApp(app).get("/").text) in outside.backends()

    def test_loading_needs_no_server(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEST_DSN", "host=/nowhere")
        app = load(with_option("minconn = 2\n    retry_after = 7\n    outage_wait = 0"))
        response = TestApp(app).get("/", status=503)
        assert response.headers["Retry-After"] == "7"

    def test_the_front_ends_defaults(self, load: Load) -> None:
        load(SIMPLE)
        pool: Any = zpgpool.get_pool()
        settings = pool.settings
        assert (settings.minconn, settings.maxconn, settings.idle_timeout, settings.timeout) == (0, 10, 600, 30)
        assert (settings.max_lifetime, settings.prune_interval) == (3600, 30)


class TestOptions:
    def test_are_read_by_the_table(self, load: Load) -> None:
        load(
            with_option("maxconn = 3\n    idle-timeout = none\n    check_idle =\n    readonly = yes")
            + "    configure = test_paste:configure\n"
        )
        pool: Any = zpgpool.get_pool()
        settings = pool.settings
        assert (settings.maxconn, settings.idle_timeout, settings.check_idle, settings.readonly) == (
            3,
            None,
            None,
            True,
        )
        assert settings.configure is configure

    def test_eager_puts_the_connection_into_the_environ(self, load: Load) -> None:
        app = load(with_option("eager = on"))
        assert app.eager is True
        assert load(ALONE).eager is False

    def test_libpqs_keywords_go_to_the_connect(self, load: Load) -> None:
        app = load(with_option("options = -c work_mem=123kB"))
        with app.pool.connection() as conn:
            assert run(conn, "SHOW work_mem") == "123kB"

    def test_libpqs_keywords_alone_make_a_pool(self, load: Load, dsn: str) -> None:
        parts = parse_dsn(dsn)
        app = load(ALONE + "".join(f"    {name} = {value}\n" for name, value in parts.items()))
        assert TestApp(app).get("/").text.isdigit()

    def test_the_dsn_may_stand_in_the_file(self, load: Load, dsn: str) -> None:
        app = load(f"{ALONE}    dsn = {dsn}\n")
        assert TestApp(app).get("/").text.isdigit()

    @pytest.mark.parametrize("how", ["keyword", "words", "uri"])
    def test_a_percent_sign_is_written_twice(self, load: Load, dsn: str, how: str) -> None:
        """Pitfall 21."""
        parts = parse_dsn(dsn)
        options = {
            "keyword": f"dsn = {dsn}\n    password = p%%40ss%%",
            "words": f"dsn = {dsn} password=p%%40ss%%",
            "uri": f"dsn = postgresql:///?{urlencode(parts).replace('%', '%%')}&password=p%%2540ss%%25",
        }
        app = load(f"{ALONE}    {options[how]}\n")
        with app.pool.connection() as conn:
            assert conn.info.password == "p%40ss%"


def configure(conn: Any) -> None:
    """Set up a new connection: a hook that an ini file names."""


class TestDefaults:
    @pytest.mark.parametrize("as_argument", [False, True], ids=["default", "command-line"])
    def test_an_option_there_is_warned_of_and_hides_the_filters_own(
        self, load: Load, caplog: pytest.LogCaptureFixture, as_argument: bool
    ) -> None:
        """Pitfall 21."""
        ini = with_option("maxconn = 3")
        if as_argument:
            load(ini, global_conf={"maxconn": "5"})
        else:
            load("    [DEFAULT]\n    maxconn = 5\n" + ini)
        assert zpgpool.get_pool().maxconn == 10
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("zpgpool", "WARNING")
        expected = "option 'maxconn' of [DEFAULT] is not read, and hides one here: call it zpgpool.maxconn there"
        assert record.getMessage() == f"zpgpool filter: {expected}"

    @pytest.mark.parametrize("as_argument", [False, True], ids=["default", "command-line"])
    def test_its_prefixed_name_is_read_there(
        self, load: Load, caplog: pytest.LogCaptureFixture, as_argument: bool
    ) -> None:
        """Pitfall 21."""
        if as_argument:
            load(SIMPLE, global_conf={"zpgpool.maxconn": "5"})
        else:
            load("    [DEFAULT]\n    zpgpool.maxconn = 5\n" + SIMPLE)
        assert zpgpool.get_pool().maxconn == 5
        assert caplog.records == []

    @pytest.mark.parametrize("name", ["idle_timeout", "idle-timeout"])
    @pytest.mark.parametrize("prefixed", ["zpgpool.idle_timeout", "zpgpool.idle-timeout"])
    def test_the_filters_own_beats_the_prefixed_one(self, load: Load, name: str, prefixed: str) -> None:
        """Pitfall 21."""
        load(f"    [DEFAULT]\n    {prefixed} = 5\n" + with_option(f"{name} = 3"))
        pool: Any = zpgpool.get_pool()
        assert pool.settings.idle_timeout == 3

    def test_the_dsn_may_come_from_there(self, load: Load, dsn: str) -> None:
        """Pitfall 21."""
        app = load(ALONE, global_conf={"zpgpool.dsn": dsn})
        assert TestApp(app).get("/").text.isdigit()

    def test_set_overrides_it_for_the_filter(self, load: Load, caplog: pytest.LogCaptureFixture) -> None:
        """Pitfall 21."""
        app = load("    [DEFAULT]\n    zpgpool.dsn = host=/nowhere\n" + ALONE + "    set zpgpool.dsn = ENV:TEST_DSN\n")
        assert TestApp(app).get("/").text.isdigit()
        assert caplog.records == []

    def test_set_without_the_prefix_is_warned_of(
        self, refuse: Callable[..., str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Pitfall 21."""
        assert refuse(f"{ALONE}    set dsn = password={SECRET}\n").startswith("option 'dsn' is missing")
        assert "call it zpgpool.dsn there" in caplog.text

    def test_other_names_there_are_nobodys_business(self, load: Load, caplog: pytest.LogCaptureFixture) -> None:
        load("    [DEFAULT]\n    debug = true\n    host = example.org\n" + SIMPLE)
        assert caplog.records == []

    def test_an_unknown_prefixed_name_is_refused(self, refuse: Callable[..., str]) -> None:
        """Pitfall 20."""
        assert refuse("    [DEFAULT]\n    zpgpool.max_con = 5\n" + SIMPLE).startswith(
            "unknown option 'max_con', did you mean 'maxconn'? (known: "
        )


class TestErrors:
    """Pitfall 20: each is one line that names the option and the file, and shows no secret (see `refuse`)."""

    PASSWORD = f"dsn = host=x password={SECRET}"

    def test_an_unknown_option(self, refuse: Callable[..., str]) -> None:
        message = refuse(ALONE + f"    {self.PASSWORD}\n    maxcon = 5\n")
        assert message.startswith("unknown option 'maxcon', did you mean 'maxconn'? (known: ")
        for name in (*TABLE, "dsn", "pool", "eager", "retry_after"):
            assert f" {name}," in message.replace("(known:", ",")
        assert message.endswith(", and libpq's connection keywords)")

    def test_an_unknown_keyword_of_libpq(self, refuse: Callable[..., str]) -> None:
        message = refuse(ALONE + f"    hots = x\n    password = {SECRET}\n")
        assert message.startswith("unknown option 'hots'")

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("maxconn = many", "option 'maxconn': expected a whole number, 0 or more, got 'many'"),
            ("max-lifetime = -3", "option 'max_lifetime': expected a number above 0, or none, got '-3'"),
            ("eager = perhaps", "option 'eager': expected true or false, got 'perhaps'"),
            ("retry_after = 1.5", "option 'retry_after': expected a whole number, 0 or more, got '1.5'"),
            ("maxconn = 0", "maxconn must be 1 or more, and minconn not above it: got 0 and 0"),
            ("maxconn = 8 ; a comment", "option 'maxconn': expected a whole number, 0 or more, got '8 ; a comment'"),
            ("timeout = 1\n      2", "option 'timeout': expected a number, 0 or more, got '1\\n2'"),
            (
                "isolation_level = chaos",
                "option 'isolation_level': expected one of read uncommitted, read committed, repeatable read, "
                "serializable, or none, got 'chaos'",
            ),
        ],
    )
    def test_a_bad_value(self, refuse: Callable[..., str], option: str, said: str) -> None:
        assert refuse(f"{ALONE}    {self.PASSWORD}\n    {option}\n") == said

    def test_a_hook_that_cannot_be_imported(self, refuse: Callable[..., str]) -> None:
        message = refuse(f"{ALONE}    {self.PASSWORD}\n    check = test_paste:nothing\n")
        assert message.startswith("option 'check': expected a dotted name that can be imported (")

    def test_an_unknown_kind_of_pool(self, refuse: Callable[..., str]) -> None:
        message = refuse(f"{ALONE}    {self.PASSWORD}\n    pool = eternal\n")
        assert message == "option 'pool': expected one of persistent, simple, threaded, got 'eternal'"

    def test_a_connection_string_that_libpq_cannot_read(self, refuse: Callable[..., str]) -> None:
        for dsn in (f"host=x {SECRET}", f"pasword={SECRET}", f"postgresql://u:{SECRET}@[h/db"):
            assert refuse(f"{ALONE}    dsn = {dsn}\n") == "option 'dsn': libpq cannot read this connection string"

    def test_a_variable_that_the_environment_does_not_have(self, refuse: Callable[..., str]) -> None:
        assert refuse(f"{ALONE}    dsn = ENV:NOT_SET\n") == "option 'dsn': the environment has no variable 'NOT_SET'"

    def test_no_connection_string_and_no_pool_to_serve(self, refuse: Callable[..., str]) -> None:
        message = refuse(f"{ALONE}    name = main\n")
        assert message.startswith("option 'dsn' is missing, and no pool is registered as 'main' that could be served")
        assert "maxconn" in message

    def test_a_setting_of_a_pool_that_is_not_made_here(self, refuse: Callable[..., str], make_pool: Any) -> None:
        zpgpool.register_pool(make_pool(), "main")
        message = refuse(f"{ALONE}    name = main\n    maxconn = 5\n")
        assert "'maxconn'" in message
        assert "no pool is registered" not in message  # there is one: the option is what is wrong

    def test_the_same_name_twice(self, refuse: Callable[..., str]) -> None:
        """Pitfall 24."""
        message = refuse(f"""
            [pipeline:main]
            pipeline = pool pool app

            [filter:pool]
            use = egg:zpgpool
            name = main
            dsn = ENV:TEST_DSN
            application_name = {SECRET}

            [app:app]
            use = call:test_paste:app_factory
        """)
        assert message == ("option 'name': a pool is registered as 'main' already: unregister_pool('main') first")
        assert zpgpool.query_pool("main") is not None

    def test_without_a_file_none_is_named(self) -> None:
        from zpgpool.paste import filter_app_factory

        with pytest.raises(SettingError, match=r"^zpgpool filter: unknown option 'x+' .* keywords\)$"):
            filter_app_factory(app_factory({}), {}, xxxxxxxx="1")

    def test_a_password_is_nowhere_while_it_runs(self, load: Load, dsn: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("DEBUG")
        app = load(f"{ALONE}    dsn = {dsn} password={SECRET}\n")
        TestApp(app).get("/")
        pool = zpgpool.get_pool()
        texts = [repr(app), repr(vars(app)), repr(pool), repr(vars(pool)), str(pool.get_stats()), caplog.text]
        assert not [text for text in texts if SECRET in text]


class TestRegisteredPools:
    """Without a connection string the filter serves the pool that is registered."""

    def test_is_served(self, load: Load, make_pool: Any) -> None:
        """Pitfall 23."""
        pool = make_pool(zpgpool.ThreadedConnectionPool)
        zpgpool.register_pool(pool, "main")
        app = load("""
            [app:main]
            use = call:test_paste:app_factory
            name = main
            filter-with = pool

            [filter:pool]
            use = egg:zpgpool
            name = main
            eager = true
            retry-after = 9
        """)
        assert TestApp(app).get("/").text.isdigit()
        assert pool.get_stats()["requests_num"] == 1
        assert (app.pool, app.eager, app.retry_after) == (pool, True, 9)

    def test_by_a_second_filter_that_makes_none(self, load: Load) -> None:
        first = load(SIMPLE)
        second = load(ALONE)
        assert first.pool is second.pool
