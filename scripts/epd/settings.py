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

MODEL_MOUNT = "/model"
"""Where the containers see EPD_MODEL_DIR."""
_TINY = "tiny"
_TOPOLOGY = re.compile(r"^[1-9]\d*e[1-9]\d*p(?:[1-9]\d*)?d$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_PROJECT = re.compile(r"^[a-z0-9][a-z0-9_-]*$")


@dataclass(frozen=True)
class Settings:
    """What `make` was asked to do, all checked."""

    root: Path
    """The project's folder."""
    project: str
    """Compose project name."""
    topology: str
    """Name of a file in `compose/`, without `.yaml`."""
    hardware: str
    """Hardware profile asked for; empty to look for NPUs. Never taken from what `make up` wrote: cards come and go."""
    proxy_port: int
    """TCP port of this machine that the proxy is published on."""
    model: str
    """Hub id or path in the container; empty for the tiny model in the image."""
    model_dir: str
    """Absolute path on the host mounted at MODEL_MOUNT; empty if none."""
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


def topologies(root: Path) -> tuple[str, ...]:
    """Return the names of the topologies in `compose/`."""
    return tuple(sorted(path.stem for path in (root / "compose").glob("*.yaml") if _TOPOLOGY.match(path.stem)))


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

    model, model_dir = _model(
        environ.get("MODEL", "").strip(), (setting("EPD_MODEL", ""), setting("EPD_MODEL_DIR", "")), root
    )
    return Settings(
        root=root,
        project=_matching("COMPOSE_PROJECT_NAME", setting("COMPOSE_PROJECT_NAME", "ascend-epd"), _PROJECT),
        topology=_topology(root, environ.get("TOPOLOGY", "").strip(), setting("COMPOSE_FILE", "")),
        hardware=environ.get("EPD_HARDWARE", "").strip() or file.own.get("EPD_HARDWARE", ""),
        proxy_port=int(_number("EPD_PROXY_PORT", setting("EPD_PROXY_PORT", "8000"), 1, 65535)),
        model=model,
        model_dir=model_dir,
        pull=_flag("EPD_PULL", environ),
        no_install=_flag("EPD_NO_INSTALL", environ),
        up_timeout_s=_number("EPD_UP_TIMEOUT_S", setting("EPD_UP_TIMEOUT_S", "900"), 1, 86400),
        build_timeout_s=_number("EPD_BUILD_TIMEOUT_S", setting("EPD_BUILD_TIMEOUT_S", "5400"), 1, 86400),
        registry_timeout_s=_number("EPD_REGISTRY_TIMEOUT_S", setting("EPD_REGISTRY_TIMEOUT_S", "15"), 1, 3600),
        base_image=setting("EPD_BASE_IMAGE", ""),
        debian_mirror=setting("EPD_DEBIAN_MIRROR", ""),
    )


def entries(settings: Settings, *, hardware: str, image: str, proxy_image: str) -> list[dotenv.Entry]:
    """Return the block of `.env`: the names that the files in `compose/` use, in one place."""
    files = f"compose/{settings.topology}.yaml"
    block = [
        dotenv.Entry("COMPOSE_PROJECT_NAME", settings.project, "Compose project: the prefix of the containers' names"),
        dotenv.Entry("COMPOSE_FILE", files, "topology; `make deploy-1e1pd` and `make deploy-1e1p1d` choose"),
        dotenv.Entry("EPD_HARDWARE", hardware, "hardware profile, found by looking for NPUs"),
        dotenv.Entry("EPD_IMAGE", image, "image of every serving role"),
        dotenv.Entry("EPD_PROXY_IMAGE", proxy_image, "image of the proxy"),
        dotenv.Entry("EPD_PROXY_PORT", str(settings.proxy_port), "TCP port of this machine that the proxy answers on"),
    ]
    if settings.model:
        block.append(dotenv.Entry("EPD_MODEL", settings.model, "model: hub id, or path in the container"))
    if settings.model_dir:
        block.append(dotenv.Entry("EPD_MODEL_DIR", settings.model_dir, f"folder of the host seen at {MODEL_MOUNT}"))
    return block


def check_set_once(settings: Settings, entries: list[dotenv.Entry], environ: Mapping[str, str]) -> None:
    """Refuse a value that the command line and the user's own lines of `.env` set differently.

    Plain `docker compose` would go by `.env` later, and act on another stack than the one started now.

    Raises:
        StepError: there is such a value.
    """
    own = dotenv.read(settings.root / ".env").own
    behind = {"COMPOSE_FILE": "TOPOLOGY", "EPD_MODEL": "MODEL", "EPD_MODEL_DIR": "MODEL"}
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


def _model(wanted: str, earlier: tuple[str, str], root: Path) -> tuple[str, str]:
    """Return model and model folder for `MODEL=`: a folder, a hub id, or `tiny`; without it, those of before."""
    if not wanted:
        return earlier
    if wanted == _TINY:
        return "", ""
    folder = Path(wanted).expanduser()
    folder = folder if folder.is_absolute() else root / folder
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StepError(
                "MODEL is not a model",
                expected="a folder with a config.json in it",
                found=f"{folder} has none",
                fix="name the folder of a Hugging Face model (the one with config.json and *.safetensors)",
            )
        return MODEL_MOUNT, str(folder.resolve())
    if _HUB_ID.match(wanted):
        return wanted, ""
    raise StepError(
        "MODEL is not usable",
        expected=f"an existing folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or {_TINY!r}",
        found=f"MODEL={wanted}",
        fix="correct it, or leave MODEL out to serve the tiny model",
    )


def _topology(root: Path, wanted: str, compose_file: str) -> str:
    """Return the topology: `TOPOLOGY`, else the one of COMPOSE_FILE in `.env`, else 1e1pd."""
    names = topologies(root)
    name = wanted or next((n for n in names if f"compose/{n}.yaml" in compose_file.split(":")), "1e1pd")
    if name not in names:
        raise StepError(
            "no such topology",
            expected=f"one of: {', '.join(names) or '(none in compose/)'}",
            found=f"TOPOLOGY={name}",
            fix="make deploy-1e1pd, or TOPOLOGY=1e1pd make up",
        )
    return name


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
