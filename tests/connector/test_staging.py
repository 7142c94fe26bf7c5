"""Which memory an engine stages its embeddings in, and what each promises."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from epd_connector.config import read_config
from epd_connector.device import HostDevice
from epd_connector.header import HEADER_SIZE_BYTES
from epd_connector.metadata import Location
from epd_connector.staging import SLAB_NAME, DirectStaging, SlabStaging, Staging, make_staging
from epd_connector.store.factory import make_store

SIZE_BYTES = 1 << 20


@pytest.fixture(params=["direct", "slab"])
def staging(request: pytest.FixtureRequest, tmp_path: Path) -> Staging:
    direct = DirectStaging(SIZE_BYTES)
    return direct if request.param == "direct" else make(tmp_path, zero_copy=False)


def make(directory: Path, *, ranks: int = 1, device: str = "cpu", **extra: object) -> Staging:
    settings = {"master_server_address": "127.0.0.1:1", "slab_size_mb": 1, **extra}
    config = read_config(settings)
    host = HostDevice(device)
    return make_staging(config, ranks, directory, make_store(config, lambda: "127.0.0.1", host), host)


def put(staging: Staging, payload: bytes) -> Location:
    """Do what a fetch does."""
    size_bytes = HEADER_SIZE_BYTES + len(payload)
    offset = staging.allocator.allocate(size_bytes)
    assert offset is not None
    staging.open(offset, size_bytes)[HEADER_SIZE_BYTES:] = payload
    return Location(offset, len(payload), "bfloat16", (len(payload) // 16, 8))


@pytest.mark.parametrize(
    ("options", "is_direct"),
    [
        ({}, True),
        ({"ranks": 2}, False),
        ({"device": "npu"}, False),
        ({"protocol": "rdma"}, False),
        ({"zero_copy": False}, False),
    ],
)
def test_nothing_is_copied_where_one_rank_has_memory_that_the_store_reaches(
    options: dict[str, Any], is_direct: bool, tmp_path: Path
) -> None:
    staging = make(tmp_path, **options)
    assert isinstance(staging, DirectStaging) == is_direct
    assert isinstance(staging, SlabStaging) == (tmp_path / SLAB_NAME).exists() == (not is_direct)
    assert staging.allocator.size_bytes == SIZE_BYTES


def test_loaded_tensor_is_what_was_read_and_stays_so(staging: Staging) -> None:
    payload = torch.arange(32, dtype=torch.bfloat16).view(4, 8)
    location = put(staging, payload.view(torch.uint8).numpy().tobytes())
    loaded = staging.load(location)
    staging.allocator.release(location.offset, after_step=1)
    staging.finish_step(1)
    again = put(staging, bytes(64))
    assert again.offset == location.offset
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, payload)


def test_empty_embedding_is_loaded_and_staged(staging: Staging) -> None:
    assert staging.load(put(staging, b"")).shape == (0, 8)
    header, payload = staging.stage(0, torch.empty(0, 8))
    assert (len(header), len(payload)) == (HEADER_SIZE_BYTES, 0)


def test_staged_bytes_are_the_tensors_and_outlive_it(staging: Staging) -> None:
    offset = staging.allocator.allocate(5000)
    assert offset is not None
    tensor = torch.arange(512, dtype=torch.float32).view(32, 16)[:, ::2]
    expected = tensor.contiguous().numpy().tobytes()
    header, payload = staging.stage(offset, tensor)
    header[:] = bytes(HEADER_SIZE_BYTES)
    del tensor
    gc.collect()
    others = [torch.full((512,), -1.0) for _ in range(64)]  # would take the memory if it were free
    assert bytes(payload) == expected
    assert others


def test_direct_staging_copies_nothing() -> None:
    staging = DirectStaging(SIZE_BYTES)
    tensor = torch.zeros(4, 8, dtype=torch.bfloat16)
    _, payload = staging.stage(0, tensor)
    tensor[0, 0] = 1
    assert bytes(payload[:2]) == b"\x80\x3f"
    location = put(staging, bytes(64))
    region = staging.open(location.offset, HEADER_SIZE_BYTES + 64)
    loaded = staging.load(location)
    region[HEADER_SIZE_BYTES : HEADER_SIZE_BYTES + 2] = b"\x80\x3f"
    assert loaded[0, 0] == 1


def test_what_is_never_loaded_is_let_go() -> None:
    staging = DirectStaging(SIZE_BYTES)
    given_up, skipped = put(staging, bytes(64)), put(staging, bytes(64))
    staging.allocator.release(given_up.offset)
    staging.allocator.release(skipped.offset, after_step=1)  # vLLM had it already when the step ran
    assert set(staging._arrived) == {skipped.offset}
    staging.finish_step(1)
    assert staging.allocator.allocate(SIZE_BYTES) == 0
    assert staging._arrived == {}
