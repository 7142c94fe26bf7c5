"""What npu-smi prints, read. Pure: text in, values out.

The shapes are those of npu-smi 24.1 to 26.0 on Atlas A2 and A3 and 25.7 on 950PR, as people showed them in issues of
vllm-ascend and in Ascend's own documents. A shape that is not known reads as nothing found, never as a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BUS = re.compile(r"\b[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]\b")
_USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")
_VERSION = re.compile(r"Version:\s*(\S+)")
_COLUMNS = ("NPU ID", "Slot ID", "Chip ID", "Chip Logic ID", "Chip Phy-ID", "Chip Name")
_NODE = re.compile(r"^(?:NPU|Phy-ID)(\d+)$")
FAST_LINKS = frozenset({"HCCS", "HCCS_SW", "SIO", "UB"})
"""Links between cards that do not cross PCIe (npu-smi's own legend of `info -t topo`)."""


@dataclass(frozen=True)
class Chip:
    """One chip: what has a device node /dev/davinci<physical id> of its own."""

    npu: int
    """Number of its module; an A3 module has two chips."""
    chip: int
    """Its number within the module."""
    physical: int
    name: str
    """`910B3`, `Ascend910`, `Ascend950PR`, …"""
    health: str
    bus: str
    """PCI address, in small letters."""
    hbm_used_mib: int
    hbm_mib: int


@dataclass(frozen=True)
class Process:
    """A process that npu-smi sees on a chip."""

    npu: int
    chip: int
    pid: int
    name: str


def version(text: str) -> str:
    """Return the version that the head of `npu-smi info` names; empty if none."""
    found = _VERSION.search(text)
    return found[1] if found else ""


def chips(text: str, mapping: Mapping[tuple[int, int], int]) -> list[Chip]:
    """Return the chips in the output of `npu-smi info`, by physical id.

    `mapping` (of `npu-smi info -m`) tells the physical id where the table does not.
    """
    found = []
    before: list[str] = []
    for line in text.splitlines():
        cells = _cells(line)
        if not cells:
            continue
        if "Process id" in line:
            break
        if _BUS.search(line):
            chip = _chip(before, cells, mapping)
            found += [chip] if chip else []
        before = cells
    return sorted(found, key=lambda chip: chip.physical)


def _chip(upper: list[str], lower: list[str], mapping: Mapping[tuple[int, int], int]) -> Chip | None:
    """Read the two lines of one chip. 950 has the module's number in a cell of its own, and no chip number."""
    head = upper[0].split()
    name = head[1:] or upper[1:2]
    health = upper[1] if len(head) > 1 else (upper[2:3] or [""])[0]
    usage = _USAGE.findall(lower[-1])
    bus = _BUS.search(" ".join(lower))
    if not head or not head[0].isdigit() or not name or not usage or bus is None:
        return None
    npu = int(head[0])
    numbers = [int(word) for word in lower[0].split() if word.isdigit()]
    number = numbers[0] if numbers else 0
    physical = numbers[1] if len(numbers) > 1 else mapping.get((npu, number), npu)
    used, total = usage[-1]
    return Chip(npu, number, physical, name[0], health, bus[0].lower(), int(used), int(total))


def mapping(text: str) -> dict[tuple[int, int], int]:
    """Return the physical id by (module, chip) in the output of `npu-smi info -m`.

    Without the column `Chip Phy-ID` the logical id counts, which is the same number on a host.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("NPU ID")), None)
    if start is None:
        return {}
    columns = sorted((name for name in _COLUMNS if name in lines[start]), key=lines[start].index)
    wanted = "Chip Phy-ID" if "Chip Phy-ID" in columns else "Chip Logic ID"
    found = {}
    for line in lines[start + 1 :]:
        row = dict(zip(columns, line.split()))
        if row.get("NPU ID", "").isdigit() and row.get("Chip ID", "").isdigit() and row.get(wanted, "").isdigit():
            found[int(row["NPU ID"]), int(row["Chip ID"])] = int(row[wanted])
    return found


def processes(text: str) -> list[Process]:
    """Return the processes in the lower table of `npu-smi info`."""
    found: list[Process] = []
    in_table = False
    for line in text.splitlines():
        cells = _cells(line)
        if "Process id" in line:
            in_table = True
        elif in_table and len(cells) >= 3 and cells[1].isdigit():
            place = [int(word) for word in cells[0].split() if word.isdigit()]
            if place:
                chip = place[1] if len(place) > 1 else 0
                found.append(Process(place[0], chip, int(cells[1]), cells[2]))
    return found


def links(text: str) -> dict[int, dict[int, str]]:
    """Return the kind of link between each two chips in the output of `npu-smi info -t topo`, by their numbers."""
    heads: list[int] = []
    found: dict[int, dict[int, str]] = {}
    for line in text.splitlines():
        words = line.split()
        nodes = [_NODE.match(word) for word in words]
        if len(words) > 1 and all(nodes[:2]):
            heads = [int(node[1]) for node in nodes if node]
        elif words and nodes[0] and heads:
            row = dict(zip(heads, words[1:]))
            found[int(nodes[0][1])] = {other: kind for other, kind in row.items() if kind != "X"}
    return found


def groups(matrix: Mapping[int, Mapping[int, str]]) -> dict[int, int]:
    """Return for each chip the lowest number among the chips that fast links join it with."""
    group: dict[int, int] = {}
    for start in sorted(matrix):
        reached, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            if node in reached:
                continue
            reached.add(node)
            waiting += [other for other, kind in matrix.get(node, {}).items() if kind in FAST_LINKS]
        for node in reached:
            group.setdefault(node, start)
    return group


def profile(found: list[Chip]) -> str:
    """Return the hardware profile of these chips: `a2`, `a3`, `a5`; empty when it is none that we know.

    910B is A2 whatever its last digit (a 910B3 is no A3); A3 calls itself Ascend910 and has two chips to a module.
    """
    names = {chip.name.removeprefix("Ascend") for chip in found}
    if names and all(name.startswith("950") for name in names):
        return "a5"
    if names and all(name.startswith("910B") for name in names):
        return "a2"
    if names and all(name in ("910", "910C") or name.startswith("910_93") for name in names):
        return "a3" if any(chip.chip > 0 for chip in found) else ""
    return ""


def _cells(line: str) -> list[str]:
    line = line.strip()
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
