"""What a vLLM instance on NPUs needs of its container, looked at from within before it starts.

Without it a wrong device mapping shows late, as an error of HCCL, and a library that is missing as a connector that
cannot be imported. Not run on an NPU so far.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from epd_serve.roles import KV_ROLES
from epd_serve.settings import Settings

TIMEOUT_S = 300.0
"""torch and CANN load from a cold disk."""
_COUNT_CARDS = "import torch, torch_npu; print(torch.npu.device_count())"
_IMPORT_ENGINE = "import mooncake.engine"


def find_faults(
    role: str, settings: Settings, environment: Mapping[str, str], *, hccn_conf: Path = Path("/etc/hccn.conf")
) -> list[str]:
    """Return why an instance could not work here, each with its remedy; empty when it could."""
    faults = [*_card_faults(settings, environment), *_engine_faults(role, environment)]
    if role in KV_ROLES and settings.hardware in ("a2", "a3"):  # A5 has other files
        faults += _address_faults(hccn_conf)
    return faults


def _card_faults(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    wanted = settings.parallel.tensor * settings.parallel.data
    code, text = _python(_COUNT_CARDS, environment)
    if code != 0:
        return [
            f"the cards cannot be counted: {_last_line(text)}; expected torch_npu to load. "
            "Fix: `make doctor` on the host checks driver, mounts and image"
        ]
    found = _last_line(text)
    if found == str(wanted):
        return []
    return [
        f"this container sees {found} cards; expected {wanted} (tensor-parallel {settings.parallel.tensor} x "
        f"data-parallel {settings.parallel.data}). Fix: `make plan` writes the devices of each service; "
        "ASCEND_RT_VISIBLE_DEVICES is for privileged containers alone"
    ]


def _address_faults(hccn_conf: Path) -> list[str]:
    """Return that the cards' addresses are not told: transfers start without, and the answers are garbage."""
    try:
        text = hccn_conf.read_text()
    except OSError:
        text = ""
    if "address_" in text:
        return []
    return [
        f"{hccn_conf} has no address of a card; without it answers are garbage. "
        "Fix: on the host, hccn_tool -i <card> -ip -s address <address> netmask <mask> for every card; mount the file"
    ]


def _engine_faults(role: str, environment: Mapping[str, str]) -> list[str]:
    if role not in KV_ROLES:
        return []
    code, text = _python(_IMPORT_ENGINE, environment)
    if code == 0:
        return []
    return [
        f"mooncake.engine cannot be imported: {_last_line(text)}. "
        "Fix: a library that is not found comes from the host's driver (mounts) or from CANN (the image's entrypoint)"
    ]


def _python(text: str, environment: Mapping[str, str]) -> tuple[int, str]:
    try:
        done = subprocess.run(  # noqa: S603 - the two lines above
            ["python", "-c", text],  # noqa: S607 - the image's, as vLLM itself is started
            env=dict(environment), capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]
