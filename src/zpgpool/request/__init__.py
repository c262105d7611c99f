"""What a request does with a pool: the names that the modules at the top may import of it.

It imports from `core` and the leaves only.
"""

from .body import begin_body
from .body import InnerBody
from .body import is_complete
from .body import join_body
from .body import swapped
from .disconnects import Disconnects
from .failures import close_body
from .failures import has_left_primary
from .failures import is_lost
from .failures import is_unavailable
from .failures import make_unavailable
from .failures import reveal
from .keys import lease_keys
from .kinds import lease_class
from .kinds import ThreadLease
from .lease import current_lease
from .lease import Lease
from .lease import local
from .lease import note_commit
from .replica import fail_over
from .replica import has_written
from .replica import is_repeatable
from .replica import is_safe
from .replica import may_succeed_on_primary
from .replica import may_write
from .replica import ReplicaLease
from .replica import report
from .replica import with_write_cookie
from .response import Headers
from .response import HeldResponse
from .shared import SharedCheckout


__all__ = [
    "Disconnects",
    "Headers",
    "HeldResponse",
    "InnerBody",
    "Lease",
    "ReplicaLease",
    "SharedCheckout",
    "ThreadLease",
    "begin_body",
    "close_body",
    "current_lease",
    "fail_over",
    "has_left_primary",
    "has_written",
    "is_complete",
    "is_lost",
    "is_repeatable",
    "is_safe",
    "is_unavailable",
    "join_body",
    "lease_class",
    "lease_keys",
    "local",
    "make_unavailable",
    "may_succeed_on_primary",
    "may_write",
    "note_commit",
    "report",
    "reveal",
    "swapped",
    "with_write_cookie",
]
