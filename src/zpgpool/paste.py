"""PasteDeploy: `use = egg:zpgpool`, and `use = egg:zpgpool#status`, in an ini file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .registry import make_pool
from .registry import query_pool
from .settings import convert_with
from .settings import count
from .settings import flag
from .settings import hook
from .settings import list_known
from .settings import optional
from .settings import read_options
from .settings import SettingError
from .settings import TABLE
from .status import StatusApp
from .wsgi import PoolMiddleware


if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


log = logging.getLogger("zpgpool")

#: The filter's own options and their defaults, beside those of the pool.
FILTER_OPTIONS = {
    "pool": "persistent",
    "eager": "false",
    "retry_after": "5",
    "cancel_on_disconnect": "false",
    "retry_safe": "true",
    "unavailable": "none",
}

KNOWN = {*FILTER_OPTIONS, *TABLE, "dsn"}

STATUS_OPTIONS = {"listen", "loopback", "peers", "share", "show_sql", "token"}

PREFIX = "zpgpool."


def filter_app_factory(app: WSGIApplication, global_conf: Mapping[str, str], **local_conf: str) -> PoolMiddleware:
    """Return `app` behind a PoolMiddleware (PasteDeploy's `paste.filter_app_factory`).

    With `dsn`, or another connection keyword of libpq, the pool is made, and registered as `name` in the global
    registry; without, the filter serves the pool that is registered as `name` already. An option in `[DEFAULT]` or
    on the command line needs the prefix `zpgpool.`: there PasteDeploy hides a filter's option of the same name.

    Raises SettingError for what is unknown, missing or cannot be, naming the option and the file.
    """
    with _naming("zpgpool filter", global_conf):
        return _make(app, _collect(global_conf, local_conf))


def status_app_factory(global_conf: Mapping[str, str], **local_conf: str) -> StatusApp:
    """Return the status page (PasteDeploy's `paste.app_factory`): see `StatusApp`.

    Its options: `listen`, `loopback`, `peers` (with spaces between), `share`, `show_sql`, and `token`, which must be
    `ENV:NAME`: others read what stands in a file.
    Raises SettingError for what is unknown or cannot be, naming the option and the file.
    """
    with _naming("zpgpool status", global_conf):
        options = {name.replace("-", "_"): value for name, value in local_conf.items()}
        if strange := sorted(set(options) - STATUS_OPTIONS):
            raise SettingError(f"unknown option {strange[0]!r} (known: {', '.join(sorted(STATUS_OPTIONS))})")
        return StatusApp(
            token=_read_token(options["token"]) if "token" in options else None,
            show_sql=convert_with(flag, "show_sql", options.get("show_sql", "false")),
            loopback=convert_with(flag, "loopback", options.get("loopback", "true")),
            share=_read_folder(options["share"]) if "share" in options else None,
            listen=options.get("listen"),
            peers=options.get("peers", "").split(),
        )


def _read_token(where: str) -> str:
    if not where.startswith("ENV:"):
        raise SettingError("option 'token': expected ENV:NAME, a variable of the environment that has it")
    return _read_variable("token", where)


def _read_folder(where: str) -> str:
    return _read_variable("share", where) if where.startswith("ENV:") else where


def _read_variable(option: str, where: str) -> str:
    name = where.removeprefix("ENV:").strip()
    if not os.environ.get(name):
        raise SettingError(f"option {option!r}: the environment has no variable {name!r}")
    return os.environ[name]


@contextmanager
def _naming(what: str, global_conf: Mapping[str, str]) -> Iterator[None]:
    """Return a context manager that says in a SettingError what it is about, and in which file."""
    try:
        yield
    except SettingError as error:
        where = f" (in {global_conf['__file__']})" if "__file__" in global_conf else ""
        raise SettingError(f"{what}: {error}{where}") from None


def _collect(global_conf: Mapping[str, str], local_conf: Mapping[str, str]) -> dict[str, str]:
    options = {name.removeprefix(PREFIX): value for name, value in global_conf.items() if name.startswith(PREFIX)}
    options.update(local_conf)
    options = {name.replace("-", "_"): value for name, value in options.items()}
    for name in sorted(KNOWN & set(global_conf) - set(options)):
        log.warning(
            "zpgpool filter: option %r of [DEFAULT] is not read, and hides one here: call it %s%s there",
            name,
            PREFIX,
            name,
        )
    return options


def _make(app: WSGIApplication, options: Mapping[str, str]) -> PoolMiddleware:
    own = FILTER_OPTIONS | {name: value for name, value in options.items() if name in FILTER_OPTIONS}
    eager = convert_with(flag, "eager", own["eager"])
    retry_after = convert_with(count, "retry_after", own["retry_after"])
    cancel = convert_with(flag, "cancel_on_disconnect", own["cancel_on_disconnect"])
    retry_safe = convert_with(flag, "retry_safe", own["retry_safe"])
    unavailable = convert_with(optional(hook), "unavailable", own["unavailable"])
    settings, libpq = read_options(options, FILTER_OPTIONS)
    name = settings["name"]
    if libpq:
        make_pool(own["pool"], settings, libpq)
    elif others := sorted(set(options) - (FILTER_OPTIONS.keys() - {"pool"}) - {"name"}):
        raise SettingError(
            f"option {others[0]!r} is for a pool that is made here, but option 'dsn' is missing ({list_known(KNOWN)})"
        )
    elif query_pool(name) is None:
        raise SettingError(
            f"option 'dsn' is missing, and no pool is registered as {name!r} that could be served ({list_known(KNOWN)})"
        )
    return PoolMiddleware(
        app,
        name=name,
        eager=eager,
        retry_after=retry_after,
        cancel_on_disconnect=cancel,
        retry_safe=retry_safe,
        unavailable=unavailable,
    )
