"""The command `zpgpool`."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from .errors import CommandError


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed (with one line on stderr), 2 called wrongly."""
    parser = argparse.ArgumentParser(prog="zpgpool", description="psycopg2 connection pools for Zope, Pyramid and WSGI")
    parser.add_argument("--version", action="version", version=f"zpgpool {version('zpgpool')}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="serve a small application on a PostgreSQL of its own")
    demo.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    demo.add_argument("--port", type=_port, default=8080, help="where to listen (%(default)s); 0: any free one")
    demo.add_argument("--data", type=Path, help="folder that keeps the database (~/.local/share/zpgpool/demo)")
    demo.add_argument("--dsn", help="use this PostgreSQL instead of one of its own; ENV:NAME reads the environment")
    demo.add_argument("--ini", type=Path, help="PasteDeploy file to serve instead of the demo's own")
    recover = commands.add_parser("recover", help="list prepared transactions that a crash left behind; resolve them")
    recover.add_argument("dsn", help="the database, as libpq has it; ENV:NAME reads the environment")
    recover.add_argument("--commit", metavar="ID", action="append", default=[], help="commit this one")
    recover.add_argument("--rollback", metavar="ID", action="append", default=[], help="roll this one back")
    recover.add_argument("--zodb", metavar="FILE|URI", help="propose what ZODB did: Data.fs, zope.conf, a zodburi URI")
    recover.add_argument("--yes", action="store_true", help="do what --zodb proposes")
    check = commands.add_parser(
        "check",
        help="whether a server and a fleet of pools fit together",
        description="Prints a line for each thing looked at; the exit status is that of the worst line: "
        "0 ok, 1 advice, 2 wrong.",
    )
    check.add_argument("dsn", help="the database, as libpq has it; ENV:NAME reads the environment")
    check.add_argument("--threads", type=_count, default=4, metavar="N", help="of each process (%(default)s)")
    check.add_argument("--processes", type=_count, default=1, metavar="M", help="with a pool each (%(default)s)")
    check.add_argument("--maxconn", type=_count, metavar="K", help="of each pool (as many as threads)")
    top = commands.add_parser("top", help="show the status page in the terminal")
    top.add_argument(
        "url",
        nargs="+",
        help="where the page is, as http://localhost:8080/status, or several; or the folder of `share`",
    )
    top.add_argument("--once", action="store_true", help="show it once")
    top.add_argument("--every", type=_seconds, default=2.0, metavar="SECONDS", help="between two looks (%(default)s)")
    top.add_argument("--token", metavar="ENV:NAME", help="the page's token, which the environment has as NAME")
    _add_migrate(commands)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (CommandError, ImportError) as error:  # ImportError: of an extra, which it names
        print(f"zpgpool {args.command}: {error}", file=sys.stderr)
        return 1


def _add_migrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    migrate = commands.add_parser(
        "zope-migrate",
        help="replace the connection objects of Products.ZPsycopgDA in a Zope site",
        description="Shows what would be done; the site must be stopped, unless it has a ZEO server.",
    )
    migrate.add_argument("conf", help="the site's zope.conf")
    migrate.add_argument(
        "--pool",
        action="append",
        default=[],
        metavar="[PATH=]NAME",
        help="the pool for all, or for those at a path or below (the unnamed one)",
    )
    migrate.add_argument(
        "--any-pool",
        action="store_true",
        help="take pools that are not registered here, as those that the filter makes",
    )
    migrate.add_argument("--back", action="store_true", help="go back to Products.ZPsycopgDA")
    migrate.add_argument("--yes", action="store_true", help="do it")


def _run(args: argparse.Namespace) -> int:
    # Each imports what it needs alone: a command works without the extras of the others.
    match args.command:
        case "demo":
            from .demo.serve import serve

            serve(args)
        case "recover":
            from .recover import recover

            recover(args)
        case "check":
            from .check import check

            return check(args)
        case "top":
            from .monitor.top import top

            top(args)
        case "zope-migrate":
            from .zsql.migrate import migrate

            migrate(args)
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a whole number above 0")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("seconds, from 0.1 to 3600")
    return seconds


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return number


if __name__ == "__main__":
    sys.exit(main())
