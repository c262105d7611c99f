"""Zope's publisher: what the filter must know of a request that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core import current_work
from .errors import database_error
from .request import Lease


if TYPE_CHECKING:
    from ZPublisher.pubevents import PubBeforeAbort
    from ZPublisher.pubevents import PubFailure


def report(event: PubBeforeAbort) -> None:
    """Tell which error the page is about that was rendered just now: the filter may answer 503 in its place."""
    lease = current_work()
    if isinstance(lease, Lease) and not event.retry:
        lease.reported = database_error(event.exc_info[1])


def rest(event: PubFailure) -> None:
    """Return the connection after the abort, before Zope sleeps, for seconds, and publishes the request again."""
    lease = current_work()
    if isinstance(lease, Lease) and event.retry:
        lease.let_go()
