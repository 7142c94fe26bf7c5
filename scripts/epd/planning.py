"""From the settings and this machine to a plan, and its files below `deploy/`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epd import dotenv, survey
from epd.errors import StepError
from epd.machine import Machine
from epd.plan import compose, hosts, model, placing, topology
from epd.plan.hosts import Host
from epd.plan.placing import Limits, Plan
from epd.settings import Settings
from epd.settings import entries as setting_entries
from epd.values import check_store

NPU_DEFAULTS = Limits(max_model_len=32768, max_num_seqs=128, store_size_mb=8192)
_CPU_DEFAULTS = Limits(max_model_len=2048, max_num_seqs=8, store_size_mb=512)
"""What compose/services.yaml says."""
_STORE_MEMORY_LIMIT = "2g"
"""The same; on NPU hosts the plan derives it from the pool's size."""


@dataclass(frozen=True)
class Planned:
    """A plan, and which of its hosts this machine is."""

    plan: Plan
    host: Host
    compose_files: tuple[str, ...]
    """What COMPOSE_FILE names, relative to the project's folder."""
    variables: Mapping[str, str]
    """What `.env` has to say beside."""


def choose_hardware(wanted: str, machine: Machine) -> str:
    """Return the hardware profile: the one asked for (EPD_HARDWARE), else what the machine has.

    Raises:
        StepError: the machine has NPUs, and npu-smi does not tell of which kind.
    """
    found = wanted or survey.profile(machine)
    if found:
        return found
    table = machine.run("npu-smi", "info")
    said = (table.stderr or table.stdout).strip().splitlines() or [f"exit code {table.code}"]
    names = ", ".join(sorted({chip.name for chip in survey.chips(machine)}))
    raise StepError(
        "this machine has NPUs of a kind that cannot be told",
        expected="npu-smi that names 910B (A2), Ascend910 with two chips a module (A3) or Ascend950 (A5)",
        found=f"chips {names}" if names else f"npu-smi info: {said[-1]}",
        fix="mend the driver until `npu-smi info` works; or say what it is: EPD_HARDWARE=a2, a3, a5, or cpu",
    )


def describe(settings: Settings, hardware: str, machine: Machine) -> Host:
    """Describe this machine as a host of the plan."""
    name = settings.planning.get("EPD_HOST") or socket.gethostname().split(".")[0].lower()
    return survey.host(machine, hardware=hardware, name=name, project=settings.project, settings=settings.planning)


def make(settings: Settings, hardware: str, machine: Machine) -> Planned:
    """Return the plan for what the settings ask for.

    Raises:
        StepError: it is impossible, or a setting is not usable.
    """
    inventory, here = _hosts(settings, hardware, machine)
    plan = _plan(settings, inventory)
    return Planned(plan, here, _compose_files(settings, here), compose.variables(plan))


def wanted(settings: Settings, hardware: str) -> tuple[topology.Topology, Limits]:
    """Return the topology that is asked for, and what its instances are told of requests.

    Raises:
        StepError: a setting is not usable.
    """
    values = settings.planning
    expert_parallel = values.get("EPD_EXPERT_PARALLEL", "0") not in ("", "0")
    asked = topology.parse(settings.topology, topology.read_parallel(values), expert_parallel=expert_parallel)
    limits = _limits(values, _CPU_DEFAULTS if hardware == "cpu" else NPU_DEFAULTS)
    store_limit = values.get("EPD_STORE_MEMORY_LIMIT") or (_STORE_MEMORY_LIMIT if hardware == "cpu" else "0")
    check_store(limits.store_size_mb, store_limit)
    return asked, limits


def _plan(settings: Settings, inventory: list[Host]) -> Plan:
    values, hardware = settings.planning, inventory[0].hardware
    asked, limits = wanted(settings, hardware)
    _check_embeddings_are_shared(values, inventory)
    return placing.make(asked, inventory, _model(values, hardware), limits)


def _check_embeddings_are_shared(values: Mapping[str, str], inventory: list[Host]) -> None:
    """Check that what an encoder writes is where the others read it: by default each host has a volume of its own."""
    if len(inventory) > 1 and values.get("EPD_EC_STORE") == "shared_dir" and not values.get("EPD_EC_SHARED_DIR"):
        raise StepError(
            "embeddings would not leave the host that made them",
            expected="EPD_EC_SHARED_DIR=<folder of a file system that all hosts mount>, or the pool",
            found=f"EPD_EC_STORE=shared_dir, which is a volume in the memory of each of {len(inventory)} hosts",
            fix="name the folder, or `make deploy EPD_EC_STORE=` for the pool",
        )


def for_inventory(settings: Settings) -> Plan:
    """Return the plan for the hosts of an inventory, which this machine need not be one of.

    Raises:
        StepError: it is impossible, or a setting is not usable.
    """
    inventory = hosts.load(settings.root / settings.planning["EPD_HOSTS"])
    return _plan(settings, inventory)


def write(root: Path, planned: Planned) -> list[Path]:
    """Write the plan's files, unless it is one that compose/ has ready; return those written."""
    ready = planned.compose_files[0].startswith("compose/")
    return [] if ready else write_all(root, planned.plan)


