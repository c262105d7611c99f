"""Pyramid: settings, and requests whose rows and objects are stored together or not at all, under a real waitress."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import ClassVar

import psycopg2
import pytest
import transaction
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError
from pyramid.exceptions import ConfigurationExecutionError
from pyramid.interfaces import IExecutionPolicy
from pyramid.request import Request
from pyramid.response import FileResponse
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid.threadlocal import manager as threadlocals
from pyramid.wsgi import wsgiapp
from pyramid.wsgi import wsgiapp2
from repoze.tm import TM
from transaction.interfaces import TransactionFailedError
from webtest import TestApp
from ZODB import DB
from ZODB.FileStorage import FileStorage
from zope.component import getGlobalSiteManager

import books
import zpgpool
from books import check_books
from books import get
from books import numbers
from books import Planned
from books import rows
from books import STREAMED
from conftest import Call
from conftest import KINDS
from conftest import Outside
from conftest import run
from serving import waitress
from zpgpool.interfaces import IConnectionPool
from zpgpool.interfaces import IConnectionPoolFactory
from zpgpool.pyramid import get_connection
from zpgpool.settings import SettingError
from zpgpool.settings import TABLE
from zpgpool.wsgi import PoolMiddleware


TestApp.__test__ = False  # it is not a test

#: Stands in no message, log or repr.
SECRET = "hunter2"

MAXCONN = 6

Configure = Callable[..., Any]


@pytest.fixture
def configure(dsn: str) -> Iterator[Configure]:
    """Return a configurator with these settings, by default those of one pool, that has included the package."""
    configs: list[Any] = []

    def configure(settings: dict[str, Any] | None = None, *includes: str) -> Any:
        config = Configurator(settings={"zpgpool.dsn": dsn} if settings is None else settings)
        configs.append(config)
        for each in (*includes, "zpgpool"):
            config.include(each)
        return config

    yield configure
    for config in configs:
        for _, pool in config.registry.getUtilitiesFor(IConnectionPool):
            pool.close(0)


def with_view(config: Any, view: Callable[[Any], Any]) -> TestApp:
    """Return the application, with a view on every path."""
    config.add_route("all", "/*path")
    config.add_view(view, route_name="all")
    return TestApp(config.make_wsgi_app())


def tell_backend(request: Any) -> Response:
    return Response(str(run(request.pgconn, "SELECT pg_backend_pid()")))


class TestSettings:
    def test_make_the_unnamed_pool_with_the_front_ends_defaults(self, configure: Configure, outside: Outside) -> None:
        app = with_view(config := configure(), tell_backend)
        pool: Any = zpgpool.get_pool(registry=config.registry)
        settings = pool.settings
        assert type(pool) is zpgpool.PersistentConnectionPool
        assert (settings.minconn, settings.maxconn, settings.idle_timeout, settings.timeout) == (0, 10, 600, 30)
        assert outside.backends() == set()
        assert {int(app.get("/").text)} == outside.backends()
        assert pool.holders() == []

    def test_register_it_in_the_applications_registry_only(self, configure: Configure) -> None:
        """Pitfall 24."""
        config = configure()
        config.commit()
        assert config.registry.queryUtility(IConnectionPool) is not None
        assert getGlobalSiteManager().queryUtility(IConnectionPool) is None
        assert dict(config.registry.getUtilitiesFor(IConnectionPoolFactory)) == KINDS

    def test_are_read_by_the_table(self, configure: Configure, dsn: str) -> None:
        config = configure(
            {
                "zpgpool.dsn": dsn,
                "zpgpool.pool": "threaded",
                "zpgpool.maxconn": "3",
                "zpgpool.idle-timeout": "none",
                "zpgpool.readonly": "yes",
                "zpgpool.max_lifetime": 7.5,
                "zpgpool.keepalives_idle": "60",
                "other.maxcon": "nobody's business",
            }
        )
        config.commit()
        pool: Any = zpgpool.get_pool(registry=config.registry)
        assert type(pool) is zpgpool.ThreadedConnectionPool
        assert (pool.maxconn, pool.settings.idle_timeout, pool.settings.readonly) == (3, None, True)
        assert pool.settings.max_lifetime == 7.5
        with pool.connection() as conn:
            assert conn.get_dsn_parameters()["keepalives_idle"] == "60"

    def test_name_further_pools(self, configure: Configure, dsn: str) -> None:
        config = configure(
            {
                "zpgpool.dsn": dsn,
                "zpgpool.maxconn": "3",
                "zpgpool.reports.dsn": dsn,
                "zpgpool.reports.maxconn": "4",
                "zpgpool.reports.yearly.dsn": dsn,
            }
        )

        def view(request: Any) -> Response:
            conns = [get_connection(request, name) for name in ("", "reports", "reports.yearly")]
            assert request.pgconn is conns[0]
            return Response(repr([run(conn, "SELECT pg_backend_pid()") for conn in conns]))

        app = with_view(config, view)
        pools: list[Any] = [zpgpool.get_pool(name, config.registry) for name in ("", "reports", "reports.yearly")]
        assert [pool.name for pool in pools[1:]] == ["reports", "reports.yearly"]
        assert [pool.maxconn for pool in pools] == [3, 4, 10]
        assert len(set(app.get("/").text.split(","))) == 3
        assert [pool.holders() for pool in pools] == [[], [], []]

    def test_may_leave_the_pool_to_the_application(self, configure: Configure, make_pool: Any) -> None:
        config = configure({})
        pool = make_pool(zpgpool.ThreadedConnectionPool)
        zpgpool.register_pool(pool, registry=config.registry)
        assert with_view(config, tell_backend).get("/").text.isdigit()
        assert pool.get_stats()["requests_num"] == 1

    def test_may_come_from_the_environment(
        self, configure: Configure, dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEST_DSN", dsn)
        assert with_view(configure({"zpgpool.dsn": "ENV:TEST_DSN"}), tell_backend).get("/").text.isdigit()

    def test_including_twice_is_harmless(self, configure: Configure) -> None:
        config = configure()
        config.include("zpgpool")
        assert with_view(config, tell_backend).get("/").text.isdigit()

    def test_a_name_that_another_include_takes_is_a_conflict(self, configure: Configure) -> None:
        config = configure()
        config.include(take_the_name)
        with pytest.raises(ConfigurationConflictError):
            config.commit()
        assert config.registry.queryUtility(IConnectionPool) is None

    def test_the_application_itself_overrides_them_and_nothing_is_made(
        self, configure: Configure, make_pool: Any
    ) -> None:
        config = configure({"zpgpool.dsn": "host=x", "zpgpool.pool": "eternal"})
        pool = make_pool()
        config.action(("utility", IConnectionPool, ""), lambda: zpgpool.register_pool(pool, registry=config.registry))
        assert with_view(config, tell_backend).get("/").text.isdigit()
        assert pool.get_stats()["requests_num"] == 1

    def test_a_name_that_is_registered_is_refused(self, configure: Configure, make_pool: Any) -> None:
        config = configure()
        zpgpool.register_pool(make_pool(), registry=config.registry)
        with pytest.raises(ConfigurationExecutionError, match="option 'name': a pool is registered as '' already"):
            config.commit()


def take_the_name(config: Any) -> None:
    """A package that has a pool of its own to register."""
    config.action(("utility", IConnectionPool, ""), lambda: None)


class TestErrors:
    """Pitfall 20: each names the setting, and shows no secret."""

    DSN: ClassVar = {"zpgpool.dsn": f"password={SECRET}"}

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (
                {**DSN, "zpgpool.maxcon": "5"},
                "zpgpool.*: unknown option 'maxcon', did you mean 'maxconn'? (known: a",
            ),
            ({**DSN, "zpgpool.eager": "true"}, "zpgpool.*: unknown option 'eager'"),
            ({**DSN, "zpgpool.": "5"}, "zpgpool.*: unknown option ''"),
            (
                {"zpgpool.maxconn": "many"},
                "zpgpool.*: option 'maxconn': expected a whole number, 0 or more, got 'many'",
            ),
            (
                {**DSN, "zpgpool.retry_after": "-1"},
                "zpgpool.*: option 'retry_after': expected a whole number, 0 or more",
            ),
            ({"zpgpool.dsn": f"pasword={SECRET}"}, "zpgpool.*: option 'dsn': libpq cannot read this"),
            ({"zpgpool.dsn": 5}, "zpgpool.*: option 'dsn': libpq cannot read this"),
            ({"zpgpool.dsn": "ENV:NOT_SET"}, "zpgpool.*: option 'dsn': the environment has no variable 'NOT_SET'"),
            ({**DSN, "zpgpool.name": "main"}, "zpgpool.*: option 'name': a pool's name stands before its options"),
            ({"zpgpool.reports.maxcon": "5"}, "zpgpool.reports.*: unknown option 'maxcon', did you mean 'maxconn'?"),
            ({"zpgpool.reprots.maxconn": "5"}, "zpgpool.reprots.*: option 'dsn' is missing (known: autocommit,"),
        ],
    )
    def test_are_raised_by_the_include(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: str
    ) -> None:
        monkeypatch.delenv("NOT_SET", raising=False)
        if (
            not any("dsn" in name or "reports" in name for name in settings)
            and "zpgpool.reprots.maxconn" not in settings
        ):
            settings = {"zpgpool.dsn": f"password={SECRET}", **settings}
        with pytest.raises(SettingError) as caught:
            configure(settings)
        assert str(caught.value).startswith(f"setting {expected}")
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_an_unknown_option_names_all_that_are_known(self, configure: Configure) -> None:
        with pytest.raises(SettingError) as caught:
            configure({"zpgpool.xxxxxxxxx": "1"})
        for name in {*TABLE, "dsn", "pool", "retry_after"} - {"name"}:
            assert f" {name}," in str(caught.value).replace("(known:", ",")

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (
                {"zpgpool.dsn": f"password={SECRET}", "zpgpool.pool": "eternal"},
                "option 'pool': expected one of persist",
            ),
            ({}, "option 'dsn' is missing, and no pool is registered as '' in the application's registry (known: "),
            ({"zpgpool.retry_after": "3"}, "option 'dsn' is missing, and no pool is registered as ''"),
        ],
    )
    def test_are_raised_by_the_commit(self, configure: Configure, settings: dict[str, Any], expected: str) -> None:
        config = configure(settings)
        with pytest.raises(ConfigurationExecutionError) as caught:
            config.commit()
        assert f"setting zpgpool.*: {expected}" in str(caught.value)
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_another_package_comes_without_pyramid(self) -> None:
        script = 'import sys; sys.modules["pyramid"] = sys.modules["transaction"] = None; import zpgpool, zpgpool.wsgi'
        subprocess.run([sys.executable, "-c", script], check=True)


class TestRequestsOwnConnection:
    """Without a transaction manager the connection is the request's, until its body is closed."""

    def test_is_one_for_the_request_and_free_afterwards(self, configure: Configure) -> None:
        def view(request: Any) -> Response:
            assert request.pgconn is request.pgconn
            (holder,) = zpgpool.get_pool(registry=request.registry).holders()
            return Response(holder.request or "")

        app = with_view(config := configure(), view)
        assert app.get("/some/path").text == "GET /some/path"
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    def test_is_not_taken_unasked(self, configure: Configure) -> None:
        app = with_view(config := configure(), lambda request: Response("x"))
        app.get("/")
        assert zpgpool.get_pool(registry=config.registry).get_stats()["requests_num"] == 0

    def test_keeps_what_the_view_commits_and_nothing_else(self, configure: Configure) -> None:
        def view(request: Any) -> Response:
            run(request.pgconn, "CREATE TEMP TABLE IF NOT EXISTS kept (n int)")
            request.pgconn.commit()
            run(request.pgconn, "INSERT INTO kept VALUES (1)")
            if "commit" in request.path:
                request.pgconn.commit()
            return Response(str(run(request.pgconn, "SELECT count(*) FROM kept")))

        app = with_view(configure(), view)
        assert [app.get(path).text for path in ("/", "/commit", "/", "/")] == ["1", "1", "2", "2"]

    def test_is_rolled_back_when_the_view_fails(self, configure: Configure) -> None:
        def view(request: Any) -> Response:
            run(request.pgconn, "SELECT 1")
            raise Planned

        app = with_view(config := configure(), view)
        with pytest.raises(Planned):
            app.get("/")
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    @pytest.mark.parametrize("first_use", ["view", "body"])
    @pytest.mark.parametrize("kind", ["persistent", "threaded"])
    def test_lasts_until_a_streamed_body_is_closed(
        self, configure: Configure, dsn: str, first_use: str, kind: str
    ) -> None:
        """Pyramid's finished callbacks run before the first chunk."""

        def view(request: Any) -> Response:
            before = run(request.pgconn, "SELECT pg_backend_pid()") if first_use == "view" else None

            def body() -> Iterator[bytes]:
                yield b"x" * 100_000
                pid = run(request.pgconn, "SELECT pg_backend_pid()")
                assert before in (None, pid)
                assert len(zpgpool.get_pool(registry=request.registry).holders()) == 1
                yield str(pid).encode()

            return Response(app_iter=body())

        app = with_view(config := configure({"zpgpool.dsn": dsn, "zpgpool.pool": kind}), view)
        with waitress(app.app) as port:
            status, body = get(port, "/")
        assert (status, body.lstrip(b"x").isdigit()) == (200, True)
        pool: Any = zpgpool.get_pool(registry=config.registry)
        assert (pool.holders(), pool.get_stats()["requests_num"]) == ([], 1)

    def test_is_free_while_a_file_is_sent(self, configure: Configure, tmp_path: Path) -> None:
        path = tmp_path / "file.txt"
        path.write_bytes(b"y" * 100_000)

        def view(request: Any) -> Response:
            run(request.pgconn, "SELECT 1")
            return FileResponse(str(path), request)

        app = with_view(config := configure(), view)
        with waitress(app.app) as port:
            assert get(port, "/") == (200, b"y" * 100_000)
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    def test_is_refused_after_the_request(self, configure: Configure) -> None:
        """Pitfall 16."""
        kept: list[Any] = []

        def view(request: Any) -> Response:
            kept.append(request)
            return tell_backend(request)

        with_view(configure(), view).get("/")
        with pytest.raises(zpgpool.PoolError, match="the request has ended"):
            _ = kept[0].pgconn

    def test_a_subrequest_has_its_requests(self, configure: Configure) -> None:
        def view(request: Any) -> Response:
            if request.path == "/inner":
                return tell_backend(request)
            mine = tell_backend(request).text
            inner = request.invoke_subrequest(Request.blank("/inner")).text
            assert tell_backend(request).text == mine
            return Response(repr(mine == inner))

        app = with_view(config := configure(), view)
        assert app.get("/").text == "True"
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    def test_without_a_free_connection_the_answer_is_503(self, configure: Configure, dsn: str) -> None:
        settings = {"zpgpool.dsn": dsn, "zpgpool.maxconn": "1", "zpgpool.timeout": "0", "zpgpool.retry_after": "7"}
        app = with_view(config := configure(settings), tell_backend)
        pool = zpgpool.get_pool(registry=config.registry)

        with waitress(app.app) as port, pool.connection():
            assert get(port, "/")[0] == 503

    def test_an_execution_policy_of_the_applications_own_is_kept(self, configure: Configure) -> None:
        seen: list[str] = []

        def policy(environ: Any, router: Any) -> Any:
            seen.append(environ["PATH_INFO"])
            with router.request_context(environ) as request:
                return router.invoke_request(request)

        config = configure()
        config.set_execution_policy(policy)
        assert with_view(config, tell_backend).get("/x").text.isdigit()
        assert seen == ["/x"]
        assert config.registry.getUtility(IExecutionPolicy) is not policy


