"""How the project is worked on: changes, releases, checks before a commit, CI, reports. What the pages say is done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import zpgpool
from conftest import missing
from conftest import ROOT
from test_docs import commands
from test_docs import read_blocks


BIN = Path(sys.executable).parent

PYPROJECT = (ROOT / "pyproject.toml").read_text()

#: Where git finds nobody's settings, and twine nobody's password.
ENVIRON = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    **{f"GIT_{who}_{what}": "x@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    "NO_PROXY": "127.0.0.1",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


@pytest.fixture(autouse=True)
def in_a_clone() -> None:
    if not (ROOT / ".git").exists():
        missing("a clone", "git clone")


def need(*tools: str) -> None:
    for tool in tools:
        if not (BIN / tool).exists():
            missing(tool, "pip install 'zpgpool[dist,lint]'")


def run(folder: Path, *command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **ENVIRON, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def done(folder: Path, *command: str | Path, **environ: str) -> str:
    result = run(folder, *command, **environ)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of what is here, committed or not, with an `origin` to push to, and with this Python as its .venv."""
    source, clone = tmp_path / "source", tmp_path / "clone"
    for name in done(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    done(source, "git", "init", "--quiet", "--initial-branch", "main")
    done(source, "git", "add", "--all")
    done(source, "git", "commit", "--quiet", "--message", "All")
    done(tmp_path, "git", "clone", "--quiet", "--bare", source, "origin")
    done(tmp_path, "git", "clone", "--quiet", "origin", clone)
    (clone / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (clone / ".venv" / path.name).symlink_to(path)
    return clone


# Changes -------------------------------------------------------------------------------------------------------------

TYPES = ["breaking", "deprecation", "feature", "fix"]


def test_the_types_of_changes_are_those_that_contributors_are_told() -> None:
    assert re.findall(r'directory = "(\w+)", name', PYPROJECT) == TYPES
    text = (ROOT / "CONTRIBUTING.rst").read_text()
    assert re.findall(r"^``(\w+)`` +what", text, re.MULTILINE) == TYPES


@pytest.mark.slow  # as all that needs more than `make test` installs
def test_fragments_are_written_as_they_will_be_read(clone: Path) -> None:
    need("towncrier")
    for path in (clone / "changes").glob("*.*.rst"):
        path.unlink()
    for number, each in enumerate(reversed(TYPES), 5):
        (clone / f"changes/{number}.{each}.rst").write_text(f"Tell of a {each},\nin two lines.\n")
    (clone / "changes/+word.fix.rst").write_text("Tell of one without a number.\n")
    shown = done(clone, "towncrier", "build", "--draft", "--version", "9.8", "--date", "2030-01-31")
    expected = "9.8 (2030-01-31)\n----------------\n"
    for number, each in zip((8, 7, 6, 5), TYPES, strict=True):
        link = f"`#{number} <{source()}/issues/{number}>`__"
        expected += f"\n- Tell of a {each},\n  in two lines. ({link})\n"
    assert shown[shown.index("9.8 (") :].strip() == expected + "\n- Tell of one without a number."


@pytest.mark.slow
def test_the_fragments_that_are_there_are_some(clone: Path) -> None:
    need("towncrier")
    done(clone, "towncrier", "build", "--draft", "--version", "9.8")
    (clone / "changes/5.wish.rst").write_text("Tell of something else.\n")
    assert "5.wish.rst" in run(clone, "towncrier", "build", "--draft", "--version", "9.8").stdout


# Releases ------------------------------------------------------------------------------------------------------------


class Index(ThreadingHTTPServer):
    """A package index: takes what twine sends, and has a simple page for pip."""

    daemon_threads = True
    token = "a-token"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}


class IndexHandler(BaseHTTPRequestHandler):
    server: Index

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        user = b64encode(f"__token__:{self.server.token}".encode()).decode()
        if self.headers["Authorization"] != f"Basic {user}":
            return self._answer(403)
        fields: dict[str, bytes] = {}
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        for part in body.split(boundary)[1:-1]:
            head, _, value = part.removesuffix(b"\r\n").partition(b"\r\n\r\n")
            [name] = re.findall(rb'[ ;]name="([^"]*)"', head)
            fields[name.decode()] = value
            if found := re.search(rb'filename="([^"]*)"', head):
                fields["filename"] = found[1]
        assert sha256(fields["content"]).hexdigest() == fields["sha256_digest"].decode()
        name = fields["filename"].decode()
        if name in self.server.files:
            return self._answer(409)
        self.server.files[name] = fields["content"]
        return self._answer(200)

    def do_GET(self) -> None:
        files = self.server.files
        name = self.path.rpartition("/")[2]
        if self.path == "/zpgpool/":
            links = [f'<a href="{name}#sha256={sha256(files[name]).hexdigest()}">{name}</a>' for name in files]
            return self._answer(200, "\n".join(links).encode(), "text/html")
        return self._answer(200, files[name]) if name in files else self._answer(404)

    def _answer(self, status: int, body: bytes = b"", kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_release_as_the_page_has_it(clone: Path, index: Index) -> None:
    need("towncrier", "twine", "check-manifest")
    blocks = read_blocks(ROOT / "RELEASING.rst")
    script = "\n".join(command for block in blocks for command, _ in commands(block.text))
    # There is nothing to install: a change of pyproject.toml would have it installed again.
    (stamp := clone / ".venv/dist.stamp").touch()
    os.utime(stamp, (2**32, 2**32))
    # Its own index only, whatever pip is told otherwise on this machine.
    pip = f"PIP_CONFIG_FILE={os.devnull} PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= PIP_NO_INDEX= pip download"
    script, count = re.subn(r"\bpip download", f"{pip} --index-url {index.url}", script)
    assert count == 1
    fragment = clone / "changes/12.fix.rst"
    fragment.write_text("Count to twelve.\n")
    done(clone, "git", "add", ".")
    done(clone, "git", "commit", "--message", "Count to twelve")
    written = (clone / "CHANGES.rst").read_text()

    twine = {"TWINE_REPOSITORY_URL": index.url + "/", "TWINE_USERNAME": "__token__", "TWINE_PASSWORD": index.token}
    done(clone, "bash", "-euxc", script, **twine, TWINE_NON_INTERACTIVE="1")

    [version] = re.findall(r"\bversion=(\S+)", script)
    [following] = re.findall(r"\bnext=(\S+)", script)
    assert set(index.files) == {f"zpgpool-{version}-py3-none-any.whl", f"zpgpool-{version}.tar.gz"}
    with zipfile.ZipFile(clone / f"dist/zpgpool-{version}-py3-none-any.whl") as wheel:
        metadata = wheel.read(f"zpgpool-{version}.dist-info/METADATA").decode()
    assert f"\nVersion: {version}\n" in metadata
    assert "- Count to twelve. (`#12 <" in metadata

    origin = clone.parent / "origin"
    assert done(origin, "git", "cat-file", "-t", version) == "tag\n"
    assert f'\nversion = "{version}"\n' in done(origin, "git", "show", f"{version}:pyproject.toml")
    assert f'\nversion = "{following}"\n' in done(origin, "git", "show", "main:pyproject.toml")
    assert not fragment.exists()
    assert done(clone, "git", "status", "--porcelain") == ""

    changes = done(origin, "git", "show", f"{version}:CHANGES.rst")
    headings = re.findall(r"^(\S.*)\n---+$", changes, re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", headings[0])
    assert not [each for each in headings if "unreleased" in each]
    # All that was there still is, in its order, below what is new.
    for heading in re.findall(r"^.*unreleased.*\n-+\n\n", written, re.MULTILINE):
        written = written.replace(heading, "")
    assert changes.endswith(written.partition("towncrier puts here.\n")[2].strip() + "\n")

    again = run(clone, "twine", "upload", "--disable-progress-bar", *clone.glob("dist/*"), **twine)
    assert again.returncode, "what is published can be replaced"


# Before a commit -----------------------------------------------------------------------------------------------------


def test_the_hooks_are_what_make_lint_runs() -> None:
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    assert hooks == re.findall(r"\$\(BIN\)/(.+)", recipe[1])


@pytest.mark.slow
def test_git_refuses_a_commit_that_make_lint_would(clone: Path) -> None:
    need("pre-commit", "ruff", "codespell", "mypy")
    own = {"PRE_COMMIT_HOME": str(clone.parent / "pre-commit")}
    assert done(clone, ".venv/bin/pre-commit", "validate-config") == ""
    done(clone, ".venv/bin/pre-commit", "install", **own)
    path = clone / "tests/test_new.py"
    path.write_text('"""New."""\n\nimport os\n\n\nNUMBER:int = ""\n')
    done(clone, "git", "add", path)
    refused = run(clone, "git", "commit", "--message", "Add", **own)
    assert refused.returncode
    assert re.findall(r"^([\w ]+)\.\.\..*(Passed|Failed)", refused.stdout, re.MULTILINE) == [
        ("ruff check", "Failed"),
        ("ruff format", "Failed"),
        ("codespell", "Passed"),
        ("mypy", "Failed"),
    ], refused.stdout
    assert "F401" in refused.stdout
    assert "tests/test_new.py:6: error: Incompatible types" in refused.stdout
    path.write_text('"""New."""\n\nNUMBER: int = 1\n')
    done(clone, "git", "add", path)
    accepted = run(clone, "git", "commit", "--message", "Add", **own)
    # Other versions of the tools may have a word on other files; that is for `make lint`.
    assert "mypy..." in accepted.stdout
    assert "test_new.py" not in accepted.stdout.partition("[main ")[0]


# On GitHub -----------------------------------------------------------------------------------------------------------

WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text() if (ROOT / ".github").exists() else ""


def source() -> str:
    [url] = re.findall(r'^Source = "(.+)"', PYPROJECT, re.MULTILINE)
    return str(url)


def test_ci_runs_on_each_python_that_the_package_names() -> None:
    [listed] = re.findall(r"python: \[(.+)\]", WORKFLOW)
    pythons = re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', PYPROJECT)
    assert len(pythons) > 3
    assert re.findall(r'"(.+?)"', listed) == pythons
    [oldest] = re.findall(r'requires-python = ">=(.+)"', PYPROJECT)
    assert oldest == pythons[0]
    [names] = re.findall(r"^env_list = (.+)", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    assert re.findall(r"\bpy(\d)(\d+)", names) == [tuple(each.split(".")) for each in pythons]


@pytest.mark.slow
def test_what_github_reads_can_be_read() -> None:
    need("pre-commit")  # which brings PyYAML
    yaml: Any = import_module("yaml")
    workflow = yaml.safe_load(WORKFLOW)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML's `on`
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if ".ci/run" in step.get("run", "")] == ["PYTHON=python .ci/run"]
    config = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())
    assert config["contact_links"][0]["url"] in (ROOT / "SECURITY.rst").read_text()
    templates = list((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) == 2
    for path in templates:
        assert set(yaml.safe_load(path.read_text().split("---\n")[1])) == {"name", "about"}


PAGES = ["SECURITY.rst", "RELEASING.rst", "CONTRIBUTING.rst", "pyproject.toml", "docs/stable.rst", "docs/security.rst"]


def test_all_name_the_same_repository_and_files_that_are_there() -> None:
    paths = [ROOT / name for name in PAGES] + [path for path in (ROOT / ".github").rglob("*.*") if path.is_file()]
    for path in paths:
        text = path.read_text()
        assert {*re.findall(r"https://github\.com/[\w-]+/[\w-]+", text)} <= {source()}, path
        for name in re.findall(r"\bdocs/\w+\.rst|(?<![.\w])[A-Z]+\.rst|(?:src/zpgpool|tests)/\w+\.py", text):
            assert (ROOT / name).exists(), f"{path}: {name}"


# What is stable ------------------------------------------------------------------------------------------------------


def test_each_module_is_public_or_not() -> None:
    public, _, rest = (ROOT / "docs/stable.rst").read_text().partition("\nNot public\n")
    folder = Path(zpgpool.__file__).parent
    modules = {path.stem for path in folder.glob("[!_]*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    named = [set(re.findall(r"``zpgpool\.([a-z]+)``", text)) for text in (public, rest)]
    assert named[0] | named[1] == modules
    assert named[0] & named[1] == set()


def test_what_is_public_is_there() -> None:
    text = (ROOT / "docs/stable.rst").read_text()
    rows = re.findall(r"^``(zpgpool[.\w]*)`` +(.+(?:\n {38}.+)*)", text, re.MULTILINE)
    assert len(rows) > 10
    for module, names in rows:
        for name in re.findall(r"``([A-Za-z_]\w*)(?:\(\))?``", names):
            if name not in ("ValueError", "settings", "observe", "scrub", "manage_addProduct", "zpgpool"):
                assert hasattr(import_module(module), name), f"{module}.{name}"
    for name in ("observe", "scrub"):
        assert name in zpgpool.interfaces.IPoolInternals
