"""Everything a person can set, read once and checked. The only reader of the environment and of `.env`.

A value set in the environment (`make up EPD_PROXY_PORT=9000`) wins over the user's own line in `.env`, that one over
what an earlier `make up` wrote there, that one over the default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epd import dotenv
from epd.errors import StepError
from epd.plan import topology

MODEL_MOUNT = "/models"
"""Where the containers see the folder or volume EPD_MODELS."""
_MODEL_VARIABLES = ("EPD_MODEL", "EPD_MODELS", "EPD_SERVED_MODEL_NAME", "HF_HUB_OFFLINE")
_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)")
_TINY = "tiny"
_PLANNED_FILE = re.compile(r"^deploy/([^/]+)/[^/]+/compose\.yaml$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
PLAN_VARIABLES = frozenset(
    {
        "EPD_HOSTS", "EPD_HOST", "EPD_HOST_ADDRESS", "EPD_INTERFACE", "EPD_CARDS", "EPD_OVERLAYS",
        "EPD_EXPERT_PARALLEL", "EPD_SKIP_MEMORY_CHECK",
        *(topology.variable(role, size) for role in topology.ROLES for size in ("TP", "DP")),
    }
)  # fmt: skip
"""What the plan is told beyond what the compose files read; docs/configuration.md explains each."""
_PROJECT = re.compile(r"^[a-z0-9][a-z0-9_-]*$")


@dataclass(frozen=True)
class Settings:
    """What `make` was asked to do, all checked."""

    root: Path
    """The project's folder."""
    project: str
    """Compose project name."""
    topology: str
    """What runs: `1e1pd`, `1e1p1d`, `2e4p4d`, …"""
    hardware: str
    """Hardware profile asked for; empty to look for NPUs. Never taken from what `make up` wrote: cards come and go."""
    proxy_port: int
    """TCP port of this machine that the proxy is published on."""
    chosen: Mapping[str, str]
    """Variables of the compose files that were set on a command line, this one or an earlier one."""
    planning: Mapping[str, str]
    """What the plan is told, wherever it was set: PLAN_VARIABLES and the variables of the compose files."""
    pull: bool
    """Pull prebuilt images instead of building them."""
    no_install: bool
    """Report what is missing instead of installing it."""
    up_timeout_s: float
    """How long the services may take to get healthy."""
    build_timeout_s: float
    """How long the images may take to build."""
    registry_timeout_s: float
    """How long a registry may take to begin its answer before we do without one."""
    base_image: str
    """Base image to build on; empty to pull Debian's or make one."""
    debian_mirror: str
    """Debian archive to take packages from; empty for that of the machine's own apt sources."""


def profiles(root: Path) -> tuple[str, ...]:
    """Return the names of the hardware profiles in `compose/hardware/`; `cpu` is always one."""
    return tuple(sorted({"cpu", *(path.stem for path in (root / "compose" / "hardware").glob("*.yaml"))}))


def load(root: Path, environ: Mapping[str, str]) -> Settings:
    """Read the settings from the environment and `.env`.

    Raises:
        StepError: a value is not usable.
    """
    file = dotenv.read(root / ".env")

    def setting(name: str, default: str) -> str:
        candidates = (environ.get(name, "").strip(), file.own.get(name, ""), file.managed.get(name, ""))
        return next((value for value in candidates if value), default)

    return Settings(
        root=root,
        project=_matching("COMPOSE_PROJECT_NAME", setting("COMPOSE_PROJECT_NAME", "ascend-epd"), _PROJECT),
        topology=_topology(environ.get("TOPOLOGY", "").strip(), setting("COMPOSE_FILE", "")),
        hardware=environ.get("EPD_HARDWARE", "").strip() or file.own.get("EPD_HARDWARE", ""),
        proxy_port=int(_number("EPD_PROXY_PORT", setting("EPD_PROXY_PORT", "8000"), 1, 65535)),
        chosen=(chosen := _chosen(root, environ, file.managed)),
        planning={**chosen, **file.own, **_from_environment(root, environ)},
        pull=_flag("EPD_PULL", environ),
        no_install=_flag("EPD_NO_INSTALL", environ),
        up_timeout_s=_number("EPD_UP_TIMEOUT_S", setting("EPD_UP_TIMEOUT_S", "900"), 1, 86400),
        build_timeout_s=_number("EPD_BUILD_TIMEOUT_S", setting("EPD_BUILD_TIMEOUT_S", "5400"), 1, 86400),
        registry_timeout_s=_number("EPD_REGISTRY_TIMEOUT_S", setting("EPD_REGISTRY_TIMEOUT_S", "15"), 1, 3600),
        base_image=setting("EPD_BASE_IMAGE", ""),
        debian_mirror=setting("EPD_DEBIAN_MIRROR", ""),
    )


def entries(
    settings: Settings, *, compose_file: str, planned: Mapping[str, str], image: str, proxy_image: str
) -> list[dotenv.Entry]:
    """Return the block of `.env`: what the files in `compose/` are told; `planned` holds the plan's variables."""
    hardware = planned["EPD_HARDWARE"]
    block = [
        dotenv.Entry("COMPOSE_PROJECT_NAME", settings.project, "Compose project: the prefix of the containers' names"),
        dotenv.Entry("COMPOSE_FILE", compose_file, "topology; `make deploy-1e1pd` and `make deploy-1e1p1d` choose"),
        dotenv.Entry("EPD_HARDWARE", hardware, "hardware profile, found by looking for NPUs"),
        dotenv.Entry("EPD_IMAGE", image, "image of every serving role"),
        dotenv.Entry("EPD_PROXY_IMAGE", proxy_image, "image of the proxy"),
        dotenv.Entry("EPD_PROXY_PORT", str(settings.proxy_port), "TCP port of this machine that the proxy answers on"),
    ]
    block += [dotenv.Entry(name, planned[name], "what was planned") for name in planned if name != "EPD_HARDWARE"]
    fixed = {entry.name for entry in block}
    chosen = [(name, value) for name, value in sorted(settings.chosen.items()) if name not in fixed]
    return [*block, *(dotenv.Entry(name, value, "chosen on the command line of `make up`") for name, value in chosen)]


