"""Connections that are held for too long: logged after `leak_after`, ended after `hold_limit`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Iterator

from ..settings import PoolSettings
from .entry import Entry
from .entry import NEVER
from .entry import Owner
from .handoff import RETURNING
from .hangup import CANCEL
from .lines import current_lines
from .notifier import Notifier
from .owners import Holder
from .owners import tasks
from .owners import Work
from .workers import cancellers


log = logging.getLogger("zpgpool")

#: How long a rollback may take when a connection is returned, in seconds; less, with a `hold_limit` that is less.
RETURN_LIMIT = 10.0

Users = Iterable[tuple[Owner, Entry]]


def report_leaks(users: Users, settings: PoolSettings, notifier: Notifier, now: float) -> None:
    """Log each holder that has held a connection for `leak_after`: once for each checkout."""
    leak_after = settings.leak_after
    if not leak_after:
        return
    for owner, entry in users:
        if now - entry.since >= leak_after and entry.reported != entry.since:
            entry.reported = entry.since
            holder = Holder.of(owner, entry, now, current_lines())
            log.warning("%s: held for over %g s by %s", notifier, leak_after, holder)
            notifier.leaked(holder)


def end_held_too_long(users: Users, settings: PoolSettings, notifier: Notifier, now: float) -> None:
    """Cancel the queries of holders that have reached `hold_limit`; a second later, end their connections.

    And those whose rollback hangs: a server that is silent would keep the thread that returns a connection for ever.
    """
    for owner, entry in users:
        since, limit = entry.since, _limit(entry, settings)
        if now - since < limit:
            continue
        if entry.ended != since:
            # Expired first. If it was returned before this, `since` has changed; if it is returned after, it is closed.
            entry.expire_now()
            if entry.since != since:
                continue
            entry.ended = since
            if owner.is_alive and isinstance(work := tasks.get(owner.ident), Work):
                work.was_ended = True
            holder = Holder.of(owner, entry, now, current_lines())
            log.error("%s: held for over %g s, and ended: %s", notifier, limit, holder)
            is_query = entry.is_active and entry.state != RETURNING
            if is_query and cancellers.try_run(entry.cancel_handle.send):
                continue
        elif now - since < limit + CANCEL:
            continue
        entry.cut()


def _limit(entry: Entry, settings: PoolSettings) -> float:
    limit = settings.hold_limit or NEVER
    return min(limit, RETURN_LIMIT) if entry.state == RETURNING else limit


def due_times(users: Users, settings: PoolSettings, now: float) -> Iterator[float]:
    """Yield when to look again (monotonic seconds)."""
    # The loop gives exact times for present holders. Later ones cannot exceed the limit before this time.
    yield now + min(settings.leak_after or NEVER, settings.hold_limit or NEVER, RETURN_LIMIT)
    for _, entry in users:
        if settings.leak_after and entry.reported != entry.since:
            yield max(entry.since + settings.leak_after, now)
        end = entry.since + _limit(entry, settings)
        yield end if entry.ended != entry.since else max(end + CANCEL, now + CANCEL)
