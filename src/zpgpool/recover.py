"""Prepared transactions that a crash left behind: listed, and resolved by command, by what the other side did.

`zpgpool recover`. A transaction of two phases is in doubt when its process ended after the votes. It holds its locks
until it is committed or rolled back; ZODB, which commits first, knows which of the two is right.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from datetime import timedelta
from datetime import timezone
from typing import TYPE_CHECKING

import psycopg2

from .datamanager import EXTENDED_INFO
from .datamanager import FORMAT_ID
from .dsn import check_dsn
from .dsn import read_environment
from .dsn import scrub
from .errors import CommandError
from .errors import one_line
from .settings import SettingError


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import Xid
    from ZODB.BaseStorage import BaseStorage
    from ZODB.config import BaseConfig


#: A transaction was begun at most this long before it was prepared, in ZODB's eyes: how far back its commits are read.
LOOK_BACK = timedelta(days=1)


@dataclass(frozen=True)
class InDoubt:
    """A prepared transaction of this application in the connection's database."""

    xid: Xid
    prepared: datetime
    owner: str
    #: What is still there of the process that prepared it: "session", "process", or nothing.
    alive: str
    #: Whether ZODB takes part, and so can tell.
    has_zodb: bool

    @property
    def id(self) -> str:
        """What names it on the command line."""
        return f"{self.xid.gtrid}/{self.xid.bqual}"

    @property
    def is_live(self) -> bool:
        """Whether a process will end it: then this command must not."""
        return bool(self.alive)

    @property
    def state(self) -> str:
        """What is known of its owner, for people."""
        return f"its {self.alive} is alive: leave it alone" if self.alive else "its session has ended"


def list_in_doubt(conn: Connection) -> list[InDoubt]:
    """Return the prepared transactions of zpgpool in the database of `conn`, the oldest first.

    Those of other databases and of other applications are left out (PostgreSQL documentation, "pg_prepared_xacts").
    """
    found = [xid for xid in conn.tpc_recover() if xid.format_id == FORMAT_ID and xid.database == conn.info.dbname]
    sessions = _sessions(conn)
    conn.rollback()
    in_doubt = [
        InDoubt(xid, xid.prepared, xid.owner, _alive(xid, sessions), xid.bqual.endswith(":zodb")) for xid in found
    ]
    return sorted(in_doubt, key=lambda each: each.prepared)


def _sessions(conn: Connection) -> dict[int, datetime | None]:
    """Return when the server's processes began, as far as this role may see that."""
    with conn.cursor() as cursor:
        cursor.execute("SELECT pid, backend_start FROM pg_stat_activity")
        return dict(cursor.fetchall())


def _alive(xid: Xid, sessions: dict[int, datetime | None]) -> str:
    """Return what is still there of the process that prepared it."""
    numbers = [part for part in xid.bqual.split(":") if part.isdecimal()]
    pid = int(numbers[-1]) if numbers else 0
    if pid in sessions:
        began = sessions[pid]
        if began is None or began <= xid.prepared:  # a later session may have got the number of one that ended
            return "session"
    # Its connection may have ended, and it may be about to commit to ZODB.
    host, process = [*str(xid.gtrid).split(":"), "", "", ""][1:3]
    if host == socket.gethostname()[:24] and process.isdecimal() and os.path.exists(f"/proc/{process}"):
        return "process"
    return ""


def resolve(conn: Connection, each: InDoubt, commit: bool) -> str:
    """Commit or roll back one of them, and return what happened. Raises CommandError when its owner is alive."""
    if each.is_live:
        raise CommandError(f"{each.id}: {each.state}")
    try:
        if commit:
            conn.tpc_commit(each.xid)
        else:
            conn.tpc_rollback(each.xid)
    except psycopg2.errors.UndefinedObject:
        return "already gone"
    except psycopg2.Error as error:
        raise CommandError(f"{each.id}: {one_line(error)}") from None
    return "committed" if commit else "rolled back"


# The other side -------------------------------------------------------------------------------------------------------


def committed_in_zodb(source: str, since: datetime) -> tuple[set[str], bool]:
    """Return the global ids of the transactions that ZODB has committed since then, and whether it knows all of them.

    It does not after a pack, which forgets transactions whose objects have changed since.

    `source` is a FileStorage's path, a ZODB or Zope configuration file, or a URI of zodburi. It is opened read-only.
    Raises CommandError when it cannot be read.
    """
    try:
        timestamp = importlib.import_module("persistent.TimeStamp").TimeStamp
        with _storages(source) as storages:
            since = since.astimezone(timezone.utc)
            start = timestamp(since.year, since.month, since.day, since.hour, since.minute, since.second).raw()
            found, knows_all = set(), True
            for storage in storages:
                for record in storage.iterator(start):
                    knows_all = knows_all and record.status != "p"
                    if EXTENDED_INFO in (record.extension or {}):
                        found.add(record.extension[EXTENDED_INFO])
            return found, knows_all
    except ImportError as error:
        raise CommandError(f"--zodb needs the extra zpgpool[zodb]: {error}") from None
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"--zodb {source}: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def _storages(source: str) -> Iterator[list[BaseStorage]]:
    storages = list(_open(source))
    try:
        yield storages
    finally:
        for storage in storages:
            storage.close()


