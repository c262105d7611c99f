"""The table of settings: what each converter takes, and what it says of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import zpgpool
from conftest import run
from zpgpool import settings
from zpgpool.dsn import check_dsn
from zpgpool.dsn import is_libpq_keyword
from zpgpool.dsn import read_environment
from zpgpool.dsn import scrub
from zpgpool.settings import convert
from zpgpool.settings import PoolSettings
from zpgpool.settings import read_options
from zpgpool.settings import SettingError
from zpgpool.settings import sort_keywords
from zpgpool.settings import TABLE


#: What the design promises (its section 3); `dsn` and libpq's keywords are no rows.
PROMISED = {
    "minconn",
    "maxconn",
    "idle_timeout",
    "timeout",
    "max_waiting",
    "outage_wait",
    "max_lifetime",
    "check",
    "check_idle",
    "configure",
    "reset",
    "autocommit",
    "isolation_level",
    "readonly",
    "pooler",
    "twophase",
    "verify_commit",
    "replica",
    "primary_after_write",
    "max_lag",
    "prune_interval",
    "leak_after",
    "hold_limit",
    "name",
}

#: The defaults that the design promises to the front ends.
IN_FILES = {
    "minconn": 0,
    "maxconn": 10,
    "idle_timeout": 600,
    "timeout": 30,
    "max_waiting": None,
    "outage_wait": 10,
    "max_lifetime": 3600,
    "check_idle": 1,
    "prune_interval": 30,
    "leak_after": None,
}

#: ... and to Python, where they differ.
IN_PYTHON = {"idle_timeout": 0, "timeout": 0, "outage_wait": 0, "max_lifetime": None}


def refuse(name: str, value: object) -> str:
    """Return what is said of `value` for setting `name`, which must be refused."""
    with pytest.raises(SettingError) as caught:
        convert(name, value)
    return str(caught.value)


class TestTable:
    def test_has_the_settings_that_the_design_promises(self) -> None:
        assert set(TABLE) == PROMISED

    @pytest.mark.parametrize("name", TABLE)
    def test_every_row_has_a_unit_a_line_of_help_and_a_converter(self, name: str) -> None:
        row = TABLE[name].metadata
        assert row["unit"]
        assert "\n" not in row["unit"] + row["help"]
        assert len(row["help"]) >= 20
        assert callable(row["convert"])

    @pytest.mark.parametrize("name", TABLE)
    def test_every_default_is_what_its_converter_gives(self, name: str) -> None:
        field = TABLE[name]
        for default in (field.default, field.metadata["in_files"]):
            if default is not ...:
                assert convert(name, default) == default

    def test_the_front_ends_defaults_are_those_of_the_design(self) -> None:
        made, libpq = read_options({})
        assert libpq == {}
        assert set(made) == set(TABLE)
        assert {name: made[name] for name in IN_FILES} == IN_FILES

    def test_pythons_defaults_are_those_of_the_design(self) -> None:
        made = PoolSettings(minconn=0, maxconn=1)
        for name, default in IN_PYTHON.items():
            assert getattr(made, name) == default

    def test_only_minconn_and_maxconn_have_no_default_in_python(self) -> None:
        assert {name for name, field in TABLE.items() if field.default is ...} == {"minconn", "maxconn"}

    def test_the_documented_page_shows_the_table_and_the_design_the_modules(self) -> None:
        docs = Path(__file__).parent.parent / "docs"
        assert ".. settings-table::" in (docs / "settings.rst").read_text()
        assert ".. module-map::" in (docs / "design.rst").read_text()

    @pytest.mark.parametrize("name", TABLE)
    def test_every_row_is_a_keyword_of_the_pools(self, name: str) -> None:
        kwargs: dict[str, Any] = {"minconn": 0, "maxconn": 2}
        value = TABLE[name].metadata["in_files"]
        pool = zpgpool.ThreadedConnectionPool(**(kwargs | {name: value}), open=False)
        assert getattr(pool.settings, name) == value
        pool.closeall()


class TestNumbers:
    @pytest.mark.parametrize(("value", "expected"), [("2.5", 2.5), (" 3 ", 3.0), (0, 0.0), (7, 7.0), ("1e3", 1000.0)])
    def test_a_number_is_text_or_itself(self, value: object, expected: float) -> None:
        assert convert("timeout", value) == expected

    @pytest.mark.parametrize(
        "value", ["", "soon", "-1", -0.5, "nan", "inf", "-inf", math.inf, math.nan, "1e999", True, None, [1], b"1"]
    )
    def test_what_is_no_number_from_0_is_refused(self, value: object) -> None:
        assert refuse("timeout", value) == f"option 'timeout': expected a number, 0 or more, got {value!r}"

    def test_a_number_too_large_for_a_float_is_refused_too(self) -> None:
        assert "expected a number, 0 or more" in refuse("timeout", 10**400)
        assert "expected a whole number, 0 or more" in refuse("maxconn", 10**400)

    @pytest.mark.parametrize(("value", "expected"), [("8", 8), (8, 8), (8.0, 8), ("8.0", 8), ("0", 0)])
    def test_a_count_is_whole(self, value: object, expected: int) -> None:
        result = convert("maxconn", value)
        assert result == expected
        assert type(result) is int

    @pytest.mark.parametrize("value", ["eight", "8.5", 8.5, -1, "", True, None, "0x10"])
    def test_what_is_no_count_is_refused(self, value: object) -> None:
        assert refuse("maxconn", value) == f"option 'maxconn': expected a whole number, 0 or more, got {value!r}"

    @pytest.mark.parametrize("value", ["0", 0, "-3", "often"])
    def test_an_interval_is_above_0(self, value: object) -> None:
        assert convert("prune_interval", "0.1") == 0.1
        assert refuse("prune_interval", value) == f"option 'prune_interval': expected a number above 0, got {value!r}"

    @pytest.mark.parametrize("name", ["idle_timeout", "max_waiting", "max_lifetime", "check_idle", "leak_after"])
    @pytest.mark.parametrize("value", [None, "none", "None", "NONE", "", "  "])
    def test_none_may_be_written(self, name: str, value: object) -> None:
        assert convert(name, value) is None

    def test_and_what_is_refused_says_so(self) -> None:
        assert refuse("max_lifetime", "0") == "option 'max_lifetime': expected a number above 0, or none, got '0'"


class TestWords:
    @pytest.mark.parametrize("value", [True, "true", "True", "yes", "ON", "1", 1, " on "])
    def test_true_may_be_written_in_all_the_ways_of_the_field(self, value: object) -> None:
        assert convert("readonly", value) is True

    @pytest.mark.parametrize("value", [False, "false", "False", "no", "OFF", "0", 0])
    def test_false_too(self, value: object) -> None:
        assert convert("readonly", value) is False

    @pytest.mark.parametrize("value", ["maybe", 2, "t"])
    def test_nothing_else_is_taken_for_one_of_them(self, value: object) -> None:
        assert refuse("readonly", value) == f"option 'readonly': expected true or false, or none, got {value!r}"

    def test_autocommit_has_a_third_word(self) -> None:
        assert convert("autocommit", " Safe ") == "safe"
        assert convert("autocommit", "on") is True
        assert refuse("autocommit", 2) == "option 'autocommit': expected true, false or safe, or none, got 2"

    @pytest.mark.parametrize("value", ["serializable", "SERIALIZABLE", " Serializable "])
    def test_an_isolation_level_in_any_case(self, value: str) -> None:
        assert convert("isolation_level", value) == "SERIALIZABLE"

    @pytest.mark.parametrize("value", ["read committed", "read-committed", "READ_COMMITTED"])
    def test_and_with_any_hyphen(self, value: str) -> None:
        assert convert("isolation_level", value) == "READ COMMITTED"

    def test_a_strange_level_is_refused_with_those_that_are_known(self) -> None:
        message = refuse("isolation_level", "chaos")
        assert message.startswith("option 'isolation_level': expected one of read uncommitted, read committed, ")
        assert message.endswith("serializable, or none, got 'chaos'")

    @pytest.mark.parametrize("value", settings.LEVELS)
    def test_every_level_is_one_that_the_server_knows(self, value: str, dsn: str) -> None:
        with zpgpool.SimpleConnectionPool(0, 1, dsn, isolation_level=value) as pool, pool.connection() as conn:
            with conn.cursor() as cursor:
                cursor.execute("SHOW transaction_isolation")
                assert cursor.fetchone() == (value,)

    def test_text_is_text(self) -> None:
        assert convert("name", "main") == "main"
        assert convert("name", "") == ""
        assert refuse("name", 5) == "option 'name': expected text, got 5"
        assert refuse("name", None) == "option 'name': expected text, got None"


def greet(conn: Any) -> None:
    """A hook that can be named."""


class TestHooks:
    @pytest.mark.parametrize("name", ["check", "configure", "reset"])
    @pytest.mark.parametrize("dotted", ["test_settings:greet", "test_settings.greet", " test_settings:greet "])
    def test_a_hook_may_be_named(self, name: str, dotted: str) -> None:
        hook = convert(name, dotted)
        assert (hook.__module__, hook.__name__) == ("test_settings", "greet")

    def test_or_given_itself(self) -> None:
        assert convert("configure", greet) is greet
        assert convert("reset", greet) is greet

    def test_or_none(self) -> None:
        assert convert("configure", "none") is None
        assert convert("reset", "") is None

    def test_discard_is_a_reset(self) -> None:
        assert convert("reset", "discard") == "discard"

    @pytest.mark.parametrize(
        "dotted",
        ["nowhere", "no.such:thing", "zpgpool:no_such", "zpgpool:", ":greet", "os path:x", ".os:getcwd", "..x"],
    )
    def test_a_name_that_cannot_be_imported_is_refused(self, dotted: str) -> None:
        message = refuse("configure", dotted)
        assert message.startswith("option 'configure': expected a dotted name that can be imported (")
        assert message.endswith(f", or none, got {dotted!r}")
        assert "\n" not in message

    @pytest.mark.parametrize("value", [5, "test_settings:PROMISED", ["greet"]])
    def test_what_cannot_be_called_is_refused(self, value: object) -> None:
        assert "expected a callable, or its dotted name, or none, got" in refuse("check", value)

    def test_a_strange_reset_is_told_of_discard(self) -> None:
        assert (
            refuse("reset", 5)
            == "option 'reset': expected 'discard', or a callable, or its dotted name, or none, got 5"
        )


class TestSizes:
    @pytest.mark.parametrize(("minconn", "maxconn"), [(0, 0), (3, 2)])
    def test_limits_that_no_pool_can_keep_are_refused(self, minconn: int, maxconn: int) -> None:
        message = f"maxconn must be 1 or more, and minconn not above it: got {minconn} and {maxconn}"
        with pytest.raises(SettingError, match=message):
            PoolSettings(minconn=minconn, maxconn=maxconn)
        with pytest.raises(SettingError, match=message):
            read_options({"minconn": str(minconn), "maxconn": str(maxconn)})

    def test_a_SettingError_is_a_ValueError(self) -> None:
        with pytest.raises(ValueError, match="maxconn"):
            PoolSettings(minconn=0, maxconn=0)


class TestEnvironment:
    def test_ENV_reads_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_DSN", "host=somewhere")
        assert read_environment("ENV:SOME_DSN") == "host=somewhere"
        assert read_environment("ENV: SOME_DSN ") == "host=somewhere"

    @pytest.mark.parametrize("value", ["", None])
    def test_a_variable_that_is_missing_or_empty_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, value: str | None
    ) -> None:
        monkeypatch.delenv("SOME_DSN", raising=False)
        if value is not None:
            monkeypatch.setenv("SOME_DSN", value)
        with pytest.raises(SettingError, match="option 'dsn': the environment has no variable 'SOME_DSN'"):
            read_environment("ENV:SOME_DSN")

    @pytest.mark.parametrize("dsn", ["host=x", "", None, 5, "postgresql://host/db"])
    def test_everything_else_stays_as_it_is(self, dsn: object) -> None:
        assert read_environment(dsn) is dsn

    def test_a_pool_reads_it_positional_and_by_keyword(self, monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
        monkeypatch.setenv("SOME_DSN", dsn)
        for pool in (
            zpgpool.ThreadedConnectionPool(0, 1, "ENV:SOME_DSN"),
            zpgpool.ThreadedConnectionPool(0, 1, dsn="ENV:SOME_DSN"),
        ):
            with pool, pool.connection() as conn:
                assert run(conn, "SELECT 1") == 1


class TestConnectionStrings:
    @pytest.mark.parametrize("dsn", ["host=x dbname=y", "postgresql://u@h/db?connect_timeout=3", "service=app", ""])
    def test_what_libpq_can_read_passes(self, dsn: str) -> None:
        check_dsn(dsn)

    @pytest.mark.parametrize("dsn", ["hunter2", "pasword=hunter2", "postgresql://[hunter2", 5, None])
    def test_the_rest_is_refused_and_none_of_it_shown(self, dsn: Any) -> None:
        with pytest.raises(SettingError) as caught:
            check_dsn(dsn)
        assert str(caught.value) == "option 'dsn': libpq cannot read this connection string"

    @pytest.mark.parametrize("name", ["host", "application_name", "connect_timeout", "sslmode", "database", "service"])
    def test_libpqs_keywords_are_known(self, name: str) -> None:
        assert is_libpq_keyword(name)

    @pytest.mark.parametrize("name", ["hots", "", "a b", "dsn", "async", "async_", "minconn"])
    def test_others_are_not(self, name: str) -> None:
        assert not is_libpq_keyword(name)


class TestKeywords:
    def test_are_sorted_into_the_pools_and_psycopg2s(self) -> None:
        keywords = {"idle_timeout": 5, "host": "x", "cursor_factory": None, "dsn": "port=1"}
        options, connect = sort_keywords((), keywords)
        assert options == {"idle_timeout": 5}
        assert connect == {"host": "x", "cursor_factory": None, "dsn": "port=1"}

    def test_by_place_they_are_psycopg2s(self) -> None:
        assert sort_keywords(("port=1", None), {"host": "x"})[1] == {
            "dsn": "port=1",
            "connection_factory": None,
            "host": "x",
        }

    @pytest.mark.parametrize("dsn", ["postgresql://app:hunter2/@db:port", "host=x hunter2", "passwort=hunter2", 5])
    def test_a_connection_string_that_libpq_cannot_read_is_not_shown(self, dsn: Any) -> None:
        with pytest.raises(SettingError) as caught:
            sort_keywords((dsn,), {})
        assert str(caught.value) == "option 'dsn': libpq cannot read this connection string"
        assert caught.value.__cause__ is None

    @pytest.mark.parametrize(("args", "keywords"), [(("port=1",), {"dsn": "port=2"}), (("", None, None, 4), {})])
    def test_twice_or_too_many_are_refused(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match="by place, and each once"):
            sort_keywords(args, keywords)

    def test_an_unknown_one_is_refused_with_the_nearest_and_all_that_are_known(self) -> None:
        with pytest.raises(SettingError) as caught:
            sort_keywords((), {"max_con": 5, "password": "hunter2"})
        message = str(caught.value)
        assert message.startswith("unknown option 'max_con', did you mean 'maxconn'? (known: autocommit, check, ")
        assert message.endswith("and libpq's connection keywords)")
        for name in (*TABLE, "dsn", "open", "connection_factory"):
            assert f" {name}," in message.replace("(known:", ",")
        assert "hunter2" not in message

    def test_the_first_of_several_is_named_without_a_guess_where_nothing_is_near(self) -> None:
        with pytest.raises(SettingError, match=r"^unknown option 'aaaaaaaa' \(known: "):
            sort_keywords((), {"zzzzzzzz": 5, "aaaaaaaa": 6})

    @pytest.mark.parametrize("make", [zpgpool.SimpleConnectionPool, zpgpool.PersistentConnectionPool])
    def test_a_bad_value_is_refused_by_the_constructor(self, make: Callable[..., Any]) -> None:
        with pytest.raises(SettingError, match="option 'timeout': expected a number, 0 or more, got 'soon'"):
            make(0, 1, timeout="soon")

    def test_a_value_that_libpq_refuses_is_the_connects_to_tell(self) -> None:
        with pytest.raises(psycopg2.OperationalError):
            zpgpool.SimpleConnectionPool(1, 1, port="none")


class TestOptionsOfAFile:
    def test_are_converted_by_the_table(self) -> None:
        made, libpq = read_options({"maxconn": "3", "max_lifetime": "none", "readonly": "on", "host": "x"})
        assert (made["maxconn"], made["max_lifetime"], made["readonly"]) == (3, None, True)
        assert libpq == {"host": "x"}

    def test_the_front_ends_own_are_left_out_but_named_among_the_known(self) -> None:
        made, libpq = read_options({"own": "x"}, ["own"])
        assert "own" not in made
        assert libpq == {}
        with pytest.raises(SettingError, match="unknown option 'onw', did you mean 'own'"):
            read_options({"onw": "x"}, ["own"])

    @pytest.mark.parametrize("name", ["connection_factory", "cursor_factory", "open"])
    def test_what_only_python_can_give_is_unknown(self, name: str) -> None:
        with pytest.raises(SettingError, match=f"unknown option '{name}'"):
            read_options({name: "x"})

    def test_the_dsn_is_read_from_the_environment_and_judged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_DSN", "host=x")
        assert read_options({"dsn": "ENV:SOME_DSN"})[1] == {"dsn": "host=x"}
        monkeypatch.setenv("SOME_DSN", "hunter2")
        with pytest.raises(SettingError, match=r"^option 'dsn': libpq cannot read this connection string$"):
            read_options({"dsn": "ENV:SOME_DSN"})


SCRUBBED = 'at "***" "***", port 5432 failed: FATAL: password authentication failed for user "***"'


@pytest.mark.parametrize(
    ("keywords", "message", "shown"),
    [
        (
            {"dsn": "host=db1,db2 user=app password=hunter2"},
            'at "db1" (10.0.0.1), port 5432 failed: FATAL: password authentication failed for user "app"',
            SCRUBBED,
        ),
        (
            {"dsn": "postgresql://app:hunter2@db/shop"},
            "no app may enter shop at db, hunter2",
            "no *** may enter *** at ***, ***",
        ),
        (
            {"host": "db", "connection_factory": object, "password": None},
            "db is away, debug it",
            "*** is away, debug it",
        ),
        ({"user": "a", "password": "p.s"}, "a cat, not p.s; pxs", "*** cat, not ***; pxs"),
        ({"dsn": "nonsense hunter2"}, 'missing "=" after "hunter2"', 'missing "***" after "***"'),
        ({}, "FATAL: role »app«, Rolle „app“, rôle «app»", 'FATAL: role "***", Rolle "***", rôle "***"'),
        ({"dsn": 5}, "what is this?", "what is this?"),
    ],
)
def test_a_message_without_what_the_connection_string_says(keywords: dict[str, Any], message: str, shown: str) -> None:
    assert scrub(message, keywords) == shown


def test_two_phases_of_what_has_none_are_refused() -> None:
    with pytest.raises(SettingError, match="'twophase' cannot be kept with option 'autocommit'"):
        PoolSettings(minconn=0, maxconn=1, twophase=True, autocommit=True)
