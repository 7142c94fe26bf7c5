"""What kind of machine this is: distribution, rights, NPUs. Looks, changes nothing."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from epd.errors import StepError

_CARD = re.compile(r"davinci\d+")


@dataclass(frozen=True)
class Distribution:
    """A Linux distribution as /etc/os-release names it."""

    id: str
    """`debian`, `ubuntu`, …"""
    id_like: tuple[str, ...]
    """The distributions it derives from."""
    codename: str
    """`bookworm`, `noble`, …; empty where it has none."""
    pretty_name: str

    @property
    def family(self) -> str:
        """`ubuntu`, `debian`, or empty when its packages are not ours to install."""
        for name in (self.id, *self.id_like):
            if name in ("ubuntu", "debian"):
                return name
        return ""


@dataclass(frozen=True)
class Hardware:
    """The profile that the stack runs on, and the NPU device nodes that were seen."""

    profile: str
    """`cpu`, or one of the names in `compose/hardware/`."""
    cards: tuple[str, ...]
    """Device nodes of NPU cards, sorted by number."""
    manager: bool
    """Whether the NPU driver's manager node exists."""


def parse_os_release(text: str) -> Distribution:
    """Read the text of /etc/os-release (shell-quoted assignments, os-release(5))."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith("#"):
            fields[name] = " ".join(shlex.split(value))
    return Distribution(
        id=fields.get("ID", "linux"),
        id_like=tuple(fields.get("ID_LIKE", "").split()),
        codename=fields.get("VERSION_CODENAME", ""),
        pretty_name=fields.get("PRETTY_NAME", fields.get("ID", "unknown Linux")),
    )


def distribution(path: Path = Path("/etc/os-release")) -> Distribution:
    """Return this machine's distribution; one that has no os-release file is `linux`."""
    try:
        return parse_os_release(path.read_text())
    except OSError:
        return parse_os_release("")


def is_root() -> bool:
    """Whether we may install packages and start the Docker engine."""
    return os.geteuid() == 0


def has_systemd(run: Path = Path("/run/systemd/system")) -> bool:
    """Whether systemd is pid 1; sd_booted(3) looks at this folder."""
    return run.is_dir()


def detect_hardware(wanted: str, *, available: tuple[str, ...], dev: Path = Path("/dev")) -> Hardware:
    """Return the `wanted` hardware profile, `cpu` if it is empty, and the NPUs that there are.

    Raises:
        StepError: the wanted profile is not available.
    """
    nodes = sorted((p.name for p in dev.glob("davinci*") if _CARD.fullmatch(p.name)), key=lambda n: int(n[7:]))
    cards = tuple(f"/dev/{name}" for name in nodes)
    manager = (dev / "davinci_manager").exists()
    profile = wanted.lower() or "cpu"
    if profile not in available:
        raise StepError(
            f"hardware profile {profile!r} is not available",
            expected=f"one of: {', '.join(available)}",
            found=f"EPD_HARDWARE={profile}",
            fix="name one of them, or leave EPD_HARDWARE out: npu-smi tells what this machine has",
        )
    return Hardware(profile=profile, cards=cards, manager=manager)


def describe_hardware(hardware: Hardware) -> str:
    """Say in a sentence which profile was chosen and why."""
    if not hardware.manager and not hardware.cards:
        return f"no NPU found (/dev/davinci*): profile {hardware.profile}"
    seen = f"{len(hardware.cards)} Ascend NPU node(s) found (/dev/davinci*)"
    if hardware.profile == "cpu":
        return f"{seen}; the cpu profile leaves them alone"
    return f"{seen}: profile {hardware.profile}"
