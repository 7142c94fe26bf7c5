"""Work on large bodies, kept off the event loop."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

# Small objects take some 30 ms a MiB to be read and gone through; beyond this size other requests would feel it.
_FROM_BYTES = 512 * 1024


def is_large(size_bytes: int) -> bool:
    """Whether work on so large a body is done aside."""
    return size_bytes >= _FROM_BYTES


async def run_aside(
    size_bytes: int, work: Callable[_Given, _Result], *args: _Given.args, **kwargs: _Given.kwargs
) -> _Result:
    """Return what ``work`` does, done in a thread when it is about a large body."""
    if not is_large(size_bytes):
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