def _open(source: str) -> Iterable[BaseStorage]:
    if "://" in source:
        factory, _ = importlib.import_module("zodburi").resolve_uri(source)
        return [factory()]
    with open(source, "rb") as file:
        is_file_storage = file.read(4) in (b"FS21", b"FS30")
    if is_file_storage:
        return [importlib.import_module("ZODB.FileStorage").FileStorage(source, read_only=True)]
    return [_open_read_only(config) for config in _storage_configs(source)]


def _storage_configs(source: str) -> list[BaseConfig]:
    """Return the storages' factories of a ZODB or a Zope configuration file."""
    with open(source) as file:
        is_zope = "<zodb_db" in file.read()
    if is_zope:
        root = importlib.import_module("Zope2.Startup.options").ZopeWSGIOptions(source)().configroot
        return [database.config.storage for database in root.databases]
    schema = importlib.import_module("ZODB.config").getDbSchema()
    config, _ = importlib.import_module("ZConfig").loadConfig(schema, source)
    return [database.config.storage for database in config.database]


def _open_read_only(factory: BaseConfig) -> BaseStorage:
    if hasattr(factory.config, "read_only"):
        factory.config.read_only = True
    return factory.open()


# The command ----------------------------------------------------------------------------------------------------------


def recover(args: argparse.Namespace) -> None:
    """List what is in doubt, and resolve what was asked for. Raises CommandError."""
    if args.yes and args.zodb is None:
        raise CommandError("--yes does what --zodb proposes: say where ZODB is")
    try:
        dsn = read_environment(args.dsn)
        check_dsn(dsn)
        conn = psycopg2.connect(dsn)
    except SettingError as error:
        raise CommandError(str(error)) from None
    except psycopg2.OperationalError as error:
        raise CommandError(scrub(one_line(error), {"dsn": dsn})) from None
    errors = []
    with closing(conn):
        in_doubt = list_in_doubt(conn)
        wishes = _wishes(args, {each.id for each in in_doubt})
        proposed = _proposals(conn, args.zodb, in_doubt) if args.zodb is not None and in_doubt else {}
        if args.yes:
            wishes = {id: commit for id, (commit, _) in proposed.items() if commit is not None} | wishes
        if not in_doubt:
            print(f"Nothing is in doubt in database {conn.info.dbname}.")
        for each in in_doubt:
            age = datetime.now(timezone.utc) - each.prepared
            print(f"{each.id}\n    prepared {each.prepared:%Y-%m-%d %H:%M:%S %Z}, {_age(age)} ago, by {each.owner}")
            print(f"    {each.state}")
            if each.id in proposed:
                print(f"    {proposed[each.id][1]}")
            if each.id in wishes:
                try:
                    print(f"    {resolve(conn, each, wishes[each.id])}")
                except CommandError as error:
                    errors.append(str(error))
    if errors:
        raise CommandError("; ".join(errors))


def _wishes(args: argparse.Namespace, known: set[str]) -> dict[str, bool]:
    """Return what the command line says: for which transactions, and whether to commit."""
    if both := sorted(set(args.rollback) & set(args.commit)):
        raise CommandError(f"{both[0]}: either --commit or --rollback")
    wishes = dict.fromkeys(args.rollback, False) | dict.fromkeys(args.commit, True)
    if strange := sorted(wishes.keys() - known):
        raise CommandError(f"no transaction {strange[0]!r} of zpgpool is prepared in this database")
    return wishes


def _proposals(conn: Connection, source: str, in_doubt: list[InDoubt]) -> dict[str, tuple[bool | None, str]]:
    """Return for each whether to commit it (None: unknown), and the reason."""
    with conn.cursor() as cursor:
        cursor.execute("SELECT now()")
        [(server_now,)] = cursor.fetchall()
    conn.rollback()
    behind = max(timedelta(0), server_now - datetime.now(timezone.utc))  # ZODB has the time of its process
    known, knows_all = committed_in_zodb(source, in_doubt[0].prepared - behind - LOOK_BACK)
    proposals: dict[str, tuple[bool | None, str]] = {}
    for each in in_doubt:
        if each.is_live:
            continue
        if not each.has_zodb:
            proposals[each.id] = None, "no ZODB took part: nobody can tell; use --commit or --rollback"
        elif each.xid.gtrid in known:
            proposals[each.id] = True, "ZODB has committed it: commit"
        elif knows_all:
            proposals[each.id] = False, "ZODB has not committed it: roll back"
        else:
            proposals[each.id] = None, "ZODB was packed since, and cannot tell; use --commit or --rollback"
    return proposals


def _age(age: timedelta) -> str:
    return str(timedelta(seconds=round(age.total_seconds())))
