"""Pyramid: `config.include("zpgpool")` reads the settings `zpgpool.*`, and gives each request its `pgconn`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

from .datamanager import get_connection as get_transactions_connection
from .errors import PoolError
from .interfaces import IConnectionPool
from .registry import check_replica
from .registry import get_pool
from .registry import make_pool
from .registry import query_pool
from .request import current_lease
from .request import Lease
from .request import lease_keys
from .request import report
from .settings import convert_with
from .settings import count
from .settings import flag
from .settings import hook
from .settings import list_known
from .settings import optional
from .settings import Options
from .settings import read_options
from .settings import SettingError
from .settings import TABLE
from .wsgi import PoolMiddleware


try:
    from pyramid.interfaces import IExecutionPolicy
    from pyramid.router import default_execution_policy
    from pyramid.threadlocal import manager as threadlocals
    from pyramid.tweens import EXCVIEW
except ImportError as error:
    raise ImportError(f"zpgpool.pyramid needs the extra zpgpool[pyramid]: {error}") from None


if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIApplication
    from _typeshed.wsgi import WSGIEnvironment
    from psycopg2.extensions import connection as Connection
    from pyramid.config import Configurator
    from pyramid.registry import Registry
    from pyramid.request import Request
    from pyramid.response import Response
    from pyramid.router import Router

    from .types import Savepoint
    from .types import TransactionManager

    #: Of each request on it the `request` and the `registry`.
    Stack: TypeAlias = list[Mapping[str, Any]]

    #: See `pyramid.interfaces.IExecutionPolicy`.
    Policy: TypeAlias = Callable[[WSGIEnvironment, Router], WSGIApplication]


PREFIX = "zpgpool."

#: The options that are not the pool's, and their defaults.
OWN_OPTIONS = {"pool": "persistent", "retry_after": "5", "retry_safe": "true", "unavailable": "none"}

KNOWN = {*OWN_OPTIONS, *TABLE, "dsn"} - {"name"}

#: Where `environ` has the place of the outermost request on Pyramid's stack.
PLACE = "zpgpool.pyramid.place"

#: After the actions of other packages that set an execution policy, as pyramid_retry does.
LAST = 1000

#: Where a registry says that it was included.
INCLUDED = "zpgpool"


def includeme(config: Configurator) -> None:
    """Make the pools that the settings describe, register them in the application's registry, and serve them.

    `zpgpool.dsn` and `zpgpool.maxconn` are about the unnamed pool, which is `request.pgconn`'s, `zpgpool.reports.dsn`
    about the pool `reports`. Without any of them the unnamed pool is served that the application registered itself.

    Raises SettingError for what is unknown, missing or cannot be, naming it.
    """
    if INCLUDED in config.registry:
        return  # several packages may need it
    config.registry[INCLUDED] = True
    served = {name: _include(config, name, options) for name, options in _collect(config.get_settings()).items()}

    def serve() -> None:
        for name in served:
            try:
                check_replica(name, config.registry)
            except SettingError as error:
                raise SettingError(f"setting {_prefix(name)}*: {error}") from None
        policy = config.registry.queryUtility(IExecutionPolicy, default=default_execution_policy)
        config.registry.registerUtility(_serving(policy, served, config.registry), IExecutionPolicy)

    config.action(None, serve, order=LAST)
    config.add_tween("zpgpool.pyramid.report_tween_factory", under=EXCVIEW)
    # Not reified: after the commit, and in a streamed body, it is another one.
    config.add_request_method(get_connection, "pgconn", property=True)


def get_connection(request: Request, name: str = "") -> Connection:
    """Return the connection to the pool `name` for `request`: what `request.pgconn` is.

    While a transaction of `request.tm` is the request's (pyramid_tm, repoze.tm2, or a script), it is that
    transaction's, which commits it or rolls it back. Otherwise it is the request's own until its body is closed: what
    it does not commit itself is rolled back. A subrequest has that of its request.
    """
    environ, registry = request.environ, request.registry
    tm = getattr(request, "tm", None)
    managers = _active_managers(environ, registry, tm)
    if managers:
        conn = get_transactions_connection(name, managers[0], registry)
        for inner in managers[1:]:
            _nest(inner, managers[0])
        return conn
    pool = get_pool(name, registry)
    known = environ.get(lease_keys[name])
    # A subrequest has an environ of its own; what is mounted has one with another application, and the same names.
    lease = known if isinstance(known, Lease) and known.pool is pool else current_lease(pool)
    if lease is not None:
        return lease.connection()
    if tm is None:
        raise PoolError(
            f"request.pgconn was asked for outside of a request: get_pool({name!r}, request.registry).connection() is "
            "for scripts; or include pyramid_tm, and use request.tm"
        )
    return get_transactions_connection(name, tm, registry)  # a script's


def report_tween_factory(handler: Callable[[Request], Response], registry: Registry) -> Callable[[Request], Response]:
    """Return a tween that tells the middleware of an error before an exception view makes a page of it."""

    def tween(request: Request) -> Response:
        try:
            return handler(request)
        except Exception as error:
            report(error)
            raise

    return tween


def _active_managers(
    environ: WSGIEnvironment, registry: Registry, tm: TransactionManager | None
) -> list[Any]:  # None among them is the thread's own
    """Return who commits what the request writes: of a subrequest its request's first, then its own, if it has one."""
    if "repoze.tm.active" in environ:
        return [tm]
    # Of the requests whose tweens are on the stack: a copy of an environ has the key still when all is committed.
    requests = [each["request"] for each in _entries(environ) if each["registry"] is registry]
    environs = [each.environ for each in requests if each is not None]
    found = [each.get("tm.manager", tm) for each in environs if "tm.active" in each]
    return list({id(manager): manager for manager in found}.values()) if len(found) > 1 else found


