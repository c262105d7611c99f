"""The pool itself: what others may import of it.

It imports only the interfaces, settings, errors, events and connection strings.
"""

from .base import AbstractConnectionPool
from .lag import Lag
from .lag import lag_of
from .lag import NOT_YET
from .lag import watch
from .owners import task
from .owners import tasks
from .pools import PersistentConnectionPool
from .pools import SimpleConnectionPool
from .pools import ThreadedConnectionPool
from .probe import NoAnswer
from .probe import query
from .session import PLAIN
from .timer import MaintenanceTimer
from .timer import timer


__all__ = [
    "NOT_YET",
    "PLAIN",
    "AbstractConnectionPool",
    "Lag",
    "MaintenanceTimer",
    "NoAnswer",
    "PersistentConnectionPool",
    "SimpleConnectionPool",
    "ThreadedConnectionPool",
    "lag_of",
    "query",
    "task",
    "tasks",
    "timer",
    "watch",
]
