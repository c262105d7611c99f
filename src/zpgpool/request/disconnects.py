"""Requests whose clients may go before they are answered: the timer looks after them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core import timer
from .lease import Lease


if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


log = logging.getLogger("zpgpool")


class Disconnects:
    """Asks the server which clients have disconnected, and cancels the queries of those clients."""

    #: How often, in seconds.
    EVERY = 0.5

    def __init__(self) -> None:
        self._leases: dict[Lease, Callable[[], bool]] = {}

    def add(self, lease: Lease, environ: WSGIEnvironment) -> None:
        """Look after a request, if the server can tell."""
        has_gone = environ.get("waitress.client_disconnected")
        if has_gone is not None:
            self._leases[lease] = has_gone
            timer.watch(self)

    def run_maintenance(self, now: float) -> float:
        """Cancel the queries of clients that have disconnected; return when to ask again (monotonic seconds)."""
        for lease, has_gone in self._leases.copy().items():
            if lease.is_over:
                self._leases.pop(lease, None)
            else:
                try:
                    if has_gone():
                        lease.cancel()
                except Exception:  # the server's: the others' clients are asked all the same
                    log.exception("%s: whether its client is there cannot be told", lease)
        return now + self.EVERY
