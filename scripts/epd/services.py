"""The state of the services, as `docker inspect` tells it. Pure: JSON in, states out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

PROXY = "proxy"
"""The service that clients talk to; of several hosts only the first has it."""
CRASHES_TO_GIVE_UP = 2
"""A service that its restart policy started again this often while we wait for it will not get healthy."""
_SERVICE_LABEL = "com.docker.compose.service"
_MEMORY_LIMITS = {
    "proxy": "EPD_PROXY_MEMORY_LIMIT",
    "mooncake-store": "EPD_STORE_MEMORY_LIMIT",
    "mooncake-master": "mem_limit in compose/services.yaml",
}
"""What sets a service's limit; of all others, EPD_MEMORY_LIMIT does."""


class Phase(str, Enum):
    """Where a service is on its way up."""

    WAITING = "waiting"
    """No container yet."""
    CREATED = "created"
    """Its container waits for the services it depends on."""
    LOADING = "loading"
    """It runs; its health check does not pass yet."""
    RUNNING = "running"
    """It runs and has no health check."""
    HEALTHY = "healthy"
    RESTARTING = "restarting"
    """It crashed and is started again."""
    UNHEALTHY = "unhealthy"
    EXITED = "exited"
    """It ended, with whatever exit code: every service of a stack is there to stay."""

    __str__ = str.__str__


READY = frozenset({Phase.RUNNING, Phase.HEALTHY})


@dataclass(frozen=True)
class Service:
    """One service and what is known of its container."""

    name: str
    phase: Phase
    container: str = ""
    """Container id; empty while there is none."""
    exit_code: int = 0
    started_at: str = ""
    """When its container was last started, in the engine's own words; tells one run from the next."""
    restarts: int = 0
    """How often its restart policy started it again."""
    out_of_memory: bool = False
    """Whether the kernel killed it at its memory limit."""
    health_output: str = ""
    """What the last failed health check printed."""

    @property
    def ready(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.phase in READY

    @property
    def failed(self) -> bool:
        """Whether waiting any longer is of no use."""
        gave_up = self.restarts >= CRASHES_TO_GIVE_UP and not self.ready
        return self.phase in (Phase.UNHEALTHY, Phase.EXITED) or gave_up


def classify(inspected: dict[str, Any]) -> Service:
    """Turn one element of the JSON of `docker inspect` into a service."""
    state = inspected["State"]
    health = state.get("Health") or {}
    checks = health.get("Log") or []
    failing = [check for check in checks if check.get("ExitCode") != 0]
    return Service(
        name=inspected["Config"]["Labels"][_SERVICE_LABEL],
        phase=_phase(state, health.get("Status", "")),
        container=inspected["Id"],
        exit_code=state.get("ExitCode", 0),
        started_at=state.get("StartedAt", ""),
        restarts=inspected.get("RestartCount", 0),
        out_of_memory=bool(state.get("OOMKilled")),
        health_output=str(failing[-1].get("Output", "")).strip() if failing else "",
    )


def _phase(state: dict[str, Any], health: str) -> Phase:
    status = state["Status"]
    if status == "running":
        by_health = {"healthy": Phase.HEALTHY, "unhealthy": Phase.UNHEALTHY, "starting": Phase.LOADING}
        return by_health.get(health, Phase.RUNNING)
    others = {"created": Phase.CREATED, "restarting": Phase.RESTARTING, "paused": Phase.CREATED}
    return others.get(status, Phase.EXITED)


def proxy_ports(inspected: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the TCP ports of this machine that our running proxy has: published, or its own on a host network."""
    found: set[int] = set()
    for container in inspected:
        config, host = container["Config"], container.get("HostConfig") or {}
        if config["Labels"].get(_SERVICE_LABEL) != PROXY or container["State"]["Status"] != "running":
            continue
        if host.get("NetworkMode") == "host":
            ports = [line.partition("=")[2] for line in config.get("Env") or [] if line.startswith("EPD_PORT=")]
        else:
            bindings = (host.get("PortBindings") or {}).values()
            ports = [str(binding.get("HostPort", "")) for group in bindings for binding in group or []]
        found |= {int(port) for port in ports if port.isdecimal()}
    return found


def complete(expected: list[str], inspected: list[dict[str, Any]]) -> list[Service]:
    """Return the state of every expected service, in that order; one without a container is waiting."""
    found = {service.name: service for service in map(classify, inspected)}
    return [found.get(name, Service(name, Phase.WAITING)) for name in expected]


def since(service: Service, before: Service | None, *, compose_ended: bool) -> Service:
    """Return the service as it is to be judged, given its state `before` Compose was told to start it.

    Restarts of long ago do not count. What is left of an earlier run is no failure as long as Compose is at work: it
    is about to start that container again, or to replace it.
    """
    if before is None or before.container != service.container:
        return service
    if not compose_ended and not service.ready and before.started_at == service.started_at:
        return replace(service, phase=Phase.CREATED, restarts=0)
    return replace(service, restarts=max(0, service.restarts - before.restarts))


def hint(service: Service) -> str:
    """Say what most often helps a service in this state."""
    if service.out_of_memory or service.exit_code == 137:
        limit = _MEMORY_LIMITS.get(service.name, "EPD_MEMORY_LIMIT")
        return f"it was killed, most likely at its memory limit: raise {limit}, or free memory of this machine"
    if service.phase is Phase.UNHEALTHY and service.health_output:
        return f"its health check says: {service.health_output.splitlines()[-1]}"
    if service.phase is not Phase.EXITED and service.failed:
        return f"it was started again {service.restarts} times and does not stay up: the reason is in its log"
    if service.failed:
        return f"it ended with exit code {service.exit_code}: the reason is in its log"
    return "it was still loading: a slow machine may need a longer EPD_UP_TIMEOUT_S"
