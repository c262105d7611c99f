"""The pool against a plain reference, driven by hypothesis: keys, returns, closes, prunes, resizes, in any order."""

from __future__ import annotations

from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle
from hypothesis.stateful import consumes
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import rule
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import run_state_machine_as_test

import zpgpool
from conftest import eventually
from conftest import run
from zpgpool.core.handoff import OPEN


KEYS = ["a", "b", 1, ("c", 2)]


def machine(dsn: str) -> type[RuleBasedStateMachine]:
    class PoolMachine(RuleBasedStateMachine):
        """The reference: which key has which connection, how many there may be, and how many rest."""

        lent = Bundle("lent")

        @initialize(minconn=st.integers(0, 2), maxconn=st.integers(2, 4), idle_timeout=st.sampled_from([0, 60, None]))
        def start(self, minconn: int, maxconn: int, idle_timeout: float | None) -> None:
            self.pool = zpgpool.ThreadedConnectionPool(minconn, maxconn, dsn, idle_timeout=idle_timeout, open=False)
            self.pool._timer = None  # no timer: this test is the only user
            self.by_key: dict[Any, Any] = {}
            self.without_key: list[Any] = []

        @property
        def in_use(self) -> int:
            return len(self.by_key) + len(self.without_key)

        @rule(target=lent)
        def getconn(self) -> Any:
            if self.in_use >= self.pool.maxconn:
                with pytest.raises(zpgpool.PoolTimeout):
                    self.pool.getconn()
                return None
            conn = self.pool.getconn()
            assert all(conn is not other for other in [*self.without_key, *self.by_key.values()])
            assert run(conn, "SELECT 1") == 1
            self.without_key.append(conn)
            return conn

        @rule(key=st.sampled_from(KEYS))
        def getconn_by_key(self, key: Any) -> None:
            if key in self.by_key and not self.by_key[key].closed:
                assert self.pool.getconn(key) is self.by_key[key]
                return
            self.by_key.pop(key, None)  # its place is room again, unless the pool was made smaller meanwhile
            if self.in_use >= self.pool.maxconn:
                with pytest.raises(zpgpool.PoolTimeout):
                    self.pool.getconn(key)
            else:
                conn = self.pool.getconn(key)
                assert run(conn, "SELECT 1") == 1
                self.by_key[key] = conn

        @rule(conn=consumes(lent), close=st.booleans())
        def putconn(self, conn: Any, close: bool) -> None:
            if conn is None or not any(conn is other for other in self.without_key):
                return
            self.without_key = [other for other in self.without_key if other is not conn]
            self.pool.putconn(conn, close=close)
            with pytest.raises(zpgpool.PoolError):
                self.pool.putconn(conn)

        @rule(key=st.sampled_from(KEYS), by_key_alone=st.booleans())
        def putconn_by_key(self, key: Any, by_key_alone: bool) -> None:
            if key in self.by_key:
                conn = self.by_key.pop(key)
                self.pool.putconn(None if by_key_alone else conn, key)
            else:
                with pytest.raises(zpgpool.PoolError):
                    self.pool.putconn(None, key)

        @rule(key=st.sampled_from(KEYS), other=st.sampled_from(KEYS))
        def putconn_with_the_wrong_key(self, key: Any, other: Any) -> None:
            if key in self.by_key and key != other:
                with pytest.raises(zpgpool.PoolError):
                    self.pool.putconn(self.by_key[key], other)

        @rule(key=st.sampled_from(KEYS))
        def user_closes(self, key: Any) -> None:
            if key in self.by_key:
                self.by_key[key].close()

        @rule()
        def prune(self) -> None:
            self.pool.prune()
            stats = self.pool.get_stats()
            assert stats["pool_size"] >= min(self.pool.minconn, self.pool.maxconn)

        @rule()
        def drain(self) -> None:
            self.pool.drain()
            assert self.pool.get_stats()["pool_available"] == 0

        @rule(maxconn=st.integers(2, 5))
        def resize(self, maxconn: int) -> None:
            self.pool.resize(self.pool.minconn, maxconn)

        @invariant()
        def the_count_is_right(self) -> None:
            # What is too old is closed by another thread, and a new one opened by one.
            eventually(lambda: all(slot.state == OPEN for slot in self.pool._connections.handoff.slots))
            stats = self.pool.get_stats()
            assert stats["pool_size"] == self.in_use + stats["pool_available"]
            assert stats["pool_size"] <= max(self.pool.maxconn, self.in_use)
            assert len(self.pool.holders()) == self.in_use
            if self.pool.settings.idle_timeout == 0:
                assert stats["pool_available"] <= max(self.pool.minconn, 0)

        def teardown(self) -> None:
            conns = [*self.without_key, *self.by_key.values()]
            self.pool.closeall()
            assert all(conn.closed for conn in conns)
            with pytest.raises(psycopg2.pool.PoolError):
                self.pool.getconn()

    return PoolMachine


def test_the_pool_does_as_the_reference(dsn: str) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call, unused-ignore]  # before hypothesis 6.170
        machine(dsn),
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
