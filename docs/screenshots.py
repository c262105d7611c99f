"""Take the pictures of the documents from the real pages under real load: `make screenshots`.

The demo runs, one of its requests holds a lock, others wait for it and for a connection.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from urllib.request import Request
from urllib.request import urlopen

from benchmarks.harness import free_port
from rich.console import Console

import zpgpool
from browser import chromium
from zpgpool.monitor.top import draw


IMAGES = Path(__file__).parent / "images"

SOURCE = Path(zpgpool.__file__).parent.parent

#: How long the demo's load runs before the pictures are taken, in seconds: the charts want something to show.
LOAD = 30.0

#: How long the lock is held before, in seconds: less than the demo holds it.
HELD = 4.0


#: What docs/status.rst explains, in the order of its list: where the numbers stand on the picture.
PARTS = (
    ".verdict",
    ".charts",
    "table td[data-label=For]",
    "table td[data-label=Request]",
    "table td[data-label=Server]",
    "table td[data-label='At line']",
)

#: Puts the numbers on the page, outside of what renews itself.
NUMBER_THEM = """
for (const [index, part] of PARTS.entries()) {
    const place = document.querySelector("section " + part).getBoundingClientRect()
    const badge = document.body.appendChild(document.createElement("b"))
    badge.textContent = index + 1
    Object.assign(badge.style, {
        position: "absolute", left: `${scrollX + place.left - 20}px`, top: `${scrollY + place.top - 9}px`,
        width: "20px", height: "20px", borderRadius: "50%", background: "#b9431a", color: "#fff",
        font: "bold 13px/20px sans-serif", textAlign: "center",
    })
}
"""


def main() -> None:
    """Write `status.png`, `status-parts.png` and `top.svg`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser:
        command = [sys.executable, "-m", "zpgpool", "demo", "--port", str(port), "--data", f"{folder}/data"]
        demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(url, demo)
            for button, seconds in (("load", LOAD / 2), ("load", LOAD / 2), ("lock", HELD)):
                print(f"{button}, and {seconds:g} s of load ...", flush=True)
                urlopen(Request(f"{url}/{button}", method="POST")).close()
                time.sleep(seconds)
            browser.open(f"{url}/status", width=1100, height=860)
            # What a screen shows, not the whole page: the README has it, too.
            (IMAGES / "status.png").write_bytes(b64decode(browser.send("Page.captureScreenshot")["data"]))
            browser.run(f"{{ const PARTS = {list(PARTS)}; {NUMBER_THEM} }}")
            (IMAGES / "status-parts.png").write_bytes(b64decode(browser.send("Page.captureScreenshot")["data"]))
            with urlopen(f"{url}/status/json") as answer:
                # Where it stands on this machine is nobody's business.
                snapshot = json.loads(answer.read().decode().replace(str(SOURCE), "/srv/shop/lib"))
        finally:
            demo.terminate()
            demo.wait(30)
    with open(os.devnull, "w") as nothing:
        console = Console(record=True, width=160, file=nothing)
        console.print(draw(snapshot))
    svg = console.export_svg(title="zpgpool top http://127.0.0.1:8080/status")
    # Without fonts from elsewhere: a reader's own will do.
    (IMAGES / "top.svg").write_text(re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL))


def wait_for(url: str, demo: subprocess.Popen[bytes]) -> None:
    """Wait until the demo answers."""
    until = time.monotonic() + 60
    while True:
        assert demo.poll() is None, "the demo has ended"
        try:
            urlopen(url).close()
            return
        except OSError:
            assert time.monotonic() < until, "the demo does not answer"
            time.sleep(0.2)


if __name__ == "__main__":
    main()
