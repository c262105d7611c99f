"""`zpgpool recover`: what a crash left prepared is found, and resolved as ZODB says, or as its user does."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import transaction
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

import zpgpool
from conftest import eventually
from conftest import Outside
from zpgpool.__main__ import main
from zpgpool.datamanager import connection
from zpgpool.errors import CommandError
from zpgpool.recover import list_in_doubt
from zpgpool.recover import resolve
from zpgpool.twophase import FORMAT_ID


MakePool = Callable[..., Any]


@pytest.fixture(autouse=True)
def table(outside: Outside) -> Iterator[None]:
    outside.query("SET lock_timeout = '5s'")
    outside.query("DROP TABLE IF EXISTS twophase; CREATE TABLE twophase (id int PRIMARY KEY)")
    yield
    transaction.abort()
    for (gid,) in outside.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
        outside.query(f"ROLLBACK PREPARED '{gid}'")
    outside.query("DROP TABLE twophase")


def rows(outside: Outside) -> list[int]:
    return [number for (number,) in outside.query("SELECT id FROM twophase ORDER BY id")]


def prepare(outside: Outside, dsn: str, number: int, bqual: str = "", format_id: int = FORMAT_ID) -> str:
    """Leave a prepared transaction behind, as a process does that is killed; return its id on the command line."""
    conn = psycopg2.connect(dsn)
    bqual = bqual or f"main:{conn.info.backend_pid}:zodb"
    conn.tpc_begin(conn.xid(format_id, f"zpgpool:here:1:{number}", bqual))
    with conn.cursor() as cursor:
        cursor.execute("INSERT INTO twophase VALUES (%s)", [number])
    conn.tpc_prepare()
    pid = conn.info.backend_pid
    conn.close()
    eventually(lambda: pid not in outside.backends())
    return f"zpgpool:here:1:{number}/{bqual}"


class TestListing:
    def test_nothing(self, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recover", dsn]) == 0
        assert capsys.readouterr().out.startswith("Nothing is in doubt in database ")

    def test_it_resolves_nothing_by_itself(
        self, dsn: str, outside: Outside, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second = prepare(outside, dsn, 1), prepare(outside, dsn, 2)
        assert main(["recover", dsn]) == 0
        out = capsys.readouterr().out
        assert out.index(first) < out.index(second)
        assert "its session has ended" in out
        assert "ago, by " in out
        assert main(["recover", dsn]) == 0
        assert rows(outside) == []

    def test_foreign_ones_are_not_shown(self, dsn: str, outside: Outside, capsys: pytest.CaptureFixture[str]) -> None:
        prepare(outside, dsn, 1, format_id=1)
        elsewhere = f"elsewhere_{os.getpid()}"
        outside.query(f"CREATE DATABASE {elsewhere}")
        other_dsn = psycopg2.extensions.make_dsn(dsn, dbname=elsewhere)
        other = Outside(other_dsn)
        try:
            other.query("CREATE TABLE twophase (id int)")
            prepare(other, other_dsn, 2)
            conn = psycopg2.connect(dsn)
            conn.tpc_begin("a string")
            conn.tpc_prepare()
            conn.close()
            assert main(["recover", dsn]) == 0
            assert "Nothing is in doubt" in capsys.readouterr().out
            with pytest.raises(SystemExit):
                main(["recover"])
        finally:
            for (gid,) in other.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
                other.query(f"ROLLBACK PREPARED '{gid}'")
            other.conn.close()
            outside.query(f"DROP DATABASE {elsewhere}")

    def test_a_live_one_is_never_touched(
        self, dsn: str, outside: Outside, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        conn = psycopg2.connect(dsn)
        conn.tpc_begin(conn.xid(FORMAT_ID, "zpgpool:here:1:1", f"main:{conn.info.backend_pid}"))
        conn.tpc_prepare()
        DB(FileStorage(str(tmp_path / "Data.fs"))).close()
        assert main(["recover", dsn, "--zodb", str(tmp_path / "Data.fs"), "--yes"]) == 0
        out = capsys.readouterr().out
        assert "its session is alive: leave it alone" in out
        assert "roll" not in out
        assert main(["recover", dsn, "--rollback", f"zpgpool:here:1:1/main:{conn.info.backend_pid}"]) == 1
        assert "is alive" in capsys.readouterr().err
        conn.tpc_commit()
        conn.close()

    def test_a_later_session_with_its_number_is_not_its_owner(self, dsn: str, outside: Outside) -> None:
        """The number of a session that ended is given away: here to one that began after the PREPARE."""
        later = psycopg2.connect(dsn)
        later_pid = later.info.backend_pid
        each = prepare(outside, dsn, 1, f"main:{later_pid}")
        asking = psycopg2.connect(dsn)
        [found] = list_in_doubt(asking)
        assert found.is_live  # it began before
        later.close()
        eventually(lambda: later_pid not in outside.backends())
        [found] = list_in_doubt(asking)
        assert not found.is_live
        assert found.id == each
        asking.close()


class TestWhatZodbCannotTell:
    """Nothing is proposed where it would be a guess, and `--yes` does nothing."""

    def recover(self, dsn: str, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert main(["recover", dsn, "--zodb", str(path), "--yes"]) == 0
        return capsys.readouterr().out

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "Data.fs"
        DB(FileStorage(str(path))).close()
        return path

    def test_no_zodb_took_part(
        self, dsn: str, outside: Outside, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prepare(outside, dsn, 1, "main:0:none")
        assert "no ZODB took part" in self.recover(dsn, path, capsys)
        assert len(list_in_doubt(outside.conn)) == 1

    def test_an_id_without_a_number(
        self, dsn: str, outside: Outside, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prepare(outside, dsn, 1, "strange")
        assert "no ZODB took part" in self.recover(dsn, path, capsys)

    def test_zodb_was_packed(self, dsn: str, outside: Outside, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        db = DB(FileStorage(str(path)))
        zodb = db.open()
        for number in range(3):
            zodb.root()["x"] = number
            transaction.commit()
        prepare(outside, dsn, 1)
        db.pack()
        zodb.close()
        db.close()
        assert "ZODB was packed since" in self.recover(dsn, path, capsys)
        assert len(list_in_doubt(outside.conn)) == 1

    def test_its_process_is_alive(
        self, dsn: str, outside: Outside, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its connection was lost after the vote, and ZODB commits in a moment."""
        conn = psycopg2.connect(dsn)
        gtrid = f"zpgpool:{socket.gethostname()[:24]}:{os.getpid()}:1"
        conn.tpc_begin(conn.xid(FORMAT_ID, gtrid, f"main:{conn.info.backend_pid}:zodb"))
        conn.tpc_prepare()
        pid = conn.info.backend_pid
        conn.close()
        eventually(lambda: pid not in outside.backends())
        assert "its process is alive: leave it alone" in self.recover(dsn, path, capsys)
        assert len(list_in_doubt(outside.conn)) == 1


