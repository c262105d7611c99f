"""The wheel, installed into an empty environment: it works without extras, and what needs one says which."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT
from test_types import CHECKERS


pytestmark = pytest.mark.slow  # they install

USE = """
import sys
import zpgpool
from zpgpool.wsgi import PoolMiddleware, get_connection

def app(environ, start_response):
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT 41 + 1")
        return [str(cursor.fetchone()[0]).encode()]

pool = zpgpool.PersistentConnectionPool(0, 2, sys.argv[1], idle_timeout=60)
print(PoolMiddleware(app, pool)({"REQUEST_METHOD": "GET"}, None)[0].decode())
pool.close()
"""


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, timeout=1800)


def present() -> list[Path]:
    """Return the supported Pythons of this machine, the oldest first: on the path, or installed beside this one."""
    found: dict[int, Path] = {}
    for minor in range(14, 9, -1):
        beside = sorted(Path(sys.base_prefix).parent.glob(f"*/bin/python3.{minor}"))
        for path in [shutil.which(f"python3.{minor}"), *beside]:
            if path is not None and run(path, "-c", "import venv, ensurepip").returncode == 0:
                found.setdefault(minor, Path(path))
    return [found[minor] for minor in sorted(found)]


def install(base: Path, wheel: Path, folder: Path) -> Path:
    """Return an interpreter that has the wheel, and what it requires: without a compiler."""
    result = run(base, "-m", "venv", folder)
    assert result.returncode == 0, result.stderr
    python = folder / "bin" / "python"
    result = run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", wheel
    )
    assert result.returncode == 0, result.stderr
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(Path(sys.executable), wheel, tmp_path_factory.mktemp("empty") / "environment")


def test_the_wheel_has_all_that_the_package_has(wheel: Path) -> None:
    package = ROOT / "src" / "zpgpool"
    files = {
        str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_it_works_without_extras(python: Path, tmp_path: Path, dsn: str) -> None:
    result = run(python, "-c", USE, dsn, folder=tmp_path)
    assert result.stdout == "42\n", result.stderr


@pytest.mark.parametrize(("which", "number"), [("oldest", 0), ("newest", -1)])
def test_it_works_on_the_oldest_and_the_newest_python(
    which: str, number: int, wheel: Path, tmp_path: Path, dsn: str
) -> None:
    result = run(install(present()[number], wheel, tmp_path / "environment"), "-c", USE, dsn, folder=tmp_path)
    assert result.stdout == "42\n", result.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("datamanager", "transaction"),
        ("recover", "transaction"),
        ("zcml", "zcml"),
        ("pyramid", "transaction"),
        ("flask", "flask"),
        ("sqlalchemy", "sqlalchemy"),
        ("django.base", "django"),
        ("django.middleware", "django"),
        ("zsql", "transaction"),
    ],
)
def test_what_needs_an_extra_names_it(python: Path, tmp_path: Path, module: str, extra: str) -> None:
    result = run(python, "-c", f"import zpgpool.{module}", folder=tmp_path)
    assert f"zpgpool[{extra}]" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "extra"), [(["demo"], "demo"), (["recover", "dbname=x"], "transaction"), (["top", "http://x"], "cli")]
)
def test_a_command_that_needs_an_extra_names_it(python: Path, tmp_path: Path, args: list[str], extra: str) -> None:
    result = run(python.parent / "zpgpool", *args, folder=tmp_path)
    assert result.returncode == 1
    assert f"zpgpool[{extra}]" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


PROGRAM = """
from __future__ import annotations
from typing import TYPE_CHECKING

import zpgpool
from zpgpool.wsgi import PoolMiddleware, get_connection

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    with get_connection(environ).cursor() as cursor:
        cursor.execute("SELECT 1")
    start_response("200 OK", [])
    return []


pool = zpgpool.PersistentConnectionPool(0, 4, "dbname=x", timeout=5)
with pool.connection() as conn:
    with conn.cursor() as cursor:
        cursor.execute("SELECT 1")
waiting: int = pool.get_stats()["requests_waiting"]
zpgpool.register_pool(pool, "main")
with zpgpool.get_pool("main").connection() as conn:
    conn.commit()
keyed = zpgpool.ThreadedConnectionPool(1, 2, "dbname=x", idle_timeout=None)
conn = keyed.getconn("a")
keyed.putconn(conn, "a", close=True)
site = PoolMiddleware(app, pool, eager=True)
maybe = zpgpool.query_pool("other")
if maybe is not None:
    maybe.closeall()
pool.getconn("a")  # a persistent pool has no keys
"""

WRONG = f"program.py:{PROGRAM.count(chr(10))}"


@pytest.mark.parametrize("checker", CHECKERS)
def test_types_for_users(python: Path, tmp_path: Path, checker: str) -> None:
    """A program of a user's, as strictly as can be, without zope's plugin: its only mistake is found."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    result = run(sys.executable, "-m", *CHECKERS[checker], python, "program.py", folder=tmp_path)
    errors = [line for line in result.stdout.splitlines() if "error" in line and "program.py:" in line]
    assert [line for line in errors if WRONG not in line] == [], result.stdout + result.stderr
    assert len(errors) == 1, result.stdout + result.stderr
