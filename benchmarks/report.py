"""What the documentation shows of a run: a table for each question, and drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

from benchmarks.harness import Figure
from benchmarks.harness import Question


#: Ours, the limit, and the others.
COLOURS = {"zpgpool": "#2a7f62", "limit": "#999999", "": "#c9b458"}

#: The columns of the summary, by the names in the questions.
COLUMNS = {
    "zpgpool persistent": "zpgpool persistent",
    "zpgpool threaded": "zpgpool threaded",
    "psycopg2.pool": "psycopg2.pool",
    "psycopg2-pool": "psycopg2-pool",
    "psycopg_pool": "psycopg_pool",
    "SQLAlchemy": "SQLAlchemy",
    "SQLAlchemy + pre_ping": "with pre_ping",
    "DBUtils": "DBUtils PooledDB",
    "DBUtils PersistentDB": "PersistentDB",
    "ZPsycopgDA": "ZPsycopgDA",
    "connect per request": "connect each time",
    "thread-local (limit)": "limit",
    "limit": "limit",
}


def _colour(peer: str) -> str:
    return next(colour for word, colour in COLOURS.items() if word in peer)


def draw(question: Question, path: Path) -> None:
    """Draw the medians as bars, with their quartiles."""
    drawing = Drawing(figsize=(8, 0.9 + 0.36 * len(question.figures)), layout="constrained")
    axes = drawing.subplots()
    figures = question.figures[::-1]
    errors = [
        [max(0.0, figure.value - figure.low) for figure in figures],
        [max(0.0, figure.high - figure.value) for figure in figures],
    ]
    axes.barh(
        [figure.peer for figure in figures],
        [figure.value for figure in figures],
        xerr=errors,
        color=[_colour(figure.peer) for figure in figures],
        ecolor="#555555",
    )
    axes.bar_label(axes.containers[1], labels=[f" {figure.value:,.4g}" for figure in figures], padding=3)
    axes.set_xlabel(f"{question.unit} ({'less' if question.is_less_better else 'more'} is better)")
    axes.set_title(question.title, loc="left", fontsize=11)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, metadata={"Date": None})


def draw_lost(questions: list[Question], path: Path) -> None:
    """Draw the requests that were lost: a row for each pool, a mark for each request."""
    drawing = Drawing(figsize=(8, 0.5 + 1.5 * len(questions)), layout="constrained")
    panels = drawing.subplots(len(questions), sharex=True, squeeze=False)[:, 0]
    for axes, question in zip(panels, questions, strict=True):
        figures = question.figures[::-1]
        axes.eventplot(
            [figure.marks for figure in figures], colors="#b3322a", lineoffsets=range(len(figures)), linelengths=0.7
        )
        axes.set_yticks(range(len(figures)), [f"{figure.peer}: {figure.value:.0f} lost" for figure in figures])
        for label, figure in zip(axes.get_yticklabels(), figures, strict=True):
            label.set(color=_colour(figure.peer) if "zpgpool" in figure.peer else "#555555", fontsize=8)
        axes.set_title(question.title.partition(": ")[2], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds; each mark is a request that got an error")
    drawing.savefig(path, metadata={"Date": None})


def table(question: Question) -> list[str]:
    """Return a question as reStructuredText."""
    more = list(dict.fromkeys(name for figure in question.figures for name in figure.more))
    has_ratio = any(figure.ratio is not None for figure in question.figures)
    head = ["", question.unit, "quartiles", *([f"x {question.reference}"] if has_ratio else []), *more]
    lines = [question.title, "-" * len(question.title), "", ".. list-table::", "   :header-rows: 1", ""]
    lines += _row(head)
    for figure in question.figures:
        cells = [figure.peer, f"{figure.value:,.4g}", f"{figure.low:,.4g} to {figure.high:,.4g}"]
        between = f" ({figure.between[0]:.2f} to {figure.between[1]:.2f})" if figure.between else ""
        cells += [f"{figure.ratio:.2f}{between}" if figure.ratio is not None else ""] if has_ratio else []
        cells += [f"{figure.more[name]:,.4g}" if name in figure.more else "" for name in more]
        lines += _row(cells)
    notes = [note for note in (question.note, _order(question)) if note]
    return [*lines, "", *(line for note in notes for line in (note, ""))]


def _order(question: Question) -> str:
    """Say whether the runs agree on who is before whom."""
    orders, runs = question.orders, len(question.orders)
    if runs < 2:
        return ""
    if all(order == orders[-1] for order in orders):
        return f"The order of all is the same in the last {runs} runs."
    place = next(place for place in range(len(orders[-1])) if len({tuple(order[: place + 1]) for order in orders}) > 1)
    rest = "; ".join(", ".join(order[place : place + 3]) for order in orders)
    if place == 0:
        return f"Nobody is first in each of the last {runs} runs: {rest}."
    return f"The first {place} are the same in the last {runs} runs, in this order; behind them: {rest}."


def summary(questions: list[Question]) -> list[str]:
    """Return one table of all that was asked of several peers: these in columns, the questions in rows."""
    rows = [question for question in questions if sum(figure.peer in COLUMNS for figure in question.figures) > 2]
    lines = [".. list-table::", "   :header-rows: 1", "   :class: summary", ""]
    lines += _row(["", *dict.fromkeys(COLUMNS.values())])
    for question in rows:
        cells = {COLUMNS[figure.peer]: figure for figure in question.figures if figure.peer in COLUMNS}
        sound = [figure for name, figure in cells.items() if name != "limit" and not figure.more.get("errors")]
        best = min(sound, key=lambda figure: figure.value * (1 if question.is_less_better else -1), default=None)
        texts = []
        for name in dict.fromkeys(COLUMNS.values()):
            figure = cells.get(name)
            text = "" if figure is None else f"{figure.value:,.3g}" if figure.value < 1000 else f"{figure.value:,.0f}"
            errors = figure.more.get("errors", 0) if figure is not None else 0
            text += f" ({errors:,.0f} errors)" if errors else ""
            is_bold = figure in sound and _is_level(figure, best, question.is_less_better)
            texts.append(f"**{text}**" if is_bold else text)
        arrow = "less" if question.is_less_better else "more"
        lines += _row([f"{question.title} ({question.unit}, {arrow} is better)", *texts])
    return [*lines, ""]


def _is_level(figure: Figure, best: Figure, is_less_better: bool) -> bool:
    """Whether the interval of a figure's median ratio reaches the best one's: nothing says then that it is behind."""
    if figure is best or not (figure.between and best.between):
        return figure is best
    if is_less_better:
        return figure.between[0] <= best.between[1]
    return figure.between[1] >= best.between[0]


def _row(cells: list[str]) -> list[str]:
    return [f"   {'* -' if number == 0 else '  -'} {cell}".rstrip() for number, cell in enumerate(cells)]


def write(folder: Path, about: dict[str, Any], questions: list[Question]) -> None:
    """Write the drawings, and the tables that `docs/benchmarks.rst` and `docs/fleets.rst` include."""
    mpl.rcParams["svg.hashsalt"] = "zpgpool"  # the same run gives the same file
    mpl.rcParams["svg.fonttype"] = "none"
    if lost := [question for question in questions if question.name.startswith("lost-")]:
        draw_lost(lost, folder / "lost.svg")
    fleets = [question for question in questions if question.name.startswith("fleet-")]
    _write(folder, "tables.rst", about, [question for question in questions if question not in fleets])
    _write(folder, "fleets.rst", about, fleets)
    (folder / "summary.rst").write_text("\n".join(summary(questions)).rstrip() + "\n")


def _write(folder: Path, name: str, about: dict[str, Any], questions: list[Question]) -> None:
    lines = [f"Measured on {about['date']}: {about['machine']}.", ""]
    for question in questions:
        lines += table(question)
        path = folder / f"{question.name}.svg"
        draw(question, path)
        lines += [f".. image:: /benchmarks/{path.name}", f"   :alt: {question.title}", ""]
    (folder / name).write_text("\n".join(lines).rstrip() + "\n")
