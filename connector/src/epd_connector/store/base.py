"""What the connector needs of a store, and the errors a backend turns its own into.

StoreError                  any refusal; counts towards the circuit breaker
├── StoreFullError          no room now; a retry may succeed
├── StoreTimeoutError       one answer was late: a busy machine does that too; a retry may succeed
└── StoreUnavailableError   the store does not answer; opens the circuit breaker at once
"""

from collections.abc import Sequence
from typing import Protocol


class StoreError(Exception):
    """A store refused or failed an operation."""


class StoreFullError(StoreError):
    """There is no room for the object now."""


class StoreTimeoutError(StoreError):
    """The store did not answer this one call in time."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached."""


class Store(Protocol):
    """A flat namespace of immutable objects.

    Every method may block for seconds when the store is sick, so none is ever called from a scheduler or
    model thread. All but ``connect`` and ``close`` may be called from several threads at once, and raise a
    StoreError when they fail.
    """

    reaches_any_memory: bool
    """Whether put and get take any memory of the host, which is theirs only until they return."""

    def connect(self, memory: memoryview) -> None:
        """Reach the store and make ``memory`` usable for put and get. Raises StoreUnavailableError; may be retried."""

    def exists(self, key: str) -> bool:
        """Tell whether a finished object is there; keeps it from eviction for the store's lease, if it has one."""

    def find_size(self, key: str) -> int | None:
        """Return the object's size in bytes, None when it is absent or being written; like ``exists`` else."""

    def put(self, key: str, parts: Sequence[memoryview]) -> None:
        """Store the parts as one object. One that is there already stays as it is and that is no error."""

    def get(self, key: str, out: memoryview) -> int | None:
        """Read an object into memory of exactly its size; return its size, None when it is absent."""

    def remove(self, key: str) -> None:
        """Remove an object, also under lease; an absent one is no error, one that is being written may be.

        Who reads it meanwhile may get a part of another object: verify what was read.
        """

    def remove_all(self) -> int:
        """Remove every embedding, also under lease; return how many there were."""

    def close(self) -> None:
        """Let go of the store. No other method may be called afterwards, nor be running."""
