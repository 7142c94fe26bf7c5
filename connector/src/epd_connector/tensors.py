"""Copies between torch tensors and the slab: the only module besides vLLM's own that touches a device."""

from typing import TypeAlias

import torch

from .header import HEADER_SIZE_BYTES
from .metadata import Location

EmbeddingTensor: TypeAlias = torch.Tensor


def describe_tensor(tensor: EmbeddingTensor) -> tuple[str, tuple[int, ...]]:
    """Return a tensor's dtype name (``bfloat16``, …) and shape."""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def copy_to_slab(tensor: EmbeddingTensor, payload: memoryview) -> None:
    """Copy a tensor of any device and stride into the slab, row-major; returns when the bytes are there."""
    if tensor.numel():
        target = torch.frombuffer(payload, dtype=tensor.dtype).view(tensor.shape)
        target.copy_(tensor.detach())


def copy_to_device(data: memoryview, location: Location, device: str) -> EmbeddingTensor:
    """Return a new tensor on ``device`` with the payload of the object at ``location``; returns when it was read."""
    dtype = getattr(torch, location.dtype)
    if not location.payload_size_bytes:
        return torch.empty(location.shape, dtype=dtype, device=device)
    start = location.offset + HEADER_SIZE_BYTES
    payload = data[start : start + location.payload_size_bytes]
    source = torch.frombuffer(payload, dtype=dtype).view(location.shape)
    # Always a copy, also on the CPU: the region is reused later.
    return torch.empty(location.shape, dtype=dtype, device=device).copy_(source)
