"""Django: its connections come from a pool, and go back where Django closes them. Its own suites: docs/django.rst."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import django
import psycopg2
import pytest
from benchmarks.harness import free_port
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import WSGIHandler
from django.db import connection
from django.db import connections
from django.db import DatabaseError
from django.db import OperationalError
from django.db import transaction
from django.http import Http404
from django.http import HttpResponse
from django.http import StreamingHttpResponse
from django.test import Client
from django.test import override_settings
from django.urls import path
from psycopg2.extensions import parse_dsn
from zope.component import getGlobalSiteManager

import zpgpool
from conftest import Call
from conftest import eventually
from conftest import in_thread
from conftest import NO_PSYCOPG_3
from conftest import Outside
from serving import waitress
from zpgpool.interfaces import IConnectionPool


settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={},
    MIDDLEWARE=["zpgpool.django.middleware.UnavailableMiddleware"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="x",
    USE_TZ=True,
)
django.setup()

from zpgpool.django import base  # noqa: E402  # Django wants its settings before
from zpgpool.django import Unavailable  # noqa: E402


#: Stands in no message.
SECRET = "hunter2"


def execute(sql: str, *args: object, using: Any = connection) -> Any:
    with using.cursor() as cursor:
        cursor.execute(sql, args or None)
        return cursor.fetchone()[0] if cursor.description else None


def add(request: Any, n: int) -> HttpResponse:
    execute("INSERT INTO numbers VALUES (%s)", n)
    return HttpResponse("added")


def add_later(request: Any, n: int) -> StreamingHttpResponse:
    return StreamingHttpResponse(str(execute("SELECT %s", n + i)) + "\n" for i in range(3))


def fail(request: Any) -> HttpResponse:
    with transaction.atomic():
        execute("INSERT INTO numbers VALUES (1)")
        raise LookupError


def handle(request: Any) -> HttpResponse:
    try:
        execute("SELECT 1")
    except OperationalError:
        if request.GET.get("how") == "not_found":
            raise Http404 from None
        return HttpResponse("from the cache")
    return HttpResponse("from the database")


def wrap(request: Any) -> HttpResponse:
    try:
        execute("SELECT 1")
    except DatabaseError as error:
        raise RuntimeError("no numbers") from error
    return HttpResponse("")


def wrong(request: Any) -> None:
    execute("SET LOCAL statement_timeout = '1ms'; SELECT pg_sleep(10)")


async def add_async(request: Any, n: int) -> HttpResponse:
    from asgiref.sync import sync_to_async

    await sync_to_async(execute)("INSERT INTO numbers VALUES (%s)", n)
    return HttpResponse("added")


def session_in_the_database(get_response: Any) -> Any:
    """A middleware that stores something after the view, as sessions are."""

    def middleware(request: Any) -> Any:
        response = get_response(request)
        execute("SELECT 1")
        return response

    return middleware


urlpatterns = [
    path("add/<int:n>", add),
    path("later/<int:n>", add_later),
    path("async/<int:n>", add_async),
    path("fail", fail),
    path("handle", handle),
    path("wrap", wrap),
    path("wrong", wrong),
    path("nothing", lambda request: HttpResponse("nothing")),
]


Databases = Callable[..., None]


@pytest.fixture
def databases(dsn: str) -> Iterator[Databases]:
    """Set DATABASES: of each, what is not as usual. Called without, there is one, of three connections."""
    parts = parse_dsn(dsn)

    def one(options: Any = None, own: Any = None, **more: Any) -> dict[str, Any]:
        return {
            "ENGINE": "zpgpool.django",
            "NAME": parts["dbname"],
            "USER": parts["user"],
            "PASSWORD": parts.get("password", ""),
            "HOST": parts["host"],
            "PORT": parts.get("port", ""),
            "OPTIONS": {
                "application_name": parts["application_name"],
                "zpgpool": {"maxconn": 3, "timeout": 20} if own is None else own,
                **(options or {}),
            },
            **more,
        }

    def set_up(**each: Any) -> None:
        clean_up()
        settings.DATABASES = {alias: one(**more) for alias, more in (each or {"default": {}}).items()}
        settings.DATABASES.setdefault("default", {})

    def clean_up() -> None:
        for wrapper in connections.all(initialized_only=True):
            wrapper.close()
            delattr(connections._connections, wrapper.alias)
        for pool in base._pools.values():
            zpgpool.unregister_pool(pool.name).close(0)
        base._pools.clear()
        connections._settings = None
        connections.__dict__.pop("settings", None)

    set_up()
    yield set_up
    clean_up()
    settings.DATABASES = {}


@pytest.fixture(autouse=True)
def table(outside: Outside, databases: Databases) -> Iterator[None]:
    outside.query("DROP TABLE IF EXISTS numbers; CREATE TABLE numbers (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    yield
    connections.close_all()
    outside.query("DROP TABLE numbers")


def the_pool(name: str = "default") -> Any:
    return zpgpool.get_pool(name)


def stored(outside: Outside) -> list[int]:
    return [n for (n,) in outside.query("SELECT n FROM numbers ORDER BY n")]


class TestSettings:
    def test_make_a_pool(self, outside: Outside) -> None:
        pid = execute("SELECT pg_backend_pid()")
        assert outside.backends() == {pid}
        pool = the_pool()
        assert type(pool) is zpgpool.ThreadedConnectionPool
        assert (pool.maxconn, pool.settings.timeout, pool.settings.idle_timeout) == (3, 20, 600)
        [holder] = pool.holders()
        assert holder.backend_pid == pid
        connection.close()
        assert pool.holders() == []
        assert outside.backends() == {pid}
        assert execute("SELECT pg_backend_pid()") == pid

    def test_that_are_the_same_share_it(self, databases: Databases) -> None:
        databases(default={}, other={})
        execute("SELECT 1")
        execute("SELECT 1", using=connections["other"])
        assert connection.pool is connections["other"].pool
        assert len(the_pool().holders()) == 2

    @pytest.mark.parametrize(
        "other",
        [
            {"options": {"connect_timeout": 7}},
            {"own": {"maxconn": 2}},
            {"options": {"assume_role": "pg_monitor"}},
        ],
    )
    def test_that_differ_do_not(self, databases: Databases, other: Any) -> None:
        databases(default={}, other=other)
        assert connection.pool is not connections["other"].pool

    def test_name_it(self, databases: Databases) -> None:
        databases(
            default={"own": {"name": "main"}},
            two={"own": {"name": "main", "maxconn": 2}},
            three={},
            four={"own": {"maxconn": 2}},
        )
        for alias, name in [("default", "main"), ("two", "main-2"), ("three", "three"), ("four", "four")]:
            pool = connections[alias].pool
            assert pool.name == name
            assert zpgpool.get_pool(name) is pool
        connection.close_pool()
        assert list(getGlobalSiteManager().getUtilitiesFor(IConnectionPool)) == []

    def test_of_the_table_are_refused_by_name(self, databases: Databases) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"own": {"maxcon": 3}}, "unknown option 'maxcon', did you mean 'maxconn'"),
            ({"own": {"maxconn": "x"}}, "option 'maxconn': expected a whole number"),
            ({"own": {"host": "x"}}, "option 'host' belongs into OPTIONS itself, or is one of Django's own"),
            ({"options": {"timeout": 3}}, r"option 'timeout' belongs into OPTIONS\['zpgpool'\]"),
            ({"options": {"hots": 3}}, "unknown option 'hots'"),
            ({"own": {"timeout": [1]}}, "option 'timeout': expected a number"),
            ({"own": f"password={SECRET}"}, r"OPTIONS\['zpgpool'\]: expected a mapping of the pool's options, not str"),
        ]
        for options, message in cases:
            databases(default={**options, "PASSWORD": SECRET})
            with pytest.raises(ImproperlyConfigured, match=rf"DATABASES\['default'\]: {message}") as info:
                execute("SELECT 1")
            assert SECRET not in str(info.value)

    def test_that_cannot_be_kept_with_a_pool(self, databases: Databases) -> None:
        for age in (600, None):
            databases(default={"CONN_MAX_AGE": age})
            with pytest.raises(ImproperlyConfigured, match=r"\['default'\]: CONN_MAX_AGE must be 0 .*idle_timeout"):
                execute("SELECT 1")
        databases(default={"options": {"pool": True}})
        with pytest.raises(ImproperlyConfigured, match=r"OPTIONS\['pool'\] is for psycopg 3; .*OPTIONS\['zpgpool'\]"):
            execute("SELECT 1")

    def test_with_psycopg_3_say_what_to_do(self) -> None:
        script = (
            "from django.conf import settings; settings.configure()\n"
            "from django.db.backends.postgresql import base, psycopg_any; psycopg_any.is_psycopg3 = True\n"
            "import zpgpool.django.base"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "psycopg 3 is installed, and Django prefers it: pip uninstall psycopg, or use" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("django.core.exceptions.ImproperlyConfigured: ")

    def test_hooks_come_after_djangos_own(self, databases: Databases) -> None:
        def configure(conn: Any) -> None:
            with conn.cursor() as cursor:
                cursor.execute("SELECT set_config('application_name', current_user::text, false)")

        databases(default={"own": {"configure": configure}, "options": {"assume_role": "pg_monitor"}})
        for _ in range(2):
            assert execute("SHOW application_name") == "pg_monitor"
            connection.close()


class TestConnections:
    def test_have_the_time_zone(self, databases: Databases) -> None:
        databases(default={"TIME_ZONE": "Asia/Tokyo"}, other={})
        assert execute("SHOW timezone") == "Asia/Tokyo"
        assert execute("SHOW timezone", using=connections["other"]) == "UTC"

    def test_have_the_time_zone_that_is_wanted_now(self, databases: Databases) -> None:
        assert execute("SHOW timezone") == "UTC"
        with override_settings(USE_TZ=False, TIME_ZONE="Asia/Tokyo"):
            assert execute("SHOW timezone") == "Asia/Tokyo"
            connection.close()
            assert execute("SHOW timezone") == "Asia/Tokyo"
        connection.close()
        assert execute("SHOW timezone") == "UTC"

    def test_have_the_role(self, databases: Databases, outside: Outside) -> None:
        databases(default={}, other={"options": {"assume_role": "pg_monitor"}})
        for _ in range(2):
            assert execute("SELECT current_user::text", using=connections["other"]) == "pg_monitor"
            assert execute("SELECT current_user::text") != "pg_monitor"
            connections.close_all()
        assert len(outside.backends()) == 2

    def test_have_the_isolation_level(self, databases: Databases) -> None:
        from django.db.backends.postgresql.psycopg_any import IsolationLevel

        databases(default={"options": {"isolation_level": IsolationLevel.SERIALIZABLE}}, other={})
        for _ in range(2):
            with transaction.atomic():
                assert execute("SHOW transaction_isolation") == "serializable"
            with transaction.atomic("other"):
                assert execute("SHOW transaction_isolation", using=connections["other"]) == "read committed"
            connections.close_all()

    def test_are_set_up_once(self, databases: Databases) -> None:
        statements: list[str] = []

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, sql: Any, args: Any = None) -> None:
                statements.append(str(sql))
                super().execute(sql, args)

        databases(
            default={"options": {"assume_role": "pg_monitor", "cursor_factory": Cursor}, "TIME_ZONE": "Asia/Tokyo"}
        )
        execute("SELECT 1")
        connection.close()
        assert any("SET ROLE" in sql for sql in statements)
        statements.clear()
        execute("SELECT 1")
        connection.close()
        assert statements == ["SELECT 1"]

    def test_that_are_discarded_are_set_up_again(self, databases: Databases) -> None:
        own = {"maxconn": 1, "reset": "discard"}
        databases(default={"options": {"assume_role": "pg_monitor"}, "own": own, "TIME_ZONE": "Asia/Tokyo"})
        pids = []
        for _ in range(3):
            assert execute("SELECT current_user::text") == "pg_monitor"
            assert execute("SHOW timezone") == "Asia/Tokyo"
            pids.append(execute("SELECT pg_backend_pid()"))
            assert execute("SHOW search_path") != "pg_catalog"
            execute("SET search_path = pg_catalog")
            connection.close()
        assert len(set(pids)) == 1

    def test_are_clean(self, outside: Outside) -> None:
        connection.set_autocommit(False)
        execute("INSERT INTO numbers VALUES (1)")
        connection.close()
        assert connection.connection is None
        execute("INSERT INTO numbers VALUES (2)")
        assert stored(outside) == [2]

    def test_that_break_at_rest_are_nobodys_trouble(self, outside: Outside) -> None:
        execute("SELECT 1")
        connection.close()
        outside.terminate()
        assert execute("SELECT 42") == 42

    def test_that_break_in_use_cost_no_place(self, outside: Outside) -> None:
        for _ in range(5):
            outside.terminate(execute("SELECT pg_backend_pid()"))
            with pytest.raises(OperationalError):
                execute("SELECT 1")
            connection.close_if_unusable_or_obsolete()
            assert the_pool().holders() == []
        assert execute("SELECT 42") == 42

    def test_that_are_dropped_cost_no_place(self, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(5):
            in_thread(execute, "SELECT 1")
            gc.collect()
        assert execute("SELECT 42") == 42
        assert len(the_pool().holders()) == 1

    def test_closed_within_a_transaction(self, outside: Outside) -> None:
        with pytest.raises(LookupError), transaction.atomic():
            execute("INSERT INTO numbers VALUES (1)")
            connection.close()
            assert the_pool().holders() == []
            with pytest.raises(DatabaseError, match="in an atomic block"):
                execute("SELECT 1")
            raise LookupError
        assert execute("SELECT 42") == 42
        assert stored(outside) == []

    def test_of_a_pool_that_was_given_up_are_closed_when_they_are_returned(
        self, databases: Databases, outside: Outside
    ) -> None:
        databases(default={}, other={})
        pid = execute("SELECT pg_backend_pid()")
        others = execute("SELECT pg_backend_pid()", using=connections["other"])
        connections["other"].close()
        pool = the_pool()
        connections["other"].close_pool()
        eventually(lambda: others not in outside.backends())
        assert execute("SELECT pg_backend_pid()") == pid
        connection.close()
        eventually(lambda: outside.backends() == set())
        assert execute("SELECT 42") == 42
        assert the_pool() is not pool

    def test_that_are_kept_open_are_closed_where_nobody_uses_them(self, databases: Databases, outside: Outside) -> None:
        databases(default={"own": {"minconn": 2, "maxconn": 3}})
        execute("SELECT 1")
        eventually(lambda: len(outside.backends()) > 1)
        connection.close()
        connection.close_pool()
        eventually(lambda: outside.backends() == set())

    def test_of_a_pool_that_was_closed(self) -> None:
        execute("SELECT 1")
        the_pool().close(0)
        connection.close()
        with pytest.raises(Unavailable):
            execute("SELECT 1")
        connection.close_pool()
        assert execute("SELECT 42") == 42

    def test_without_a_database_are_no_pools(self, outside: Outside) -> None:
        with connection._nodb_cursor() as cursor:
            cursor.execute("SELECT current_database()")
            assert cursor.fetchone() == ("postgres",)
        assert list(getGlobalSiteManager().getUtilitiesFor(IConnectionPool)) == []
        eventually(lambda: outside.backends() == set())

    def test_stream(self) -> None:
        for in_transaction in (False, True):
            if in_transaction:
                transaction.set_autocommit(False)
            with connection.chunked_cursor() as cursor:
                cursor.execute("SELECT generate_series(1, 1000)")
                assert cursor.fetchmany(2) == [(1,), (2,)]
                assert execute("SELECT bool_or(is_holdable) FROM pg_cursors") is not in_transaction
        connection.close()
        assert execute("SELECT count(*) FROM pg_cursors") == 0

    def test_of_the_orm(self, outside: Outside) -> None:
        from django.db import models

        class Number(models.Model):  # type: ignore[misc]
            n = models.IntegerField(primary_key=True)

            class Meta:
                app_label = "x"
                db_table = "numbers"
                managed = False

        done = []
        with transaction.atomic():
            Number.objects.create(n=1)
            with pytest.raises(LookupError), transaction.atomic():
                Number.objects.create(n=2)
                raise LookupError
            transaction.on_commit(lambda: done.append(Number.objects.count()))
        assert done == [1]
        Number.objects.bulk_create([Number(n=n) for n in range(10, 1000)])
        assert sum(number.n for number in Number.objects.iterator(chunk_size=10)) == sum(range(10, 1000)) + 1
        assert len(stored(outside)) == 991


class TestWithoutAConnection:
    @pytest.fixture
    def exhausted(self, databases: Databases) -> Iterator[Any]:
        databases(default={"own": {"maxconn": 3, "timeout": 0.1}})
        pool = connection.pool
        conns = [pool.getconn(timeout=20) for _ in range(3)]
        yield pool
        for conn in conns:
            pool.putconn(conn)

    def test_the_error_is_djangos_and_tells_who_holds_them(self, exhausted: Any) -> None:
        with pytest.raises(OperationalError, match=r"no connection came free .* Held by thread MainThread") as info:
            execute("SELECT 1")
        assert type(info.value) is Unavailable
        assert isinstance(info.value.__cause__, zpgpool.PoolTimeout)

    def test_the_next_try_may_succeed(self, exhausted: Any) -> None:
        with pytest.raises(OperationalError):
            execute("SELECT 1")
        exhausted.resize(0, 4)
        exhausted.putconn(exhausted.getconn(timeout=20))
        assert execute("SELECT 42") == 42

    def test_whoever_waits_is_served(self, databases: Databases) -> None:
        databases(default={"own": {"maxconn": 1, "timeout": 20}})
        execute("SELECT 1")
        waiter = Call(lambda: [execute("SELECT 42"), connection.close()])
        eventually(the_pool().waiters)
        connection.close()
        assert waiter.result()[0] == 42

    def test_requests_are_503(self, exhausted: Any, caplog: pytest.LogCaptureFixture) -> None:
        response = Client().get("/add/1")
        assert (response.status_code, response["Retry-After"], response["Cache-Control"]) == (503, "5", "no-store")
        assert b"not available" in response.content
        [record] = [record for record in caplog.records if record.name == "zpgpool"]
        assert record.getMessage().startswith("GET /add/1: 503 Service Unavailable: no connection came free within ")

    def test_requests_are_503_where_the_server_is_down(
        self, databases: Databases, caplog: pytest.LogCaptureFixture
    ) -> None:
        databases(
            default={"HOST": "127.0.0.1", "PORT": str(free_port()), "PASSWORD": SECRET, "own": {"outage_wait": 0}}
        )
        response = Client().get("/add/1")
        assert (response.status_code, response["Retry-After"]) == (503, "5")
        assert "Connection refused" in caplog.text
        assert SECRET not in caplog.text

    def test_requests_whose_view_says_what_the_cause_was(self, exhausted: Any) -> None:
        assert Client().get("/wrap").status_code == 503

    def test_requests_that_another_middleware_fails(self, exhausted: Any) -> None:
        name = f"{__name__}.session_in_the_database"
        with override_settings(MIDDLEWARE=[*settings.MIDDLEWARE, name]):
            response = Client(raise_request_exception=False).get("/nothing")
        assert (response.status_code, response["Retry-After"]) == (503, "5")

    @pytest.mark.parametrize(("how", "status"), [("", 200), ("not_found", 404)])
    def test_a_view_may_answer_itself(self, exhausted: Any, how: str, status: int) -> None:
        assert Client().get("/handle", {"how": how}).status_code == status

    def test_async_views(self, databases: Databases, outside: Outside) -> None:
        assert Client().get("/async/1").status_code == 200
        assert stored(outside) == [1]

    def test_other_errors_are_djangos(self, caplog: pytest.LogCaptureFixture) -> None:
        client = Client(raise_request_exception=False)
        assert client.get("/wrong").status_code == 500
        assert client.get("/fail").status_code == 500
        assert client.get("/none").status_code == 404


class TestRequests:
    def test_return_their_connection(self, outside: Outside) -> None:
        client = Client(raise_request_exception=False)
        for number in range(5):
            assert client.get(f"/add/{number}").content == b"added"
            assert client.get("/fail").status_code == 500
        assert stored(outside) == [0, 1, 2, 3, 4]

    def test_under_a_real_server(self, outside: Outside) -> None:
        with waitress(WSGIHandler(), threads=3) as port:
            for number in range(5):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/add/{number}") as answer:
                    assert answer.read() == b"added"
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/later/{number}") as answer:
                    assert answer.read().split() == [b"%d" % n for n in range(number, number + 3)]
            eventually(lambda: the_pool().holders() == [])
        assert stored(outside) == [0, 1, 2, 3, 4]
        assert len(outside.backends()) <= 3


FORK = """
import sys
sys.modules['psycopg'] = None  # see conftest
import os, sys
from django.conf import settings
from psycopg2.extensions import parse_dsn

