"""A primary and its standby, real ones."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2

from benchmarks.harness import free_port
from zpgpool.demo.server import EmbeddedServer


OPTIONS = {"fsync": "off", "max_connections": "50", "shared_buffers": "8MB", "wal_keep_size": "64MB"}


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `condition()` is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        time.sleep(0.02)


class Pair:
    """Two servers, of which one is the primary."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.primary = EmbeddedServer(folder / "a", port=free_port(), options=OPTIONS)
        self.standby = EmbeddedServer(folder / "b", port=free_port(), options=OPTIONS)
        self.primary.start()

    @property
    def dsn(self) -> str:
        """Both addresses, always in the same order."""
        ports = ",".join(str(port) for port in sorted([self.primary.port or 0, self.standby.port or 0]))
        return f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres target_session_attrs=read-write"

    def ask(self, server: EmbeddedServer, *statements: str) -> Any:
        with closing(psycopg2.connect(server.dsn)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
                row = cursor.fetchone() if cursor.description else None
                return row and row[0]

    def attach(self, is_synchronous: bool = True) -> None:
        """Make the standby a copy of the primary, without which nothing is committed from then on, if synchronous."""
        self.standby.halt(signal.SIGQUIT)
        shutil.rmtree(self.standby.data, ignore_errors=True)
        self.standby.data.mkdir(mode=0o700)
        EmbeddedServer._give_to_servant(self.standby.data, self.standby.sockets)
        host = str(self.primary.sockets)
        command = self.standby._command(
            "pg_basebackup", "-D", str(self.standby.data), "-R", "-c", "fast", "--no-sync",
            "-h", host, "-p", str(self.primary.port), "-U", "postgres",
        )  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd="/")
        self.standby.launch()
        wait_until(lambda: self.ask(self.primary, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))
        if not is_synchronous:
            return
        self.ask(self.primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        wait_until(lambda: self.ask(self.primary, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"))

    def fail_over(self) -> float:
        """Crash the primary and promote the standby; return when that is to be seen."""
        self.primary.halt(signal.SIGQUIT)
        self.primary, self.standby = self.standby, self.primary
        self.ask(
            self.primary,
            "ALTER SYSTEM RESET synchronous_standby_names",
            "SELECT pg_reload_conf()",
            "SELECT pg_promote()",
        )
        wait_until(lambda: self.ask(self.primary, "SELECT NOT pg_is_in_recovery()"))
        return time.monotonic()

    def stop(self) -> None:
        self.primary.stop()
        self.standby.stop()
