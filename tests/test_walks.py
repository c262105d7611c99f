"""Three newcomers in an empty folder do what the documentation says, word by word: install, write, serve, look."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from test_docs import Block
from test_docs import BLOCKS
from test_docs import Desk
from zpgpool.demo.server import EmbeddedServer


#: The page, and the first block of the walk: from there on all is done.
WALKS = {
    "docs/tutorial.rst": "zpgpool[demo",
    "docs/pyramid.rst": "zpgpool[pyramid",
    "docs/zope-walk.rst": "zpgpool[zcml",
}

SOURCE = re.compile(r"zpgpool(\[[\w,]+\]) @ git\+https://\S+?(?='|$)")


pytestmark = pytest.mark.slow  # they install


class Walker(Desk):
    """Has nothing but a folder, a Python, and the address of a PostgreSQL."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        super().__init__(folder)
        self._wheel = wheel

    def do(self, block: Block) -> None:
        # The address of the project becomes the wheel of this checkout, and nothing else is changed.
        text = SOURCE.sub(rf"zpgpool\1 @ {self._wheel.as_uri()}", block.text)
        super().do(Block(block.path, block.line, block.language, text, block.marks))

    def do_python(self, block: Block, text: str) -> None:
        pass  # a file, which the server runs

    do_xml = do_ini = do_python

    def serve(self, command: str, expected: str = "...") -> None:
        for path in self.folder.glob("site/etc/zope.ini"):  # made by Zope, with its own default
            path.write_text(path.read_text().replace("port = 8080", f"port = {self.port}"))
        super().serve(command, expected)


@pytest.fixture
def walker(
    tmp_path: Path,
    wheel: Path,
    own_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Walker]:
    with closing(psycopg2.connect(own_server.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS notes, seen")
        conn.commit()
    for name in [name for name in os.environ if name.startswith(("PYTHON", "COVERAGE", "COV_", "XDG_", "ZPGPOOL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("APP_DSN", own_server.dsn)
    monkeypatch.setenv("COLUMNS", "200")
    walker = Walker(tmp_path, wheel)
    yield walker
    walker.stop()


@pytest.mark.parametrize("page", WALKS)
def test_a_newcomer_walks(page: str, walker: Any) -> None:
    blocks = BLOCKS[page]
    [first] = [
        number for number, block in enumerate(blocks) if WALKS[page] in block.text and "walk only" in block.marks
    ]
    for block in blocks[first:]:
        walker.do(block)
