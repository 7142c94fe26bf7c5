"""The NPU's side without an NPU: a double records order and arguments of the calls. It shows nothing about hardware.

The double's memory is the host's, so Mooncake's real client, transfer engine and pool move the bytes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mooncake.engine import TransferEngine
from mooncake_pool import MooncakePool

from epd_connector import npu
from epd_connector.config import read_config
from epd_connector.npu import ALIGNMENT_BYTES, NpuDevice
from epd_connector.store.mooncake import MooncakeStore

OWN_INDEX = 3
KEY = "ec/v1/model/item"


class Recorder:
    """Stands for torch and torch.npu; ``calls`` has one tuple per call: name, arguments, and the thread's NPU."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.selected: dict[int, int] = {threading.get_ident(): OWN_INDEX}
        self.torch = SimpleNamespace(
            Tensor=torch.Tensor,
            uint8=torch.uint8,
            frombuffer=torch.frombuffer,
            empty=self.empty,
            npu=SimpleNamespace(
                current_device=self.find_selected, set_device=self.set_device, Stream=self.make_stream, stream=self.use
            ),
        )

    def find_selected(self) -> int:
        return self.selected.get(threading.get_ident(), 0)

    def note(self, *call: object) -> None:
        self.calls.append((*call, self.find_selected()))

    def set_device(self, index: int) -> None:
        self.selected[threading.get_ident()] = index
        self.note("set_device", index)

    def empty(self, size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        self.note("empty", size, dtype, device)
        return torch.empty(size + 64, dtype=dtype)[64:]  # an address that is not aligned by chance

    def make_stream(self) -> Any:
        return SimpleNamespace(synchronize=lambda: self.note("synchronize"))

    @contextmanager
    def use(self, stream: object) -> Any:
        self.note("stream")
        yield

    def wrap(self, target: Any, *names: str) -> Any:
        """Return an object whose methods ``names`` record and then do what the target's do."""

        def recording(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                self.note(name, *arguments, *more)
                return getattr(target, name)(*arguments, **more)

            return call

        others = {name: getattr(target, name) for name in dir(target) if not name.startswith("_")}
        return SimpleNamespace(**others | {name: recording(name) for name in names})

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    recorded = recorder.wrap(engine, "register_memory")

    def share(hostname: str) -> Any:
        recorder.note("share", hostname)
        return recorded

    monkeypatch.setattr(npu, "torch", recorder.torch)
    monkeypatch.setattr(npu, "share_transfer_engine", share)
    return recorder


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[MooncakePool]:
    """By handshake: a pool with a metadata server is not found by vllm-ascend's engine, and puts fail with -800."""
    pool = MooncakePool(tmp_path, by_handshake=True)
    try:
        pool.start()
        yield pool
    finally:
        pool.stop()


@pytest.fixture
def store(recorder: Recorder, pool: MooncakePool, monkeypatch: pytest.MonkeyPatch) -> MooncakeStore:
    config = read_config(pool.extra_config)
    store = MooncakeStore(config, "127.0.0.1", NpuDevice())
    make = store._module.MooncakeDistributedStore
    module = SimpleNamespace(
        MooncakeDistributedStore=lambda: recorder.wrap(
            make(), "setup", "register_buffer", "batch_put_from_multi_buffers", "get_into"
        )
    )
    monkeypatch.setattr(store, "_module", module)
    return store


def test_bytes_go_over_the_npus_memory_and_come_back(recorder: Recorder, store: MooncakeStore) -> None:
    slab = memoryview(bytearray(range(256)) * 4096 * 5)  # 5 MiB
    store.connect(slab)
    source, target = slab[4096 : 4096 + 100_000], slab[1 << 20 : (1 << 20) + 100_000]
    before = bytes(source)
    store.put(KEY, [source])
    source[:] = bytes(len(source))
    target[:] = bytes(len(target))
    assert store.get(KEY, target) == 100_000
    assert bytes(target) == before
    assert bytes(source) == bytes(100_000)
    store.close()


def test_order_and_arguments(recorder: Recorder, store: MooncakeStore) -> None:
    slab = memoryview(bytearray(5 << 20))
    store.connect(slab)
    store.put(KEY, [slab[8192:9192]])
    store.get(KEY, slab[4096:5096])
    assert recorder.names == [
        *("share", "setup", "empty", "register_memory"),
        *("stream", "synchronize", "batch_put_from_multi_buffers"),
        *("get_into", "stream", "synchronize"),
    ]  # the engine's registration, never the client's; bytes are there before and after
    calls = {call[0]: call[1:] for call in recorder.calls}
    assert calls["share"][0] == "127.0.0.1"
    assert calls["empty"][:3] == (8 << 20, torch.uint8, f"npu:{OWN_INDEX}")
    host, *_, keyword, selected = calls["setup"]
    assert host.startswith("127.0.0.1:")
    assert (keyword, selected) == ("engine", OWN_INDEX)
    address, size_bytes, _ = calls["register_memory"]
    assert address % ALIGNMENT_BYTES == 0
    assert size_bytes == 6 << 20
    assert calls["batch_put_from_multi_buffers"][:3] == ([KEY], [[address + 8192]], [[1000]])
    assert calls["get_into"][:3] == (KEY, address + 4096, 1000)
    store.close()


def test_every_thread_selects_the_workers_npu(recorder: Recorder) -> None:
    device = NpuDevice()
    threads = [threading.Thread(target=device.enter_thread) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert recorder.calls == [("set_device", OWN_INDEX, OWN_INDEX)] * 3
