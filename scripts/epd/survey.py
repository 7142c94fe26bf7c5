"""Looking at this machine the way the plan wants it described: its cards, its address, its memory. Changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from epd import npu_smi
from epd.errors import StepError
from epd.machine import Machine
from epd.plan.hosts import Card, Host

HCCN_TOOL = "/usr/local/Ascend/driver/tools/hccn_tool"
_PROJECT_LABEL, _SERVICE_LABEL = "com.docker.compose.project", "com.docker.compose.service"
_NODE = re.compile(r"^davinci(\d+)$")
_CHIP_PREFIX = re.compile(r"^Ascend\w+-")
"""What Ascend's Docker runtime takes before each number in ASCEND_VISIBLE_DEVICES, and its device plugin writes."""
_MEMORY = re.compile(r"^MemTotal:\s+(\d+) kB", re.MULTILINE)
_HCCN = re.compile(r"^address_(\d+)=(\S+)", re.MULTILINE)


def card_nodes(machine: Machine) -> list[int]:
    """Return the numbers of the device nodes /dev/davinci<n>."""
    dev = machine.path("/dev")
    found = (_NODE.match(path.name) for path in (dev.iterdir() if dev.is_dir() else ()))
    return sorted(int(match[1]) for match in found if match)


def sentence(machine: Machine, profile: str) -> str:
    """Say what NPUs this machine has, and which profile was chosen."""
    count = len(card_nodes(machine))
    if not count and not machine.exists("/dev/davinci_manager"):
        return f"no NPU found (/dev/davinci*): profile {profile}"
    seen = f"{count} Ascend NPU node(s) found (/dev/davinci*)"
    return f"{seen}; the cpu profile leaves them alone" if profile == "cpu" else f"{seen}: profile {profile}"


def chips(machine: Machine) -> list[npu_smi.Chip]:
    """Return the chips that npu-smi names; none when it is missing or fails."""
    table = machine.run("npu-smi", "info")
    return npu_smi.chips(table.stdout, npu_smi.mapping(machine.run("npu-smi", "info", "-m").stdout)) if table.ok else []


def profile(machine: Machine) -> str:
    """Return the hardware profile of this machine: `cpu` without NPUs; empty when its NPUs are none that we know."""
    if not card_nodes(machine):
        return "cpu"
    return npu_smi.profile(chips(machine))


def host(machine: Machine, *, hardware: str, name: str, project: str, settings: Mapping[str, str]) -> Host:
    """Describe this machine for the plan; EPD_HOST_ADDRESS, EPD_INTERFACE and EPD_CARDS win over what is found.

    Cards that containers of our own Compose project use count as free: the next start replaces those containers.

    Raises:
        StepError: this machine's address cannot be told, or EPD_CARDS names a card that is not there.
    """
    memory = _MEMORY.search(machine.text("/proc/meminfo"))
    memory_mib = int(memory[1]) // 1024 if memory else 0
    if hardware == "cpu":
        return Host(name, hardware, "127.0.0.1", memory_mib=memory_mib)
    address, interface = _address(machine, settings.get("EPD_HOST_ADDRESS", ""), settings.get("EPD_INTERFACE", ""))
    return Host(
        name=name,
        hardware=hardware,
        address=address,
        interface=interface,
        memory_mib=memory_mib,
        roce=has_roce(machine),
        cards=_wanted(cards(machine, project), settings.get("EPD_CARDS", "")),
    )


def has_roce(machine: Machine) -> bool:
    """Whether the cards have a network of their own: addresses in /etc/hccn.conf, and the first one's link is up."""
    addresses = _HCCN.findall(machine.text("/etc/hccn.conf"))
    if not addresses:
        return False
    link = machine.run(HCCN_TOOL, "-i", addresses[0][0], "-link", "-g")
    return link.ok and "UP" in link.stdout.upper().split()


def cards(machine: Machine, project: str = "") -> tuple[Card, ...]:
    """Return the cards that have a device node and that npu-smi knows, and who uses them."""
    nodes = set(card_nodes(machine))
    group = npu_smi.groups(npu_smi.links(machine.run("npu-smi", "info", "-t", "topo").stdout))
    users, busy = card_users(machine, project), card_users(machine)
    own = {
        card: user.service
        for card, found in containers(machine).items()
        for user in found
        if project and user.project == project
    }
    addresses = dict(_HCCN.findall(machine.text("/etc/hccn.conf")))
    return tuple(
        Card(
            id=chip.physical,
            module=chip.npu,
            hbm_mib=chip.hbm_mib,
            hbm_used_mib=0 if chip.physical in busy else chip.hbm_used_mib,
            numa=_numa(machine, chip.bus),
            group=group.get(chip.physical, 0),
            address=addresses.get(str(chip.physical), ""),
            taken_by=users.get(chip.physical, ""),
            serves=own.get(chip.physical, ""),
        )
        for chip in chips(machine)
        if chip.physical in nodes
    )


