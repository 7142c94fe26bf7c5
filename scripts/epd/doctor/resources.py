"""Memory of the host, and the model that is to be served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from epd.doctor.finding import Finding, failed, passed, warned
from epd.doctor.subject import Subject
from epd.plan.placing import CPU_INSTANCE_MIB

_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)
_NPU_INSTANCE_MIB = 16384
"""Host memory an instance on an NPU takes while it loads weights, on top of shared memory. An estimate."""


def check(subject: Subject) -> Iterator[Finding]:
    """Check memory and model."""
    if subject.plan:
        yield _memory(subject)
    yield from _model(subject)


def _memory(subject: Subject) -> Finding:
    match = _AVAILABLE.search(subject.machine.text("/proc/meminfo"))
    if match is None or not subject.plan:
        return passed("host.memory", "not told by /proc/meminfo")
    if subject.is_running:
        return passed("host.memory", f"the stack {subject.settings.project} runs and has its share")
    have = int(match[1]) // 1024
    each = _NPU_INSTANCE_MIB if subject.npu else CPU_INSTANCE_MIB
    store = subject.plan.limits.store_size_mb if subject.host == subject.plan.head else 0
    count = len(subject.instances)
    need = count * each + store
    if have < need:
        return warned(
            "host.memory",
            expected=f"{count} instances x {each} + pool {store} = {need} MiB available",
            found=f"{have} MiB",
            fix="stop other programs, choose fewer instances, or a smaller EPD_STORE_SIZE_MB",
        )
    return passed("host.memory", f"{have} MiB available, about {need} MiB needed")


def _model(subject: Subject) -> Iterator[Finding]:
    values = subject.settings.planning
    folder = values.get("EPD_MODELS", "")
    if folder:
        yield _model_folder(Path(folder))
    elif "/" in values.get("EPD_MODEL", "").strip("/") and not values.get("EPD_MODEL", "").startswith("/"):
        if values.get("HF_HUB_OFFLINE", "1") == "1":
            yield warned(
                "model.files",
                expected="a folder with the model's files, or a hub that may be asked",
                found=f"hub id {values['EPD_MODEL']} and HF_HUB_OFFLINE=1: only what is in the volume can be served",
                fix="make fetch-model, then MODEL=<folder>; or HF_HUB_OFFLINE=0 where there is a network",
            )
        else:
            yield passed("model.files", f"{values['EPD_MODEL']}, from its hub")


def _model_folder(folder: Path) -> Finding:
    """Check that every file that the index names is there: a download that broke off fails after minutes of loading."""
    fix = "make fetch-model continues a download that broke off"
    if not (folder / "config.json").is_file():
        return failed("model.files", expected=f"{folder}/config.json", found="no such file", fix=fix)
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, AttributeError) as error:
        return failed("model.files", expected=f"{index} with a weight_map", found=str(error), fix=fix)
    missing = sorted(name for name in named if not (folder / name).is_file())
    empty = sorted(path.name for path in folder.glob("*.safetensors") if path.stat().st_size == 0)
    if missing or empty or not any(folder.glob("*.safetensors")):
        found = f"missing or empty: {', '.join([*missing, *empty]) or 'all weights'}"
        return failed("model.files", expected="every weight file of the model", found=found, fix=fix)
    return passed("model.files", f"{folder}: {len(list(folder.glob('*.safetensors')))} weight file(s)")
