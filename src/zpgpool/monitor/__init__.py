"""What is to be seen of pools: what doors may import of it. It imports from `core` and the leaves only."""

from .history import begin
from .history import BOUNDS
from .history import history_of
from .page import draw
from .page import title
from .snapshot import list_pools
from .snapshot import take


__all__ = ["BOUNDS", "begin", "draw", "history_of", "list_pools", "take", "title"]
