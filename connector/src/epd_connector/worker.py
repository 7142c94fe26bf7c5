"""The worker's side: takes verified embeddings in, and hands new ones to the publisher."""

import logging
from pathlib import Path

from .compat import EncoderCache, Engine, Place
from .config import ConnectorConfig
from .device import Device
from .metadata import StepMetadata
from .metrics import Metrics
from .service import StoreService
from .slab import Slab
from .staging import SLAB_NAME, Loader, SlabLoader
from .store.base import Store
from .tensors import EmbeddingTensor

log = logging.getLogger(__name__)


class Worker:
    """One rank. The first of them also runs the store service for all. Runs on vLLM's model thread."""

    def __init__(
        self,
        *,
        config: ConnectorConfig,
        engine: Engine,
        place: Place,
        directory: Path,
        device: Device,
        metrics: Metrics,
        store: Store | None,
    ) -> None:
        self._rank = place.loader_index
        self._directory = directory
        self._device = device.name
        self._loader: Loader | None = None
        self._encoder_cache: EncoderCache = {}
        self._is_producer = engine.is_producer
        self.service: StoreService | None = None
        if store is not None:
            self.service = StoreService(
                config=config,
                engine=engine,
                directory=directory,
                store=store,
                metrics=metrics,
                device=device,
                find_tensor=self._find_tensor,
            )
            self._loader = self.service.staging

    def load(self, metadata: StepMetadata, encoder_cache: EncoderCache) -> None:
        """Put the step's embeddings into vLLM's encoder cache: id → tensor on the device, as stored."""
        if not metadata.loads or self._rank < 0:
            return
        if self._loader is None:  # not before the first rank has made the slab
            self._loader = SlabLoader(Slab(self._directory / SLAB_NAME), self._rank, self._device)
        for item_id, location in metadata.loads:
            encoder_cache.setdefault(item_id, self._loader.load(location))
        self._loader.finish_step(metadata.step)

    def save(self, encoder_cache: EncoderCache, item_id: str) -> None:
        """Publish what vLLM just encoded. Ranks but the first have the same tensor and do nothing."""
        if self.service is None or not self._is_producer:
            return
        self._encoder_cache = encoder_cache
        self.service.publisher.save(item_id, encoder_cache[item_id])

    def finish_step(self) -> None:
        """Hold the step's end until its items are visible to consumers, bounded."""
        if self.service is not None:
            self.service.publisher.wait_for_step()

    def close(self) -> None:
        """End the service."""
        if self.service is not None:
            self.service.close()

    def _find_tensor(self, item_id: str) -> EmbeddingTensor | None:
        return self._encoder_cache.get(item_id)
