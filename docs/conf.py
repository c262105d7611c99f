"""Sphinx's configuration, and two things that it cannot know: our table of settings, and how our docstrings list."""

import re
from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from zpgpool.settings import TABLE


project = "zpgpool"
author = copyright = "The zpgpool developers"
version = release = version_of("zpgpool")

extensions = ["sphinx.ext.autodoc", "repoze.sphinx.autointerface"]
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_type_aliases = {"IConnectionPool": "zpgpool.interfaces.IConnectionPool"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"zpgpool {version}"


class SettingsTable(SphinxDirective):
    """`settings-table`: what `zpgpool.settings` knows of each setting."""

    def run(self) -> list[nodes.Node]:
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 18 14 12 12 44", ""]
        lines += _row("setting", "unit", "in Python", "in files", "meaning")
        for name, field in TABLE.items():
            row = field.metadata
            lines += _row(f"``{name}``", row["unit"], _shown(field.default), _shown(row["in_files"]), row["help"])
        return self.parse_text_to_nodes("\n".join(lines))


def _row(first: str, *others: str) -> list[str]:
    return [f"   * - {first}", *(f"     - {other}" for other in others)]


def _shown(default: object) -> str:
    if default is ...:
        return "(required)"
    if default is None:
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default) or "(empty)"


def list_arguments(app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Make a definition list of `argument -- meaning`, as docstrings have it."""
    lines[:] = "\n".join(re.sub(r"^(\S.*?) -- (.*)$", r"``\1``\n    \2", line) for line in lines).split("\n")


def setup(app: Sphinx) -> None:
    """Add the above."""
    app.add_directive("settings-table", SettingsTable)
    app.connect("autodoc-process-docstring", list_arguments)
