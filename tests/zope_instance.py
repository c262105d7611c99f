"""A Zope instance, made by mkwsgiinstance and served by its own runwsgi."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import free_port

from books import get
from conftest import eventually


FILTER = """[filter:pgpool]
use = egg:zpgpool

[pipeline:main]"""

META = """<configure xmlns="http://namespaces.zope.org/zope">
  <include package="zpgpool" file="meta.zcml" />
</configure>
"""


class Instance:
    """A Zope instance, and its process."""

    #: A page that answers as soon as it is served.
    ready = "/"

    def __init__(self, path: Path, dsn: str, configure: str, overrides: str = "", **environ: str) -> None:
        self.path = path
        self.port = free_port()
        search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.environ = os.environ | {"BOOKS_DSN": dsn, "PYTHONPATH": search} | environ
        self.run("mkwsgiinstance", "-d", str(path), "-u", "admin:admin")
        self.edit("zope.ini", "[pipeline:main]", FILTER)
        self.edit("zope.ini", "\n    zope\n", "\n    pgpool\n    zope\n")
        self.edit("zope.ini", "port = 8080", f"port = {self.port}\nthreads = 8")
        includes = path / "etc" / "package-includes"
        includes.mkdir()
        (includes / "zpgpool-meta.zcml").write_text(META)
        (includes / "books-configure.zcml").write_text(configure)
        if overrides:
            (includes / "books-overrides.zcml").write_text(overrides)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text that is in one of the files of `etc` once."""
        path = self.path / "etc" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def _command(self, name: str, *args: str) -> list[str]:
        return [sys.executable, str(Path(sys.executable).parent / name), *args]

    def run(self, name: str, *args: str) -> str:
        """Run one of Zope's commands, and return what it prints."""
        result = subprocess.run(self._command(name, *args), env=self.environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def run_script(self, script: str) -> str:
        """Run a script as an administrator does, and return what it prints."""
        path = self.path / "script.py"
        path.write_text(script)
        return self.run("zconsole", "run", str(self.path / "etc" / "zope.conf"), str(path))

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command("runwsgi", str(self.path / "etc" / "zope.ini")),
            env=self.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._is_up, 60)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            return get(self.port, self.ready)[0] == 200
        except OSError:
            return False

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()

    def log(self) -> str:
        """Return Zope's event log."""
        path = self.path / "var" / "log" / "event.log"
        return path.read_text() if path.exists() else ""

    def books(self) -> Any:
        """Return what the page of that name tells."""
        status, body = get(self.port, "/books")
        assert status == 200
        return json.loads(body)

    def objects(self) -> list[str]:
        """Return the keys in the ZODB."""
        objects: list[str] = self.books()["objects"]
        return objects
