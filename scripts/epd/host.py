"""What kind of machine this is: distribution, rights. Looks, changes nothing."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path


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
