"""What everything that moves objects between the slab and the store works with."""

from dataclasses import dataclass

from .breaker import Breaker
from .keys import build_key
from .metrics import Metrics
from .slab import Allocator
from .store.base import Draft, Store


class SlabDraft:
    """A part of the slab in which an object is written before it is stored."""

    def __init__(self, access: "StoreAccess", offset: int, size_bytes: int) -> None:
        self._access = access
        self._offset = offset
        self.data = access.data[offset : offset + size_bytes]

    def put(self, key: str) -> None:
        """See Draft."""
        self._access.store.put(key, self.data)

    def close(self) -> None:
        """See Draft."""
        self._access.allocator.release(self._offset)


@dataclass(frozen=True)
class StoreAccess:
    """One store, the breaker that guards it, and the slab's data with its allocator."""

    store: Store
    breaker: Breaker
    data: memoryview
    allocator: Allocator
    model_digest: str
    metrics: Metrics

    def key_of(self, item_id: str) -> str:
        """Return the store key of an item of this engine's model."""
        return build_key(self.model_digest, item_id)

    def find_draft(self, size_bytes: int, timeout_s: float) -> Draft | None:
        """Return memory to write an object into, the store's own or a part of the slab; None when none came free."""
        draft = self.store.find_draft(size_bytes)
        if draft is not None:
            return draft
        offset = self.allocator.allocate(size_bytes, timeout_s)
        return None if offset is None else SlabDraft(self, offset, size_bytes)
