"""Runs inside the image that serves: hands embeddings from a producer to a consumer process; one JSON line a case.

Each process has both halves of its connector, as vLLM has with one rank, and calls the hooks in vLLM's order. What the
encode request's reply is in life is a message over a pipe here. Arguments: ROUNDS MIB…
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "connector"))

from mooncake_pool import MooncakePool, find_port

SHM = Path("/dev/shm")
WIDTH = 4096
"""Of a bfloat16 embedding: 8 KiB a row."""
PATIENT = {"fetch_timeout_ms": 20_000, "publish_timeout_ms": 20_000}
"""Here a busy machine must not make a miss of what is measured."""
WARM_UP = 5
REST_S = 0.05
"""Each way, and each yardstick, begins in processes that were at rest: right after other work all is faster."""
POLL_S = 0.001
"""vLLM's scheduler asks for a deferred request about so often."""
OURS = ("epd_connector.connector", "ECMooncakeStoreConnector")
METHODS = {
    "ECExampleConnector": (None, "ECExampleConnector", {"shared_storage_path": str(SHM / "example")}),
    "shared_dir": (*OURS, {"store": "shared_dir", "shared_dir_path": str(SHM / "shared"), "shared_dir_size_mb": 512}),
    "mooncake": (*OURS, {"store": "mooncake"}),
}


def make_halves(method: str, role: str, pool: dict[str, Any]) -> tuple[Any, Any]:
    """Return the scheduler's and the worker's half of a connector."""
    from vllm.config import CacheConfig, ECTransferConfig, ParallelConfig
    from vllm.config.multimodal import MultiModalConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    module, name, extra = METHODS[method]
    extra = dict(extra)
    if name != "ECExampleConnector":
        extra |= PATIENT
    transfer = ECTransferConfig(
        ec_connector=name,
        ec_connector_module_path=module,
        ec_role=role,  # type: ignore[arg-type]
        ec_connector_extra_config={**extra, **(pool if method == "mooncake" else {})},
    )
    model = {"model": "some/model", "revision": None, "dtype": "torch.bfloat16", "hf_overrides": {}}
    config = SimpleNamespace(
        ec_transfer_config=transfer,
        parallel_config=ParallelConfig(),
        cache_config=CacheConfig(enable_prefix_caching=True),
        model_config=SimpleNamespace(**model, multimodal_config=MultiModalConfig()),
    )
    kind = ECConnectorFactory.get_connector_class(transfer)
    worker = kind(config, ECConnectorRole.WORKER)  # type: ignore[arg-type]
    return kind(config, ECConnectorRole.SCHEDULER), worker  # type: ignore[arg-type]


def make_request(name: str, rows: int) -> Any:
    """Return what the hooks read of a request with one item."""
    from vllm.multimodal.inputs import PlaceholderRange

    feature = SimpleNamespace(identifier=name, mm_position=PlaceholderRange(offset=0, length=rows))
    return SimpleNamespace(
        request_id=f"r-{name}", mm_features=[feature], sampling_params=None, get_num_encoder_embeds=lambda _: rows
    )


@contextmanager
def bound(scheduler: Any, worker: Any, finished: list[str]) -> Iterator[None]:
    """One step: its metadata goes from the scheduler's half to the worker's."""
    output = SimpleNamespace(finished_req_ids=set(finished), free_encoder_mm_hashes=[])
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    yield
    worker.clear_connector_metadata()


def wait_until_available(scheduler: Any, request: Any) -> None:
    """Ask as vLLM's scheduler does."""
    while not scheduler.ensure_cache_available(request, 0):
        time.sleep(POLL_S)


def wait_for_store(halves: dict[str, tuple[Any, Any]]) -> None:
    """Wait until each connector has found its store in good health."""
    for method, (_, worker) in halves.items():
        while method != "ECExampleConnector" and worker._working().service.breaker.is_open:
            time.sleep(0.1)


