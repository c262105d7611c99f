"""Draws a snapshot as HTML and SVG: no script, no style of its own, and everything that a user made escaped."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence

from webob.util import html_escape

from .history import EVERY
from .history import SPAN
from .snapshot import Json


#: The size of a chart in its own units; the page stretches it.
WIDTH = 600
HEIGHT = 100

#: Between two samples.
STEP = WIDTH * EVERY / SPAN

#: How many processes that give no answer are named.
SILENT = 3

#: Of more processes than this the page folds all but the odd ones away, and of each table all but the first rows.
MANY = 8
OLDEST = 20

Row = Sequence[tuple[str, str]]


def draw(snapshot: Json) -> str:
    """Return what stands in the page's `main`."""
    pools = "\n".join(_pool(pool, number) for number, pool in enumerate(snapshot["pools"]))
    when = snapshot["at"].replace("T", " ").replace("+00:00", " UTC")
    return (
        f"{pools or '<p>No pool is registered.</p>'}\n<footer>Process {snapshot['process']} at {_e(when)}. "
        "Each process has pools of its own.</footer>"
    )


def draw_site(snapshot: Json) -> str:
    """Return the same for a site of several processes, with a table of them at the top."""
    asked, processes = snapshot["asked"], snapshot["processes"]
    note = " and ".join(
        words
        for words in (
            f"process {asked['process']}" if asked["process"] else "",
            f"requests whose path begins with {asked['path']}" if asked["path"] else "",
        )
        if words
    )
    chosen = f'<p class="note">Only {_e(note)}. <a href="?">Show all</a></p>\n' if note else ""
    most = OLDEST if len(processes) > MANY else None
    pools = "\n".join(_pool(pool, number, True, most) for number, pool in enumerate(snapshot["pools"]))
    when = snapshot["at"].replace("T", " ").replace("+00:00", " UTC")
    odd_first = sorted(processes, key=lambda each: not each["is_odd"])
    shown = None if most is None else min(MANY, sum(each["is_odd"] for each in processes))
    rows = map(_process, processes if most is None else odd_first)
    return f"""<section aria-labelledby="site">
<h2 id="site">The site <small>{len(processes)} process{"es" * (len(processes) != 1)}</small></h2>
<p class="verdict {"bad" if snapshot["waiting"] else "good"}">{_e(sums(snapshot))}</p>
{chosen}{_folded("processes", "No process answers.", rows, shown)}
{_unknown_sessions(snapshot["unknown_sessions"], most)}</section>
{pools or "<p>No pool is registered.</p>"}
<footer>Process {snapshot["process"]} has asked at {_e(when)}.</footer>"""


def sums(snapshot: Json) -> str:
    """Return the sums of a site in one sentence."""
    waiting, longest = snapshot["waiting"], snapshot["longest_wait"]
    waits = f"{waiting} wait, the longest for {seconds(longest)}" if waiting else "nobody waits"
    return (
        f"{snapshot['used']} in use, {snapshot['idle']} idle: {snapshot['open']} open of {snapshot['max']} at most; "
        f"{waits}.{_unknown(snapshot)}"
    )


def _unknown(snapshot: Json) -> str:
    """Return how many sessions no process knows, and which processes may know them that give no answer."""
    count = snapshot.get("unknown") or 0
    if not count:
        return ""
    silent = [
        f"{'process ' + str(each['process']) if each['process'] else 'one at ' + each['host']} ({each['trouble']})"
        for each in snapshot["processes"]
        if each["trouble"]
    ]
    if len(silent) > SILENT:
        silent[SILENT:] = [f"one of {len(silent) - SILENT} more that are silent"]
    may = f"; {'it' if count == 1 else 'they'} may belong to {' or '.join(silent)}" if silent else ""
    return f" The server has {count} session{'s' * (count > 1)} that no process knows{may}."


def _unknown_sessions(sessions: Sequence[Json], most: int | None) -> str:
    if not sessions:
        return ""
    return f"<h3>Sessions that no process knows</h3>\n{_folded('unknown', '', map(_unknown_session, sessions), most)}\n"


