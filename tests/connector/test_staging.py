"""Which memory an engine stages its embeddings in, and what each kind promises."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from epd_connector.config import read_config
from epd_connector.device import HostDevice
from epd_connector.header import HEADER_SIZE_BYTES
from epd_connector.metadata import Location
from epd_connector.staging import SLAB_NAME, OwnStaging, SharedStaging, Staging, make_staging
from epd_connector.store.factory import make_store

SIZE_BYTES = 1 << 20
KINDS: dict[str, dict[str, Any]] = {"own": {}, "own, slab": {"store": "mooncake"}, "shared": {"copy_in_hooks": True}}


def make(
    directory: Path, *, ranks: int = 1, device: str = "cpu", store: str = "shared_dir", **extra: object
) -> Staging:
    own = {"master_server_address": "127.0.0.1:1"} if store == "mooncake" else {"shared_dir_path": str(directory)}
    config = read_config({"store": store, "slab_size_mb": 1, **own, **extra})
    host = HostDevice(device)
    return make_staging(config, ranks, directory, make_store(config, lambda: "127.0.0.1", host), host)


@pytest.fixture(params=KINDS)
def staging(request: pytest.FixtureRequest, tmp_path: Path) -> Staging:
    return make(tmp_path, **KINDS[request.param])


def fetch(staging: Staging, payload: bytes) -> Location:
    """Do what a fetch does with an object of bfloat16 in rows of 8."""
    size_bytes = HEADER_SIZE_BYTES + len(payload)
    offset = staging.allocator.allocate(size_bytes)
    assert offset is not None
    staging.open(offset, size_bytes)[HEADER_SIZE_BYTES:] = payload
    assert bytes(staging.accept(offset, size_bytes)[HEADER_SIZE_BYTES:]) == payload
    return Location(offset, len(payload), "bfloat16", (len(payload) // 16, 8))


@pytest.mark.parametrize(
    ("options", "kind", "has_slab"),
    [
        ({}, OwnStaging, False),
        ({"store": "mooncake"}, OwnStaging, True),
        ({"ranks": 2}, SharedStaging, True),
        ({"device": "npu"}, SharedStaging, True),
        ({"copy_in_hooks": True}, SharedStaging, True),
    ],
)
def test_who_copies_and_where(options: dict[str, Any], kind: type, has_slab: bool, tmp_path: Path) -> None:
    staging = make(tmp_path, **options)
    assert type(staging) is kind
    assert (tmp_path / SLAB_NAME).exists() == bool(staging.registered) == has_slab
    assert staging.allocator.size_bytes == SIZE_BYTES


def test_loaded_tensor_is_what_was_read_and_stays_so(staging: Staging) -> None:
    payload = torch.arange(32, dtype=torch.bfloat16).view(4, 8)
    location = fetch(staging, payload.view(torch.uint8).numpy().tobytes())
    loaded = staging.load(location)
    assert not getattr(staging, "_arrived", {})
    staging.allocator.release(location.offset, after_step=1)
    staging.finish_step(1)
    assert fetch(staging, bytes(64)).offset == location.offset
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, payload)


def test_empty_embedding_is_loaded_and_staged(staging: Staging) -> None:
    assert staging.load(fetch(staging, b"")).shape == (0, 8)
    header, payload = staging.stage(0, torch.empty(0, 8))()
    assert (len(header), len(payload)) == (HEADER_SIZE_BYTES, 0)


@pytest.mark.parametrize("stride", [1, 2])
def test_staged_bytes_are_the_tensors_and_outlive_it(staging: Staging, stride: int) -> None:
    """Also of what vLLM makes: an inference tensor, and it is staged by a thread that is in no such mode."""
    offset = staging.allocator.allocate(5000)
    assert offset is not None
    with torch.inference_mode():
        tensor = torch.arange(512, dtype=torch.float32).view(32, 16)[:, ::stride]
    expected = tensor.contiguous().numpy().tobytes()
    header, payload = staging.stage(offset, tensor)()
    del tensor
    gc.collect()
    others = [torch.full((512,), -1.0) for _ in range(64)]  # would take the memory if it were free
    header[:] = bytes(HEADER_SIZE_BYTES)
    assert bytes(payload) == expected
    assert others


@pytest.mark.parametrize(("kind", "is_copied_at_once"), [("own", False), ("own, slab", False), ("shared", True)])
def test_only_a_shared_slab_is_written_on_the_model_thread(kind: str, is_copied_at_once: bool, tmp_path: Path) -> None:
    staging = make(tmp_path, **KINDS[kind])
    tensor = torch.zeros(4, 8, dtype=torch.bfloat16)
    write = staging.stage(0, tensor)
    tensor[0, 0] = 1
    assert (bytes(write()[1][:2]) == bytes(2)) == is_copied_at_once


def test_nothing_is_copied_without_a_slab(tmp_path: Path) -> None:
    staging = make(tmp_path)
    tensor = torch.zeros(4, 8, dtype=torch.bfloat16)
    _, payload = staging.stage(0, tensor)()
    tensor[0, 0] = 1
    assert bytes(payload[:2]) == b"\x80\x3f"
    region = staging.open(0, HEADER_SIZE_BYTES + 64)
    staging.accept(0, len(region))
    region[HEADER_SIZE_BYTES : HEADER_SIZE_BYTES + 2] = b"\x80\x3f"
    assert staging.load(Location(0, 64, "bfloat16", (4, 8)))[0, 0] == 1


def test_what_comes_to_the_slab_after_verification_is_not_loaded(tmp_path: Path) -> None:
    staging = make(tmp_path, store="mooncake")
    location = fetch(staging, bytes(64))
    staging.registered[location.offset + HEADER_SIZE_BYTES] = 1
    assert not staging.load(location).any()


@pytest.mark.parametrize("kind", ["own", "own, slab"])
def test_what_is_never_loaded_is_let_go(kind: str, tmp_path: Path) -> None:
    staging = make(tmp_path, **KINDS[kind])
    assert isinstance(staging, OwnStaging)
    given_up, skipped = fetch(staging, bytes(64)), fetch(staging, bytes(64))
    staging.allocator.release(given_up.offset)
    staging.allocator.release(skipped.offset, after_step=1)  # vLLM had it already when the step ran
    assert set(staging._arrived) == {skipped.offset}
    staging.finish_step(1)
    assert staging.allocator.allocate(SIZE_BYTES) == 0
    assert staging._arrived == {}
