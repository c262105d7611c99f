"""A real Chromium without a window, spoken to over its pipe (DevTools protocol): no driver, no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import eventually
from conftest import missing


#: Chromium reads from descriptor 3 and writes to 4.
LAUNCH = """
import fcntl, os, sys
its_in, its_out = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(its_in, 3)
os.dup2(its_out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page in a browser. Commands and events are those of https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            missing("Chromium", "apt-get install chromium")
        our_end, its_out = os.pipe()
        its_in, self._write = os.pipe()
        self._read = os.fdopen(our_end, "rb", buffering=0)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(its_in), str(its_out), program, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[its_in, its_out],
            )
        os.close(its_in)
        os.close(its_out)
        self._number = 0
        self._session: str | None = None
        self._rest = b""
        #: What the page's console said, and what broke its policy.
        self.complaints: list[str] = []
        [page] = eventually(self._pages)
        self._session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _pages(self) -> list[Any]:
        targets = self.send("Target.getTargets")["targetInfos"]
        return [target for target in targets if target["type"] == "page"]

    def send(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._read.read(1 << 16)
            assert more, "Chromium has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url')}")
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False, script: bool = True) -> None:
        """Show a page, and wait until it is complete."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.resize(width, height)
        self.send("Page.navigate", url=url)
        eventually(lambda: self.run("document.readyState == 'complete' && location.href != 'about:blank'"))

    def forget(self) -> None:
        """Leave the page, which may still ask a site that has gone, and forget what it has complained of."""
        self.send("Page.navigate", url="about:blank")
        eventually(lambda: self.run("document.readyState == 'complete' && location.href == 'about:blank'"))
        self.complaints.clear()

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def shoot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def quit(self) -> None:
        try:
            self._session = None
            self.send("Browser.close")
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            self._read.close()
            os.close(self._write)


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Run a browser on a folder of its own."""
    folder.mkdir(exist_ok=True)
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.quit()
        time.sleep(0.1)  # its children write to the folder a moment longer
