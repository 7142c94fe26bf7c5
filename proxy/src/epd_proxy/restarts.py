"""Notices that a process was started anew, however soon after its end: between two probes of its health, say."""

import asyncio
import logging

from .errors import BackendError
from .pool import Endpoint, Pool
from .upstream import Upstream

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
# A process that lives takes a new connection at once, and none is back so soon after its end.
_SOON_S = 0.5
_PAUSE_S = 1.0


class Restarts:
    """Holds a connection to each endpoint of ``pool`` and marks it when that ends and there cannot be another one."""

    def __init__(self, pool: Pool, upstream: Upstream) -> None:
        self._pool = pool
        self._upstream = upstream
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Hold the connections. Needs a running loop."""
        self._tasks = [
            asyncio.create_task(self._watch(endpoint), name=f"hold {endpoint.stage} {endpoint.url}")
            for endpoint in self._pool.endpoints
        ]

    async def close(self) -> None:
        """Close them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        held_before, pause_s = False, 0.0
        while True:
            try:
                held = await self._upstream.hold(endpoint.url, _SOON_S if held_before else _CONNECT_S)
            except BackendError:
                if held_before:
                    endpoint.mark_restarted()
                    log.warning("%s %s ended: what it held is taken to be gone", endpoint.stage, endpoint.url)
                held_before = False
                await asyncio.sleep(_PAUSE_S)
                continue
            started, held_before = loop.time(), True
            try:
                await asyncio.sleep(pause_s)
                await held.ended()
            finally:
                held.close()
            # One that wants no silent connections is not to be asked without a pause.
            pause_s = _PAUSE_S if loop.time() - started < _PAUSE_S else 0.0
