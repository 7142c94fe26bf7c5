"""What differs between a host and an NPU for a store that moves bytes: memory that it can reach, and threads.

:mod:`.npu` has the implementation for an NPU and is loaded only where there is one.
"""

import ctypes
from typing import Any, Protocol


class TransferMemory(Protocol):
    """Memory that the store's transfers read and write, one byte of it for each byte of the slab."""

    address: int
    size_bytes: int

    def find_address(self, region: memoryview) -> int:
        """Return the address that stands for a region of the slab."""

    def push(self, region: memoryview) -> None:
        """Make the bytes of a region of the slab those of its address; returns when they are."""

    def pull(self, region: memoryview) -> None:
        """Make the bytes at a region's address those of the slab; returns when they are."""


class Device(Protocol):
    """The kind of device that vLLM runs on."""

    name: str
    """As torch names it, e.g. ``cpu`` or ``npu``; torch adds the current index."""

    def enter_thread(self) -> None:
        """Prepare the calling thread, once, before it uses the store."""

    def find_engine(self, hostname: str) -> Any | None:
        """Return the transfer engine of this process that the store has to share, None to make its own."""

    def open_memory(self, slab: memoryview) -> TransferMemory:
        """Return memory for transfers of the slab's content."""


class HostMemory:
    """The slab itself: transfers reach it directly."""

    def __init__(self, slab: memoryview) -> None:
        self.address = find_host_memory(slab)
        self.size_bytes = len(slab)

    def find_address(self, region: memoryview) -> int:
        """See TransferMemory."""
        return find_host_memory(region)

    def push(self, region: memoryview) -> None:
        """See TransferMemory. They are the same bytes."""

    def pull(self, region: memoryview) -> None:
        """See TransferMemory. They are the same bytes."""


class HostDevice:
    """Transfers from host memory. Embeddings may lie on any device that torch can copy from."""

    def __init__(self, name: str = "cpu") -> None:
        self.name = name

    def enter_thread(self) -> None:
        """See Device. Nothing to do."""

    def find_engine(self, hostname: str) -> Any | None:  # noqa: ARG002 - as an NPU's
        """See Device. The store makes its own."""
        return None

    def open_memory(self, slab: memoryview) -> TransferMemory:
        """See Device."""
        return HostMemory(slab)


def find_host_memory(region: memoryview) -> int:
    """Return the address of the region's first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(region))
