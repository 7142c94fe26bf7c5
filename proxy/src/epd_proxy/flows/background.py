"""Tasks that outlive the request they were started for: named, counted, ended with the proxy."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)

_GRACE_S = 2.0


class Background:
    """Keeps tasks, and logs an exception that nobody waits for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Background running={len(self)} {sorted(task.get_name() for task in self._tasks)[:8]}>"

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start ``work``."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Give the tasks a moment to end, then cancel them."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_GRACE_S)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d tasks between prefill and decode were cut off", len(late))
                await asyncio.wait(late, timeout=_GRACE_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.debug("%s: %s", task.get_name(), error)