def _entries(environ: WSGIEnvironment) -> Stack:
    """Return what Pyramid's stack has of a request, the outermost first; below may be what an exception has left."""
    stack: Stack = threadlocals.stack
    place = environ.get(PLACE)
    if place is None:  # a subrequest's, or a script's
        requests = [each["request"] for each in stack]
        outermost = [n for n, each in enumerate(requests) if each is not None and each.environ.get(PLACE) == n]
        place = max(outermost, default=0)
    return stack[place:]


def _nest(inner: TransactionManager, outer: TransactionManager) -> None:
    """Have what `inner` aborts rolled back within the transaction of `outer`, which has the connection."""
    txn = inner.get()
    try:
        txn.data(_nest)
    except KeyError:
        savepoint = outer.get().savepoint(optimistic=True)
        txn.set_data(_nest, savepoint)
        txn.addAfterAbortHook(_undo, (savepoint,))


def _undo(savepoint: Savepoint) -> None:
    with suppress(Exception):  # where another package's resource cannot, the outer transaction has failed by that
        savepoint.rollback()


def _collect(settings: Options) -> dict[str, Options]:
    """Return the options of each pool."""
    pools: dict[str, Options] = {}
    for key, value in settings.items():
        if key.startswith(PREFIX):
            name, _, option = key.removeprefix(PREFIX).rpartition(".")
            pools.setdefault(name, {})[option.replace("-", "_")] = value
    return pools or {"": {}}


def _prefix(name: str) -> str:
    return f"{PREFIX}{name}." if name else PREFIX


def _include(config: Configurator, name: str, options: Options) -> Options:
    """Have the pool `name` made when the configuration is committed, and return the options of its middleware."""
    try:
        if "name" in options:
            raise SettingError("option 'name': a pool's name stands before its options, as in zpgpool.reports.dsn")
        own = OWN_OPTIONS | {option: value for option, value in options.items() if option in OWN_OPTIONS}
        served = {
            "retry_after": convert_with(count, "retry_after", own["retry_after"]),
            "retry_safe": convert_with(flag, "retry_safe", own["retry_safe"]),
            "unavailable": convert_with(optional(hook), "unavailable", own["unavailable"]),
        }
        settings, libpq = read_options(options, OWN_OPTIONS)
        if not libpq and options.keys() - served.keys():
            raise SettingError(f"option 'dsn' is missing ({list_known(KNOWN)})")
    except SettingError as error:
        raise SettingError(f"setting {_prefix(name)}*: {error}") from None

    def register() -> None:
        try:
            if libpq:
                make_pool(own["pool"], settings | {"name": name}, libpq, config.registry)
            elif query_pool(name, config.registry) is None:
                raise SettingError(
                    f"option 'dsn' is missing, and no pool is registered as {name!r} in the application's registry "
                    f"({list_known(KNOWN)})"
                )
        except SettingError as error:
            raise SettingError(f"setting {_prefix(name)}*: {error}") from None

    config.action(("utility", IConnectionPool, name), register)  # as in ZCML: a pool there conflicts with this one
    return served


def _serving(policy: Policy, served: Mapping[str, Options], registry: Registry) -> Policy:
    """Return an execution policy: `policy`, with the pools' connections for the time of each request."""
    chains: dict[Router, tuple[WSGIApplication, WSGIApplication]] = {}
    key = lease_keys[next(iter(served))]

    def make(router: Router) -> tuple[WSGIApplication, WSGIApplication]:
        # The router calls what it gets as a WSGI application. So the middleware has the body, too, which no callback
        # of Pyramid sees, and all attempts of pyramid_retry.
        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            lease = environ.get(key)
            if isinstance(lease, Lease) and lease.environ is environ:
                environ.setdefault(PLACE, len(threadlocals.stack))
            return policy(environ, router)(environ, start_response)

        outermost: WSGIApplication = app
        for name, options in served.items():
            outermost = PoolMiddleware(outermost, name=name, registry=registry, **options)
        return app, outermost

    def execute(environ: WSGIEnvironment, router: Router) -> WSGIApplication:
        chain = chains.get(router)
        if chain is None:
            chain = chains.setdefault(router, make(router))  # in most processes there is one router
        # repoze.tm2 commits later than this request ends, and its transaction has the connection until then.
        return chain["repoze.tm.active" not in environ]

    return execute
