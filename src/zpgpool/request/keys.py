"""Where `environ` has what a request holds."""


class LeaseKeys(dict[str, str]):
    """The key of a lease, by the pool's name."""

    def __missing__(self, name: str) -> str:
        key = self[name] = f"zpgpool.lease.{name}" if name else "zpgpool.lease"
        return key


lease_keys = LeaseKeys()
