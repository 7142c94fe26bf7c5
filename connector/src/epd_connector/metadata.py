"""What one scheduler step tells the workers: which verified embeddings to load."""

from dataclasses import dataclass

import msgspec

from .compat import ECConnectorMetadata


class Location(msgspec.Struct, frozen=True):
    """A verified object: the offset of its region (its header's), payload size in bytes, torch dtype name, shape."""

    offset: int
    payload_size_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StepMetadata(ECConnectorMetadata):
    """Loads of one step. ``step`` grows by one for each step that has any; a rank reports it when done."""

    step: int = 0
    loads: tuple[tuple[str, Location], ...] = ()
