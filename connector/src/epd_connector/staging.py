"""Memory between the store and vLLM's tensors, and the thread on which bytes go from one to the other.

An allocator gives out regions, each for one object: a header and a payload. Where several ranks load what one of them
has read, and on a device, each rank's model thread copies payloads from and to the slab that all share. Where one rank
has its tensors in the host's memory, the I/O threads do all that, and the model thread only hands tensors over; a store
that reads and writes any memory then needs no slab, and the allocator keeps a budget only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from .config import ConnectorConfig
from .device import Device
from .header import HEADER_SIZE_BYTES
from .metadata import Location
from .slab import Allocator, Slab
from .store.base import Store
from .tensors import (
    EmbeddingTensor,
    allocate_bytes,
    copy_bytes,
    copy_to_device,
    copy_to_slab,
    view_as_bytes,
    view_as_embedding,
)

SLAB_NAME = "slab"

Parts: TypeAlias = tuple[memoryview, memoryview]
"""Memory for a header, and a payload, row-major. Valid until the region is released."""


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

    def accept(self, offset: int, size_bytes: int) -> memoryview:
        """Return what of the region will be loaded, now that so much was read: for verification, on an I/O thread."""

    def stage(self, offset: int, tensor: EmbeddingTensor) -> Callable[[], Parts]:
        """Take an embedding over, on the model thread; what is returned is to be called on an I/O thread, once."""


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


class SharedStaging(SlabLoader):
    """A slab from which ``ranks`` load; the first of them is this one."""

    def __init__(self, slab: Slab, ranks: int, device: str) -> None:
        super().__init__(slab, 0, device)
        self.allocator = Allocator(len(slab.data), lambda: slab.find_finished_step(ranks))
        self.registered = slab.data

    def open(self, offset: int, size_bytes: int) -> memoryview:
        """See Staging."""
        return self.registered[offset : offset + size_bytes]

    def accept(self, offset: int, size_bytes: int) -> memoryview:
        """See Staging."""
        return self.registered[offset : offset + size_bytes]

    def stage(self, offset: int, tensor: EmbeddingTensor) -> Callable[[], Parts]:
        """See Staging. Copied at once: a device does its work in the order of the model thread's calls."""
        header, payload = _divide(self.registered, offset, tensor.nbytes)
        copy_to_slab(tensor, payload)
        return lambda: (header, payload)


class OwnStaging:
    """For the only rank of an engine, with tensors in the host's memory. Without a ``slab``, it holds tensors only.

    What vLLM gave to ``stage`` stays as it is: it serves any later request with the same item from the same tensor.
    """

    def __init__(self, size_limit_bytes: int, slab: Slab | None = None) -> None:
        self.allocator = Allocator(
            size_limit_bytes, lambda: self._finished_step, on_free=lambda offset: self._arrived.pop(offset, None)
        )
        self._slab = slab.data if slab else None
        self.registered = self._slab or memoryview(b"")
        self._arrived: dict[int, EmbeddingTensor] = {}
        self._finished_step = 0

    def open(self, offset: int, size_bytes: int) -> memoryview:
        """See Staging."""
        if self._slab:
            return self._slab[offset : offset + size_bytes]
        self._arrived[offset] = whole = allocate_bytes(size_bytes)
        return view_as_bytes(whole)

    def accept(self, offset: int, size_bytes: int) -> memoryview:
        """See Staging. A copy is verified, so that nothing which comes to the slab late is in it."""
        if self._slab:
            self._arrived[offset] = whole = allocate_bytes(size_bytes)
            copy_bytes(self._slab[offset : offset + size_bytes], view_as_bytes(whole))
        return view_as_bytes(self._arrived[offset])[:size_bytes]

    def load(self, location: Location) -> EmbeddingTensor:
        """See Loader."""
        return view_as_embedding(self._arrived.pop(location.offset), location)

    def finish_step(self, step: int) -> None:
        """See Loader."""
        self._finished_step = step

    def stage(self, offset: int, tensor: EmbeddingTensor) -> Callable[[], Parts]:
        """See Staging."""

        def write() -> Parts:
            source = view_as_bytes(tensor)
            if not self._slab:
                return memoryview(bytearray(HEADER_SIZE_BYTES)), source
            header, payload = _divide(self._slab, offset, len(source))
            copy_bytes(source, payload)
            return header, payload

        return write


def make_staging(config: ConnectorConfig, ranks: int, directory: Path, store: Store, device: Device) -> Staging:
    """Return what suits an engine with ``ranks`` that load. Raises ConfigError when there is no room for its slab."""
    is_own = ranks == 1 and device.name == "cpu" and not config.copy_in_hooks
    if is_own and store.reaches_any_memory:
        return OwnStaging(config.slab_size_bytes)
    slab = Slab.create(directory / SLAB_NAME, config.slab_size_bytes)
    return OwnStaging(len(slab.data), slab) if is_own else SharedStaging(slab, ranks, device.name)


def _divide(slab: memoryview, offset: int, payload_size_bytes: int) -> Parts:
    start = offset + HEADER_SIZE_BYTES
    return slab[offset:start], slab[start : start + payload_size_bytes]
