"""A store's transfers on an Ascend NPU. Never run on hardware: tests hold the order and arguments of the calls only.

What is taken for granted here was read in vllm-ascend 0.23.0 and Mooncake's documents: the NPU build of Mooncake
installs its ascend transport whatever protocol is asked for; that transport registers NPU memory alone, aligned to
2 MiB; and it needs ``set_device`` in every thread that uses it.
"""

from typing import Any

import torch

from .compat import share_transfer_engine
from .device import TransferMemory, find_host_memory

ALIGNMENT_BYTES = 2 << 20


class NpuMemory:
    """A slab of the same size on the NPU; the same offset stands for the same item in both.

    So a region's owner in one owns it in the other, and nothing else has to be allocated. The price is
    ``slab_size_mb`` of the NPU's memory.
    """

    def __init__(self, slab: memoryview, device: str) -> None:
        self._slab_address = find_host_memory(slab)
        self.size_bytes = -(-len(slab) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        raw = torch.empty(self.size_bytes + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
        padding = -int(raw.data_ptr()) % ALIGNMENT_BYTES
        self._mirror = raw[padding : padding + self.size_bytes]
        self.address: int = raw.data_ptr() + padding

    def find_address(self, region: memoryview) -> int:
        """See TransferMemory."""
        return self.address + self._offset_of(region)

    def push(self, region: memoryview) -> None:
        """See TransferMemory."""
        self._copy(self._part(region), torch.frombuffer(region, dtype=torch.uint8))

    def pull(self, region: memoryview) -> None:
        """See TransferMemory."""
        self._copy(torch.frombuffer(region, dtype=torch.uint8), self._part(region))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # On a stream of its own: on the model's it would wait for all that the model has been given to do.
        stream = torch.npu.Stream()
        with torch.npu.stream(stream):
            target.copy_(source)
        stream.synchronize()

    def _part(self, region: memoryview) -> torch.Tensor:
        offset = self._offset_of(region)
        return self._mirror[offset : offset + len(region)]

    def _offset_of(self, region: memoryview) -> int:
        return find_host_memory(region) - self._slab_address


class NpuDevice:
    """The NPU that the calling thread has selected: vLLM's, when it is made on the model thread."""

    name = "npu"

    def __init__(self) -> None:
        self._index = int(torch.npu.current_device())

    def enter_thread(self) -> None:
        """See Device. A new thread starts on NPU 0."""
        torch.npu.set_device(self._index)

    def find_engine(self, hostname: str) -> Any | None:
        """See Device. One process has one engine on an NPU: that of vllm-ascend's KV connectors."""
        return share_transfer_engine(hostname)

    def open_memory(self, slab: memoryview) -> TransferMemory:
        """See Device."""
        return NpuMemory(slab, f"npu:{self._index}")
