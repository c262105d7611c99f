"""The drawings of the documents, as SVG: `make screenshots` writes them; tests/test_docs.py compares them with this.

A drawing is boxes, arrows between them, and words. Its colours follow the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path


IMAGES = Path(__file__).parent / "images"

STYLE = """
text { fill: #1c2733; text-anchor: middle } .left { text-anchor: start } .small { fill: #55626e; font-size: 11.5px }
.title { font-weight: 600 } rect { fill: #ffffff; stroke: #2c5f8a; stroke-width: 1.3 }
.paper { fill: #fcfcfa; stroke: none } .ours { fill: #dcebf7 }
.good { fill: #d8f0dc; stroke: #2f7d43 } .bad { fill: #fbe0d8; stroke: #b9431a }
.wait { fill: #fbf0cf; stroke: #a57c10 }
.group { fill: none; stroke: #98a4b0; stroke-dasharray: 4 3 } .line { fill: none; stroke: #55626e; stroke-width: 1.4 }
.arrow { marker-end: url(#head) } .dashed { stroke-dasharray: 5 4 } #head path { fill: #55626e }
@media (prefers-color-scheme: dark) {
text { fill: #e4e8ec } .small { fill: #a9b4bf } rect { fill: #22272d; stroke: #6ea8d6 }
.paper { fill: #1a1d21; stroke: none } .ours { fill: #24415a }
.good { fill: #1f4429; stroke: #6cbf7f } .bad { fill: #5a2a1c; stroke: #e58a6a }
.wait { fill: #4d4015; stroke: #d8b44a }
.group { fill: none; stroke: #6b7681 } .line { stroke: #a9b4bf } #head path { fill: #a9b4bf } }
"""


class Drawing:
    """What is drawn, from the top left corner; all numbers are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
            ' font-family="sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"',
            'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
            # Of its own: a page may be dark where the browser is light.
            f'<rect class="paper" width="{width}" height="{height}"/>',
        ]

    def box(self, x: int, y: int, width: int, height: int, *lines: str, kind: str = "") -> None:
        """Draw a box with lines of text in its middle."""
        radius = 0 if kind == "group" else 6
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"/>')
        first = y + height / 2 + 4.5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.words(x + width // 2, round(first + 16 * number), line)

    def words(self, x: int, y: int, line: str, kind: str = "") -> None:
        """Write a line of text; its middle is at `x`, or its beginning, if it is of the kind `left`."""
        self._parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(line)}</text>')

    def arrow(self, *points: tuple[int, int], kind: str = "arrow") -> None:
        """Draw an arrow from the first point to the last."""
        path = "L".join(f"{x} {y}" for x, y in points)
        self._parts.append(f'<path class="line {kind}" d="M{path}"/>')

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def checkout() -> Drawing:
    """Draw the life of a checkout."""
    drawing = Drawing(
        760, 430, "The life of a checkout: the hot path on the left, what may happen in between on the right"
    )
    box, arrow, words = drawing.box, drawing.arrow, drawing.words
    box(20, 20, 180, 40, "getconn()", kind="ours")
    box(20, 110, 180, 50, "this thread's idle one,", "checked just now", kind="good")
    box(20, 220, 180, 50, "its user", kind="ours")
    box(20, 340, 180, 50, "putconn():", "clean? idle again", kind="good")
    arrow((110, 60), (110, 108))
    words(118, 88, "no lock", "left small")
    arrow((110, 160), (110, 218))
    words(118, 192, "the hot path", "left small")
    arrow((110, 270), (110, 338))
    box(290, 20, 180, 50, "an idle one of", "any other thread")
    box(290, 110, 180, 50, "check it: age, socket,", "ping, the hook `check`")
    box(290, 220, 180, 50, "the queue: wait for a", "returned one, or room", kind="wait")
    box(560, 20, 180, 50, "room: open a new one")
    box(560, 110, 180, 50, "close it: its slot", "is room again", kind="bad")
    arrow((200, 45), (288, 45))
    words(245, 38, "none", "small")
    arrow((200, 135), (288, 135))
    words(245, 128, "in doubt", "small")
    arrow((380, 70), (380, 108))
    arrow((470, 45), (558, 45))
    words(515, 38, "none", "small")
    arrow((470, 135), (558, 135))
    words(525, 128, "unfit", "small")
    arrow((290, 150), (250, 232), (202, 236))
    words(262, 200, "fit", "left small")
    arrow((740, 45), (752, 45), (752, 306), (150, 306), (150, 272))
    words(620, 300, "opened", "small")
    arrow((560, 62), (490, 62), (490, 240), (472, 240))
    words(496, 205, "maxconn are open", "left small")
    arrow((290, 254), (202, 254))
    words(245, 270, "served", "small")
    box(290, 340, 180, 50, "somebody waits? the first", "in the queue gets it", kind="wait")
    arrow((200, 365), (288, 365))
    arrow((380, 340), (380, 272))
    box(560, 340, 180, 50, "rolled back and reset,", "or closed", kind="bad")
    arrow((110, 390), (110, 414), (650, 414), (650, 392))
    words(330, 408, "not clean", "small")
    arrow((650, 160), (650, 262), (472, 262), kind="arrow dashed")
    words(560, 256, "serves the queue", "left small")
    return drawing


def outage() -> Drawing:
    """Draw what becomes of requests while the server is away."""
    drawing = Drawing(
        760,
        250,
        "An outage: a running request begins again, new requests wait and later are refused, until the server is back",
    )
    box, words, arrow = drawing.box, drawing.words, drawing.arrow
    for y, text in (
        (30, "the server"),
        (80, "attempts to connect"),
        (132, "a running request"),
        (192, "a new request"),
    ):
        words(10, y + 4, text, "left")
    box(150, 18, 110, 24, "up", kind="good")
    box(260, 18, 335, 24, "down", kind="bad")
    box(595, 18, 155, 24, "up", kind="good")
    for x in (264, 272, 284, 300, 322, 350, 372, 390, 412, 475, 535, 595):
        arrow((x, 74), (x, 88), kind="")
    words(266, 108, "every 50 to 250 ms", "left small")
    words(450, 108, "once a second", "left small")
    box(200, 120, 60, 24, "runs", kind="good")
    box(260, 120, 160, 24, "waits", kind="wait")
    words(
        150,
        162,
        "a safe request begins again when the server is back in time; another one gets the error",
        "left small",
    )
    box(260, 180, 160, 24, "waits in the queue", kind="wait")
    box(420, 180, 175, 24, "refused at once: 503", kind="bad")
    box(595, 180, 155, 24, "served", kind="good")
    arrow((260, 216), (420, 216))
    words(340, 234, "outage_wait", "small")
    return drawing


def threads() -> Drawing:
    """Draw which thread has which connection in a persistent pool and in a threaded one."""
    drawing = Drawing(
        760, 330, "Four threads: a persistent pool has a connection for each; in a threaded one they share two"
    )
    box, arrow, words = drawing.box, drawing.arrow, drawing.words
    for left, title, count in (
        (10, "PersistentConnectionPool, maxconn 4", 4),
        (390, "ThreadedConnectionPool, maxconn 2", 2),
    ):
        box(left, 36, 360, 226, kind="group")
        words(left + 180, 24, title, "title")
        words(left + 60, 56, "threads", "small")
        words(left + 180, 56, "the pool", "small")
        words(left + 300, 56, "PostgreSQL", "small")
        for number in range(4):
            y = 68 + number * 48
            has = number < count
            box(left + 14, y, 92, 32, f"thread {number + 1}", kind="ours" if has else "wait")
            if has:
                box(left + 134, y, 92, 32, "connection", kind="good")
                box(left + 254, y, 92, 32, "session")
                arrow((left + 106, y + 16), (left + 132, y + 16))
                arrow((left + 226, y + 16), (left + 252, y + 16))
    box(524, 164, 92, 80, "the queue", "1. thread 3", "2. thread 4", kind="wait")
    arrow((496, 180), (522, 190))
    arrow((496, 228), (522, 220))
    arrow((570, 164), (570, 150))
    words(10, 284, "Each thread finds its own connection again.", "left")
    words(10, 304, "Nobody waits.", "left")
    words(390, 284, "A thread gets the connection it had last, or another one.", "left")
    words(390, 304, "The others wait, first come first served.", "left")
    return drawing


def topology() -> Drawing:
    """Draw the connections that a site of several machines and processes needs."""
    drawing = Drawing(
        760, 300, "Two machines, two processes on each, eight threads and a pool in each process: 32 connections"
    )
    box, arrow, words = drawing.box, drawing.arrow, drawing.words
    for top, name in ((20, "machine A"), (150, "machine B")):
        box(10, top, 400, 116, kind="group")
        words(22, top + 18, name, "left small")
        for number in (0, 1):
            y = top + 26 + number * 44
            box(22, y, 90, 36, f"process {number + 1}", kind="ours")
            box(140, y, 90, 36, "8 threads", kind="ours")
            box(258, y, 140, 36, "pool, maxconn 8", kind="good")
            arrow((112, y + 18), (138, y + 18))
            arrow((230, y + 18), (256, y + 18))
            arrow((398, y + 18), (560, 124 + (top > 20) * 22 + number * 11))
            words(440, y + 12, "8", "small")
    box(562, 90, 188, 100, "PostgreSQL", "max_connections 100", "13 reserved for others")
    words(656, 220, "2 * 2 * 8 = 32, and 32 <= 87", "title")
    words(
        10,
        290,
        "machines * processes * maxconn, and what superusers, backups, cron and people need: at most max_connections",
        "left small",
    )
    return drawing


def filters() -> Drawing:
    """Draw the order of the filters, and the end of a request."""
    drawing = Drawing(
        760, 340, "From the outside: the server, zpgpool's filter, the transaction's filter, the application"
    )
    box, arrow, words = drawing.box, drawing.arrow, drawing.words
    columns = (10, 200, 390, 580)
    names = ("server", "zpgpool", "tm, or pyramid_tm", "application")
    for x, name in zip(columns, names, strict=True):
        box(x, 14, 170, 34, name, kind="ours" if name == "zpgpool" else "")
        arrow((x + 85, 48), (x + 85, 290 if name in names[:2] else 235), kind="dashed")
    middle = {name: x + 85 for name, x in zip(names, columns, strict=True)}
    steps = (
        (72, "server", "zpgpool", "request"),
        (92, "zpgpool", "tm, or pyramid_tm", ""),
        (112, "tm, or pyramid_tm", "application", "begin"),
        (146, "application", "zpgpool", "get_connection(): check out"),
        (180, "application", "tm, or pyramid_tm", "body"),
        (214, "tm, or pyramid_tm", "zpgpool", "commit, then the body"),
        (248, "zpgpool", "server", "status, headers, body"),
        (282, "server", "zpgpool", "body.close()"),
    )
    for y, start, end, label in steps:
        arrow((middle[start], y), (middle[end], y))
        words((middle[start] + middle[end]) // 2, y - 5, label, "small")
    box(210, 292, 150, 36, "return: rolled back,", "reset, idle again", kind="good")
    words(376, 306, "A list as body: the connection is returned when the application", "left small")
    words(376, 322, "has returned. A stream: when the server has sent it all.", "left small")
    return drawing


def twophase() -> Drawing:
    """Draw a two-phase commit, and when it is in doubt."""
    drawing = Drawing(
        760, 230, "Two phases: between PREPARE TRANSACTION and COMMIT PREPARED a crash leaves the transaction in doubt"
    )
    box, arrow, words = drawing.box, drawing.arrow, drawing.words
    for y, name in ((34, "the pool"), (94, "the ZODB"), (154, "PostgreSQL")):
        words(10, y + 4, name, "left")
    box(110, 18, 150, 34, "your statements", kind="ours")
    box(268, 18, 120, 34, "vote: PREPARE", kind="ours")
    box(396, 78, 110, 34, "vote, then finish")
    box(514, 18, 140, 34, "COMMIT PREPARED", kind="ours")
    box(110, 138, 158, 34, "a transaction", kind="good")
    box(268, 138, 316, 34, "prepared: survives a crash, keeps its locks", kind="wait")
    box(584, 138, 166, 34, "committed", kind="good")
    arrow((328, 52), (328, 136))
    arrow((584, 52), (584, 136))
    arrow((388, 35), (450, 35), (450, 76))
    arrow((506, 95), (540, 95), (540, 54))
    arrow((268, 192), (584, 192))
    words(268, 212, "in doubt after a crash: `zpgpool recover` asks the ZODB, and commits or rolls back", "left small")
    words(110, 192, "a crash rolls back", "left small")
    return drawing


def replica() -> Drawing:
    """Draw which server a request reads from."""
    drawing = Drawing(
        760, 320, "Which server a request reads from: unsafe methods and clients that wrote just now, the primary"
    )
    box, arrow, words = drawing.box, drawing.arrow, drawing.words
    box(10, 20, 150, 44, "a request", kind="ours")
    box(10, 110, 200, 50, "GET, HEAD or OPTIONS?")
    box(280, 110, 200, 50, "has its client written in", "the last 8 seconds?")
    box(550, 110, 200, 50, "standby well, and at", "most max_lag behind?")
    box(10, 240, 330, 50, "primary", "reads and writes", kind="good")
    box(550, 240, 200, 50, "standby", "reads only", kind="good")
    arrow((85, 64), (85, 108))
    arrow((210, 135), (278, 135))
    words(244, 128, "yes", "small")
    arrow((480, 135), (548, 135))
    words(514, 128, "no", "small")
    arrow((85, 160), (85, 238))
    words(93, 205, "no", "left small")
    arrow((310, 160), (310, 238))
    words(318, 205, "yes: the cookie, or the header", "left small")
    arrow((600, 160), (600, 222), (500, 222), (500, 258), (342, 258))
    words(512, 216, "no", "left small")
    arrow((690, 160), (690, 238))
    words(698, 205, "yes", "left small")
    arrow((550, 278), (342, 278), kind="arrow dashed")
    words(446, 295, "lost, or a write: begins again", "small")
    words(
        10,
        312,
        "A client that writes gets the cookie `zpgpool-written`: its next reads go to the primary.",
        "left small",
    )
    return drawing


DRAWINGS: tuple[Callable[[], Drawing], ...] = (checkout, outage, threads, topology, filters, twophase, replica)


def main() -> None:
    """Write the drawings."""
    for draw in DRAWINGS:
        (IMAGES / f"{draw.__name__}.svg").write_text(str(draw()))


if __name__ == "__main__":
    main()
