"""Sphinx's configuration, and what it cannot know: our settings, our modules, and how our docstrings list."""

import ast
import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import zpgpool
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


#: Of each setting an example, as a file has it, and the page that says more.
EXAMPLES = {
    "minconn": ("2", "howto/sizing"),
    "maxconn": ("8", "howto/sizing"),
    "idle_timeout": ("300", "howto/which"),
    "timeout": ("10", "howto/sizing"),
    "max_waiting": ("4", "howto/sizing"),
    "outage_wait": ("5", "howto/outages"),
    "max_lifetime": ("1800", "fleets"),
    "check": ("shop.db:check", "howto/outages"),
    "check_idle": ("none", "howto/outages"),
    "configure": ("shop.db:configure", "howto/request"),
    "reset": ("discard", "security"),
    "autocommit": ("safe", "howto/request"),
    "isolation_level": ("serializable", "transactions"),
    "readonly": ("true", "howto/readers"),
    "pooler": ("pgbouncer-transaction", "beyond"),
    "twophase": ("true", "transactions"),
    "verify_commit": ("true", "howto/outages"),
    "replica": ("standby", "howto/readers"),
    "primary_after_write": ("2", "howto/readers"),
    "max_lag": ("10", "howto/readers"),
    "prune_interval": ("10", "design"),
    "leak_after": ("60", "howto/exhausted"),
    "hold_limit": ("300", "howto/exhausted"),
    "name": ("main", "howto/request"),
}


class SettingsTable(SphinxDirective):
    """`settings-table`: what `zpgpool.settings` knows of each setting; the first column leads to `settings-list`."""

    def run(self) -> list[nodes.Node]:
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 22 14 14 50", ""]
        lines += _row("setting", "in Python", "in files", "meaning")
        for name, field in TABLE.items():
            row = field.metadata
            lines += _row(f":confval:`{name}`", _shown(field.default), _shown(row["in_files"]), row["help"])
        return self.parse_text_to_nodes("\n".join(lines))


class SettingsList(SphinxDirective):
    """`settings-list`: of each setting an anchor, what it takes, an example, and where to read more."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for name, field in TABLE.items():
            row = field.metadata
            example, page = EXAMPLES[name]
            defaults = f"{_shown(field.default)} in Python, {_shown(row['in_files'])} in files"
            lines += [f".. confval:: {name}", f"   :type: {row['unit']}", f"   :default: {defaults}", ""]
            meaning = f"{row['help'][0].upper()}{row['help'][1:]}"
            lines += [f"   {meaning}. For instance ``{name} = {example}``. See :doc:`{page}`.", ""]
        return self.parse_text_to_nodes("\n".join(lines))


class ModuleMap(SphinxDirective):
    """`module-map`: the folders, the highest first, and what each module of them says of itself."""

    FOLDERS = (("", "the doors"), ("monitor", ""), ("request", ""), ("core", ""))

    def run(self) -> list[nodes.Node]:
        lines = []
        for folder, title in self.FOLDERS:
            path = Path(zpgpool.__file__).parent / folder
            lines += [f"``zpgpool/{folder}`` {title or _summary(path / '__init__.py')}", ""]
            lines += ["   .. list-table::", "      :widths: 20 80", ""]
            modules = sorted([*path.glob("[!_]*.py"), *(path.glob("[dz]*/__init__.py") if not folder else ())])
            for module in modules:
                name = module.parent.name if module.name == "__init__.py" else module.stem
                lines += ["   " + line for line in _row(f"``{name}``", _summary(module))]
            lines.append("")
        return self.parse_text_to_nodes("\n".join(lines))


class MessageIndex(SphinxDirective):
    """`message-index`: each message of the pages in `messages/` by its first words, with a link to what to do."""

    def run(self) -> list[nodes.Node]:
        return [nodes.container(classes=["message-index"])]  # filled when all pages have been read


def collect_messages(app: Sphinx, document: nodes.document) -> None:
    """Give each message an anchor."""
    page = app.env.docname
    if page.startswith("messages/"):
        found = []
        for term in document.findall(nodes.term):
            for literal in term.findall(nodes.literal):
                anchor = f"m-{len(found)}"
                literal["ids"].append(anchor)
                found.append((literal.astext(), anchor))
        app.env.metadata[page]["messages"] = found


def list_messages(app: Sphinx, document: nodes.document, page: str) -> None:
    """Put the index in its place: in the order of the first words that are always the same."""
    for place in document.findall(lambda node: "message-index" in getattr(node, "attributes", {}).get("classes", ())):
        entries = [
            (re.sub(r"^\W+", "", text), text, f"{app.builder.get_relative_uri(page, each)}#{anchor}")
            for each, known in app.env.metadata.items()
            for text, anchor in known.get("messages", ())
        ]
        items = nodes.bullet_list()
        for _, text, address in sorted(entries, key=lambda entry: entry[0].lower()):
            link = nodes.reference("", "", nodes.literal("", text), refuri=address, internal=True)
            items += nodes.list_item("", nodes.paragraph("", "", link))
        place.replace_self(items)


def _summary(module: Path) -> str:
    """Return the first sentences of a module's docstring."""
    return " ".join((ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0].split())


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
    app.add_directive("message-index", MessageIndex)
    app.add_directive("module-map", ModuleMap)
    app.add_directive("settings-list", SettingsList)
    app.add_directive("settings-table", SettingsTable)
    app.connect("autodoc-process-docstring", list_arguments)
    app.connect("doctree-read", collect_messages)
    app.connect("doctree-resolved", list_messages)