parts = parse_dsn(sys.argv[1])
settings.configure(DATABASES={"default": {
    "ENGINE": "zpgpool.django", "NAME": parts["dbname"], "USER": parts["user"], "HOST": parts["host"],
    "PASSWORD": parts.get("password", ""), "PORT": parts.get("port", ""), "OPTIONS": {"zpgpool": {"maxconn": 2}},
}})
import django
from django.db import connection

django.setup()

def ask():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]

pid = ask()
for is_open in (True, False):
    if (child := os.fork()) == 0:
        connection.close()
        assert ask() != pid
        connection.close()
        assert ask() != pid
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert ask() == pid
    connection.close()
assert ask() == pid
"""


def test_a_forked_child_has_connections_of_its_own(dsn: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, dsn],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == ""
    assert result.returncode == 0


PROJECT = {
    "site_settings.py": """
import os
from psycopg2.extensions import parse_dsn

parts = parse_dsn(os.environ["APP_DSN"])
DATABASES = {"default": {
    "ENGINE": "zpgpool.django", "NAME": parts["dbname"], "USER": parts["user"], "HOST": parts["host"],
    "PASSWORD": parts.get("password", ""), "PORT": parts.get("port", ""),
    "OPTIONS": {"zpgpool": {"maxconn": 2, "timeout": 20}}, "TEST": {"NAME": "test_zpgpool_" + str(os.getppid())},
}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["shop"]
STATIC_URL = "static/"
MIDDLEWARE = ["zpgpool.django.middleware.UnavailableMiddleware"]
ROOT_URLCONF = "shop.urls"
SECRET_KEY = "x"
""",
    "shop/__init__.py": "",
    "shop/models.py": """
from django.db import models

class Item(models.Model):
    name = models.TextField(unique=True)
""",
    "shop/urls.py": """
from django.http import HttpResponse
from django.urls import path
from shop.models import Item

def add(request, name):
    Item.objects.create(name=name)
    return HttpResponse(str(Item.objects.count()))

urlpatterns = [path("add/<name>", add)]
""",
    "shop/tests.py": """
from urllib.request import urlopen
from django.db import connection
from django.test import LiveServerTestCase, TestCase, TransactionTestCase
from shop.models import Item

class InATransaction(TestCase):
    @classmethod
    def setUpTestData(cls):
        Item.objects.create(name="a")

    def test_one(self):
        self.assertEqual(self.client.get("/add/b").content, b"2")

    def test_other(self):
        self.assertEqual(self.client.get("/add/c").content, b"2")

class Committed(TransactionTestCase):
    def test_one(self):
        self.assertEqual(self.client.get("/add/a").content, b"1")
        connection.close()
        self.assertEqual(self.client.get("/add/b").content, b"2")

class Served(LiveServerTestCase):
    def test_one(self):
        for number in range(5):
            with urlopen(f"{self.live_server_url}/add/{number}") as answer:
                self.assertEqual(answer.read(), b"%d" % (number + 1))
        self.assertEqual(Item.objects.count(), 5)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_project_is_migrated_and_tested(dsn: str, outside: Outside, tmp_path: Path, parallel: str) -> None:
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "psycopg.py").write_text(NO_PSYCOPG_3)
    environ = {**os.environ, "APP_DSN": dsn, "DJANGO_SETTINGS_MODULE": "site_settings", "PYTHONPATH": str(tmp_path)}

    def manage(*args: str) -> str:
        command = [sys.executable, "-m", "django", *args]
        result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    try:
        assert "Create model Item" in manage("makemigrations", "shop")
        assert "Applying shop.0001_initial... OK" in manage("migrate")
        told = manage("test", "--parallel", parallel)
        assert "Ran 4 tests" in told
        assert ("Cloning test database" in told) is (parallel == "2")
    finally:
        outside.query("DROP TABLE IF EXISTS shop_item, django_migrations")
    assert outside.query("SELECT datname FROM pg_database WHERE datname ~ %s", f"^test_zpgpool_{os.getpid()}") == []


