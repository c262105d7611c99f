"""The order of the folders: each imports from those below it only, and of another one only what that hands out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zpgpool


SOURCE = Path(zpgpool.__file__).parent

#: What is at the top, but imported by all: they import each other only.
LEAVES = ["errors", "interfaces", "dsn", "settings", "types", "events"]

#: The folders, and what each may import from besides itself and the leaves. Everything else at the top is a door.
FOLDERS = {"core": [], "request": ["core"], "monitor": ["core"], "": ["core", "request", "monitor"]}

#: The order within each folder: a module imports from those before it.
ORDER = {
    "": [
        *LEAVES,
        *[
            "registry",
            "transient",
            "onephase",
            "twophase",
            "datamanager",
            "wsgi",
            "metrics",
            "status",
            "paste",
            "zcml",
            "publisher",
            "pyramid",
            "flask",
            "sqlalchemy",
            "django",
            "zsql",
        ],
        *["recover", "check", "demo", "__main__"],
    ],
    "core": [
        *[
            "workers",
            "handoff",
            "session",
            "libpq",
            "readable",
            "entry",
            "hangup",
            "outage",
            "backoff",
            "lines",
            "owners",
            "notifier",
            "probe",
            "opener",
            "idle",
            "connections",
            "transactions",
        ],
        *["timer", "watchdog", "users", "management", "base", "persistent", "keyed", "lag"],
    ],
    "request": ["keys", "response", "shared", "lease", "kinds", "replica", "failures", "body", "disconnects"],
    "monitor": [
        *[
            "history",
            "snapshot",
            "counters",
            "folder",
            "past",
            "ask",
            "process",
            "site",
            "share",
            "page",
            "remote",
            "beside",
            "top",
        ],
    ],
}

#: A command imports its module whole, because other commands shall not.
OF_COMMANDS = {"monitor.top"}

MODULES = [
    *((folder, path.stem) for folder in FOLDERS for path in sorted((SOURCE / folder).glob("*.py"))),
    *(("", path.parent.name) for path in SOURCE.glob("[dz]*/__init__.py")),
]


def imports(folder: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield what a module imports of the package: (folder, module), a hint for type checkers left out."""
    path = SOURCE / folder / f"{name}.py"
    inner = not path.exists()  # a package of one door
    tree = ast.parse((SOURCE / name / "__init__.py" if inner else path).read_text())
    hints = {
        node
        for check in ast.walk(tree)
        if isinstance(check, ast.If) and getattr(check.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(check)
    }
    depth = bool(folder) + inner
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in hints:
            parts = (node.module or "").split(".")
            if node.level - 1 < depth and not inner:
                yield folder, parts[0]
            elif node.level - 1 == depth:
                where = parts[0] if parts[0] in FOLDERS else ""
                yield where, ".".join(parts[1:]) if where else parts[0]


def test_every_module_has_its_place() -> None:
    for folder in FOLDERS:
        there = {name for where, name in MODULES if where == folder} - {"__init__"}
        assert there == set(ORDER[folder])


@pytest.mark.parametrize(("folder", "name"), [each for each in MODULES if each[1] != "__init__"])
def test_a_module_imports_from_below_only(folder: str, name: str) -> None:
    for where, module in imports(folder, name):
        if where == folder:
            assert ORDER[folder].index(module) < ORDER[folder].index(name), module
        elif where == "":
            assert module in LEAVES, module
        else:
            assert where in FOLDERS[folder], where
            assert module == "" or f"{where}.{module}" in OF_COMMANDS, "not what the folder hands out"
    if folder == "" and name in LEAVES:
        assert {module for _, module in imports(folder, name)} <= set(LEAVES)


@pytest.mark.parametrize("folder", ["core", "request", "monitor"])
def test_a_folder_hands_out_what_it_lists(folder: str) -> None:
    module = getattr(zpgpool, folder, None) or __import__(f"zpgpool.{folder}", fromlist=["__all__"])
    assert sorted(module.__all__) == sorted(set(module.__all__))
    tree = ast.parse((SOURCE / folder / "__init__.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(module.__all__)


#: What stays out of a module's process, with all that it imports.
OUTSIDE = {
    "errors": ["zope", "webob", "zpgpool.core"],
    "interfaces": ["psycopg2", "webob", "zope.component", "threading"],
    "dsn": ["zope", "webob"],
    "settings": ["zope", "webob"],
    "core": ["webob", "zope.component", "zpgpool.wsgi", "zpgpool.registry", "zpgpool.request", "zpgpool.monitor"],
    "registry": ["webob", "zpgpool.wsgi", "zpgpool.request", "zpgpool.monitor"],
    "monitor": ["zpgpool.wsgi", "zpgpool.request", "zpgpool.status", "prometheus_client", "opentelemetry", "rich"],
    "metrics": ["prometheus_client", "opentelemetry", "zpgpool.status", "zpgpool.request"],
    "status": ["paste", "opentelemetry", "prometheus_client", "rich", "zpgpool.wsgi"],
    "wsgi": ["paste", "zpgpool.demo", "zpgpool.status", "zpgpool.monitor", "waitress", "transaction"],
    "datamanager": ["paste", "pyramid", "ZODB", "zope.configuration", "zpgpool.paste", "zpgpool.demo"],
    "zcml": ["webob", "pyramid", "transaction", "zope.security", "zpgpool.wsgi"],
    "check": ["webob", "zope.component", "zpgpool.core", "rich"],
    "monitor.top": ["rich", "waitress", "prometheus_client"],
    "flask": ["transaction", "pyramid", "ZODB", "zpgpool.datamanager", "zpgpool.paste", "zpgpool.demo"],
    "sqlalchemy": ["webob", "transaction", "flask", "zpgpool.request", "zpgpool.wsgi", "zpgpool.monitor"],
    "django": ["webob", "transaction", "sqlalchemy", "zpgpool.core", "zpgpool.wsgi"],
    "django.middleware": ["webob", "transaction", "sqlalchemy", "zpgpool.core", "zpgpool.wsgi"],
    "pyramid": ["paste", "ZODB", "zope.configuration", "zpgpool.zcml", "zpgpool.demo"],
}

SCRIPT = """
import sys, types
package = types.ModuleType("zpgpool")  # without the front door, which imports the folders itself
package.__path__ = [{path!r}]
sys.modules["zpgpool"] = package
before = set(sys.modules)
import zpgpool.{module}
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("module", OUTSIDE)
def test_a_module_does_not_know_what_it_must_not(module: str) -> None:
    script = SCRIPT.format(path=str(SOURCE), module=module)
    output = subprocess.run([sys.executable, "-S", "-c", f"import site; site.main()\n{script}"], capture_output=True)
    loaded = output.stdout.decode().split()
    assert output.returncode == 0, output.stderr.decode()
    known = [each for each in loaded for banned in OUTSIDE[module] if each == banned or each.startswith(banned + ".")]
    assert not known


def test_the_hand_over_knows_no_database() -> None:
    tree = ast.parse((SOURCE / "core" / "handoff.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= {
        "collections",
        "collections.abc",
        "contextlib",
        "queue",
        "threading",
        "time",
        "typing",
        "workers",
    }