def make_tensor(seed: int, rows: int) -> Any:
    """Return an embedding in bfloat16 that the seed decides."""
    import torch

    return torch.randn((rows, WIDTH), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def timed(call: Callable[[], Any]) -> float:
    """Return how long a call takes, in seconds."""
    started_s = time.monotonic()
    call()
    return time.monotonic() - started_s


class Memory:
    """The two yardsticks: a copy of the item, and Mooncake's own transfer of it, from memory like the slab's."""

    def __init__(self, pool: dict[str, Any], size_bytes: int) -> None:
        import mmap

        from epd_connector.config import read_config
        from epd_connector.device import HostDevice
        from epd_connector.store.factory import make_store

        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self.region = memoryview(mmap.mmap(-1, size_bytes, flags=flags))
        self.store = make_store(read_config(pool), lambda: "127.0.0.1", HostDevice())
        self.store.connect(self.region)

    def copy(self, tensor: Any) -> float:
        """Copy a tensor to this memory, which is resident."""
        from epd_connector.tensors import copy_to_slab

        part = self.region[: tensor.nbytes]
        return timed(lambda: copy_to_slab(tensor, part))


def join_vllm() -> None:
    """Make vLLM's parallel groups of one rank, as its worker does before it makes a connector."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{find_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)


def produce(link: Connection, peer: Connection, pool: dict[str, Any], sizes: list[int], rounds: int) -> None:
    """Encode and save, again and again; send the times."""
    join_vllm()
    memory = Memory(pool, max(sizes))
    halves = {method: make_halves(method, "ec_producer", pool) for method in METHODS}
    wait_for_store(halves)
    peer.recv()
    for size_bytes in sizes:
        rows = size_bytes // WIDTH // 2
        for number in range(WARM_UP + rounds):
            tensor = make_tensor(number, rows)
            time.sleep(REST_S)
            copy_s = memory.copy(tensor)
            time.sleep(REST_S)
            key = f"ec/v1/bench/{size_bytes}-{number}"
            put_s = timed(lambda: memory.store.put(key, [memory.region[:size_bytes]]))  # noqa: B023 - called here
            peer.send(("own", key, rows, 0.0, number))
            peer.recv()
            link.send(("own", {"memcpy": copy_s, "put": put_s}))
            for method, (scheduler, worker) in halves.items():
                name = f"{method}-{size_bytes}-{number}"
                request, cache = make_request(name, rows), {name: tensor.clone()}
                wait_until_available(scheduler, request)
                scheduler.update_state_after_alloc(request, 0)
                time.sleep(REST_S)
                with bound(scheduler, worker, []):
                    began_s = time.monotonic()
                    save_s = timed(lambda: worker.save_caches(cache, name))  # noqa: B023
                    wait_s = timed(lambda: worker.get_finished(set()))  # noqa: B023
                peer.send((method, name, rows, began_s, number))
                peer.recv()
                link.send((method, {"save": save_s, "wait": wait_s}))
                with bound(scheduler, worker, [request.request_id]):
                    pass
    peer.send(None)
    close(halves)


def consume(link: Connection, peer: Connection, pool: dict[str, Any], sizes: list[int], _: int) -> None:
    """Look up, fetch and load whatever the producer names; send the times."""
    join_vllm()
    memory = Memory(pool, max(sizes))
    halves = {method: make_halves(method, "ec_consumer", pool) for method in METHODS}
    wait_for_store(halves)
    peer.send("ready")
    while message := peer.recv():
        method, name, rows, began_s, number = message
        if method == "own":
            part = memory.region[: 2 * rows * WIDTH]
            get_s = timed(lambda: memory.store.get(name, part))  # noqa: B023
            link.send((method, {"get": get_s}))
        else:
            link.send((method, take(halves[method], name, rows, began_s, number)))
        memory.store.remove_all()  # or the pool is full of what is under lease
        peer.send("taken")
    close(halves)


def close(halves: dict[str, tuple[Any, Any]]) -> None:
    """Shut the connectors down."""
    for half in (half for pair in halves.values() for half in pair):
        half.shutdown()


def take(halves: tuple[Any, Any], name: str, rows: int, began_s: float, number: int) -> dict[str, float]:
    """Schedule a request with the item and load it; return the times in seconds."""
    scheduler, worker = halves
    request, cache = make_request(name, rows), {}
    arrived_s = time.monotonic()
    wait_until_available(scheduler, request)
    available_s = time.monotonic()
    assert scheduler.has_cache_item(name), f"{name} is not in the store"
    scheduler.update_state_after_alloc(request, 0)
    with bound(scheduler, worker, []):
        load_s = timed(lambda: worker.start_load_caches(cache))
        ended_s = time.monotonic()
        worker.get_finished(set())
    read_s = timed(cache[name].sum)
    assert cache[name].equal(make_tensor(number, rows)), f"{name} came over changed"
    with bound(scheduler, worker, [request.request_id]):
        pass
    shutil.rmtree(SHM / "example" / name, ignore_errors=True)
    return {"total": ended_s - began_s, "load": load_s, "fetch": available_s - arrived_s, "read": read_s}


def summarise(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return the medians in milliseconds, without the first rounds."""
    return {
        case: {name: 1000 * statistics.median(values[WARM_UP:]) for name, values in times.items()}
        for case, times in found.items()
    }


def main(rounds: int, sizes_mib: list[int]) -> None:
    """Start pool, producer and consumer; print what they measured, in milliseconds."""
    sizes = [size << 20 for size in sizes_mib]
    context = multiprocessing.get_context("spawn")
    folder = Path(tempfile.mkdtemp())
    (SHM / "shared").mkdir()
    pool = MooncakePool(folder, 512)
    pool.start()
    one, other = context.Pipe()
    ends = []
    try:
        for run, peer in ((produce, one), (consume, other)):
            ours, theirs = context.Pipe()
            arguments = (theirs, peer, {**pool.extra_config, "rpc_timeout_ms": 2000}, sizes, rounds)
            context.Process(target=run, args=arguments, daemon=True).start()
            theirs.close()
            ends.append(ours)
        other.close()
        collect(*ends, sizes, rounds)
    finally:
        pool.stop()


def collect(producer: Connection, consumer: Connection, sizes: list[int], rounds: int) -> None:
    """Print one line a size, as soon as it is measured."""
    for size_bytes in sizes:
        found: dict[str, dict[str, list[float]]] = {}
        for _ in range((WARM_UP + rounds) * (1 + len(METHODS))):
            case, times = consumer.recv()
            same, others = producer.recv()
            assert case == same
            for name, value in (*others.items(), *times.items()):
                found.setdefault(case, {}).setdefault(name, []).append(value)
        print(json.dumps({"mib": size_bytes >> 20, "rounds": rounds, **summarise(found)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