class TestById:
    def test_both_at_once(self, dsn: str, outside: Outside, capsys: pytest.CaptureFixture[str]) -> None:
        one = prepare(outside, dsn, 1)
        assert main(["recover", dsn, "--commit", one, "--rollback", one]) == 1
        assert "either --commit or --rollback" in capsys.readouterr().err

    def test_commit_and_rollback(self, dsn: str, outside: Outside, capsys: pytest.CaptureFixture[str]) -> None:
        one, two, three = (prepare(outside, dsn, number) for number in (1, 2, 3))
        assert main(["recover", dsn, "--commit", one, "--rollback", two]) == 0
        out = capsys.readouterr().out
        assert out.count("    committed") == 1
        assert out.count("    rolled back") == 1
        assert rows(outside) == [1]
        assert main(["recover", dsn, "--commit", three]) == 0
        assert rows(outside) == [1, 3]

    def test_one_that_is_not_there(self, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recover", dsn, "--commit", "nonsense"]) == 1
        assert "no transaction 'nonsense' of zpgpool is prepared" in capsys.readouterr().err

    def test_the_second_to_come_is_told(self, dsn: str, outside: Outside) -> None:
        prepare(outside, dsn, 1)
        conn = psycopg2.connect(dsn)
        [each] = list_in_doubt(conn)
        assert resolve(conn, each, commit=True) == "committed"
        assert resolve(conn, each, commit=True) == "already gone"
        assert resolve(conn, each, commit=False) == "already gone"
        conn.close()
        assert rows(outside) == [1]

    def test_one_that_belongs_to_another(self, dsn: str, outside: Outside) -> None:
        prepare(outside, dsn, 1)
        stranger = f"stranger_{os.getpid()}"
        outside.query(f"CREATE ROLE {stranger} LOGIN")
        try:
            conn = psycopg2.connect(psycopg2.extensions.make_dsn(dsn, user=stranger))
            [each] = list_in_doubt(conn)
            with pytest.raises(CommandError, match="permission denied"):
                resolve(conn, each, commit=True)
            conn.close()
        finally:
            outside.query(f"DROP ROLE {stranger}")


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["ENV:NOT_SET_HERE"], "no variable 'NOT_SET_HERE'"),
            (["password=secret nonsense"], "libpq cannot read"),
            (["host=/nowhere password=secret"], "No such file"),
            (["dbname=x", "--yes"], "--yes does what --zodb proposes"),
        ],
    )
    def test_one_line(self, args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recover", *args]) == 1
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
        assert "secret" not in err

    @pytest.mark.parametrize("content", [None, b"nonsense", b"<zodb nonsense"])
    def test_a_zodb_that_cannot_be_read(
        self, dsn: str, outside: Outside, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
    ) -> None:
        prepare(outside, dsn, 1)
        path = tmp_path / "zodb.conf"
        if content is not None:
            path.write_bytes(content)
        assert main(["recover", dsn, "--zodb", str(path), "--yes"]) == 1
        assert str(path) in capsys.readouterr().err
        assert len(list_in_doubt(outside.conn)) == 1

    def test_the_extra_that_is_missing(
        self, dsn: str, outside: Outside, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare(outside, dsn, 1)
        monkeypatch.setitem(sys.modules, "zodburi", None)
        assert main(["recover", dsn, "--zodb", "file:///nowhere"]) == 1
        assert "zpgpool[zodb]" in capsys.readouterr().err


CONFIGS = {
    "Data.fs": "",
    "zodb.conf": "<zodb>\n<filestorage>\npath {path}\n</filestorage>\n</zodb>\n",
    "zope.conf": "instancehome {folder}\n<zodb_db main>\n<filestorage>\npath {path}\n</filestorage>\n"
    "mount-point /\n</zodb_db>\n",
    "uri": "",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_zodb_has_committed_is_committed(
    kind: str,
    dsn: str,
    outside: Outside,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_pool: MakePool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "Data.fs"
    pool = make_pool(twophase=True)
    zpgpool.register_pool(pool)

    def fail() -> Any:
        raise psycopg2.OperationalError("the server is down")

    db = DB(FileStorage(str(path)))
    zodb = db.open()
    zodb.root()["x"] = 1
    with connection().cursor() as cursor:
        cursor.execute("INSERT INTO twophase VALUES (1)")
    pid = connection().info.backend_pid

    class Kill:
        """Ends the session between vote and finish."""

        transaction_manager = transaction.manager
        tpc_begin = commit = tpc_finish = tpc_abort = abort = lambda self, txn: None

        def tpc_vote(self, txn: object) -> None:
            outside.terminate(pid)
            monkeypatch.setattr(pool, "open_connection", fail)

        def sortKey(self) -> str:
            return "~"

    transaction.get().join(Kill())
    transaction.commit()
    prepare(outside, dsn, 2)  # and one that ZODB does not know
    config = tmp_path / kind
    if CONFIGS[kind]:
        config.write_text(CONFIGS[kind].format(path=path, folder=tmp_path))
    source = f"file://{path}" if kind == "uri" else str(config)
    if kind == "uri":
        zodb.close()
        db.close()
    monkeypatch.setattr("zpgpool.recover.socket.gethostname", lambda: "elsewhere")  # its process has ended, too
    assert main(["recover", dsn, "--zodb", source]) == 0
    out = capsys.readouterr().out
    assert out.count("ZODB has committed it: commit") == 1
    assert out.count("ZODB has not committed it: roll back") == 1
    assert rows(outside) == []
    assert main(["recover", dsn, "--zodb", source, "--yes"]) == 0  # while the site runs: read-only
    assert rows(outside) == [1]
    assert list_in_doubt(outside.conn) == []
    if kind != "uri":
        zodb.close()
        db.close()


@pytest.mark.slow
def test_killed_twenty_times(dsn: str, outside: Outside, tmp_path: Path) -> None:
    """SIGKILL at random moments: after `recover --zodb --yes` ZODB and PostgreSQL agree every time."""
    dice = random.Random(4)
    path = tmp_path / "Data.fs"
    script = Path(__file__).parent / "two_phases.py"
    prepared = "SELECT 1 FROM pg_prepared_xacts WHERE database = current_database()"
    in_doubt = 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, str(script), dsn, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(dice.randint(1, 15)):
            process.stdout.readline()
        eventually(lambda: len(outside.query(prepared)) > 0, 20)
        process.kill()
        process.wait()
        process.stdout.close()
        eventually(lambda: not outside.backends())
        in_doubt += len(list_in_doubt(outside.conn))
        assert main(["recover", dsn, "--zodb", str(path), "--yes"]) == 0
        assert list_in_doubt(outside.conn) == []
        db = DB(FileStorage(str(path), read_only=True))
        zodb = db.open()
        assert sorted(zodb.root()) == rows(outside)
        zodb.close()
        db.close()
    assert in_doubt > 0  # or nothing was shown
    assert len(rows(outside)) > 20
