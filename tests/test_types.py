"""A program of each front end, as its user writes it, under the strictest type checkers: its one mistake is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow  # the checkers read the frameworks, too

PROGRAMS = {
    "flask": """
from __future__ import annotations

import flask
from zpgpool.flask import get_connection, init_app

app = flask.Flask(__name__)
app.config["ZPGPOOL"] = {"dsn": "dbname=x"}
init_app(app)


@app.get("/")
def index() -> str:
    with get_connection("reports").cursor() as cursor:
        cursor.execute("SELECT 1")
    return ""


init_app("app")  # WRONG: an application is wanted
""",
    "pyramid": """
from __future__ import annotations

from pyramid.request import Request  # type: ignore[import-untyped] # pyright: ignore[reportMissingTypeStubs]
from zpgpool.pyramid import get_connection


def view(request: Request) -> dict[str, int]:
    with get_connection(request, "reports").cursor() as cursor:
        cursor.execute("SELECT 1")
    get_connection(request, 1)  # WRONG: a name is text
    return {}
""",
    "sqlalchemy": """
from __future__ import annotations

import zpgpool
from sqlalchemy import create_engine, text
from zpgpool.sqlalchemy import pool_class

pool = zpgpool.ThreadedConnectionPool(0, 4, "dbname=x")
engine = create_engine("postgresql+psycopg2://", poolclass=pool_class(pool))
with create_engine("postgresql+psycopg2://", poolclass=pool_class("main")).connect() as conn:
    conn.execute(text("SELECT 1"))
pool_class(1)  # WRONG: a pool, or the name of one
""",
    "django": """
from __future__ import annotations

from zpgpool.django import Unavailable
from zpgpool.django.base import DatabaseWrapper
from zpgpool.django.middleware import UnavailableMiddleware

error = Unavailable("no connection")
middleware = UnavailableMiddleware
pool = DatabaseWrapper({}).pool
size: int = pool.maxconn if pool is not None else 0
wrong: int = DatabaseWrapper({}).pool  # WRONG: a pool is no number
""",
    "transaction": """
from __future__ import annotations

import zpgpool
from zpgpool.datamanager import get_connection
from zpgpool.metrics import PoolCollector, instrument
from zpgpool.paste import filter_app_factory
from zpgpool.status import StatusApp

with get_connection("main").cursor() as cursor:
    cursor.execute("SELECT 1")
collector = PoolCollector()
instrument()
factory = filter_app_factory
status = StatusApp(token="hunter2", share="/run/x")
total: int = zpgpool.get_pool().get_stats()["pool_size"]
StatusApp(tokn="hunter2")  # WRONG: no such option
""",
    "zcml": """
from __future__ import annotations

from zpgpool.zcml import close_pools
from zpgpool.zsql import Connection, Database

connection = Connection("db", pool_name="main", zdatetime=True)
database: Database = connection()
names = [table["table_name"] for table in database.tables()]
close_pools()
close_pools(1)  # WRONG: no argument
""",
}

CHECKERS = {
    "mypy": ["mypy", "--strict", f"--config-file={os.devnull}", "--python-executable"],
    "basedpyright": ["basedpyright", "--pythonpath"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_mistake_is_found_and_no_other(tmp_path: Path, checker: str) -> None:
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    wrong = {}
    for name, text in PROGRAMS.items():
        lines = text.strip().splitlines()
        (tmp_path / f"{name}_program.py").write_text("\n".join(lines) + "\n")
        [wrong[name]] = [number for number, line in enumerate(lines, 1) if "  # WRONG: " in line]
    files = [f"{name}_program.py" for name in PROGRAMS]
    command = [sys.executable, "-m", *CHECKERS[checker], sys.executable, *files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
    errors = {line.partition(" error")[0].rpartition("/")[2] for line in result.stdout.splitlines() if " error" in line}
    places = {":".join(error.split(" ")[0].split(":")[:2]) for error in errors if "_program.py:" in error}
    assert places == {f"{name}_program.py:{line}" for name, line in wrong.items()}, result.stdout + result.stderr