def _unknown_session(session: Json) -> Row:
    query = f'<code class="more">{_e(session["query"])}</code>' if session["query"] else ""
    state = f"{session['state'] or 'state unknown'}, for {seconds(session['seconds'] or 0.0)}"
    return (
        ("Opened", f"{seconds(session['age'])} ago"),
        ("Backend", str(session["backend_pid"])),
        ("Client", _e(session["client"] or "a unix socket")),
        ("Application", _e(session["application_name"])),
        ("Server", f"<span>{_e(state)}</span>{query}"),
        ("Pool", _e(session["pool"] or "unnamed")),
    )


def _process(process: Json) -> Row:
    number = process["process"]
    how = process["trouble"] or ("not as the others" if process["is_odd"] else "answers")
    return (
        ("Process", f'<a href="?process={number}">{number}</a>{_more(process["host"])}'),
        ("Open", "" if process["trouble"] else f"{process['used']} in use, {process['idle']} idle"),
        ("At most", "" if process["trouble"] else str(process["max"])),
        ("Waiting", f"{process['waiting']}, for {seconds(process['longest_wait'])}" if process["waiting"] else ""),
        ("How it is", f'<span class="{"warn" if process["is_odd"] else "good"}">{_e(how)}</span>'),
    )


def title(snapshot: Json) -> str:
    """Return the page's title: what somebody should see in a tab."""
    waiting = sum(pool["waiting"] for pool in snapshot["pools"])
    used = sum(pool["used"] for pool in snapshot["pools"])
    return f"{waiting} waiting - pools" if waiting else f"{used} in use - pools"


def verdict(pool: Json) -> tuple[str, str]:
    """Return how a pool is, in one sentence, and how bad that is: `good`, `warn` or `bad`."""
    used, most, waiting = pool["used"], pool["max"], pool["waiting"]
    if pool["is_closed"]:
        return "bad", "The pool is closed."
    if pool["outage_seconds"] is not None:
        return "bad", (
            f"The server cannot be reached for {seconds(pool['outage_seconds'])}; {waiting} wait for it: "
            f"{pool['last_connect_error']}"
        )
    if pool["last_connect_error"]:
        return "bad", f"The last connect failed: {pool['last_connect_error']}"
    if waiting:
        longest = seconds(max((waiter["seconds"] for waiter in pool["waiters"]), default=0.0))
        who = f"{waiting} requests wait, the longest" if waiting > 1 else "1 request waits,"
        return "bad", f"{used} of {most} connections in use; {who} for {longest}."
    if pool["lag"] and pool["lag"]["trouble"]:
        return "warn", f"The replica is lost: {pool['lag']['trouble']}"
    if used >= most:
        return "warn", f"All {most} connections are in use; nobody waits yet."
    return "good", f"{used} of {most} connections in use, {pool['idle']} idle; nobody waits."


def seconds(number: float) -> str:
    """Return a time for people."""
    if number >= 3600:
        return f"{number / 3600:.1f} h"
    if number >= 60:
        return f"{int(number) // 60} min {int(number) % 60} s"
    return f"{number:.1f} s" if number >= 0.1 or number == 0 else f"{number * 1000:.0f} ms"


def _pool(pool: Json, number: int, has_process: bool = False, most: int | None = None) -> str:
    mood, words = verdict(pool)
    name = _e(pool["name"]) if pool["name"] else "Unnamed pool"
    note = f'<p class="note">Without what the server says: {_e(pool["server_note"])}</p>' if pool["server_note"] else ""
    holders = (_holder(each, has_process) for each in pool["holders"])
    waiters = (_waiter(each, has_process) for each in pool["waiters"])
    counters = "".join(f"<div><dt>{_e(key)}</dt><dd>{value}</dd></div>" for key, value in pool["stats"].items())
    return f"""<section aria-labelledby="pool-{number}">
<h2 id="pool-{number}">{name} <small>{_e(pool["kind"])}</small></h2>
<p class="verdict {mood}">{_e(words)}</p>
<div class="charts">{_charts(pool)}</div>
{_lag(pool["lag"])}<h3>Who holds a connection</h3>
{note}{_folded(f"holders-{number}", "Nobody.", holders, most)}
<h3>Who waits for one</h3>
{_folded(f"waiters-{number}", "Nobody.", waiters, most)}
<h3>What happened</h3>
{_table("Nothing worth mentioning.", map(_incident, pool["incidents"]))}
<details id="counters-{number}"><summary>Counters</summary><dl>{counters}</dl></details>
</section>"""


