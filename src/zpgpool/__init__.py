"""psycopg2 connection pools for Zope, Pyramid and plain WSGI: a drop-in replacement of `psycopg2.pool`."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

from .core import AbstractConnectionPool
from .core import PersistentConnectionPool
from .core import SimpleConnectionPool
from .core import task
from .core import ThreadedConnectionPool
from .errors import CommitInDoubt
from .errors import PoolClosed
from .errors import PoolError
from .errors import PoolTimeout
from .errors import TooManyRequests
from .registry import get_pool
from .registry import query_pool
from .registry import register_factories
from .registry import register_pool
from .registry import unregister_pool


__all__ = [
    "AbstractConnectionPool",
    "CommitInDoubt",
    "PersistentConnectionPool",
    "PoolClosed",
    "PoolError",
    "PoolTimeout",
    "SimpleConnectionPool",
    "ThreadedConnectionPool",
    "TooManyRequests",
    "get_pool",
    "query_pool",
    "register_factories",
    "register_pool",
    "task",
    "unregister_pool",
]

if not getattr(sys, "_is_gil_enabled", lambda: True)():  # since Python 3.13
    # handoff.py works without a lock, by what the interpreter promises under its own one.
    warnings.warn(
        "zpgpool is not proven on a free-threaded Python: its hand-over of connections rests on the interpreter's "
        "lock; run it with PYTHON_GIL=1, or with a Python that has the lock",
        RuntimeWarning,
        stacklevel=2,
    )

__version__ = version("zpgpool")


if TYPE_CHECKING:
    from pyramid.config import Configurator


def includeme(config: Configurator) -> None:
    """What Pyramid's `config.include("zpgpool")` calls; see `zpgpool.pyramid`."""
    from .pyramid import includeme

    includeme(config)
