"""What is looked at: a machine, and what is to run on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epd.machine import Machine
from epd.plan.hosts import Host
from epd.plan.placing import Instance, Plan
from epd.settings import Settings


def free_bytes(path: Path) -> int:
    """Return the free space of the file system that holds a path, or would hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Subject:
    """All that the checks may look at."""

    machine: Machine
    settings: Settings
    versions: Mapping[str, str]
    hardware: str
    """Hardware profile; empty when it cannot be told."""
    host: Host | None = None
    """This machine as the plan has it; None when there is no plan."""
    plan: Plan | None = None
    services: Mapping[str, Any] = field(default_factory=dict)
    """The services of this host as Compose will start them; empty when Compose cannot tell."""
    images: tuple[str, ...] = ()
    """Images that the services need."""
    will_start: bool = False
    """Whether the caller is about to get the images and to start or replace the containers."""
    free_bytes: Callable[[Path], int] = free_bytes

    @property
    def npu(self) -> bool:
        """Whether the stack runs on NPUs."""
        return self.hardware not in ("", "cpu")

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The vLLM instances of this host."""
        return self.plan.on(self.host) if self.plan and self.host else ()

    @property
    def several_hosts(self) -> bool:
        """Whether the stack has instances on other hosts."""
        return self.plan is not None and len(self.plan.hosts) > 1

    @property
    def cards(self) -> tuple[int, ...]:
        """Numbers of the cards that instances of this host get; all the host's own where there is no plan."""
        if self.instances:
            return tuple(sorted(card.id for instance in self.instances for card in instance.cards))
        return tuple(card.id for card in self.host.cards) if self.host else ()

    @property
    def is_running(self) -> bool:
        """Whether containers of this stack run already: then its ports and memory are its own."""
        label = f"label=com.docker.compose.project={self.settings.project}"
        return bool(self.machine.run("docker", "ps", "-q", "--filter", label).stdout.strip())

    @property
    def running(self) -> Mapping[str, str]:
        """The container's id of each service of this stack that runs."""
        label = f"label=com.docker.compose.project={self.settings.project}"
        form = '{{.ID}} {{.Label "com.docker.compose.service"}}'
        lines = self.machine.run("docker", "ps", "--filter", label, "--format", form).stdout.splitlines()
        return {words[1]: words[0] for line in lines if len(words := line.split()) == 2}

    def image_labels(self, image: str) -> Mapping[str, str] | None:
        """Return the labels of an image; None when the engine does not have it."""
        result = self.machine.run("docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image)
        if not result.ok:
            return None
        try:
            labels = json.loads(result.stdout or "null")
        except ValueError:
            labels = None
        return labels if isinstance(labels, dict) else {}
