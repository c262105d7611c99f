"""Who holds a connection for too long: told of after `leak_after`, ended after `hold_limit`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Iterator

from .caller import Caller
from .caller import Holder
from .entry import Entry
from .entry import hang_up
from .herald import Herald
from .settings import PoolSettings


log = logging.getLogger("zpgpool")

Users = Iterable[tuple[Caller, Entry]]


def report_leaks(users: Users, settings: PoolSettings, herald: Herald, now: float) -> None:
    """Log who holds a connection for `leak_after`: each holding once."""
    leak_after = settings.leak_after
    if not leak_after:
        return
    for caller, entry in users:
        if now - entry.since >= leak_after and entry.reported != entry.since:
            entry.reported = entry.since
            holder = Holder.of(caller, entry, now)
            log.warning("%s: held for over %g s by %s", herald, leak_after, holder)
            herald.leaked(holder)


def end_held_too_long(users: Users, settings: PoolSettings, herald: Herald, now: float) -> None:
    """End the queries of those who hold a connection for `hold_limit`, and then their connections."""
    hold_limit = settings.hold_limit
    if not hold_limit:
        return
    over = []
    for caller, entry in users:
        since = entry.since
        if now - since >= hold_limit and entry.ended != since:
            # Doomed first: what was returned before has another time now, what is returned after is closed.
            entry.doom()
            if entry.since == since:
                entry.ended = since
                log.error("%s: held for over %g s, and ended: %s", herald, hold_limit, Holder.of(caller, entry, now))
                over.append(entry)
    hang_up(over)
    for entry in over:
        entry.cut()


def due_times(users: Users, settings: PoolSettings, now: float) -> Iterator[float]:
    """Yield when to look again (monotonic seconds)."""
    if settings.leak_after:
        yield now + settings.leak_after
    if settings.hold_limit:
        # Exactly, for those of now; whoever comes later cannot be over the limit before the second.
        yield now + settings.hold_limit
        for _, entry in users:
            if entry.ended != entry.since:
                yield entry.since + settings.hold_limit
