"""`zpgpool top`: the status page in the terminal, live; or all processes that share a folder."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from functools import partial
from typing import Any
from typing import TYPE_CHECKING

from ..errors import CommandError
from ..errors import SettingError
from .ask import ask_all
from .folder import Folder
from .page import blockers
from .page import seconds
from .page import short
from .page import sums
from .page import verdict
from .remote import fetch
from .remote import Peers
from .remote import request_for
from .share import sort_out
from .site import merge
from .site import total
from .snapshot import Json
from .snapshot import readable
from .snapshot import time_of_day


if TYPE_CHECKING:
    from rich.console import Group
    from rich.console import RenderableType
    from rich.table import Table


#: How long each part of an answer may take, in seconds.
TIMEOUT = 10

COLOURS = {"good": "green", "warn": "yellow", "bad": "red"}

BARS = " ▁▂▃▄▅▆▇█"

#: How many samples, and incidents, a pool shows.
SAMPLES = 60
INCIDENTS = 5


def top(args: argparse.Namespace) -> None:
    """Show the pools until Ctrl-C, or once. Raises CommandError."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise CommandError("rich is missing: pip install 'zpgpool[cli]'") from None
    look = _look(args.url, args.token)
    console = Console()
    if args.once:
        console.print(draw(look()))
        return
    frame = draw(look())
    try:
        with Live(frame, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(args.every)
                try:
                    frame = draw(look())
                except CommandError as error:
                    live.update(_failed(str(error), frame), refresh=True)
                else:
                    live.update(frame, refresh=True)
    except KeyboardInterrupt:
        pass


def _look(where: Sequence[str], token: str | None) -> Callable[[], Json]:
    """Return what returns a snapshot: of a status page, of several, or of the processes that share a folder."""
    try:
        if any(_is_url(each) for each in where):
            secret = _read_token(token)
            if len(where) > 1:
                return partial(ask_pages, Peers(where, secret))
            request = request_for(where[0], secret)
            return lambda: dict(_clean(fetch(request, TIMEOUT)))
        if len(where) > 1:
            raise CommandError("one folder, or the URLs of status pages")
        return partial(ask_folder, Folder(where[0]))
    except SettingError as error:
        raise CommandError(str(error).rpartition("': ")[2]) from None


def _is_url(where: str) -> bool:
    return "://" in where or not (os.path.isdir(where) or os.sep in where)


def ask_pages(peers: Peers) -> Json:
    """Return the snapshot of several status pages, without what the server says, as of a folder."""
    told, silent = peers.snapshots()
    if not told:
        raise CommandError("; ".join(f"{address}: {why}" for _, address, why in silent))
    return _added_up(told, silent)


def ask_folder(folder: Folder) -> Json:
    """Return the snapshot of a site, without what the server says: this command has no connection to it."""
    try:
        told, silent = sort_out(ask_all(folder, "pools"))
    except OSError as error:
        raise CommandError(f"no answer: {error}") from None
    if not told and not silent:
        raise CommandError("nobody answers in that folder: does a site run that shares it?")
    return _added_up(told, silent)


def _added_up(told: list[Json], silent: list[tuple[int, str, str]]) -> Json:
    site = _clean(merge(told, silent))
    return {"at": time_of_day(), "process": os.getpid(), **total(site), **site}


def _read_token(token: str | None) -> str | None:
    if token is None:
        return None
    name = token.removeprefix("ENV:")
    if not token.startswith("ENV:") or not os.environ.get(name):
        raise CommandError("--token is ENV:NAME, where the environment has NAME")
    return os.environ[name]


def _clean(value: Any) -> Any:
    """Return JSON data without what a terminal would obey."""
    if isinstance(value, str):
        return readable(value, 2000)
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    return [_clean(each) for each in value] if isinstance(value, list) else value


def draw(snapshot: Json) -> Group:
    """Return what rich prints of a snapshot. Raises CommandError when it is none."""
    from rich.console import Group
    from rich.text import Text

    try:
        parts = [part for pool in snapshot["pools"] for part in _pool(pool)]
    except (TypeError, KeyError, AttributeError):
        raise CommandError("what answers there is no status page of zpgpool, or of another version") from None
    head = Text(f"process {snapshot.get('process')} at {snapshot.get('at')}", style="dim")
    return Group(head, *_site(snapshot), *(parts or [Text("No pool is registered.")]))


def _site(snapshot: Json) -> Iterator[RenderableType]:
    """Yield the processes of a site, where there are several."""
    from rich.text import Text

    processes = snapshot.get("processes")
    if not isinstance(processes, list) or len(processes) < 2:
        return
    try:
        yield Text(sums(snapshot), style=COLOURS["bad" if snapshot["waiting"] else "good"])
        yield _table(("process", "host", "in use", "idle", "most", "waiting", "how"), map(_process, processes))
    except (TypeError, KeyError, AttributeError):
        raise CommandError("what answers there is no status page of zpgpool, or of another version") from None


def _process(process: Json) -> tuple[str, ...]:
    numbers = [process[key] for key in ("process", "host", "used", "idle", "max", "waiting")]
    return *map(str, numbers), process["trouble"] or ("not as the others" if process["is_odd"] else "answers")


def _failed(error: str, frame: Group) -> Group:
    from rich.console import Group
    from rich.text import Text

    return Group(Text(f"{time.strftime('%H:%M:%S')} {error}", style="bold red"), frame)


def _pool(pool: Json) -> Iterator[RenderableType]:
    from rich.text import Text

    mood, words = verdict(pool)
    yield Text()
    yield Text.assemble((pool["name"] or "unnamed pool", "bold"), ("  " + pool["kind"], "dim"))
    yield Text(words, style=COLOURS[mood])
    samples = pool["samples"][-SAMPLES:]
    for label, name, most in (("in use ", "used", pool["max"]), ("waiting", "waiting", 1), ("wait   ", "wait", 0.1)):
        values = [sample[name] for sample in samples]
        yield Text.assemble((label + " ", "dim"), _bars(values, max([most, *values])))
    if pool["lag"] and pool["lag"]["seconds"] is not None:
        yield Text(f"behind the primary: {seconds(pool['lag']['seconds'])}", style="dim")
    if pool["server_note"]:
        yield Text(f"without what the server says: {pool['server_note']}", style="yellow")
    if pool["holders"]:
        yield _table(
            ("held for", "process", "request", "connection", "server", "at line"), map(_holder, pool["holders"])
        )
    if pool["waiters"]:
        yield _table(("waits for", "process", "request"), [_who(each) for each in pool["waiters"]])
    if pool["incidents"]:
        incidents = [(each["at"], f"{each['kind']} ({each['count']})", each["text"]) for each in pool["incidents"]]
        yield _table(("at", "what", "more"), incidents[:INCIDENTS])


def _bars(values: list[float], most: float) -> str:
    return "".join(BARS[min(len(BARS) - 1, round(value / most * (len(BARS) - 1)))] for value in values)


def _who(each: Json) -> tuple[str, ...]:
    return seconds(each["seconds"]), str(each.get("process", "")), each["request"] or each["thread"]


def _holder(holder: Json) -> tuple[str, ...]:
    return *_who(holder), holder["status"], _server(holder), short(holder["line"])


def _server(holder: Json) -> str:
    server = holder["server"] or {}
    waits = f"{server.get('wait_event_type')}/{server.get('wait_event')}" if server.get("wait_event") else ""
    blocked = f"blocked by {blockers(server)}" if server.get("blocked_by") else ""
    return " ".join(part for part in (str(holder["backend_pid"]), server.get("state") or "", waits, blocked) if part)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, box=None, header_style="dim", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(each) for each in row))
    return table
