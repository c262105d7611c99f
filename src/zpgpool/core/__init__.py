"""The pool itself: what others may import of it.

It imports only the interfaces, settings, errors, events and connection strings.
"""

from .base import AbstractConnectionPool
from .entry import BROKEN
from .keyed import SimpleConnectionPool
from .keyed import ThreadedConnectionPool
from .lag import Lag
from .lag import lag_of
from .lag import NOT_YET
from .lag import watch
from .outage import is_temporary
from .outage import LOST
from .owners import current_work
from .owners import refuse_greenlets
from .owners import task
from .owners import tasks
from .owners import Work
from .persistent import PersistentConnectionPool
from .probe import NoAnswer
from .probe import query
from .session import is_at_end
from .session import is_demoted
from .session import only_reads
from .session import PLAIN
from .session import set_temporarily
from .timer import MaintenanceTimer
from .timer import timer
from .transactions import commit
from .transactions import may_succeed
from .workers import will_fork


__all__ = [
    "BROKEN",
    "LOST",
    "NOT_YET",
    "PLAIN",
    "AbstractConnectionPool",
    "Lag",
    "MaintenanceTimer",
    "NoAnswer",
    "PersistentConnectionPool",
    "SimpleConnectionPool",
    "ThreadedConnectionPool",
    "Work",
    "commit",
    "current_work",
    "is_at_end",
    "is_demoted",
    "is_temporary",
    "lag_of",
    "may_succeed",
    "only_reads",
    "query",
    "refuse_greenlets",
    "set_temporarily",
    "task",
    "tasks",
    "timer",
    "watch",
    "will_fork",
]
