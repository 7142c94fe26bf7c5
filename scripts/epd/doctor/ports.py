"""The addresses and TCP ports that the services of this host will bind."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from epd.doctor.finding import Finding, failed, passed
from epd.doctor.subject import Subject
from epd.machine import Machine
from epd.plan.ports import FOREIGN, METASERVER

_OWN = ("EPD_PORT", "EPD_EC_METRICS_PORT")
_MASTER = ("EPD_MOONCAKE_RPC_PORT", "EPD_MOONCAKE_METADATA_PORT", "EPD_MOONCAKE_METRICS_PORT")
_STORE = ("EPD_STORE_PORT", "EPD_STORE_HTTP_PORT")


def check(subject: Subject) -> Iterator[Finding]:
    """Check every port of a host network; elsewhere the proxy's, which is the only one that is published."""
    yield from _addresses(subject)
    if not subject.services:
        return
    wanted = bound(subject)
    names: dict[int, list[str]] = {}
    for port, service in wanted:
        names.setdefault(port, []).append(service)
    twice = {port: services for port, services in names.items() if len(services) > 1}
    if twice:
        found = "; ".join(f"{port}: {' and '.join(services)}" for port, services in sorted(twice.items()))
        yield failed(
            "ports.distinct", expected="a port of its own for each", found=found, fix="choose others, see `make plan`"
        )
    foreign = [
        f"{port} ({', '.join(names[port])}) belongs to {owner}"
        for port in sorted(names)
        for owner, taken in FOREIGN.items()
        if subject.npu and port in taken
    ]
    if foreign:
        expected = ", ".join(f"none of {r.start}-{r.stop - 1} ({owner})" for owner, r in FOREIGN.items())
        yield failed("ports.range", expected=expected, found="; ".join(foreign), fix="choose others, see `make plan`")
    own = set(subject.running)  # what runs has its ports already
    taken = sorted(port for port in listening(subject.machine) & set(names) if not own.issuperset(names[port]))
    if taken:
        yield failed(
            "ports.free",
            expected="ports that nobody listens on",
            found="; ".join(f"{port} ({', '.join(names[port])}): in use" for port in taken),
            fix=f"`ss -ltnp 'sport = :{taken[0]}'` names who does; stop it, or choose another port",
        )
    else:
        yield passed("ports.free", f"{len(names)} port(s): {', '.join(map(str, sorted(names)))}")


def bound(subject: Subject) -> list[tuple[int, str]]:
    """Return each port that a service will bind on this host, and the service."""
    found: list[tuple[int, str]] = []
    for name, service in subject.services.items():
        found += [(port, name) for port in _ports(name, service)]
        found += [(int(entry["published"]), name) for entry in service.get("ports") or [] if entry.get("published")]
    return found


def _ports(name: str, service: Mapping[str, Any]) -> list[int]:
    if service.get("network_mode") != "host":
        return []
    environment = service.get("environment") or {}
    names = {"mooncake-master": _MASTER, "mooncake-store": _STORE}.get(name, _OWN)
    ports = [int(environment[key]) for key in names if str(environment.get(key, "")).isdecimal()]
    if "--metaserver-advertise-url" in (service.get("command") or []):
        workers = str(environment.get("EPD_PROXY_WORKERS") or 1)
        ports += range(METASERVER, METASERVER + (int(workers) if workers.isdecimal() else 1))
    first = str(environment.get("EPD_KV_PORT", ""))
    if first.isdecimal():
        sizes = [int(environment.get(f"EPD_{kind}_PARALLEL_SIZE") or 1) for kind in ("TENSOR", "DATA")]
        ports += range(int(first), int(first) + sizes[0] * sizes[1])
    return ports


def _addresses(subject: Subject) -> Iterator[Finding]:
    """Check that what is advertised is an address of this machine, and one that others reach."""
    if not subject.npu or not subject.host:
        return
    address = subject.host.address
    if not reachable(address):
        yield failed(
            "network.address",
            expected="an address under which the containers of every host reach this one",
            found=f"{address}: a loopback or wildcard address, or none",
            fix="EPD_HOST_ADDRESS=<address of an interface>, or leave it out; `ip addr` lists them",
        )
        return
    said = subject.machine.run("ip", "-j", "-4", "addr", "show").stdout
    if f'"{address}"' not in said:
        yield failed(
            "network.address",
            expected=f"an interface of this machine with the address {address}, which other services connect to",
            found="none has it",
            fix="EPD_HOST_ADDRESS=<address>, or correct the inventory (`make describe` shows this machine)",
        )
        return
    advertised = {
        name: str((service.get("environment") or {}).get("EPD_ADVERTISE_HOST", address))
        for name, service in subject.services.items()
    }
    wrong = [f"{name}: {value}" for name, value in advertised.items() if value != address]
    if wrong:
        expected = f"{address} for every service of this host; a wildcard or loopback address reaches nobody"
        yield failed(
            "network.address", expected=expected, found=", ".join(wrong), fix="remove your own EPD_ADVERTISE_HOST"
        )
    else:
        yield passed("network.address", address)


def reachable(address: str) -> bool:
    """Whether this is an address, and one that means the same machine everywhere."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (found.is_loopback or found.is_unspecified)


def listening(machine: Machine) -> set[int]:
    """Return the TCP ports that somebody listens on, by the kernel's tables (proc(5): state 0A is LISTEN)."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in machine.text(name).splitlines()[1:]:
            words = line.split()
            if len(words) > 3 and words[3] == "0A":
                found.add(int(words[1].rpartition(":")[2], 16))
    return found
