"""Django: `"ENGINE": "zpgpool.django"` is Django's own backend for PostgreSQL, whose connections come from a pool.

Django imports `base`, and `middleware` where MIDDLEWARE names it.
"""

try:
    from django.db import OperationalError
except ImportError as error:
    raise ImportError(f"zpgpool.django needs the extra zpgpool[django]: {error}") from None


class Unavailable(OperationalError):
    """No connection was to be had; `__cause__` is PoolTimeout, TooManyRequests, or the error of the connect."""
