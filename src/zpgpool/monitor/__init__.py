"""What is seen of pools: the names that the modules at the top may import of it.

It imports from `core` and the leaves only.
"""

from .beside import Beside
from .counters import COUNTERS
from .counters import read
from .counters import Reading
from .folder import Folder
from .history import begin
from .history import BOUNDS
from .history import history_of
from .page import draw
from .page import draw_site
from .page import title
from .remote import Peers
from .share import package_version
from .share import Share
from .site import merge
from .site import name_blockers
from .site import only
from .site import total
from .site import VERSION
from .snapshot import describe
from .snapshot import join_server
from .snapshot import Json
from .snapshot import list_pools
from .snapshot import time_of_day


__all__ = [
    "BOUNDS",
    "COUNTERS",
    "VERSION",
    "Beside",
    "Folder",
    "Json",
    "Peers",
    "Reading",
    "Share",
    "begin",
    "describe",
    "draw",
    "draw_site",
    "history_of",
    "join_server",
    "list_pools",
    "merge",
    "name_blockers",
    "only",
    "package_version",
    "read",
    "time_of_day",
    "title",
    "total",
]
