"""What every command begins with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from epd import host, images, settings, versions
from epd.machine import Machine
from epd.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Context:
    """What every command begins with."""

    versions: dict[str, str]
    distribution: host.Distribution
    root_user: bool
    machine: Machine

    @cached_property
    def settings(self) -> Settings:
        """What can be set. Read where it is needed: `make down` works whatever is wrong with it."""
        return settings.load(ROOT, os.environ)

    @property
    def bake(self) -> dict[str, str]:
        """Variables of the bake file that the names of the images depend on."""
        return images.bake_variables(self.settings, self.versions)


def context() -> Context:
    """Look at the machine."""
    return Context(
        versions.load(ROOT / "docker" / "versions.env"),
        host.distribution(),
        host.is_root(),
        Machine(),
    )
