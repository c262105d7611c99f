"""The proxies of docs/deploy, as they run: nobody outside sees the status page, however the path is written."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from benchmarks.harness import free_port
from paste.urlmap import URLMap

from bouncer import deployed
from conftest import eventually
from conftest import missing
from serving import waitress
from zpgpool.status import StatusApp


PATHS = [
    *[
        "/status",
        "/status/",
        "/status/json",
        "/status/metrics",
        "/STATUS",
        "/Status/json",
        "/status?x",
        "/status/?x=/y",
    ],
    *[
        "//status",
        "///status/json",
        "//status//json",
        "/status//json",
        "/./status",
        "/x/../status",
        "/status/../status",
    ],
    *[
        "/%73tatus",
        "/%73%74%61%74%75%73",
        "/%53tatus",
        "/s%74atus/json",
        "/statu%73/metrics",
        "/%2fstatus",
        "/%2Fstatus",
    ],
    *[
        "/%2f%2fstatus/json",
        "/%2e/status",
        "/x/%2e%2e/status",
        "/status%2fjson",
        "/status%3f",
        "/status%23",
        "/status;x",
    ],
    *["/status%00", "/%2573tatus", "/%252fstatus", "/status%0d%0aX:1", "/status%20", "/%20/status", "/\\status"],
    *["/%5cstatus", "/status.css", "/status/status.css", "/status/icon.svg", "/.//status"],
]

HEADERS: list[dict[str, str]] = [
    {},
    {"Host": "localhost"},
    {"Host": "127.0.0.1", "X-Forwarded-For": "127.0.0.1"},
    {"Host": "[::1]", "X-Real-IP": "127.0.0.1", "X-Client-IP": "127.0.0.1", "CF-Connecting-IP": "127.0.0.1"},
    {"X-Original-URL": "/status", "X-Rewrite-URL": "/status"},
]


def find(program: str, package: str) -> str:
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        missing(program, f"apt-get install {package}")
    return path


def nginx(folder: Path, port: int, site: int) -> list[str]:
    """Return the command that runs nginx with the documented file, on other ports."""
    text = deployed("nginx.conf").replace("127.0.0.1:80;", f"127.0.0.1:{port};").replace("8081", str(site))
    text = text.replace("    server 127.0.0.1:8082;\n", "")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{text}\n}}\n"
    )
    return [find("nginx", "nginx"), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]


def haproxy(folder: Path, port: int, site: int) -> list[str]:
    """Return the command that runs HAProxy likewise."""
    text = deployed("haproxy.cfg").replace("bind 127.0.0.1:80", f"bind 127.0.0.1:{port}").replace("8081", str(site))
    text = text.replace("    server shop2 127.0.0.1:8082\n", "").replace("option httpchk GET /alive", "")
    (folder / "haproxy.cfg").write_text(text)
    return [find("haproxy", "haproxy"), "-f", str(folder / "haproxy.cfg")]


def apache(folder: Path, port: int, site: int) -> list[str]:
    """Return the command that runs Apache likewise."""
    program = find("apache2", "apache2")
    text = deployed("apache.conf").replace("127.0.0.1:80>", f"127.0.0.1:{port}>").replace("8081", str(site))
    modules = ["mpm_event", "authz_core", "proxy", "proxy_http"]
    loads = "".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in modules)
    (folder / "apache.conf").write_text(
        f"ServerRoot {folder}\nServerName shop.example\nPidFile {folder}/pid\nErrorLog {folder}/error.log\n"
        f"Mutex file:{folder}\nListen 127.0.0.1:{port}\n{loads}{text}"
    )
    return [program, "-f", str(folder / "apache.conf"), "-DFOREGROUND"]


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """A waitress with a page, and the status page without a token: it strips the proxies' headers."""

    def shop(environ: object, start_response: object) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])  # type: ignore[operator]
        return [b"shop"]

    pages = URLMap(shop)
    pages["/"] = shop
    pages["/status"] = StatusApp()
    with waitress(pages) as port:
        yield port


def ask(port: int, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as conn:
        conn.putrequest("GET", path, skip_host="Host" in headers)
        for name, value in headers.items():
            conn.putheader(name, value)
        conn.endheaders()
        response = conn.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize("proxy", [nginx, haproxy, apache])
def test_nobody_outside_sees_the_status_page(
    tmp_path_factory: pytest.TempPathFactory, site: int, proxy: object
) -> None:
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()
    folder.chmod(0o777)
    command = proxy(folder, port, site)  # type: ignore[operator]
    assert ask(site, "/status/json", {"Host": "localhost"})[0] == 200  # it is there, for this machine

    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:

        def is_up() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                return ask(port, "/", {"Host": "shop.example"}) == (200, b"shop")
            except OSError:
                return False

        try:
            eventually(is_up)
            for path in PATHS:
                for headers in HEADERS:
                    status, body = ask(port, path, headers)
                    # What means something else to the site is the shop's; a proxy may refuse it on its own, too.
                    assert status in (400, 403, 404) or (status, body) == (200, b"shop"), (path, headers, status, body)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
