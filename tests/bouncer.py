"""A PgBouncer of the tests' own, configured by the file of the documentation."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psycopg2
from benchmarks.harness import free_port

from conftest import eventually
from conftest import missing
from zpgpool.demo.server import EmbeddedServer
from zpgpool.demo.server import SERVANT


DEPLOY = Path(__file__).parent.parent / "docs" / "deploy"


def deployed(name: str, **values: object) -> str:
    """Return a file of docs/deploy with other values in some of its lines `name = value`."""
    text = (DEPLOY / name).read_text()
    for key, value in values.items():
        [old] = re.findall(rf"^{key} = .*$", text, re.MULTILINE)
        text = text.replace(old, f"{key} = {value}")
    return text


#: How many connections PgBouncer has to the server.
SERVER_CONNECTIONS = 10


class PgBouncer:
    """A PgBouncer of the test's own, as an ordinary user."""

    def __init__(self, folder: Path, server: EmbeddedServer, mode: str, query_wait_timeout: int = 30) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            missing("PgBouncer", "apt-get install pgbouncer")
        self._program = program
        self.port = free_port()
        self.ini = folder / "pgbouncer.ini"
        text = deployed(
            "pgbouncer.ini",
            shop=f"host={server.sockets} port={server.port or 5432} user=postgres dbname=postgres",
            listen_port=self.port,
            auth_type="any",
            pool_mode=mode,
            default_pool_size=SERVER_CONNECTIONS,
            query_wait_timeout=query_wait_timeout,
            server_login_retry=0.2,
            logfile=folder / "log",
        )
        self.ini.write_text(text)
        self._prefix: list[str] = []
        if os.geteuid() == 0:
            servant = pwd.getpwnam(SERVANT)
            os.chown(folder, servant.pw_uid, servant.pw_gid)
            self._prefix = ["setpriv", "--reuid", SERVANT, "--regid", str(servant.pw_gid), "--clear-groups"]
            self._prefix += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        self.start()

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=shop"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._prefix, self._program, "-q", str(self.ini)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.ini.parent / "log").read_text()
        try:
            psycopg2.connect(self.dsn, connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)

    def command(self, sql: str) -> None:
        """Say something to its console."""
        conn = psycopg2.connect(self.dsn.replace("dbname=shop", "dbname=pgbouncer"))
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(sql)
        conn.close()