def card_users(machine: Machine, project: str = "") -> dict[int, str]:
    """Return who uses a card, by its number: a running container that has its device node, else a process on it.

    Containers of the Compose project `project`, and the processes on their cards, are left out.
    """
    own, others = set(), {}
    for card, users in containers(machine).items():
        names = [user.name for user in users if not project or user.project != project]
        if names:
            others[card] = f"container {names[0]}"
        else:
            own.add(card)
    found = {}
    by_place = {(chip.npu, chip.chip): chip.physical for chip in chips(machine)}
    for process in npu_smi.processes(machine.run("npu-smi", "info").stdout):
        physical = by_place.get((process.npu, process.chip))
        if physical is not None and physical not in own:
            found[physical] = f"process {process.pid} {process.name}".strip()
    return found | others


class User(NamedTuple):
    """A running container that has a card."""

    name: str
    project: str
    """Compose project; empty when it is none's."""
    service: str
    """Its service in there."""


def containers(machine: Machine) -> dict[int, list[User]]:
    """Return the running containers that have a card's device node, by the card's number."""
    ids = machine.run("docker", "ps", "-q").stdout.split()
    if not ids:
        return {}
    try:
        inspected: list[dict[str, Any]] = json.loads(machine.run("docker", "inspect", *ids).stdout or "[]")
    except ValueError:
        return {}
    found: dict[int, list[User]] = {}
    for container in inspected:
        labels = container.get("Config", {}).get("Labels") or {}
        name = str(container.get("Name", "?")).lstrip("/")
        user = User(name, str(labels.get(_PROJECT_LABEL, "")), str(labels.get(_SERVICE_LABEL, "")))
        for card in _cards_of(container):
            found.setdefault(card, []).append(user)
    return found


def _cards_of(container: Mapping[str, Any]) -> set[int]:
    """Return the cards of a container, given by name or through the Ascend Docker Runtime's variable."""
    nodes = [str(device.get("PathOnHost", "")) for device in container.get("HostConfig", {}).get("Devices") or []]
    found = {int(match[1]) for node in nodes if (match := _NODE.match(node.removeprefix("/dev/")))}
    for variable in container.get("Config", {}).get("Env") or []:
        name, _, value = variable.partition("=")
        if name == "ASCEND_VISIBLE_DEVICES":
            found |= numbers(value)
    return found


def numbers(text: str) -> set[int]:
    """Read a list of card numbers: `0,1,4-7`, `Ascend910-0`; what is no number is left out."""
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = _CHIP_PREFIX.sub("", part.strip()).partition("-")
        if low.isdecimal() and (high or low).isdecimal():
            found |= set(range(int(low), int(high or low) + 1))
    return found


def _wanted(found: tuple[Card, ...], wanted: str) -> tuple[Card, ...]:
    if not wanted.strip():
        return found
    chosen = numbers(wanted)
    there = {card.id for card in found}
    if not chosen or chosen - there:
        raise StepError(
            "EPD_CARDS is not usable",
            expected=f"some of the cards of this machine: {', '.join(map(str, sorted(there))) or 'none was found'}",
            found=f"EPD_CARDS={wanted}",
            fix="name cards that are there, e.g. EPD_CARDS=0-3, or leave it out",
        )
    return tuple(card for card in found if card.id in chosen)


def _numa(machine: Machine, bus: str) -> int:
    text = machine.text(f"/sys/bus/pci/devices/{bus}/numa_node").strip()
    return int(text) if text.isdecimal() else -1


def _address(machine: Machine, address: str, interface: str) -> tuple[str, str]:
    """Return this machine's address and its interface: those asked for, else those of the default route."""
    found = _addresses(machine)
    if not interface and not address:
        routes = _json(machine.run("ip", "-j", "route", "show", "default").stdout)
        interface = next((str(route["dev"]) for route in routes if route.get("dev")), "")
        if not interface and len(found) == 1:  # no way out of this network, yet no choice either
            interface = next(iter(found))
    if address:
        interface = interface or next((name for name, local in found.items() if address in local), "")
        return address, interface
    local = found.get(interface, [])
    if not local:
        listed = ", ".join(f"{name} {' '.join(values)}" for name, values in found.items()) or "none"
        raise StepError(
            "cannot tell this machine's address",
            expected="an IPv4 address on the interface of the default route",
            found=f"interface {interface or '(no default route)'}; addresses: {listed}",
            fix="name it: EPD_HOST_ADDRESS=<address> (the one that the other hosts, and the cards' transfers, use)",
        )
    return local[0], interface


def _addresses(machine: Machine) -> dict[str, list[str]]:
    """Return the IPv4 addresses of each interface but the loopback one."""
    found = {}
    for entry in _json(machine.run("ip", "-j", "-4", "addr", "show").stdout):
        local = [str(info["local"]) for info in entry.get("addr_info") or [] if info.get("local")]
        if local and entry.get("ifname") != "lo":
            found[str(entry["ifname"])] = local
    return found


def _json(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text or "[]")
    except ValueError:
        return []
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
