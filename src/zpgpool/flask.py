"""Flask: `init_app(app)` makes the pools of `app.config["ZPGPOOL"]`; `get_connection()` is the request's connection."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Mapping
from typing import TYPE_CHECKING

import psycopg2
import psycopg2.errors
from psycopg2.extensions import TRANSACTION_STATUS_INERROR
from zope.interface.registry import Components

from .core import commit
from .core import only_reads
from .errors import PoolTimeout
from .errors import TooManyRequests
from .registry import get_pool
from .registry import make_pool
from .request import Lease
from .request import lease_keys
from .request import note_commit
from .request import report
from .settings import convert_with
from .settings import count
from .settings import flag
from .settings import list_known
from .settings import Options
from .settings import read_options
from .settings import SettingError
from .settings import TABLE
from .wsgi import PoolMiddleware


try:
    import flask
    from flask import current_app
    from flask import g
    from flask import has_request_context
    from flask import request
    from werkzeug.exceptions import ServiceUnavailable
except ImportError as error:
    raise ImportError(f"zpgpool.flask needs the extra zpgpool[flask]: {error}") from None


if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIApplication
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection

    from .types import Checkout
    from .types import Pool


log = logging.getLogger("zpgpool")

#: The options that are not the pool's, and their defaults.
OWN_OPTIONS = {"pool": "threaded"}

KNOWN = {*OWN_OPTIONS, *TABLE, "dsn"} - {"name"}

#: Where `environ` says that the answer does not go on after Flask has returned it.
COMPLETE = "zpgpool.flask.complete"


class ConnectFailed(psycopg2.OperationalError):
    """The server gave no connection; `__cause__` is the error of the connect."""


def init_app(app: flask.Flask) -> None:
    """Make the pools that `app.config` describes, and serve them to the application's requests.

    `ZPGPOOL` has the options of the pool, or names of pools and the options of each; `ZPGPOOL_COMMIT` is whether a
    request whose answer is below 400 commits, by default true; `ZPGPOOL_RETRY_AFTER` is told with a 503, in seconds, by
    default 5. The pools are utilities of the registry `app.extensions["zpgpool"]`. Nothing connects.

    Call it before anything else registers functions for `after_request`: then they have run when this commits.

    Raises SettingError for what is unknown, missing or cannot be, naming it.
    """
    if "zpgpool" in app.extensions:
        raise SettingError(f"zpgpool.flask: init_app() was called for the application {app.name!r} before")
    commits = app.config.setdefault("ZPGPOOL_COMMIT", True)
    retry_after = app.config.setdefault("ZPGPOOL_RETRY_AFTER", 5)
    convert_with(flag, "ZPGPOOL_COMMIT", commits)
    seconds: int = convert_with(count, "ZPGPOOL_RETRY_AFTER", retry_after)
    registry = Components(app.name)
    pools = _collect(app.config.get("ZPGPOOL", {}))
    keys = [lease_keys[_lease_name(app, name)] for name in pools]
    outermost: WSGIApplication = _Inner(app.wsgi_app, keys)
    for name, options in pools.items():
        pool = _make(name, options, registry)
        outermost = PoolMiddleware(outermost, pool, _lease_name(app, name), retry_after=seconds, registry=registry)
    app.extensions["zpgpool"] = registry
    app.wsgi_app = outermost  # type: ignore[assignment, method-assign]  # as Flask's documentation wraps it

    @app.after_request
    def commit_leases(response: flask.Response) -> flask.Response:
        environ = request.environ
        if response.status_code >= 400 and response.content_length is not None:
            response.make_sequence()  # an error's page, which werkzeug brings as an iterator of what is there already
        environ[COMPLETE] = not response.is_streamed
        if response.status_code < 400 and convert_with(flag, "ZPGPOOL_COMMIT", app.config["ZPGPOOL_COMMIT"]):
            for lease in _leases(environ, keys):
                for conn in lease.connections():
                    _commit(lease.source(), conn)
        return response

    @app.teardown_appcontext
    def give_back(error: BaseException | None) -> None:
        for checkout in g.pop("_zpgpool", {}).values():
            checkout.putconn()

    flask.got_request_exception.connect(_report, app)
    for error in (PoolTimeout, TooManyRequests, ConnectFailed):
        app.register_error_handler(error, _answer_unavailable)


def get_connection(name: str = "") -> Connection:
    """Return the connection of the current request, or else of the current application context, from the pool `name`.

    It is checked out on first use. Of a request it is the same until the body is sent; what is not committed then is
    rolled back. Outside of requests, as in a command, it is the context's, and nothing commits it but the caller.

    Raises PoolTimeout and TooManyRequests when no connection came free, and ConnectFailed when the server gave none:
    a request that does not handle them is answered with 503 Service Unavailable. Raises ComponentLookupError when there
    is no such pool, and PoolError after the request's end.
    """
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # of the proxy, not of Flask
    try:
        if has_request_context():
            lease = request.environ.get(lease_keys[_lease_name(app, name)])
            if isinstance(lease, Lease):
                return lease.connection()
        return _get_contexts_connection(app, name)
    except psycopg2.OperationalError as error:
        raise ConnectFailed(*error.args) from error


def _get_contexts_connection(app: flask.Flask, name: str) -> Connection:
    if "zpgpool" not in app.extensions:
        raise SettingError(f"zpgpool.flask: init_app() was not called for the application {app.name!r}")
    pool = get_pool(name, app.extensions["zpgpool"])
    checkouts: dict[str, Checkout] = g.setdefault("_zpgpool", {})
    if name in checkouts and checkouts[name].conn.closed:
        checkouts.pop(name).putconn()
    if name not in checkouts:
        checkouts[name] = pool.checkout()
    return checkouts[name].conn


def _lease_name(app: flask.Flask, name: str) -> str:
    # Its own for each application: one that is called within another's request has the same environ.
    return f"{app.name}.{id(app)}.{name}"


def _collect(config: object) -> dict[str, Options]:
    """Return the options of each pool."""
    if isinstance(config, Mapping):
        are_pools = {isinstance(value, Mapping) for value in config.values()}
        if are_pools == {True}:
            return dict(config)
        if True not in are_pools:
            return {"": dict(config)}
    raise SettingError(
        "option 'ZPGPOOL': expected a mapping of a pool's options, or a mapping of names to such mappings"
    )


def _make(name: str, options: Options, registry: Components) -> Pool:
    try:
        if "name" in options:
            raise SettingError("option 'name': a pool's name is its key, as in {'reports': {'dsn': ...}}")
        settings, libpq = read_options(options, OWN_OPTIONS)
        if not libpq:
            raise SettingError(f"option 'dsn' is missing ({list_known(KNOWN)})")
        return make_pool((OWN_OPTIONS | dict(options))["pool"], settings | {"name": name}, libpq, registry)
    except SettingError as error:
        where = f"['ZPGPOOL'][{name!r}]" if name else "['ZPGPOOL']"
        raise SettingError(f"app.config{where}: {error}") from None


def _commit(pool: Pool, conn: Connection) -> None:
    if conn.get_transaction_status() == TRANSACTION_STATUS_INERROR:  # the server would roll back, and say nothing
        raise psycopg2.errors.InFailedSqlTransaction(
            "a statement of this request has failed, and was not rolled back to a savepoint: nothing can be committed"
        )
    commit(pool, conn)
    if not only_reads(conn):
        note_commit()


def _leases(environ: WSGIEnvironment, keys: Iterable[str]) -> list[Lease]:
    """Return what the request has of the pools; not if it is part of another one, which has them."""
    leases = [environ.get(key) for key in keys]
    return [lease for lease in leases if isinstance(lease, Lease) and lease.environ is environ]


class _Inner:
    """Flask's own application, within the middleware, which knows nothing of Flask."""

    def __init__(self, app: WSGIApplication, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = keys

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body: Iterable[bytes] = self._app(environ, start_response)
        # A body that is complete needs no connection, and not every client closes it: Flask's test client does not.
        if environ.pop(COMPLETE, False):
            for lease in _leases(environ, self._keys):
                lease.end()
        return body


def _report(sender: flask.Flask, exception: BaseException) -> None:
    report(exception)


def _answer_unavailable(error: Exception) -> flask.Response:
    log.error("%s %s: 503 Service Unavailable: %s", request.method, request.path, error, exc_info=error)
    answer = ServiceUnavailable("The database is not available just now. Please try again in a moment.")
    response = current_app.make_response(current_app.handle_http_exception(answer))
    response.headers.setdefault("Retry-After", str(current_app.config["ZPGPOOL_RETRY_AFTER"]))
    response.headers.setdefault("Cache-Control", "no-store")
    return response