@pytest.mark.slow
def test_under_fire(databases: Databases, outside: Outside) -> None:
    """Eight threads, three connections, kills and closes: what was committed is stored, by never more than 3."""
    databases(default={"own": {"maxconn": 3, "timeout": 60}})
    until = monotonic() + 8
    committed: set[int] = set()
    in_doubt: set[int] = set()
    counts: Counter[str] = Counter()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        number = seed * 1_000_000
        while monotonic() < until:
            number += 1
            sent = False
            try:
                with transaction.atomic():
                    execute("INSERT INTO numbers VALUES (%s)", number)
                    if dice.random() < 0.05:
                        counts["closed"] += 1
                        connection.close()
                    sent = not connection.closed_in_transaction
                if sent:
                    committed.add(number)
            except DatabaseError:
                counts["broken"] += 1
                if sent:
                    in_doubt.add(number)
            if dice.random() < 0.5:
                connection.close()
            else:
                connection.close_if_unusable_or_obsolete()  # as at the end of a request
        connection.close()

    def kill() -> None:
        dice = random.Random(0)
        while monotonic() < until:
            pids = outside.backends()
            counts["most"] = max(counts["most"], len(pids))
            if pids and dice.random() < 0.05:
                outside.query("SELECT pg_terminate_backend(%s)", dice.choice(sorted(pids)))
                counts["killed"] += 1

    calls = [Call(work, seed) for seed in range(1, 9)] + [Call(kill)]
    for call in calls:
        call.result(60)
    assert counts["most"] == 3
    assert min(counts[name] for name in ("killed", "broken", "closed")) > 5, counts
    assert len(committed) > 100
    assert committed <= set(stored(outside)) <= committed | in_doubt
    assert the_pool().holders() == []
