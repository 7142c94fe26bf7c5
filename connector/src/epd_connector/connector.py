"""ECMooncakeStoreConnector: what vLLM makes once in its scheduler and once in each worker.

Every hook is guarded: an exception that reached the engine would end it, while the answer given here instead
only costs an encode. The one that cannot be mended is logged: see ``start_load_caches``.
"""

import atexit
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .compat import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorPromMetrics,
    ECConnectorRole,
    ECConnectorStats,
    EncoderCache,
    Engine,
    adopt_logging,
    awaits_arrival,
    describe_engine,
    find_device,
    find_faults,
    find_host_address,
    find_lookup,
    find_place,
    read_features,
)
from .config import ConnectorConfig, read_config
from .device import Device, HostDevice
from .metadata import StepMetadata
from .metrics import Metrics
from .native import NativeMetrics, SumsOfStep, SumsTaker
from .slab import name_directory

if TYPE_CHECKING:
    from .producer_scheduler import ProducerScheduler
    from .scheduler import ConsumerScheduler
    from .worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")


class ECMooncakeStoreConnector(ECConnectorBase):
    """Role shell: each hook goes to the scheduler's or the worker's side.

    Raises ConfigError, with every fault in one message, when the configuration cannot work.
    """

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        adopt_logging()
        extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        config = read_config(extra, find_faults(vllm_config))
        engine = describe_engine(vllm_config, config.namespace)
        self._metrics = Metrics()
        self._sums = SumsTaker(self._metrics.snapshot)
        self._scheduler: ConsumerScheduler | ProducerScheduler | None = None
        self._worker: Worker | None = None
        if role is ECConnectorRole.SCHEDULER:
            self._scheduler = _make_scheduler(config, engine, self._metrics)
        else:
            self._worker = _make_worker(config, engine, self._metrics)
        # vllm-ascend 0.23.0 does not call shutdown in workers.
        atexit.register(self.shutdown)

    # Scheduler side -------------------------------------------------------------------------------------------

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Return False while items of the request are being fetched and its time is not up; never blocks."""

        def ensure() -> bool:
            # Positions below num_computed_tokens come from the KV cache: their embeddings are not needed.
            features = [feature for feature in read_features(request) if feature.end > num_computed_tokens]
            return self._scheduling().ensure_available(request.request_id, features, awaits_arrival(request))

        return self._guard_scheduler(ensure, True)

    def has_cache_item(self, identifier: str) -> bool:
        """Return True when the item is there, verified.

        No I/O, unless vLLM did not announce the request in ``ensure_cache_available``: then it is fetched now, bounded.
        """
        return self._guard_scheduler(lambda: self._scheduling().has_item(identifier, find_lookup(identifier)), False)

    def has_caches(self, request: Any) -> list[bool]:
        """Answer for all items of a request at once, as vLLM 0.14 asks."""
        features = read_features(request)
        return [f.end > request.num_computed_tokens and self.has_cache_item(f.item_id) for f in features]

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """Take note of an item that vLLM made room for, to be loaded or encoded in this step."""
        self._guard_scheduler(lambda: self._scheduling().record_allocation(request.mm_features[index].identifier), None)

    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata:
        """Return the step's loads."""
        metadata = self._guard_scheduler(
            lambda: self._scheduling().close_step(
                finished_request_ids=scheduler_output.finished_req_ids,
                evicted_item_ids=scheduler_output.free_encoder_mm_hashes,
            ),
            StepMetadata(),
        )
        self._guard_scheduler(lambda: self._scheduling().send_counts(), None)
        return metadata

    # Worker side ----------------------------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: EncoderCache, **kwargs: Any) -> None:  # noqa: ARG002 - vLLM's signature
        """Put the step's embeddings into ``encoder_cache``: id → tensor on the device.

        Everything was verified before the scheduler counted on it. Should the copy itself fail (no device
        memory), vLLM 0.23 has no way to encode the item now and stops on the missing entry; the log says why.
        """
        metadata = self._get_connector_metadata()
        if isinstance(metadata, StepMetadata):
            self._guard(lambda: self._working().load(metadata, encoder_cache), None)

    def save_caches(self, encoder_cache: EncoderCache, mm_hash: str, **kwargs: Any) -> None:  # noqa: ARG002
        """Take a new embedding over; another thread stores it."""
        self._guard(lambda: self._working().save(encoder_cache, mm_hash), None)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """Wait, bounded, until the step's items are published: the encode request's reply then implies it."""
        self._guard(lambda: self._working().finish_step(), None)
        return None, None

    # Both -----------------------------------------------------------------------------------------------------

    def get_ec_connector_stats(self) -> ECConnectorStats | None:
        """Return what this half has counted since it was last asked; vLLM asks from 0.31 on."""
        return self._guard(self._sums.take, None)

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> ECConnectorStats | None:
        """Return such counts from what came over from another process."""
        return SumsOfStep(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ECConnectorPromMetrics | None:
        """Return the counters that vLLM's API server shows at its own /metrics."""
        return NativeMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Release threads, sockets and shared memory; harmless when repeated."""
        atexit.unregister(self.shutdown)
        scheduler, self._scheduler = self._scheduler, None
        worker, self._worker = self._worker, None
        if scheduler is not None:
            self._guard(scheduler.close, None)
        if worker is not None:
            self._guard(worker.close, None)

    def _scheduling(self) -> "ConsumerScheduler | ProducerScheduler":
        if self._scheduler is None:
            raise RuntimeError("a scheduler hook was called on a worker's connector, or after shutdown")
        return self._scheduler

    def _working(self) -> "Worker":
        if self._worker is None:
            raise RuntimeError("a worker hook was called on the scheduler's connector, or after shutdown")
        return self._worker

    def _guard_scheduler(self, hook: Callable[[], T], otherwise: T) -> T:
        with self._metrics.time_hook():
            return self._guard(hook, otherwise)

    def _guard(self, hook: Callable[[], T], otherwise: T) -> T:
        try:
            return hook()
        except Exception:
            self._metrics.count("epd_ec_hook_errors")
            log.exception("The encoder-cache connector failed in a hook; the engine goes on without it.")
            return otherwise


def _make_scheduler(
    config: ConnectorConfig, engine: Engine, metrics: Metrics
) -> "ConsumerScheduler | ProducerScheduler":
    from .link import LinkClient
    from .producer_scheduler import ProducerScheduler
    from .scheduler import ConsumerScheduler

    link = LinkClient(name_directory(config.slab_dir, engine.engine_id, engine.data_parallel_rank))
    make = ConsumerScheduler if engine.is_consumer else ProducerScheduler
    return make(config, link, metrics)


def _make_device() -> Device:
    name = find_device()
    if name != "npu":
        return HostDevice(name)
    from .npu import NpuDevice

    return NpuDevice()


def _make_worker(config: ConnectorConfig, engine: Engine, metrics: Metrics) -> "Worker":
    # Here and not above: the scheduler's process must not load the store's client.
    from .store.factory import make_store
    from .worker import Worker

    place = find_place()
    device = _make_device()
    store = make_store(config, find_host_address, device) if place.runs_service else None
    directory = name_directory(config.slab_dir, engine.engine_id, engine.data_parallel_rank)
    return Worker(
        config=config,
        engine=engine,
        place=place,
        directory=directory,
        device=device,
        metrics=metrics,
        store=store,
    )