class TestTransactions:
    """With pyramid_tm the connection is the transaction's."""

    @pytest.fixture(params=["pyramid_tm.explicit_manager", None], ids=["explicit", "thread"])
    def settings(self, dsn: str, request: Any) -> dict[str, Any]:
        settings = {"zpgpool.dsn": dsn, "zpgpool.maxconn": str(MAXCONN)}
        return settings | ({"tm.manager_hook": request.param} if request.param else {})

    @pytest.fixture(autouse=True)
    def table(self, outside: Outside) -> Iterator[None]:
        outside.query("DROP TABLE IF EXISTS rows")
        outside.query(books.SCHEMA)
        yield
        outside.query("DROP TABLE rows")

    def test_commits_and_rolls_back(self, configure: Configure, settings: Any, outside: Outside) -> None:
        def view(request: Any) -> Response:
            assert request.pgconn is request.pgconn
            books.store_row(request.pgconn, request.path)
            if "fail" in request.path:
                raise Planned
            if "doom" in request.path:
                request.tm.doom()
            return Response("x")

        app = with_view(config := configure(settings, "pyramid_tm"), view)
        app.get("/one")
        app.get("/doom")
        with pytest.raises(Planned):
            app.get("/fail")
        assert rows(outside) == ["/one"]
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    def test_a_streamed_body_queries_after_the_commit(
        self, configure: Configure, settings: Any, outside: Outside
    ) -> None:
        """Pitfall 37: it works, is rolled back, and nothing joins a transaction that nobody ends."""

        def view(request: Any) -> Response:
            books.store_row(request.pgconn, "kept")

            def body() -> Iterator[bytes]:
                yield run(request.pgconn, "SELECT key FROM rows").encode()
                books.store_row(request.pgconn, "lost")
                yield b"."

            return Response(app_iter=body())

        app = with_view(config := configure(settings, "pyramid_tm"), view)
        assert app.get("/").text == "kept."
        assert rows(outside) == ["kept"]
        assert zpgpool.get_pool(registry=config.registry).holders() == []
        assert {outside.state(pid) for pid in outside.backends()} == {"idle"}

    def test_a_request_without_a_transaction_has_its_own(
        self, configure: Configure, settings: Any, outside: Outside
    ) -> None:
        def view(request: Any) -> Response:
            books.store_row(request.pgconn, "lost")
            return Response("x")

        settings["tm.activate_hook"] = "test_pyramid.never"
        app = with_view(config := configure(settings, "pyramid_tm"), view)
        app.get("/")
        assert rows(outside) == []
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    def test_a_request_that_an_exception_has_left_on_the_stack_is_not_asked(
        self, configure: Configure, settings: Any, outside: Outside
    ) -> None:
        """One that hits Pyramid between the push and its `try`, as a signal's handler may raise it."""

        def view(request: Any) -> Response:
            books.store_row(request.pgconn, "kept")
            return Response("x")

        app = with_view(config := configure(settings, "pyramid_tm"), view)
        left = Request.blank("/")
        left.environ.update({"tm.active": True, "tm.manager": transaction.TransactionManager(explicit=True)})
        threadlocals.push({"request": left, "registry": config.registry})
        try:
            assert app.get("/").text == "x"
        finally:
            threadlocals.pop()
        assert rows(outside) == ["kept"]

    def test_a_script_has_its_transactions(self, configure: Configure, settings: Any, outside: Outside) -> None:
        with_view(config := configure(settings, "pyramid_tm"), tell_backend)
        with prepare(registry=config.registry) as env:
            with env["request"].tm:
                books.store_row(env["request"].pgconn, "kept")
            with pytest.raises(Planned), env["request"].tm:
                books.store_row(env["request"].pgconn, "lost")
                raise Planned
        assert rows(outside) == ["kept"]
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    @pytest.mark.parametrize("include", ["pyramid_tm", None])
    def test_repoze_tm2_around_it_commits(
        self, configure: Configure, dsn: str, outside: Outside, caplog: pytest.LogCaptureFixture, include: str | None
    ) -> None:
        def view(request: Any) -> Response:
            books.store_row(request.pgconn, "kept")
            return Response("x")

        config = configure({"zpgpool.dsn": dsn}, *([include] if include else []))
        app = TestApp(TM(with_view(config, view).app))
        app.get("/")
        assert rows(outside) == ["kept"]
        assert zpgpool.get_pool(registry=config.registry).holders() == []
        assert caplog.records == []