def _lag(lag: Json | None) -> str:
    if lag is None:
        return ""
    what = "not known" if lag["seconds"] is None else f"{seconds(lag['seconds'])}, {seconds(lag['ago'])} ago"
    return f'<p class="lag">Behind the primary: {what}</p>\n'


# Tables --------------------------------------------------------------------------------------------------------------


def _table(none: str, rows: Iterable[Row]) -> str:
    """Return a table. With its roles said: on a phone the style makes blocks of it, and browsers forget them then."""
    listed = list(rows)
    if not listed:
        return f'<p class="none">{none}</p>'
    heads = "".join(f'<th role="columnheader" scope="col">{label}</th>' for label, _ in listed[0])
    lines = "\n".join(
        f'<tr role="row">{"".join(_cell(label, content) for label, content in row)}</tr>' for row in listed
    )
    return (
        f'<table role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>\n'
        f'<tbody role="rowgroup">{lines}</tbody></table>'
    )


def _folded(key: str, none: str, rows: Iterable[Row], most: int | None) -> str:
    """Return a table of the first `most` rows (None: of all), with the others folded away."""
    listed = list(rows)
    if most is None or len(listed) <= most:
        return _table(none, listed)
    first = f"{_table(none, listed[:most])}\n" if most else ""
    rest = f"{len(listed) - most} {'more' if most else key}"
    return f'{first}<details id="{key}"><summary>{rest}</summary>{_table(none, listed[most:])}</details>'


def _cell(label: str, content: str) -> str:
    return f'<td role="cell" data-label="{label}"{" class=seconds" if label == "For" else ""}>{content}</td>'


def _ending(holder: Json) -> str:
    """Return what to type to end the query of a holder: where the server knows its backend by that number."""
    if holder["server"] is None or holder["server"]["state"] != "active":
        return ""
    return f'<code class="more">SELECT pg_cancel_backend({holder["backend_pid"]})</code>'


def blockers(server: Json) -> str:
    """Return the backends that one waits for, and who they are, as far as that is known."""
    known = {each["backend_pid"]: each for each in server.get("blockers", ())}
    shown = []
    for pid in server["blocked_by"]:
        who = known.get(pid)
        shown.append(
            f"backend {pid}"
            if who is None
            else f"backend {pid}, which is {who['request'] or who['thread']} in process {who['process']}"
        )
    return ", ".join(shown)


def _in_process(each: Json, has_process: bool) -> Row:
    return (("Process", str(each["process"])),) if has_process else ()


def _holder(holder: Json, has_process: bool) -> Row:
    return (
        ("For", seconds(holder["seconds"])),
        *_in_process(holder, has_process),
        ("Request", f"<code>{_e(holder['request'])}</code>" if holder["request"] else ""),
        ("Thread", _e(holder["thread"])),
        ("Connection", f"<span>{_e(holder['status'])}</span>{_more('backend ' + str(holder['backend_pid'] or '?'))}"),
        ("Server", _server(holder["server"]) + _ending(holder)),
        ("At line", _line(holder["line"])),
    )


def _server(server: Json | None) -> str:
    if server is None:
        return ""
    running = f" for {seconds(server['seconds'])}" if server["state"] == "active" and server["seconds"] else ""
    lines = [f"<span>{_e(server['state'] or 'unknown')}{running}</span>"]
    if server["blocked_by"]:
        lines.append(_more(f"waits for a lock of {blockers(server)}"))
    elif server["wait_event"]:
        lines.append(_more(f"waits: {server['wait_event_type']}, {server['wait_event']}"))
    if server["application_name"]:
        lines.append(_more(server["application_name"]))
    if server["query"]:
        lines.append(f'<code class="more">{_e(server["query"])}</code>')
    return "".join(lines)


def _waiter(waiter: Json, has_process: bool) -> Row:
    return (
        ("For", seconds(waiter["seconds"])),
        *_in_process(waiter, has_process),
        ("Request", f"<code>{_e(waiter['request'])}</code>" if waiter["request"] else ""),
        ("Thread", _e(waiter["thread"])),
    )


