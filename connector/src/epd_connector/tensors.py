"""Between torch tensors and bytes: the only module besides vLLM's own and :mod:`.npu` that uses torch."""

from typing import TypeAlias

import numpy
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


def allocate_bytes(size_bytes: int) -> EmbeddingTensor:
    """Return a tensor of bytes in host memory, aligned for any dtype; their values are not set."""
    return torch.empty(size_bytes, dtype=torch.uint8)


def view_as_bytes(tensor: EmbeddingTensor) -> memoryview:
    """Return the bytes of a tensor in host memory, row-major, and keep them alive; a copy when it has other strides."""
    return memoryview(tensor.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy())


def copy_bytes(source: memoryview, target: memoryview) -> None:
    """Copy on this thread alone, without the GIL. Torch's would start a team of threads for each I/O thread."""
    numpy.copyto(numpy.asarray(target), numpy.asarray(source))


def view_as_embedding(whole: EmbeddingTensor, location: Location) -> EmbeddingTensor:
    """Return the payload of an object, of which ``whole`` has all bytes, as the tensor that it is."""
    payload = whole[HEADER_SIZE_BYTES : HEADER_SIZE_BYTES + location.payload_size_bytes]
    return payload.view(getattr(torch, location.dtype)).view(location.shape)
