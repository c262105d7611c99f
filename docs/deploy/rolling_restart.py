"""Replace the processes behind HAProxy one after the other, without a request that fails.

python rolling_restart.py SOCKET BACKEND "systemctl restart shop@{port}"
"""

import csv
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable


def ask(command: str) -> str:
    """Say something to HAProxy's admin socket, and return its answer."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("r") as answer:
        sock.connect(sys.argv[1])
        sock.sendall(f"{command}\n".encode())
        return answer.read()


def servers() -> dict[str, dict[str, str]]:
    """Return what HAProxy knows of each server."""
    rows = csv.DictReader(ask(f"show stat {sys.argv[2]} 4 -1").removeprefix("# ").splitlines())
    return {row["svname"]: row for row in rows}


def answers(address: str) -> bool:
    """Whether the process itself does: HAProxy may not have noticed yet that it was away."""
    try:
        with urllib.request.urlopen(f"http://{address}/alive", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    """Wait for a minute at most."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    sys.exit(f"not {what} after a minute: look at it before the next one is restarted")


def replace(name: str, address: str) -> None:
    """Let a process finish, start it again, and let it serve."""
    ask(f"set server {sys.argv[2]}/{name} state drain")
    wait_until(f"without requests: {name}", lambda: servers()[name]["scur"] == "0")
    subprocess.run(sys.argv[3].format(port=address.rpartition(":")[2]), shell=True, check=True)
    wait_until(f"answering: {name}", lambda: answers(address))
    ask(f"set server {sys.argv[2]}/{name} state ready")
    wait_until(f"up: {name}", lambda: servers()[name]["status"].startswith("UP"))


for name, row in servers().items():
    replace(name, row["addr"])
