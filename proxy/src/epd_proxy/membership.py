"""Which instances there are: those of the start, changed live by operators and by the instances file."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from .announcements import State
from .config import ProxyConfig, Topology
from .errors import ConfigError, ConflictError, InvalidRequestError, NotFoundError
from .pool import Endpoint, Pool

log = logging.getLogger(__name__)

_BEAT_S = 0.1


class Membership:
    """Adds, drains and removes instances. ``changed`` is called after each change.

    An instance that is removed gets no new requests and goes when its own are done, whatever the others do. The stages
    themselves, and with them the handshake, are those of the start.
    """

    def __init__(self, config: ProxyConfig, pools: Mapping[str, Pool], changed: Callable[[], None]) -> None:
        self._config = config
        self._pools = pools
        self._changed = changed
        self._leaving: dict[Endpoint, asyncio.Event] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self.staffed: set[str] = set()
        """The stages that have instances: live, for who plans requests."""
        self._note_staffed()

    def __repr__(self) -> str:
        return f"<Membership leaving={sorted(e.url for e in self._leaving)} {list(self._pools.values())}>"

    def endpoints(self) -> dict[str, list[Endpoint]]:
        """Return the instances by stage, those that are on their way out included."""
        return {stage: pool.endpoints for stage, pool in self._pools.items()}

    def add(self, stage: str, url: str) -> tuple[Endpoint, bool]:
        """Return the instance, which takes requests from here on, and whether it is new.

        Raises :class:`NotFoundError` for a stage that this topology lacks, and :class:`InvalidRequestError` for a URL
        that the stage cannot have.
        """
        pool, url = self._pool(stage), url.rstrip("/")
        known = pool.find(url)
        new = known is None
        came_back = known is not None and known.draining
        if new:
            urls = (*(e.url for e in pool.endpoints), url)
            try:
                self.check(replace(self._topology(), **{stage: urls}))
            except ConfigError as error:
                raise InvalidRequestError(str(error)) from error
        endpoint = pool.add(url)
        self._decided(endpoint)
        if new or came_back:
            log.info("%s instance %s takes requests from here on", stage, url)
            self._note_staffed()
            self._changed()
        return endpoint, new

    def drain(self, stage: str, url: str) -> Endpoint:
        """Send no new requests to the instance; :meth:`add` undoes it.

        Raises :class:`NotFoundError` for an unknown instance, and :class:`ConflictError` for the last one of a stage
        that requests cannot do without.
        """
        endpoint = self._find(stage, url)
        others = [e for e in self._pools[stage].endpoints if e is not endpoint and not e.draining]
        if stage != "encode" and not others:
            raise ConflictError(f"{url} is the last {stage} instance that takes requests; add another one first")
        if not endpoint.draining:
            endpoint.draining = True
            self._changed()
            log.info("%s instance %s is drained of %d requests", stage, url, endpoint.active_leases)
        return endpoint

    def remove(self, stage: str, url: str) -> Endpoint:
        """Drain the instance, and forget it when its requests are done. Raises as :meth:`drain` does."""
        endpoint = self.drain(stage, url)
        if endpoint not in self._leaving:
            self._leaving[endpoint] = asyncio.Event()
            self._changed()
        self._sweep()
        if self._leaving and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = asyncio.create_task(self._keep_sweeping(), name="remove instances")
        return endpoint

    def check(self, topology: Topology) -> None:
        """Raise :class:`ConfigError` with all that keeps the instances from becoming those of ``topology``."""
        replace(self._config, topology=topology)
        before, after = (set(each.stages()) - {"encode"} for each in (self._config.topology, topology))
        if before != after:
            raise ConfigError([f"the stages {' and '.join(sorted(before))} cannot become {' and '.join(sorted(after))} "
                               "while the proxy runs; start it again for that"])  # fmt: skip

    def become(self, topology: Topology) -> None:
        """Make the instances those of ``topology``. Raises as :meth:`check` does, and then changes nothing."""
        self.check(topology)
        wanted = topology.stages()
        for stage in self._pools:
            for url in wanted.get(stage, ()):
                self.add(stage, url)
        for stage, pool in self._pools.items():
            for endpoint in pool.endpoints:
                if endpoint.url not in wanted.get(stage, ()):
                    self.remove(stage, endpoint.url)

    def state(self) -> State:
        """Return what each instance is doing."""
        return {stage: {e.url: self._doing(e) for e in pool.endpoints} for stage, pool in self._pools.items()}

    def adopt(self, state: State) -> None:
        """Do what another worker's :meth:`state` tells of. Raises :class:`ConfigError`."""
        wanted = {stage: state.get(stage, {}) for stage in self._pools} if state else {}
        try:
            for stage, urls in wanted.items():
                for url in urls:
                    if urls[url] == "serving":
                        self.add(stage, url)
            for stage, urls in wanted.items():
                for endpoint in self._pools[stage].endpoints:
                    if urls.get(endpoint.url) == "drained":
                        self.drain(stage, endpoint.url)
                    elif urls.get(endpoint.url) != "serving":
                        self.remove(stage, endpoint.url)
        except InvalidRequestError as error:
            raise ConfigError([str(error)]) from error

    async def wait_gone(self, endpoint: Endpoint, timeout_s: float) -> bool:
        """Wait until a removed instance is gone, or was added again, ``timeout_s`` at most. Returns whether it is."""
        if leaving := self._leaving.get(endpoint):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(leaving.wait(), timeout_s)
        return endpoint not in self._pools[endpoint.stage].endpoints

    async def close(self) -> None:
        """Wait for no more instances to be idle."""
        if self._sweeping:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))

    async def _keep_sweeping(self) -> None:
        while self._leaving:
            await asyncio.sleep(_BEAT_S)
            self._sweep()

    def _sweep(self) -> None:
        idle = [endpoint for endpoint in self._leaving if not endpoint.active_leases]
        for endpoint in idle:
            self._pools[endpoint.stage].remove(endpoint)
            self._decided(endpoint)
            log.info("%s instance %s was removed", endpoint.stage, endpoint.url)
        if idle:
            self._note_staffed()
            self._changed()

    def _doing(self, endpoint: Endpoint) -> str:
        if endpoint in self._leaving:
            return "leaving"
        return "drained" if endpoint.draining else "serving"

    def _decided(self, endpoint: Endpoint) -> None:
        if leaving := self._leaving.pop(endpoint, None):
            leaving.set()

    def _topology(self) -> Topology:
        return Topology(**{stage: tuple(e.url for e in pool.endpoints) for stage, pool in self._pools.items()})

    def _note_staffed(self) -> None:
        self.staffed.clear()
        self.staffed.update(stage for stage, pool in self._pools.items() if pool.endpoints)

    def _pool(self, stage: str) -> Pool:
        pool = self._pools.get(stage)
        if pool is None:
            raise NotFoundError(f"stage: expected one of {', '.join(self._pools)}, found {stage!r}")
        return pool

    def _find(self, stage: str, url: str) -> Endpoint:
        endpoint = self._pool(stage).find(url.rstrip("/"))
        if endpoint is None:
            raise NotFoundError(f"{url} is no {stage} instance")
        return endpoint
