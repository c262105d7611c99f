"""A floor imports from below only: each module, alone in a fresh process, leaves out what it must not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import zpgpool


SOURCE = Path(zpgpool.__file__).parent

#: Floors of docs/design.rst, the lowest first; a module may import from lower floors, and from those before it.
FLOORS = [
    ["errors", "interfaces", "settings"],
    [
        "events",
        "handoff",
        "caller",
        "session",
        "entry",
        "outage",
        "herald",
        "stock",
        "watchdog",
        "base",
        "pool",
        "keeper",
        "registry",
    ],
    [
        *["aside", "lag", "history", "snapshot", "page", "metrics", "status"],
        *["lease", "readers", "wsgi", "paste", "datamanager", "recover", "zcml", "pyramid", "zsql"],
    ],
    ["demo", "check", "top", "__main__"],
]

ORDER = [name for floor in FLOORS for name in floor]

#: What stays out of a module's process, with all that it imports.
OUTSIDE = {
    "errors": ["zope", "webob", "zpgpool.pool"],
    "interfaces": ["psycopg2", "webob", "zope.component", "threading"],
    "settings": ["zope", "webob"],
    "handoff": ["psycopg2", "zope", "webob", "logging"],
    "keeper": ["psycopg2", "zope", "webob"],
    "pool": ["webob", "zope.component", "zpgpool.keeper", "zpgpool.wsgi", "zpgpool.registry"],
    "registry": ["webob", "zpgpool.wsgi"],
    "history": ["webob", "zope.component", "zpgpool.wsgi", "zpgpool.registry"],
    "snapshot": ["webob", "zpgpool.wsgi"],
    "metrics": ["webob", "prometheus_client", "opentelemetry", "zpgpool.status"],
    "status": ["paste", "opentelemetry", "prometheus_client", "rich", "zpgpool.wsgi"],
    "wsgi": ["paste", "zpgpool.demo", "zpgpool.status", "waitress"],
    "datamanager": ["paste", "pyramid", "ZODB", "zope.configuration", "zpgpool.paste", "zpgpool.demo"],
    "zcml": ["webob", "pyramid", "transaction", "zope.security", "zpgpool.wsgi"],
    "check": ["webob", "zope.component", "zpgpool.base", "rich"],
    "top": ["rich", "waitress", "prometheus_client"],
    "pyramid": ["paste", "ZODB", "zope.configuration", "zpgpool.zcml", "zpgpool.demo"],
}

SCRIPT = """
import sys, types
package = types.ModuleType("zpgpool")  # without the front door, which imports the floors itself
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


def test_every_module_has_a_floor() -> None:
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert modules - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", [name for name in ORDER if (SOURCE / f"{name}.py").exists()])
def test_a_module_imports_from_below_only(module: str) -> None:
    import ast

    tree = ast.parse((SOURCE / f"{module}.py").read_text())
    is_hint = {
        node
        for check in ast.walk(tree)
        if isinstance(check, ast.If) and getattr(check.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(check)
    }
    imported = {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node not in is_hint
    }
    assert not [each for each in imported if ORDER.index(each) >= ORDER.index(module)]
