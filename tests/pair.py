"""A primary and its standby, real ones."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2

from conftest import eventually
from conftest import free_port
from conftest import run
from zpgpool.demo.server import EmbeddedServer


OPTIONS = {"fsync": "off", "max_connections": "50", "shared_buffers": "8MB", "wal_keep_size": "64MB"}


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
            return [run(conn, statement) for statement in statements][-1]

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
        eventually(lambda: self.ask(self.primary, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))
        if not is_synchronous:
            return
        self.ask(self.primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        eventually(lambda: self.ask(self.primary, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"))

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
        eventually(lambda: self.ask(self.primary, "SELECT NOT pg_is_in_recovery()"))
        return time.monotonic()

    def stop(self) -> None:
        self.primary.stop()
        self.standby.stop()
