"""The prober: asks every instance for ``GET /health`` and marks the pools."""

import asyncio
import logging
from collections.abc import Iterable

from .config import Health as HealthConfig
from .errors import BackendConnectError, BackendConnectTimeoutError, BackendError
from .pool import Endpoint, Pool
from .upstream import Call, Upstream

log = logging.getLogger(__name__)


class Prober:
    """Probes each endpoint on its own beat, so that one that hangs does not delay the others."""

    def __init__(self, pools: Iterable[Pool], upstream: Upstream, config: HealthConfig) -> None:
        self._pools = tuple(pools)
        self._probing: dict[Endpoint, asyncio.Task[None]] = {}
        self._upstream = upstream
        self._interval_s = config.interval_s
        self._call = Call("/health", headers=[], first_byte_s=config.timeout_s, method="GET")

    def follow(self) -> None:
        """Probe the endpoints that the pools have now, the new ones at once, and no others. Needs a running loop."""
        endpoints = [endpoint for pool in self._pools for endpoint in pool.endpoints]
        for endpoint in endpoints:
            if endpoint not in self._probing:
                name = f"probe {endpoint.stage} {endpoint.url}"
                self._probing[endpoint] = asyncio.create_task(self._watch(endpoint), name=name)
        for endpoint in self._probing.keys() - set(endpoints):
            self._probing.pop(endpoint).cancel()

    async def close(self) -> None:
        """Probe no more."""
        tasks = list(self._probing.values())
        self._probing.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            error, refused = await self._probe(endpoint)
            if endpoint.mark_probe(error, refused=refused):
                log.log(logging.WARNING if error else logging.INFO, "%s instance %s is %s%s", endpoint.stage,
                        endpoint.url, endpoint.health.value, f": {error}" if error else "")  # fmt: skip
            await asyncio.sleep(self._interval_s)

    async def _probe(self, endpoint: Endpoint) -> tuple[str | None, bool]:
        """Return what is wrong, and whether nothing listens there at all."""
        try:
            response = await self._upstream.send(endpoint.url, self._call)
        except BackendError as error:
            refused = isinstance(error, BackendConnectError) and not isinstance(error, BackendConnectTimeoutError)
            return str(error), refused
        response.close()
        return None if response.status == 200 else f"GET /health answered {response.status}", False
