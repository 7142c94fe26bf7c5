"""Which items are taken to be in the store. A mistake costs time alone: what is not there is encoded later."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from .pool import Endpoint

# About 20 MB.
_NAMES_MAX = 65_536


class KnownItems:
    """Names of items that were encoded within ``ttl_s`` seconds (0: none are kept).

    An item is forgotten when the instance that encoded it goes down, or a part of ``store`` does: a new process begins
    with nothing.
    """

    def __init__(
        self, ttl_s: float, store: Sequence[Endpoint] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_s = ttl_s
        self._store = store
        self._clock = clock
        self._names: OrderedDict[str, tuple[float, Endpoint, int]] = OrderedDict()  # the oldest first

    def __repr__(self) -> str:
        return f"<KnownItems {len(self)}>"

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        entry = self._names.get(name)
        if entry is None:
            return False
        until_s, encoder, outages = entry
        if self._clock() < until_s and outages == self._outages(encoder):
            return True
        del self._names[name]
        return False

    def note(self, name: str, encoder: Endpoint) -> None:
        """Take note that ``encoder`` has encoded the item."""
        if not name or not self._ttl_s:
            return
        self._names.pop(name, None)
        self._names[name] = (self._clock() + self._ttl_s, encoder, self._outages(encoder))
        if len(self._names) > _NAMES_MAX:
            self._names.popitem(last=False)

    def _outages(self, encoder: Endpoint) -> int:
        """Return a number that is another one after each outage."""
        return encoder.outages + sum(endpoint.outages for endpoint in self._store)