def write_all(root: Path, plan: Plan) -> list[Path]:
    """Write the files of every host below `deploy/<topology>/<host>/`; return them."""
    written: list[Path] = []
    for host in plan.hosts:
        folder = root / "deploy" / plan.topology.name / host.name
        folder.mkdir(parents=True, exist_ok=True)
        files = compose.render(plan, host, fragments=os.path.relpath(root / "compose", folder))
        texts = {"compose": files.compose, **files.overlays}
        for name, text in texts.items():
            path = folder / f"{name}.yaml"
            path.write_text(text)
            written.append(path)
    return written


def write_environments(settings: Settings, plan: Plan, images: Mapping[str, str]) -> list[Path]:
    """Write what Compose is told on each host, next to its Compose file; lines of a person's own in there stay."""
    written = []
    for host in plan.hosts:
        folder = f"deploy/{plan.topology.name}/{host.name}"
        names = ["compose", *_overlays(settings)]
        entries = setting_entries(
            settings,
            compose_file=":".join(f"{folder}/{name}.yaml" for name in names),
            planned=compose.variables(plan),
            images=images,
        )
        path = settings.root / folder / ".env"
        dotenv.write(path, entries)
        written.append(path)
    return written


def table(plan: Plan) -> str:
    """Return the plan as a person reads it."""
    lines = [f"Plan: {plan.topology.name} on {', '.join(f'{host.name} ({host.hardware})' for host in plan.hosts)}"]
    for instance in plan.instances:
        cards = ", ".join(str(card.id) for card in instance.cards)
        where = f"cards {cards}" if cards else "no card"
        kv = f", kv {instance.ports.kv}" if instance.ports.kv and instance.cards else ""
        port = f", port {instance.ports.http}{kv}" if instance.cards else ""
        lines.append(f"  {instance.name:<18} {instance.host.name:<16} {where}{port}")
    return "\n".join([*lines, *(f"  {note}" for note in plan.notes)])


def _hosts(settings: Settings, hardware: str, machine: Machine) -> tuple[list[Host], Host]:
    """Return all hosts and the one that this machine is: of the inventory (HOSTS), or this machine alone."""
    here = describe(settings, hardware, machine)
    path = settings.planning.get("EPD_HOSTS", "")
    if not path:
        return [here], here
    inventory = hosts.load(settings.root / path)
    for host in inventory:
        if host.name == here.name or host.address == here.address:
            return inventory, host
    raise StepError(
        "this machine is not in the inventory",
        expected=f"one of: {', '.join(f'{host.name} ({host.address})' for host in inventory)}",
        found=f"{here.name} ({here.address})",
        fix="say which host this machine is: EPD_HOST=<name>",
    )


def _compose_files(settings: Settings, here: Host) -> tuple[str, ...]:
    ready = f"compose/{settings.topology}.yaml"
    if here.hardware == "cpu" and (settings.root / ready).is_file():
        return (ready,)
    folder = f"deploy/{settings.topology}/{here.name}"
    return (f"{folder}/compose.yaml", *(f"{folder}/{name}.yaml" for name in _overlays(settings)))


def _overlays(settings: Settings) -> list[str]:
    overlays = settings.planning.get("EPD_OVERLAYS", "").replace(",", " ").split()
    strange = [name for name in overlays if name not in compose.OVERLAYS]
    if strange:
        raise StepError(
            "no such overlay",
            expected=f"some of: {', '.join(compose.OVERLAYS)}",
            found=f"EPD_OVERLAYS={settings.planning['EPD_OVERLAYS']}",
            fix="correct it, or leave it out",
        )
    return overlays


def check_model(values: Mapping[str, str], hardware: str) -> None:
    """Check that there is a model to serve.

    Raises:
        StepError: there is none, on NPUs.
    """
    if hardware != "cpu" and not values.get("EPD_MODEL"):
        raise StepError(
            "no model to serve on NPUs",
            expected="MODEL=<folder of a model>; the tiny model is for the CPU profile",
            found="none",
            fix="make fetch-model MODEL=Qwen/Qwen2.5-VL-7B-Instruct, then name its folder: MODEL=<folder>",
        )


def _model(values: Mapping[str, str], hardware: str) -> model.ModelSize | None:
    """Return the model's sizes where its files are on this machine and memory matters."""
    check_model(values, hardware)
    folder = values.get("EPD_MODELS", "")
    if hardware == "cpu" or not folder or values.get("EPD_SKIP_MEMORY_CHECK", "0") not in ("", "0"):
        return None
    return model.read_folder(Path(folder))


def _limits(values: Mapping[str, str], defaults: Limits) -> Limits:
    return Limits(
        max_model_len=_number("EPD_MAX_MODEL_LEN", values, defaults.max_model_len),
        max_num_seqs=_number("EPD_MAX_NUM_SEQS", values, defaults.max_num_seqs),
        store_size_mb=_number("EPD_STORE_SIZE_MB", values, defaults.store_size_mb),
    )


def _number(name: str, values: Mapping[str, str], default: int) -> int:
    text = values.get(name, "").strip() or str(default)
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise StepError(
        f"{name} is not usable", expected="a whole number above 0", found=f"{name}={text}", fix=f"e.g. {name}={default}"
    )
