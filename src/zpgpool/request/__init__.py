"""What a request does with a pool: what doors may import of it. It imports from `core` and the leaves only."""

from .body import Body
from .body import is_complete
from .body import SizedBody
from .disconnects import Disconnects
from .lease import current_lease
from .lease import KeyedLease
from .lease import Lease
from .lease import lease_keys
from .lease import local
from .lease import OwnLease
from .lease import SharedCheckout
from .lease import ThreadLease
from .replica import asks_for_primary
from .replica import classify
from .replica import fail_over
from .replica import Fault
from .replica import has_body
from .replica import is_repeatable
from .replica import is_safe
from .replica import may_succeed_on_primary
from .replica import ReplicaLease
from .replica import with_write_cookie
from .response import HeldResponse


__all__ = [
    "Body",
    "Disconnects",
    "Fault",
    "HeldResponse",
    "KeyedLease",
    "Lease",
    "OwnLease",
    "ReplicaLease",
    "SharedCheckout",
    "SizedBody",
    "ThreadLease",
    "asks_for_primary",
    "classify",
    "current_lease",
    "fail_over",
    "has_body",
    "is_complete",
    "is_repeatable",
    "is_safe",
    "lease_keys",
    "local",
    "may_succeed_on_primary",
    "with_write_cookie",
]
