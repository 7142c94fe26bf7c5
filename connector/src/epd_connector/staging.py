"""Memory between the store and vLLM's tensors: the slab that all ranks share, or the tensors themselves.

An allocator gives out regions of it, each for one object: a header and a payload. On an NPU, and where several ranks
load what one of them has read, the payload is copied from and to the slab. Where one rank holds its tensors in memory
that the store reaches as it is, nothing is copied, and the slab is a budget only.
"""

from pathlib import Path
from typing import Protocol

from .config import ConnectorConfig
from .device import Device
from .header import HEADER_SIZE_BYTES
from .metadata import Location
from .slab import Allocator, Slab
from .store.base import Store
from .tensors import (
    EmbeddingTensor,
    allocate_bytes,
    copy_to_device,
    copy_to_slab,
    view_as_bytes,
    view_as_embedding,
)

SLAB_NAME = "slab"


class Loader(Protocol):
    """What a rank's model thread takes embeddings from."""

    def load(self, location: Location) -> EmbeddingTensor:
        """Return the embedding at ``location`` as a tensor that is the caller's alone. Once for a location."""

    def finish_step(self, step: int) -> None:
        """Say that this rank needs no region any more that was to be loaded in ``step`` or before."""


class Staging(Loader, Protocol):
    """The same for the rank that talks to the store."""

    allocator: Allocator
    registered: memoryview
    """What the store has to know of before it is used."""

    def open(self, offset: int, size_bytes: int) -> memoryview:
        """Return memory for a whole object, to be read into the region at ``offset``."""

    def stage(self, offset: int, tensor: EmbeddingTensor) -> tuple[memoryview, memoryview]:
        """Return memory for a header, and the tensor's bytes, row-major, valid while the region is not released."""


class SlabLoader:
    """Copies from a slab to a device."""

    def __init__(self, slab: Slab, rank: int, device: str) -> None:
        self._slab = slab
        self._rank = rank
        self._device = device

    def load(self, location: Location) -> EmbeddingTensor:
        """See Loader."""
        return copy_to_device(self._slab.data, location, self._device)

    def finish_step(self, step: int) -> None:
        """See Loader."""
        self._slab.mark_step(self._rank, step)


class SlabStaging(SlabLoader):
    """The slab of the first rank, from which ``ranks`` load."""

    def __init__(self, slab: Slab, ranks: int, device: str) -> None:
        super().__init__(slab, 0, device)
        self.allocator = Allocator(len(slab.data), lambda: slab.find_finished_step(ranks))
        self.registered = slab.data

    def open(self, offset: int, size_bytes: int) -> memoryview:
        """See Staging."""
        return self.registered[offset : offset + size_bytes]

    def stage(self, offset: int, tensor: EmbeddingTensor) -> tuple[memoryview, memoryview]:
        """See Staging. The tensor may change afterwards."""
        start = offset + HEADER_SIZE_BYTES
        payload = self.registered[start : start + tensor.nbytes]
        copy_to_slab(tensor, payload)
        return self.registered[offset:start], payload


class DirectStaging:
    """Objects are read into the memory of the tensor that vLLM gets, and written from that of the tensor that it has.

    vLLM gives an entry of its encoder cache to any later request with the same item, so no entry ever changes.
    """

    def __init__(self, size_limit_bytes: int) -> None:
        self._arrived: dict[int, EmbeddingTensor] = {}
        self._finished_step = 0
        self.allocator = Allocator(
            size_limit_bytes, lambda: self._finished_step, on_free=lambda offset: self._arrived.pop(offset, None)
        )
        self.registered = memoryview(b"")

    def open(self, offset: int, size_bytes: int) -> memoryview:
        """See Staging."""
        tensor = self._arrived[offset] = allocate_bytes(size_bytes)
        return view_as_bytes(tensor)

    def stage(self, offset: int, tensor: EmbeddingTensor) -> tuple[memoryview, memoryview]:  # noqa: ARG002
        """See Staging."""
        return memoryview(bytearray(HEADER_SIZE_BYTES)), view_as_bytes(tensor)

    def load(self, location: Location) -> EmbeddingTensor:
        """See Loader."""
        return view_as_embedding(self._arrived.pop(location.offset), location)

    def finish_step(self, step: int) -> None:
        """See Loader."""
        self._finished_step = step


def make_staging(config: ConnectorConfig, ranks: int, directory: Path, store: Store, device: Device) -> Staging:
    """Return the memory that suits an engine with ``ranks`` that load. Raises ConfigError when there is none for it."""
    if config.zero_copy and ranks == 1 and device.name == "cpu" and store.reaches_any_memory:
        return DirectStaging(config.slab_size_bytes)
    return SlabStaging(Slab.create(directory / SLAB_NAME, config.slab_size_bytes), ranks, device.name)
