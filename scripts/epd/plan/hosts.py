"""What there is: hosts and their cards, as a survey or a person's inventory describes them (JSON both ways)."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from epd.errors import StepError
from epd.plan.topology import ROLES

HARDWARE = ("cpu", "a2", "a3", "a5")
_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]*$")
_FIX = "correct the inventory; `make describe` prints the entry of the machine it runs on"


@dataclass(frozen=True)
class Card:
    """One NPU chip with a device node of its own, /dev/davinci<id>. An A3 module has two."""

    id: int
    """Physical id."""
    module: int
    """Number of the module it sits on."""
    hbm_mib: int
    hbm_used_mib: int = 0
    """What is taken on an idle card: driver and firmware. 0 where it is not known, as something runs there."""
    numa: int = -1
    """NUMA node of its PCI device; -1 where the host does not tell."""
    group: int = 0
    """Cards of one group reach each other without crossing PCIe (HCCS, SIO, UB)."""
    address: str = ""
    """Its address on the cards' own network (hccn.conf)."""
    taken_by: str = ""
    """Who uses it; empty when nobody does, or our own stack."""
    serves: str = ""
    """Instance of our own stack that runs on it: it stays there where it can."""


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    hardware: str
    """`cpu`, `a2`, `a3` or `a5`."""
    address: str
    """IP address under which the other hosts reach it."""
    interface: str = ""
    """Network interface that has this address."""
    memory_mib: int = 0
    """Memory of the host; 0 when it is not known."""
    roce: bool = False
    """Whether the cards have a RoCE network of their own that is up."""
    roles: tuple[str, ...] = ()
    """Roles that may run here; empty for all."""
    cards: tuple[Card, ...] = ()

    @property
    def free_cards(self) -> tuple[Card, ...]:
        """Cards that nobody uses."""
        return tuple(card for card in self.cards if not card.taken_by)

    def accepts(self, role: str) -> bool:
        """Whether a role may run here."""
        return not self.roles or role in self.roles


def dump(hosts: list[Host]) -> str:
    """Return the inventory as JSON text."""
    return json.dumps({"hosts": [asdict(host) for host in hosts]}, indent=2) + "\n"


def load(path: Path) -> list[Host]:
    """Read an inventory.

    Raises:
        StepError: it cannot be read, or a value in it is not usable; all faults in one message.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StepError(
            f"cannot read the inventory {path}",
            expected='JSON: {"hosts": [{"name": …, "hardware": "a2", "address": …, "cards": […]}]}',
            found=str(error),
            fix=_FIX,
        ) from error
    entries = data.get("hosts") if isinstance(data, dict) else None
    faults: list[str] = []
    hosts = [host for index, entry in enumerate(entries or []) if (host := _host(index, entry, faults))]
    faults += _faults(hosts) if hosts or faults else ["no hosts: expected a list under the key hosts"]
    if faults:
        raise StepError(
            f"the inventory {path} is not usable",
            expected="hosts with distinct names and addresses",
            found="; ".join(faults),
            fix=_FIX,
        )
    return hosts


def _host(index: int, entry: Any, faults: list[str]) -> Host | None:
    where = f"hosts[{index}]"
    values = _known(where, entry, Host, faults)
    if values is None:
        return None
    cards = [_known(f"{where}.cards[{i}]", card, Card, faults) for i, card in enumerate(values.get("cards") or [])]
    try:
        roles = tuple(values.pop("roles", ()) or ())
        return Host(**{**values, "roles": roles, "cards": tuple(Card(**card) for card in cards if card is not None)})
    except TypeError as error:
        faults.append(f"{where}: {str(error).split('__init__() ')[-1]}")
        return None


_KINDS: Mapping[str, type] = {"int": int, "str": str, "bool": bool}


def _known(where: str, entry: Any, kind: type, faults: list[str]) -> dict[str, Any] | None:
    """Return the entry as keyword arguments of `kind`, or note why it cannot be that."""
    if not isinstance(entry, dict):
        faults.append(f"{where}: expected an object, found {entry!r}")
        return None
    known = {item.name: str(item.type) for item in fields(kind)}
    wrong = [f"{where}.{name}: no such key" for name in entry if name not in known]
    for name, value in entry.items():
        wanted = _KINDS.get(known.get(name, ""))
        if wanted and type(value) is not wanted:
            wrong.append(f"{where}.{name}: expected {wanted.__name__}, found {value!r}")
    faults += wrong
    return None if wrong else dict(entry)


def _faults(hosts: list[Host]) -> list[str]:
    found = []
    for what in ("name", "address"):
        values = [getattr(host, what) for host in hosts]
        found += [f"{what} {value} is given twice" for value in sorted({v for v in values if values.count(v) > 1})]
    for host in hosts:
        if not _NAME.match(host.name):
            found.append(f"{host.name}: expected a name of small letters, digits, dots and dashes")
        if host.hardware not in HARDWARE:
            found.append(f"{host.name}: hardware {host.hardware}, expected one of {', '.join(HARDWARE)}")
        strange = sorted(set(host.roles) - set(ROLES))
        found += [f"{host.name}: no such role {role}, expected {', '.join(ROLES)}" for role in strange]
        found += _address_faults(host, alone=len(hosts) == 1)
        ids = [card.id for card in host.cards]
        found += [f"{host.name}: card {i} is given twice" for i in sorted({i for i in ids if ids.count(i) > 1})]
    return found


def _address_faults(host: Host, *, alone: bool) -> list[str]:
    """Return why other hosts cannot reach this address."""
    try:
        address = ipaddress.ip_address(host.address)
    except ValueError:
        return [f"{host.name}: address {host.address!r}, expected an IP address"]
    if address.is_unspecified or (address.is_loopback and not (alone and host.hardware == "cpu")):
        return [f"{host.name}: address {host.address}, expected one that other hosts can reach"]
    return []