def _incident(incident: Json) -> Row:
    times = f" ({incident['count']} times)" if incident["count"] > 1 else ""
    return (
        ("When (UTC)", _e(incident["at"][:19].replace("T", " "))),
        ("What", f"<span>{_e(incident['kind'])}{times}</span>"),
        ("More", f"<span>{_e(incident['text'])}</span>"),
    )


def short(line: str) -> str:
    """Return the innermost line of the user's code with the end of its path."""
    users, _, _ = line.partition(", inside ")
    path, _, rest = users.rpartition(":")
    return "/".join([*path.split("/")[-2:]]) + ":" + rest if path else users


def _line(line: str) -> str:
    return f'<code title="{_e(line)}">{_e(short(line))}</code>'


def _more(text: str) -> str:
    return f'<span class="more">{_e(text)}</span>'


def _e(text: object) -> str:
    return str(html_escape(str(text)))


# Charts --------------------------------------------------------------------------------------------------------------


def _charts(pool: Json) -> str:
    longest = max((waiter["seconds"] for waiter in pool["waiters"]), default=0.0)
    now = {"ago": 0.0, "used": pool["used"], "idle": pool["idle"], "waiting": pool["waiting"], "wait": longest}
    samples = [*pool["samples"], now]
    used, waiting, waits = ([sample[name] for sample in samples] for name in ("used", "waiting", "wait"))
    sizes = [sample["used"] + sample["idle"] for sample in samples]
    top = max([pool["max"], *sizes])
    limit = HEIGHT - pool["max"] / top * HEIGHT
    return "".join(
        [
            _chart(
                f"In use and idle in the last ten minutes: {pool['used']} and {pool['idle']} now, "
                f"at most {max(used)} in use",
                '<span><i class="key used"></i>In use <i class="key idle"></i>Idle</span>'
                f"<b>{pool['used']} + {pool['idle']} of {pool['max']}</b>",
                f"{_area('idle', samples, sizes, top)}{_area('used', samples, used, top)}"
                f'<line class="limit" x1="0" x2="{WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}"/>',
            ),
            _chart(
                f"Waiting in the last ten minutes: {pool['waiting']} now, at most {max(waiting)}",
                f'<span><i class="key waiting"></i>Waiting</span><b>{pool["waiting"]}, at most {max(waiting)}</b>',
                _area("waiting", samples, waiting, max([1, *waiting])),
            ),
            _chart(
                f"Longest wait in the last ten minutes: at most {seconds(max(waits))}",
                f'<span><i class="key wait"></i>Longest wait</span><b>at most {seconds(max(waits))}</b>',
                _area("wait", samples, waits, max([0.1, *waits])),
            ),
            _lag_chart(pool["samples"]) if pool["lag"] else "",
        ]
    )


def _lag_chart(samples: Sequence[Json]) -> str:
    known = [sample for sample in samples if sample["lag"] is not None]
    lags = [sample["lag"] for sample in known]
    most = max(lags, default=0.0)
    return _chart(
        f"Behind the primary in the last ten minutes: at most {seconds(most)}",
        f'<span><i class="key wait"></i>Behind the primary</span><b>at most {seconds(most)}</b>',
        _area("wait", known, lags, max(0.1, most)),
    )


def _chart(label: str, caption: str, shapes: str) -> str:
    return (
        f'<figure><figcaption>{caption}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="{label}">{shapes}</svg>'
        '<div class="axis" aria-hidden="true"><span>10 min ago</span><span>now</span></div></figure>'
    )


def _area(name: str, samples: Sequence[Json], values: Sequence[float], top: float) -> str:
    """Return the area under `values` as a path: each since the one before; a gap in the samples is one there, too."""
    path, last = "", float("-inf")
    for sample, value in zip(samples, values, strict=True):
        x, y = WIDTH * (1 - sample["ago"] / SPAN), HEIGHT * (1 - value / top)
        if x - last > 3 * STEP:
            path += f"{_END if path else ''}M{x - STEP:.1f} {HEIGHT}"
        path += f"V{y:.1f}H{x:.1f}"
        last = x
    return f'<path class="{name}" d="{path}{_END}"/>'


#: The end of a run of samples: down to the axis, and back along it.
_END = f"V{HEIGHT}Z"
