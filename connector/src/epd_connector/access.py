"""What everything that moves objects between memory and the store works with."""

from dataclasses import dataclass

from .breaker import Breaker
from .keys import build_key
from .metrics import Metrics
from .staging import Staging
from .store.base import Store


@dataclass(frozen=True)
class StoreAccess:
    """One store, the breaker that guards it, and the memory that objects are put from and read into."""

    store: Store
    breaker: Breaker
    staging: Staging
    model_digest: str
    metrics: Metrics

    def key_of(self, item_id: str) -> str:
        """Return the store key of an item of this engine's model."""
        return build_key(self.model_digest, item_id)
