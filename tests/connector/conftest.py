"""Fixtures of the connector's tests, which need vLLM and Mooncake: run them in the CPU image."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "connector" / "src"))

# Or vllm-ascend registers the NPU platform, which cannot be imported without an NPU.
os.environ.setdefault("VLLM_PLUGINS", "")

from mooncake_pool import MooncakePool

if TYPE_CHECKING:  # not loaded for tests that do without
    from ec_instances import Make
    from fake_worker import Clock, FakeWorker

    from epd_connector.metrics import Metrics


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[MooncakePool]:
    """A pool of 64 MB of the test's own, which it may kill."""
    pool = MooncakePool(tmp_path)
    try:
        pool.start()
        yield pool
    finally:
        pool.stop()


# Of the tests with the whole chain.


@pytest.fixture
def store(pool: MooncakePool) -> dict[str, object]:
    """Settings of the store; parametrised by those tests that hold for every backend."""
    return pool.extra_config


@pytest.fixture
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    if request.param.startswith("mooncake"):
        pool: MooncakePool = request.getfixturevalue("pool")
        return {**pool.extra_config, "copy_in_hooks": request.param != "mooncake"}
    (tmp_path / "store").mkdir()
    return {"store": "shared_dir", "shared_dir_path": str(tmp_path / "store"), "shared_dir_size_mb": 64}


@pytest.fixture
def make(store: dict[str, object], tmp_path: Path) -> "Iterator[Make]":
    from ec_instances import make_instances

    yield from make_instances(store, tmp_path / "shm")


@pytest.fixture
def make_any(any_store: dict[str, object], tmp_path: Path) -> "Iterator[Make]":
    from ec_instances import make_instances

    yield from make_instances(any_store, tmp_path / "shm")


# Of the schedulers' tests.


@pytest.fixture
def worker(tmp_path: Path) -> "Iterator[FakeWorker]":
    from fake_worker import FakeWorker

    worker = FakeWorker(tmp_path)
    yield worker
    worker.close()


@pytest.fixture
def clock() -> "Clock":
    from fake_worker import Clock

    return Clock()


@pytest.fixture
def metrics() -> "Metrics":
    from epd_connector.metrics import Metrics

    return Metrics()
