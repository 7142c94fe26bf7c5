"""What every command begins with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from epd import host, settings, versions
from epd.machine import Machine
from epd.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Context:
    """What every command begins with."""

    settings: Settings
    versions: dict[str, str]
    distribution: host.Distribution
    root_user: bool
    machine: Machine

    @property
    def bake(self) -> dict[str, str]:
        """Variables of the bake file that the names of the images depend on."""
        return dict(self.versions)


def context() -> Context:
    """Read the settings and look at the machine."""
    return Context(
        settings.load(ROOT, os.environ),
        versions.load(ROOT / "docker" / "versions.env"),
        host.distribution(),
        host.is_root(),
        Machine(),
    )
