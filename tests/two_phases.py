"""A process that commits to ZODB and PostgreSQL in two phases, again and again, until it is killed.

`python two_phases.py DSN Data.fs`: prints each number that it is about to write to both.
"""

from __future__ import annotations

import sys

import transaction
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

import zpgpool
from zpgpool.datamanager import connection


def main(dsn: str, path: str) -> None:
    """Write numbers to both, from the highest known to ZODB on."""
    zpgpool.register_pool(zpgpool.PersistentConnectionPool(0, 1, dsn, twophase=True))
    db = DB(FileStorage(path))
    root = db.open().root()
    number = max(root, default=0)
    while True:
        number += 1
        with transaction.manager:
            root[number] = True
            with connection().cursor() as cursor:
                cursor.execute("INSERT INTO twophase VALUES (%s)", [number])
        print(number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