def stack_variables(root: Path) -> frozenset[str]:
    """Return the names of the variables that the files in `compose/` read."""
    text = "".join(path.read_text() for path in sorted((root / "compose").rglob("*.yaml")))
    return frozenset(_VARIABLE.findall(text))


def check_set_once(settings: Settings, entries: list[dotenv.Entry], environ: Mapping[str, str]) -> None:
    """Refuse a value that the command line and the user's own lines of `.env` set differently.

    Plain `docker compose` would go by `.env` later, and act on another stack than the one started now.

    Raises:
        StepError: there is such a value.
    """
    own = dotenv.read(settings.root / ".env").own
    behind = {"COMPOSE_FILE": "TOPOLOGY", "EPD_MODEL": "MODEL", "EPD_MODELS": "MODEL"}
    for entry in entries:
        name = behind.get(entry.name, entry.name)
        asked = environ.get(name, "").strip()
        if not asked or entry.name not in own or entry.value in (own[entry.name], *own[entry.name].split(":")):
            continue
        raise StepError(
            f"{entry.name} is set twice",
            expected="one value",
            found=f"{name}={asked} in the environment, and {entry.name}={own[entry.name]} among your lines in .env",
            fix=f"remove one of the two (in .env: the line that begins with {entry.name}=)",
        )


def _chosen(root: Path, environ: Mapping[str, str], earlier: Mapping[str, str]) -> dict[str, str]:
    """Return the stack's variables that were set: on this command line, or on an earlier one and kept in `.env`."""
    known = (stack_variables(root) | PLAN_VARIABLES) - {"EPD_PLANNED"}
    values = {name: value for name, value in earlier.items() if name in known}
    values |= _from_environment(root, environ)
    wanted = environ.get("MODEL", "").strip()
    if wanted:
        for name in _MODEL_VARIABLES:
            values.pop(name, None)
        values |= _model(wanted, root)
    return values


def _from_environment(root: Path, environ: Mapping[str, str]) -> dict[str, str]:
    known = (stack_variables(root) | PLAN_VARIABLES) - {"EPD_PLANNED"}
    return {name: environ[name].strip() for name in known if environ.get(name, "").strip()}


def _model(wanted: str, root: Path) -> dict[str, str]:
    """Return the variables for `MODEL=`: a folder, a hub id, or `tiny`.

    Raises:
        StepError: it is none of these.
    """
    if wanted == _TINY:
        return {}
    folder = Path(wanted).expanduser()
    folder = (folder if folder.is_absolute() else root / folder).resolve()
    if folder.is_dir():
        _check_model_folder(folder)
        return {"EPD_MODEL": MODEL_MOUNT, "EPD_MODELS": str(folder), "EPD_SERVED_MODEL_NAME": folder.name}
    if _HUB_ID.match(wanted):
        return {"EPD_MODEL": wanted, "EPD_SERVED_MODEL_NAME": wanted, "HF_HUB_OFFLINE": "0"}
    raise StepError(
        "MODEL is not usable",
        expected=f"an existing folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or {_TINY!r}",
        found=f"MODEL={wanted}",
        fix="correct it, or leave MODEL out to serve the tiny model",
    )


def _check_model_folder(folder: Path) -> None:
    """Check that a folder can be served when nothing but itself is mounted."""
    outside = [path for path in folder.iterdir() if not path.resolve().is_relative_to(folder)]
    if outside:
        raise StepError(
            "MODEL cannot be mounted",
            expected="a folder that holds its files itself",
            found=f"{outside[0].name} is a link to {outside[0].resolve()}",
            fix=f"copy the files once, `cp -rL {folder} <new folder>`, and name that",
        )
    if not (folder / "config.json").is_file():
        raise StepError(
            "MODEL is not a model",
            expected="a folder with a config.json in it",
            found=f"{folder} has none",
            fix="name the folder of a Hugging Face model (the one with config.json and *.safetensors)",
        )


def _topology(wanted: str, compose_file: str) -> str:
    """Return the topology: `TOPOLOGY`, else the one of COMPOSE_FILE in `.env`, else 1e1pd."""
    return topology.parse(wanted or next(filter(None, map(_topology_of, compose_file.split(":"))), "1e1pd")).name


def _topology_of(file: str) -> str:
    """Return the topology that a file of COMPOSE_FILE is for; empty when it is an overlay."""
    planned = _PLANNED_FILE.match(file)
    name = planned[1] if planned else Path(file).stem if file.startswith("compose/") else ""
    return name if topology.is_name(name) else ""


def _flag(name: str, environ: Mapping[str, str]) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "no", "false"):
        return False
    if value in ("1", "yes", "true"):
        return True
    raise StepError(f"{name} is not usable", expected="1 or 0", found=f"{name}={value}", fix=f"{name}=1 make up")


def _number(name: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise StepError(
            f"{name} is not usable",
            expected=f"a number from {low:.0f} to {high:.0f}",
            found=f"{name}={value}",
            fix=f"correct it in the environment or in .env, e.g. {name}={low:.0f}",
        )
    return number


def _matching(name: str, value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.match(value):
        raise StepError(
            f"{name} is not usable",
            expected=f"a name of the form {pattern.pattern}",
            found=f"{name}={value}",
            fix="use small letters, digits, - and _",
        )
    return value
