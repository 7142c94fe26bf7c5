"""The services as Compose will start them: network, memory, mounts, cards. Finds what an own overlay broke."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from epd.doctor.finding import Finding, failed, passed, warned
from epd.doctor.subject import Subject

_GIB = 1 << 30
_SHM_BYTES = 16 * _GIB
_DOCKER_DEFAULT_BYTES = 64 << 20


def check(subject: Subject) -> Iterator[Finding]:
    """Check the services of this host; nothing when Compose could not tell them."""
    if not subject.services:
        return
    yield _mounts(subject)
    if not subject.npu:
        return
    instances = {i.name: subject.services[i.name] for i in subject.instances if i.name in subject.services}
    yield _network(instances)
    yield _shared_memory(instances)
    yield _cards(instances)
    yield _runtime(subject, instances)


def _mounts(subject: Subject) -> Finding:
    """Check that every path of this host that is mounted exists: Compose is told not to make it up."""
    missing: dict[str, list[str]] = {}
    for name, service in subject.services.items():
        for volume in service.get("volumes") or []:
            if volume.get("type") == "bind" and not subject.machine.exists(str(volume["source"])):
                missing.setdefault(str(volume["source"]), []).append(name)
    if missing:
        return failed(
            "containers.mounts",
            expected="every mounted path of this host to exist",
            found="; ".join(f"{source} ({', '.join(names)})" for source, names in missing.items()),
            fix="install what brings it (driver, hccn.conf), or say where it is: EPD_ASCEND_DRIVER, EPD_NPU_SMI, MODEL",
        )
    return passed("containers.mounts", "every mounted path exists")


def _network(instances: Mapping[str, Any]) -> Finding:
    bridged = [name for name, service in instances.items() if service.get("network_mode") != "host"]
    if bridged:
        return failed(
            "containers.network",
            expected="network_mode host: the transfer engine's id is the IP, and bridge addresses would need RoCE",
            found=f"{', '.join(bridged)} on a bridge",
            fix="remove network_mode and networks of these services from your own Compose file",
        )
    return passed("containers.network", "host network")


def _shared_memory(instances: Mapping[str, Any]) -> Finding:
    sizes = {name: int(service.get("shm_size") or _DOCKER_DEFAULT_BYTES) for name, service in instances.items()}
    small = {name: size for name, size in sizes.items() if size < _SHM_BYTES}
    if small:
        make = failed if min(small.values()) < _GIB else warned
        return make(
            "containers.shm",
            expected="16 GiB of shared memory: too little of it ends in core dumps",
            found=", ".join(f"{name}: {size >> 20} MiB" for name, size in small.items()),
            fix="leave EPD_SHM_SIZE at its default, 16g, or raise it",
        )
    return passed("containers.shm", f"{min(sizes.values(), default=_SHM_BYTES) >> 30} GiB or more")


def _cards(instances: Mapping[str, Any]) -> Finding:
    """Check that no card is in two containers; a service without any uses the Ascend runtime's variable."""
    users: dict[str, list[str]] = {}
    for name, service in instances.items():
        for card in _cards_of(service):
            users.setdefault(card, []).append(name)
    shared = {card: names for card, names in users.items() if len(names) > 1}
    without = [name for name, service in instances.items() if not _cards_of(service)]
    if shared or without:
        parts = [f"card {card}: {' and '.join(names)}" for card, names in shared.items()]
        parts += [f"{name} has none" for name in without]
        expected = "cards for each instance, none in two containers: the driver refuses to share"
        return failed(
            "containers.cards", expected=expected, found="; ".join(parts), fix="use the files that `make plan` writes"
        )
    return passed("containers.cards", "; ".join(f"{name}: {', '.join(_cards_of(s))}" for name, s in instances.items()))


def _cards_of(service: Mapping[str, Any]) -> list[str]:
    sources = [str(device.get("source", "")).removeprefix("/dev/davinci") for device in service.get("devices") or []]
    named = [source for source in sources if source.isdecimal()]
    variable = str((service.get("environment") or {}).get("ASCEND_VISIBLE_DEVICES", ""))
    return named or [card for card in variable.split(",") if card]


def _runtime(subject: Subject, instances: Mapping[str, Any]) -> Finding:
    wanted = sorted({str(s["runtime"]) for s in instances.values() if s.get("runtime")})
    if not wanted:
        return passed("containers.runtime", "devices by name, no runtime needed")
    known = subject.machine.run("docker", "info", "--format", "{{json .Runtimes}}").stdout
    missing = [name for name in wanted if f'"{name}"' not in known]
    if missing:
        return failed(
            "containers.runtime",
            expected=f"the engine knows the runtime {', '.join(missing)}",
            found=known.strip() or "no answer",
            fix="install the Ascend Docker Runtime, or leave runtime-ascend out of EPD_OVERLAYS",
        )
    return passed("containers.runtime", ", ".join(wanted))
