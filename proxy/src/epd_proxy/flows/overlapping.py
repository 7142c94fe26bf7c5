"""A request that is sent before its items are encoded. Waits while it cleans up, so it is not compiled (setup.py)."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ..relay import Answer


async def open_overlapped(
    encode: Coroutine[Any, Any, bool],
    open_pending: Coroutine[Any, Any, Answer],
    open_anew: Callable[[], Awaitable[Answer]],
    request_id: str,
) -> Answer:
    """Run ``encode``, which returns whether all items are stored, beside ``open_pending``, whose instance awaits them.

    Returns the open answer. Rather than have it wait in vain for an item that will not come, an instance is asked anew,
    by ``open_anew``, and encodes it. Raises what they do; then nothing is left open or running.
    """
    encoding = asyncio.create_task(encode, name=f"encode {request_id}")
    opening = asyncio.create_task(open_pending, name=f"answer {request_id}")
    try:
        await asyncio.wait((encoding, opening), return_when=asyncio.FIRST_COMPLETED)
        if opening.done() or await encoding:
            return await opening
        await _cancel(opening)
        return await open_anew()
    except BaseException:
        await _cancel(opening)
        raise
    finally:
        await _cancel(encoding)  # whoever has answered had no need of it


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End the task. An answer that it has opened meanwhile is closed; an error that nobody asks for is forgotten."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and task.exception() is None and isinstance(task.result(), Answer):
        task.result().close()