def never(request: Any) -> bool:
    """An activate_hook for pyramid_tm."""
    return False


class TestMounted:
    """Two applications in one process, each with an unnamed pool: what is mounted has its request's environ."""

    WHO = "SELECT current_setting('application_name')"

    @pytest.fixture
    def make(self, configure: Configure, dsn: str) -> Callable[..., Any]:
        """Make an application whose pool goes by a name that its server tells."""

        def make(name: str, view: Callable[[Any], Any], manager: str, kind: str) -> Any:
            settings = {"zpgpool.dsn": dsn, "zpgpool.pool": kind, "zpgpool.application_name": name}
            if manager == "explicit":
                settings["tm.manager_hook"] = "pyramid_tm.explicit_manager"
            return with_view(configure(settings, *(["pyramid_tm"] if manager else [])), view).app

        return make

    @pytest.mark.parametrize("manager", ["", "thread", "explicit"])
    @pytest.mark.parametrize("mount", [wsgiapp, wsgiapp2, None])
    @pytest.mark.parametrize("streams", ["neither", "inner", "both"])
    @pytest.mark.parametrize("kind", ["persistent", "threaded"])
    def test_each_has_its_own_database(
        self, make: Any, manager: str, mount: Any, streams: str, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def view(request: Any) -> Response:
            def body() -> Iterator[bytes]:
                for _ in range(3):
                    yield f" {run(request.pgconn, self.WHO)}".encode()

            return Response(app_iter=body() if streams != "neither" else list(body()))

        inner = make("inner", view, manager, kind)

        def outer(request: Any) -> Response:
            assert run(request.pgconn, self.WHO) == "outer"
            response = mount(inner)(None, request) if mount else request.get_response(inner)
            assert run(request.pgconn, self.WHO) == "outer"

            def body() -> Iterator[bytes]:
                for chunk in response.app_iter:
                    yield run(request.pgconn, self.WHO).encode() + chunk + b"\n"
                close = getattr(response.app_iter, "close", list)
                close()

            return Response(app_iter=body()) if streams == "both" else response

        app = TestApp(make("outer", outer, manager, kind))
        expected = ["outer inner"] * 3 if streams == "both" else [" inner inner inner"]
        assert app.get("/").text.splitlines() == expected
        assert [pool.holders() for pool in self.pools(app, inner)] == [[], []]
        assert caplog.records == []

    def pools(self, *apps: Any) -> list[Any]:
        return [zpgpool.get_pool(registry=getattr(app, "app", app).registry) for app in apps]


class TestSubrequests:
    """A subrequest is part of its request: one connection, and one end of what it has written."""

    @pytest.fixture(autouse=True)
    def table(self, outside: Outside) -> Iterator[None]:
        outside.query("DROP TABLE IF EXISTS rows")
        outside.query(books.SCHEMA)
        yield
        outside.query("DROP TABLE rows")

    @pytest.mark.parametrize("first", ["outer", "inner"])
    @pytest.mark.parametrize("with_tweens", [True, False])
    @pytest.mark.parametrize("kind", ["persistent", "threaded"])
    @pytest.mark.parametrize("fails", ["", "inner", "outer"])
    def test_share_its_connection_and_its_transaction(
        self, configure: Configure, dsn: str, outside: Outside, first: str, with_tweens: bool, kind: str, fails: str
    ) -> None:
        settings = {"zpgpool.dsn": dsn, "zpgpool.pool": kind, "tm.manager_hook": "pyramid_tm.explicit_manager"}
        pids: set[int] = set()

        def store(request: Any, key: str) -> None:
            books.store_row(request.pgconn, key)
            pids.add(run(request.pgconn, "SELECT pg_backend_pid()"))

        def view(request: Any) -> Response:
            if request.path == "/inner":
                store(request, "inner")
                if fails == "inner":
                    raise Planned
                return Response("x")
            if first == "outer":
                store(request, "before")
            try:
                request.invoke_subrequest(Request.blank("/inner"), use_tweens=with_tweens)
            except Planned:
                store(request, "caught")
            store(request, "after")
            if fails == "outer":
                raise Planned
            return Response("x")

        app = with_view(config := configure(settings, "pyramid_tm"), view)
        if fails == "outer":
            with pytest.raises(Planned):
                app.get("/")
        else:
            app.get("/")
        assert len(pids) == 1
        stored = ["before"] * (first == "outer") + (["caught"] if fails == "inner" else ["inner"]) + ["after"]
        if fails == "inner" and not with_tweens:
            stored.append("inner")  # no transaction of its own has failed: what was caught is forgiven
        assert rows(outside) == ([] if fails == "outer" else sorted(stored))
        assert zpgpool.get_pool(registry=config.registry).holders() == []

    def test_whose_failure_cannot_be_undone_fail_their_request(
        self, configure: Configure, dsn: str, outside: Outside
    ) -> None:
        """Another package's resource has no savepoints."""
        settings = {"zpgpool.dsn": dsn, "tm.manager_hook": "pyramid_tm.explicit_manager"}

        def view(request: Any) -> Response:
            books.store_row(request.pgconn, request.path)
            if request.path == "/inner":
                raise Planned
            request.tm.get().join(NoSavepoints())
            with pytest.raises(Planned):
                request.invoke_subrequest(Request.blank("/inner"), use_tweens=True)
            return Response("x")

        app = with_view(configure(settings, "pyramid_tm"), view)
        with pytest.raises(TransactionFailedError):
            app.get("/")
        assert rows(outside) == []

    def test_need_no_connection_more(self, configure: Configure, dsn: str) -> None:
        settings = {
            "zpgpool.dsn": dsn,
            "zpgpool.maxconn": "1",
            "zpgpool.timeout": "0",
            "tm.manager_hook": "pyramid_tm.explicit_manager",
        }

        def view(request: Any) -> Response:
            run(request.pgconn, "SELECT 1")
            if request.path == "/inner":
                return Response("x")
            return request.invoke_subrequest(Request.blank("/inner"), use_tweens=True)

        assert with_view(configure(settings, "pyramid_tm"), view).get("/").text == "x"


class NoSavepoints:
    """A resource of the simplest kind."""

    def sortKey(self) -> str:
        return "it"

    def abort(self, txn: object) -> None:
        """Nothing is to be undone."""


class TestServing:
    """What a request costs, and what scripts and settings are told."""

    def test_the_middleware_is_made_once(self, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[PoolMiddleware] = []
        init = PoolMiddleware.__init__

        def count(self: PoolMiddleware, *args: Any, **keywords: Any) -> None:
            made.append(self)
            init(self, *args, **keywords)

        monkeypatch.setattr(PoolMiddleware, "__init__", count)
        app = with_view(configure(), tell_backend)
        for _ in range(3):
            app.get("/")
        assert len(made) == 1

    def test_two_routers_of_one_registry_are_served_each(self, configure: Configure) -> None:
        with_view(config := configure(), tell_backend)
        first, second = config.make_wsgi_app(), config.make_wsgi_app()
        seen: list[Any] = []
        for router in (first, second, first):

            def answer(request: Any, router: Any = router) -> Response:
                seen.append(router)
                return Response("x")

            router.handle_request = answer
            TestApp(router).get("/")
        assert seen == [first, second, first]

    def test_a_replica_that_no_setting_describes_is_refused(self, configure: Configure, dsn: str) -> None:
        config = configure({"zpgpool.dsn": dsn, "zpgpool.replica": "readres", "zpgpool.readers.dsn": dsn})
        with pytest.raises(ConfigurationExecutionError, match="option 'replica': no pool is registered as 'readres'"):
            config.commit()

    def test_a_replica_that_the_application_registers_itself_is_known(
        self, configure: Configure, dsn: str, make_pool: Any
    ) -> None:
        config = configure({"zpgpool.dsn": dsn, "zpgpool.replica": "readers"})
        zpgpool.register_pool(make_pool(zpgpool.ThreadedConnectionPool), "readers", config.registry)
        config.commit()

    def test_a_script_without_transactions_is_told_what_to_do(self, configure: Configure) -> None:
        with_view(config := configure(), tell_backend)
        with (
            prepare(registry=config.registry) as env,
            pytest.raises(zpgpool.PoolError, match=r"outside of a request.*get_pool\(''"),
        ):
            _ = env["request"].pgconn

    def test_two_packages_that_include_it_do_not_conflict(self, configure: Configure) -> None:
        config = configure()
        config.include(include_it_too)
        config.include("zpgpool.pyramid")
        assert with_view(config, tell_backend).get("/").text.isdigit()

    @pytest.mark.parametrize("keeps", ["", "the connection", "a cursor"])
    @pytest.mark.parametrize("kind", ["persistent", "threaded"])
    def test_a_stream_that_has_committed_gives_its_connection_back(
        self, configure: Configure, dsn: str, kind: str, keeps: str
    ) -> None:
        """And gets one again when it asks; not if the body refers to it still."""

        def view(request: Any) -> Response:
            pool: Any = zpgpool.get_pool(registry=request.registry)
            run(request.pgconn, "SELECT 1")
            kept = {"the connection": lambda: request.pgconn, "a cursor": request.pgconn.cursor}.get(keeps, int)()

            def body() -> Iterator[bytes]:
                yield str(len(pool.holders())).encode()
                assert getattr(kept, "connection", kept) in (0, request.pgconn)
                run(request.pgconn, "SELECT 1")
                yield str(len(pool.holders())).encode()

            return Response(app_iter=body())

        settings = {"zpgpool.dsn": dsn, "zpgpool.pool": kind, "tm.manager_hook": "pyramid_tm.explicit_manager"}
        app = with_view(config := configure(settings, "pyramid_tm"), view)
        assert app.get("/").text == ("11" if keeps else "01")
        assert zpgpool.get_pool(registry=config.registry).holders() == []


def include_it_too(config: Any) -> None:
    """A package that needs a pool."""
    config.include("zpgpool")


class Application:
    """An application that keeps its books twice, in a ZODB and in PostgreSQL."""

    def __init__(self, dsn: str, path: Path, kind: str) -> None:
        self.db = DB(FileStorage(str(path / "Data.fs")), pool_size=20)
        with self.db.transaction() as conn:
            for number in range(books.CLIENTS):
                conn.root()[str(number)] = conn.root().__class__()
        self.barrier = threading.Barrier(2)
        self.attempts: list[tuple[str, int]] = []
        config = Configurator(
            settings={
                "zpgpool.dsn": dsn,
                "zpgpool.pool": kind,
                "zpgpool.maxconn": str(MAXCONN),
                "tm.manager_hook": "pyramid_tm.explicit_manager",
                "retry.attempts": 3,
            }
        )
        for each in ("pyramid_retry", "pyramid_tm", "zpgpool"):
            config.include(each)
        config.add_request_method(self._root, "root_object", reify=True)
        config.add_route("page", "/{job}")
        config.add_view(self.page, route_name="page")
        self.app = config.make_wsgi_app()
        self.pool: Any = zpgpool.get_pool(registry=config.registry)

    def _root(self, request: Any) -> Any:
        conn = self.db.open(request.tm)
        request.add_finished_callback(lambda request: conn.close())
        return conn.root()

    def page(self, request: Any) -> Response:
        job, key = request.matchdict["job"], request.params["key"]
        if job != "read":
            request.root_object[request.params.get("client", "0")][key] = "an object"
        if job == "stream":
            books.store_row(request.pgconn, key)
            return Response(app_iter=_later(request))
        if job.startswith("conflict"):
            self.conflict(request, key, is_late=job == "conflict-late")
        else:
            books.store_row_for(job, request.pgconn, key)
        return Response("done")

    def conflict(self, request: Any, key: str, is_late: bool) -> None:
        """Do in two requests at once what can be done only one after the other."""
        attempt = request.environ["retry.attempt"]
        self.attempts.append((key, attempt))
        run(request.pgconn, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        run(request.pgconn, "SELECT count(*) FROM rows")
        if attempt == 0 and not is_late:
            self.barrier.wait(20)
        books.store_row(request.pgconn, key)
        if attempt == 0 and is_late:
            self.barrier.wait(20)

    def objects(self) -> list[str]:
        """Return the keys in the ZODB."""
        with self.db.transaction() as conn:
            return sorted(key for number in range(books.CLIENTS) for key in conn.root()[str(number)])

    def close(self) -> None:
        self.pool.close(0)
        self.db.close()


def _later(request: Any) -> Iterator[bytes]:
    yield from numbers(request.pgconn)


@pytest.fixture(scope="module")
def books_dsn(server_dsn: str) -> Iterator[str]:
    with books.database(server_dsn, "zpgpool_pyramid") as dsn:
        yield dsn


#: The pages that are meant to fail.
FAILING = tuple(f"/{job}" for job, (_, status, _) in books.JOBS.items() if status == 500)


class IsPlanned(logging.Filter):
    """Lets pass what waitress logs beside the errors that are meant to happen."""

    def filter(self, record: logging.LogRecord) -> bool:
        is_error = isinstance(record.exc_info and record.exc_info[1], Planned | psycopg2.Error)
        return not (is_error and record.getMessage().endswith(FAILING))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, but the errors that the pages are meant to raise, and clients that wait."""
    caplog.set_level("ERROR", "waitress.queue")
    caplog.set_level("CRITICAL", "txn")  # `transaction` logs what a vote raises
    logger, planned = logging.getLogger("waitress"), IsPlanned()
    logger.addFilter(planned)
    yield caplog
    logger.removeFilter(planned)


class TestBooks:
    @pytest.fixture(params=["persistent", "threaded"])
    def application(self, books_dsn: str, tmp_path: Path, request: Any) -> Iterator[Application]:
        application = Application(books_dsn, tmp_path, request.param)
        yield application
        application.close()

    @pytest.fixture
    def outside(self, books_dsn: str) -> Iterator[Outside]:
        outside = Outside(books_dsn)
        outside.query("TRUNCATE rows")
        yield outside
        outside.conn.close()

    @pytest.fixture
    def port(self, application: Application, log: pytest.LogCaptureFixture) -> Iterator[int]:
        with waitress(application.app, threads=8) as port:
            yield port
        assert application.pool.holders() == []
        assert log.text == ""

    @pytest.mark.parametrize("job", ["store", "fail", "vote", "swallow", "kill", "stream"])
    def test_both_or_neither(self, port: int, application: Application, outside: Outside, job: str) -> None:
        _, expected, is_stored = books.JOBS[job]
        status, body = get(port, f"/{job}?key=it")
        assert status == expected
        assert rows(outside) == application.objects() == (["it"] if is_stored else [])
        if job == "stream":
            assert [int(line) for line in body.split()] == list(range(STREAMED))
        assert get(port, "/store?key=next")[0] == 200
        check_books(outside, ["it", "next"] if is_stored else ["next"], application.objects, MAXCONN)

    @pytest.mark.parametrize("job", ["conflict", "conflict-late"])
    def test_a_conflict_between_two_requests_is_retried(
        self, port: int, application: Application, outside: Outside, job: str
    ) -> None:
        """Pitfall 33: late, it is found by the vote."""
        calls = [Call(get, port, f"/{job}?key={key}&client={key}") for key in "01"]
        assert [call.result()[0] for call in calls] == [200, 200]
        check_books(outside, ["0", "1"], application.objects, MAXCONN)
        assert len(application.attempts) > 2

    @pytest.mark.slow
    def test_a_thousand_requests(self, port: int, application: Application, outside: Outside) -> None:
        stored = books.load(port, 1000)
        check_books(outside, stored, application.objects, MAXCONN)
        stats = application.pool.get_stats()
        assert stats["requests_errors"] == stats["connections_errors"] == 0
        assert stats["connections_num"] > 40  # those that were killed, and their successors
