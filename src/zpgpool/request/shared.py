"""A connection that a request and its transaction share: the last one that lets go of it returns it."""

from __future__ import annotations

import weakref
from typing import Protocol
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from ..types import Checkout


class Transaction(Protocol):
    """What a lease needs of a data manager that has joined a transaction with the request's connection."""

    @property
    def is_joined(self) -> bool:
        """Whether the transaction goes on with the connection."""

    def abandon(self, why: str) -> None:
        """Abort a transaction that was left open."""


class SharedCheckout:
    """A checkout with owners, the request and its transaction: the last one that lets go of it returns it."""

    __slots__ = ("__weakref__", "_checkout", "_owners", "transaction")

    def __init__(self, checkout: Checkout, *owners: object) -> None:
        self._checkout = checkout
        self._owners = list(owners)
        self.transaction: Transaction | None = None

    @property
    def conn(self) -> Connection:
        return self._checkout.conn

    def let_go(self, owner: object, close: bool = False) -> None:
        """Remove an owner. Where it was the last one, or `close` is true, the connection goes back. May be repeated."""
        self._owners = [each for each in self._owners if each is not owner]
        if owner is self.transaction:
            self.transaction = None
        if close or not self._owners:
            self._checkout.putconn(close)

    def add(self, transaction: Transaction) -> None:
        """Add the transaction to the owners."""
        self._owners.append(transaction)
        self.transaction = transaction


class Orphan:
    """A transaction that has outlived its request with the request's connection."""

    def __init__(self, transaction: Transaction, shared: SharedCheckout) -> None:
        self._transaction = transaction
        # Weakly: once it was returned, the connection is its next user's, who may lose it.
        self._shared = weakref.ref(shared)

    def abandon(self, why: str) -> None:
        """Abort it, and return the connection: an exception may have come before the one, or between the two."""
        self._transaction.abandon(why)
        shared = self._shared()
        if shared is not None:
            shared.let_go(self._transaction)
