"""The doctor's subject, put together from settings, plan and this machine. Nothing of the project is changed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from epd import command, dotenv, images, planning
from epd.doctor import examination
from epd.doctor.finding import Finding, Status
from epd.doctor.subject import Subject
from epd.errors import StepError
from epd.machine import Machine
from epd.plan import compose
from epd.plan.hosts import Host
from epd.planning import Planned
from epd.settings import Settings


def examine(settings: Settings, versions: Mapping[str, str], machine: Machine) -> list[Finding]:
    """Return what is found on this machine for the stack that the settings ask for; nothing stops the other checks."""
    found: list[Finding] = []
    hardware, planned = "", None
    try:
        hardware = planning.choose_hardware(settings.hardware, machine)
        planned = planning.make(settings, hardware, machine)
    except StepError as error:
        found.append(Finding("plan" if hardware else "hardware", Status.FAIL, error.found, error.expected, error.fix))
    if planned is None:
        here = _describe(settings, hardware, machine)
        return found + examination.examine(Subject(machine, settings, versions, hardware, here))
    return found + examine_planned(settings, versions, machine, planned, will_start=False)


def _describe(settings: Settings, hardware: str, machine: Machine) -> Host | None:
    """Return this machine as a host, so that without a plan its driver and cards are looked at all the same."""
    try:
        return planning.describe(settings, hardware, machine) if hardware else None
    except StepError:
        return None


def examine_planned(
    settings: Settings,
    versions: Mapping[str, str],
    machine: Machine,
    planned: Planned,
    *,
    will_start: bool,
) -> list[Finding]:
    """Return what is found on this machine for a plan."""
    subject = Subject(
        machine=machine,
        settings=settings,
        versions=versions,
        hardware=planned.host.hardware,
        host=planned.host,
        plan=planned.plan,
        will_start=will_start,
    )
    services, faults = _services(settings, versions, planned)
    wanted = tuple(sorted({str(service["image"]) for service in services.values() if service.get("image")}))
    return faults + examination.examine(replace(subject, services=services, images=wanted))


def _services(
    settings: Settings, versions: Mapping[str, str], planned: Planned
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the services as Compose reads them, through a copy of the plan's file in a temporary folder."""
    own = dotenv.read(settings.root / ".env").own
    with tempfile.TemporaryDirectory(prefix="epd-doctor-") as folder:
        files = own["COMPOSE_FILE"].split(":") if "COMPOSE_FILE" in own else _copy(settings, planned, Path(folder))
        words = [word for name in files for word in ("-f", str(settings.root / name))]
        values = {
            **settings.chosen,
            **own,
            **image_names(settings, versions, planned.host.hardware),
            **planned.variables,
        }
        result = command.probe(
            "docker", "compose", "--env-file", "/dev/null", *words, "config", "--format", "json", env=values
        )
    if not result.ok:
        return {}, [_unreadable(result.stderr)]
    try:
        return dict(json.loads(result.stdout)["services"]), []
    except (ValueError, KeyError) as error:
        return {}, [_unreadable(str(error))]


def _unreadable(said: str) -> Finding:
    return Finding(
        "containers.config",
        Status.FAIL,
        said.strip().splitlines()[-1] if said.strip() else "no output",
        "Compose files that `docker compose config` can read",
        "correct the file that it names, or .env",
    )


def _copy(settings: Settings, planned: Planned, folder: Path) -> list[str]:
    """Return the plan's files; those that do not exist yet are written to a temporary folder."""
    if planned.compose_files[0].startswith("compose/"):
        return list(planned.compose_files)
    texts = compose.render(planned.plan, planned.host, fragments=str(settings.root / "compose"))
    found = []
    for name in planned.compose_files:
        path = folder / Path(name).name
        path.write_text(texts.compose if path.stem == "compose" else texts.overlays[path.stem])
        found.append(str(path))
    return found


def image_names(settings: Settings, versions: Mapping[str, str], hardware: str) -> dict[str, str]:
    """Return the images that a start would use; none where buildx cannot tell, then Compose's defaults count."""
    targets = images.served(hardware, settings)
    try:
        return images.variables(images.tags(settings.root, targets, images.bake_variables(settings, versions)))
    except StepError:
        return {}
