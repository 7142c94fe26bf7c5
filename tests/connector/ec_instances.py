"""Engines that hand embeddings over: their workers and schedulers, and the calls that vLLM makes of them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from epd_connector.compat import Engine, Feature, Lookup, Place
from epd_connector.config import read_config
from epd_connector.device import HostDevice
from epd_connector.keys import ModelIdentity
from epd_connector.link import LinkClient
from epd_connector.metadata import StepMetadata
from epd_connector.metrics import Metrics
from epd_connector.producer_scheduler import ProducerScheduler
from epd_connector.scheduler import ConsumerScheduler
from epd_connector.slab import name_directory
from epd_connector.store.factory import make_store
from epd_connector.worker import Worker

IDENTITY = ModelIdentity(model="tests/model", dtype="bfloat16")
STALL_S = 0.005
BACKENDS = pytest.mark.parametrize("any_store", ["mooncake", "mooncake, copied in hooks", "shared_dir"], indirect=True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition did not come true"
        time.sleep(0.005)


def load(worker: Worker, metadata: StepMetadata) -> dict[str, torch.Tensor]:
    """Return what one rank has in its encoder cache after a step."""
    encoder_cache: dict[str, torch.Tensor] = {}
    worker.load(metadata, encoder_cache)
    return encoder_cache


class Instance:
    """One engine: its worker, its scheduler, and the calls vLLM makes in one step."""

    def __init__(
        self, store: dict[str, object], slab_dir: Path, name: str, *, is_producer: bool, ranks: int = 1, **extra: object
    ) -> None:
        config = read_config({**store, "slab_dir": str(slab_dir), "slab_size_mb": 16, **extra})
        engine = Engine(name, 0, ranks, is_producer, not is_producer, {}, IDENTITY)
        directory = name_directory(config.slab_dir, name, 0)
        self.metrics, self.scheduler_metrics = Metrics(), Metrics()
        own_store = make_store(config, lambda: "127.0.0.1", HostDevice())
        self.worker, *self.others = (
            Worker(
                config=config,
                engine=engine,
                place=Place(rank),
                directory=directory,
                device=HostDevice(),
                metrics=self.metrics,
                store=None if rank else own_store,
            )
            for rank in range(ranks)
        )
        self.metadata = StepMetadata()
        make = ProducerScheduler if is_producer else ConsumerScheduler
        self.scheduler: ProducerScheduler | ConsumerScheduler = make(
            config, LinkClient(directory), self.scheduler_metrics
        )
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.requests = 0
        self.slowest_stall_s = 0.0

    def is_healthy(self) -> bool:
        service = self.worker.service
        return service is not None and not service.breaker.is_open

    def defer(self, *features: Feature) -> None:
        """Poll like vLLM until the request may be scheduled."""
        self.requests += 1
        while True:
            started_s = time.thread_time()
            is_available = self.scheduler.ensure_available(f"request-{self.requests}", features)
            # CPU time of this thread: what a loaded machine adds to the wall clock is not ours. A blocking call is
            # bounded by the tests' deadlines, which are wall clock.
            self.slowest_stall_s = max(self.slowest_stall_s, time.thread_time() - started_s)
            if is_available:
                return
            time.sleep(0.001)

    def encode(self, item_id: str, tensor: torch.Tensor) -> None:
        self.defer(Feature(item_id, len(tensor), len(tensor)))
        if item_id not in self.encoder_cache:
            self.scheduler.record_allocation(item_id)
            self.encoder_cache[item_id] = tensor
            self.worker.save(self.encoder_cache, item_id)
        self.worker.finish_step()
        self.scheduler.close_step([f"request-{self.requests}"], [])

    def take(self, item_id: str, rows: int) -> torch.Tensor | None:
        """Return the embedding from the store, None when vLLM would have to encode it."""
        self.defer(Feature(item_id, rows, rows))
        self.scheduler.has_item(item_id)
        self.scheduler.record_allocation(item_id)
        self.metadata = self.scheduler.close_step([f"request-{self.requests}"], [])
        taken = load(self.worker, self.metadata).get(item_id)
        self.scheduler.close_step([], [item_id])  # an encoder cache that keeps nothing
        return taken

    def take_now(self, item_id: str, rows: int) -> tuple[torch.Tensor | None, float]:
        """Like ``take``, but vLLM does not announce the request; return the standstill too, in seconds."""
        self.requests += 1
        assert isinstance(self.scheduler, ConsumerScheduler)
        started_s = time.monotonic()
        lookup = Lookup(f"request-{self.requests}", [Feature(item_id, rows, rows)])
        self.scheduler.has_item(item_id, lookup)
        stall_s = time.monotonic() - started_s
        self.scheduler.record_allocation(item_id)
        taken = load(self.worker, self.scheduler.close_step([lookup.request_id], [])).get(item_id)
        self.scheduler.close_step([], [item_id])
        return taken, stall_s

    def misses(self, reason: str) -> float:
        return self.scheduler_metrics.snapshot().get(f"epd_ec_misses|{reason}", 0)

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()


Make = Callable[..., Instance]


def make_instances(store: dict[str, object], slab_dir: Path) -> Iterator[Make]:
    instances: list[Instance] = []
    slab_dir.mkdir()

    def start(name: str, **options: object) -> Instance:
        is_producer = name.startswith("encode")
        instance = Instance(store, slab_dir, name, is_producer=is_producer, **options)
        instances.append(instance)
        wait_until(instance.is_healthy)
        return instance

    yield start
    for instance in instances:
        instance.close()
    assert list(slab_dir.iterdir()) == []


def embedding(rows: int = 64, width: int = 128, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
