"""What happens to connections, told through `zope.event`: rarely, and never under a lock or for a checkout.

Knows `zope.event` and the interfaces.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import zope.event
from zope.interface import implementer

from .interfaces import IConnectFailed
from .interfaces import IConnectionClosed
from .interfaces import IConnectionLeaked
from .interfaces import IConnectionOpened
from .interfaces import IOutageBegan
from .interfaces import IOutageEnded
from .interfaces import IRequestRefused
from .interfaces import IRequestTimedOut


if TYPE_CHECKING:
    import psycopg2

    from .errors import PoolError
    from .types import Holder
    from .types import ObservedPool


log = logging.getLogger("zpgpool")


class PoolEvent:
    """What all events have."""

    def __init__(self, pool: ObservedPool) -> None:
        self.pool = pool


@implementer(IConnectionOpened)
class ConnectionOpened(PoolEvent):
    """See `IConnectionOpened`."""

    def __init__(self, pool: ObservedPool, backend_pid: int, seconds: float) -> None:
        super().__init__(pool)
        self.backend_pid = backend_pid
        self.seconds = seconds


@implementer(IConnectionClosed)
class ConnectionClosed(PoolEvent):
    """See `IConnectionClosed`."""

    def __init__(self, pool: ObservedPool, backend_pid: int, reason: str) -> None:
        super().__init__(pool)
        self.backend_pid = backend_pid
        self.reason = reason


@implementer(IConnectFailed)
class ConnectFailed(PoolEvent):
    """See `IConnectFailed`."""

    def __init__(self, pool: ObservedPool, error: psycopg2.OperationalError, seconds: float) -> None:
        super().__init__(pool)
        self.error = error
        self.seconds = seconds


@implementer(IOutageBegan)
class OutageBegan(PoolEvent):
    """See `IOutageBegan`."""

    def __init__(self, pool: ObservedPool, error: psycopg2.OperationalError) -> None:
        super().__init__(pool)
        self.error = error


@implementer(IOutageEnded)
class OutageEnded(PoolEvent):
    """See `IOutageEnded`."""

    def __init__(self, pool: ObservedPool, seconds: float, waiting: int) -> None:
        super().__init__(pool)
        self.seconds = seconds
        self.waiting = waiting


@implementer(IRequestTimedOut)
class RequestTimedOut(PoolEvent):
    """See `IRequestTimedOut`."""

    def __init__(self, pool: ObservedPool, seconds: float, error: PoolError) -> None:
        super().__init__(pool)
        self.seconds = seconds
        self.error = error


@implementer(IRequestRefused)
class RequestRefused(PoolEvent):
    """See `IRequestRefused`."""

    def __init__(self, pool: ObservedPool, error: PoolError) -> None:
        super().__init__(pool)
        self.error = error


@implementer(IConnectionLeaked)
class ConnectionLeaked(PoolEvent):
    """See `IConnectionLeaked`."""

    def __init__(self, pool: ObservedPool, holder: Holder) -> None:
        super().__init__(pool)
        self.holder = holder


def notify(event: PoolEvent) -> None:
    """Tell the subscribers of `zope.event`. What one of them raises is logged, and stops nothing but the others."""
    try:
        zope.event.notify(event)
    except Exception:
        log.exception("a subscriber of %s failed", type(event).__name__)
