"""Everything a person can set, read once and checked. The only reader of the environment and of `.env`.

A value set in the environment (`make up EPD_PROXY_PORT=9000`) wins over the user's own line in `.env`, that one over
what an earlier `make up` wrote there, that one over the default. One that is set and empty (`make up EPD_PROXY_PORT=`)
is the default, and what an earlier `make up` wrote is forgotten.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from epd import dotenv, recipes, served_model, values
from epd.errors import StepError
from epd.plan import topology

_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)")
_PASSED_ON = re.compile(r"^\s+([A-Z][A-Z0-9_]*):\s*$", re.MULTILINE)
"""A variable that Compose hands to a container when it is set."""
_SECRETS = frozenset({"HF_TOKEN"})
"""Never written to `.env`; the user may."""
_PLANNED_FILE = re.compile(r"^deploy/([^/]+)/[^/]+/compose\.yaml$")
IMAGE_VARIABLES = frozenset(
    {
        "REGISTRY", "EPD_PULL", "EPD_BASE_IMAGE", "TORCH_INDEX_URL", "EPD_ASCEND_REGISTRY", "EPD_ASCEND_SERVING",
        "EPD_ASCEND_OS",
    }
)  # fmt: skip
"""What the images depend on: kept in `.env`, or the next `make up` would build others."""
_MAKE_VARIABLES = frozenset(
    {
        "EPD_NO_INSTALL", "EPD_DEBIAN_MIRROR", "EPD_UP_TIMEOUT_S", "EPD_BUILD_TIMEOUT_S", "EPD_REGISTRY_TIMEOUT_S",
        "EPD_HARDWARE", "EPD_TOPOLOGY", "EPD_PLANNED", "EPD_OS_MIRROR_URL", "EPD_MODEL_FILES",
    }
)  # fmt: skip
"""Further names that mean something, to `make` or to compose.yaml."""
PLAN_VARIABLES = frozenset(
    {
        "EPD_HOSTS", "EPD_HOST", "EPD_HOST_ADDRESS", "EPD_INTERFACE", "EPD_CARDS", "EPD_OVERLAYS",
        "EPD_EXPERT_PARALLEL", "EPD_SKIP_MEMORY_CHECK", "EPD_NPU_RESOURCE",
        *(topology.variable(role, size) for role in topology.ROLES for size in ("TP", "DP")),
    }
)  # fmt: skip
"""What the plan is told beyond what the compose files read; docs/configuration.md explains each."""
_IMAGES = {
    "EPD_IMAGE": "image of every serving role",
    "EPD_PROXY_IMAGE": "image of the proxy",
    "EPD_STORE_IMAGE": "image of the embeddings' pool",
}
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
    """Use prebuilt images instead of building them."""
    pull_anew: bool
    """Pull them though they are here: this very command line says so."""
    no_install: bool
    """Report what is missing instead of installing it."""
    up_timeout_s: float | None
    """How long the services may take to get healthy; None for what the profile needs."""
    build_timeout_s: float
    """How long the images may take to build."""
    registry_timeout_s: float
    """How long a registry may take to begin its answer before we do without one."""
    base_image: str
    """Base image to build on; empty to pull Debian's or make one."""
    debian_mirror: str
    """Debian archive to take packages from; empty for that of the machine's own apt sources."""
    registry: str
    """Prefix of the images' names, with its slash; empty for none."""
    bundle: str
    """Folder that `make bundle` writes and `make load` reads; empty for the usual one."""
    pip_index_url: str
    """Package index for the image build; empty for the usual one."""
    torch_index_url: str
    """PyTorch's CPU index for the image build; empty for the usual one."""
    ascend_index_url: str
    """Huawei's package index, for the Ascend image that is built on CANN's."""
    os_mirror_url: str
    """Mirror of the distribution's archive, for the same."""
    ascend_registry: str
    """Where the base images `cann` and `vllm-ascend` are pulled from; empty for their makers' registry."""
    ascend_os: str
    """Distribution in the Ascend image: `ubuntu`, `openeuler`, or empty for the usual one, Ubuntu."""
    ascend_serving: str
    """What the Ascend image is built on: `vendor`, `cann`, or empty for the bake file's choice."""
    ca_bundle: str
    """File of CA certificates for the image build; empty for the machine's own."""


def profiles(root: Path) -> tuple[str, ...]:
    """Return the names of the hardware profiles in `compose/hardware/`; `cpu` is always one."""
    return tuple(sorted({"cpu", *(path.stem for path in (root / "compose" / "hardware").glob("*.yaml"))}))


def load(root: Path, environ: Mapping[str, str]) -> Settings:
    """Read the settings from the environment and `.env`.

    Raises:
        StepError: a value is not usable.
    """
    file = dotenv.read(root / ".env")
    environ = recipes.expand(root, environ, file.own)

    def setting(name: str, default: str = "") -> str:
        if name in environ:
            return environ[name].strip() or default
        return file.own.get(name, file.managed.get(name, "")) or default

    def number(name: str, default: str, low: float, high: float) -> float:
        return values.number(name, setting(name, default), low, high)

    chosen = _chosen(root, environ, file)
    planning = {**chosen, **file.own, **_from_environment(root, environ)}
    values.check_all(planning)
    compose_file = file.own.get("COMPOSE_FILE", "") if "TOPOLOGY" in environ else setting("COMPOSE_FILE")
    return Settings(
        root=root,
        project=values.matching("COMPOSE_PROJECT_NAME", setting("COMPOSE_PROJECT_NAME", "ascend-epd"), _PROJECT),
        topology=_topology(setting("TOPOLOGY"), compose_file),
        hardware=_hardware(root, environ.get("EPD_HARDWARE", "").strip() or file.own.get("EPD_HARDWARE", "")),
        proxy_port=int(number("EPD_PROXY_PORT", "8000", 1, 65535)),
        chosen=chosen,
        planning=planning,
        pull=values.flag("EPD_PULL", setting("EPD_PULL")),
        pull_anew=bool(environ.get("EPD_PULL", "").strip()),
        no_install=values.flag("EPD_NO_INSTALL", setting("EPD_NO_INSTALL")),
        up_timeout_s=number("EPD_UP_TIMEOUT_S", "1", 1, 86400) if setting("EPD_UP_TIMEOUT_S") else None,
        build_timeout_s=number("EPD_BUILD_TIMEOUT_S", "5400", 1, 86400),
        registry_timeout_s=number("EPD_REGISTRY_TIMEOUT_S", "15", 1, 3600),
        base_image=setting("EPD_BASE_IMAGE"),
        debian_mirror=setting("EPD_DEBIAN_MIRROR"),
        registry=values.registry(setting("REGISTRY")),
        bundle=environ.get("BUNDLE", "").strip(),
        pip_index_url=setting("PIP_INDEX_URL"),
        torch_index_url=setting("TORCH_INDEX_URL"),
        ascend_index_url=setting("ASCEND_INDEX_URL"),
        os_mirror_url=setting("EPD_OS_MIRROR_URL"),
        ascend_registry=setting("EPD_ASCEND_REGISTRY").rstrip("/"),
        ascend_os=values.choice("EPD_ASCEND_OS", setting("EPD_ASCEND_OS"), ("ubuntu", "openeuler")),
        ascend_serving=values.choice("EPD_ASCEND_SERVING", setting("EPD_ASCEND_SERVING"), ("vendor", "cann")),
        ca_bundle=setting("SSL_CERT_FILE"),
    )


def _hardware(root: Path, wanted: str) -> str:
    """Return a hardware profile that was asked for; empty stays empty."""
    profile = wanted.lower()
    if profile and profile not in profiles(root):
        raise StepError(
            f"hardware profile {profile!r} is not available",
            expected=f"one of: {', '.join(profiles(root))}",
            found=f"EPD_HARDWARE={wanted}",
            fix="name one of them, or leave EPD_HARDWARE out: npu-smi tells what this machine has",
        )
    return profile


def entries(
    settings: Settings, *, compose_file: str, planned: Mapping[str, str], images: Mapping[str, str]
) -> list[dotenv.Entry]:
    """Return the block of `.env`: what the files in `compose/` are told; `planned` holds the plan's variables."""
    hardware = planned["EPD_HARDWARE"]
    block = [
        dotenv.Entry("COMPOSE_PROJECT_NAME", settings.project, "Compose project: the prefix of the containers' names"),
        dotenv.Entry("COMPOSE_FILE", compose_file, "topology; `make deploy-1e1pd` and `make deploy-1e1p1d` choose"),
        dotenv.Entry("EPD_HARDWARE", hardware, "hardware profile, found by looking for NPUs"),
        *(dotenv.Entry(name, image, _IMAGES[name]) for name, image in images.items()),
        dotenv.Entry("EPD_PROXY_PORT", str(settings.proxy_port), "TCP port of this machine that the proxy answers on"),
    ]
    block += [dotenv.Entry(name, planned[name], "what was planned") for name in planned if name != "EPD_HARDWARE"]
    fixed = {entry.name for entry in block}
    chosen = [(name, value) for name, value in sorted(settings.chosen.items()) if name not in fixed]
    return [*block, *(dotenv.Entry(name, value, "chosen on the command line of `make up`") for name, value in chosen)]


def remember(root: Path, values_: Mapping[str, str], *, comment: str) -> None:
    """Keep variables in the block of `.env`, beside what it holds; an empty value is forgotten."""
    path = root / ".env"
    kept = [dotenv.Entry(name, value, "as before") for name, value in dotenv.read(path).managed.items()]
    new = [dotenv.Entry(name, value, comment) for name, value in values_.items() if value]
    dotenv.write(path, [*(entry for entry in kept if entry.name not in values_), *new])


def stack_variables(root: Path) -> frozenset[str]:
    """Return the names of the variables that the files in `compose/` read or hand on to a container."""
    text = "".join(path.read_text() for path in sorted((root / "compose").rglob("*.yaml")))
    return frozenset(_VARIABLE.findall(text)) | frozenset(_PASSED_ON.findall(text))


def describe_unknown(root: Path, environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each `EPD_…` in the environment or `.env` that nothing reads: a typo, most likely."""
    known = sorted(stack_variables(root) | PLAN_VARIABLES | IMAGE_VARIABLES | _MAKE_VARIABLES)
    own = dotenv.read(root / ".env").own
    sentences = []
    for name in sorted({*environ, *own}):
        if name.startswith("EPD_") and name not in known:
            where = "in .env" if name in own else "in the environment"
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            meant = f"did you mean {close[0]}?" if close else "docs/configuration.md has all names"
            sentences.append(f"{name} ({where}) is not a setting; {meant}")
    return sentences


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
        asked, where = environ.get(name, "").strip(), "in the environment"
        if not asked and name != entry.name:
            asked, where = own.get(name, ""), "in .env"
        if not asked or not own.get(entry.name) or entry.value in (own[entry.name], *own[entry.name].split(":")):
            continue
        raise _set_twice(entry.name, f"{name}={asked} {where}", own[entry.name])
    for name in sorted(_known(settings.root) & own.keys()):
        if name in environ and own[name] and not environ[name].strip():
            raise _set_twice(name, f"{name}= (its default) in the environment", own[name])


def _set_twice(name: str, found: str, own: str) -> StepError:
    return StepError(
        f"{name} is set twice",
        expected="one value",
        found=f"{found}, and {name}={own} among your lines in .env",
        fix=f"remove one of the two (in .env: the line that begins with {name}=)",
    )


def _known(root: Path) -> frozenset[str]:
    """Return the names of what is kept in `.env` when it was set on a command line."""
    return (stack_variables(root) | PLAN_VARIABLES | IMAGE_VARIABLES) - {"EPD_PLANNED"} - _SECRETS


def _chosen(root: Path, environ: Mapping[str, str], file: dotenv.Dotenv) -> dict[str, str]:
    """Return the variables that were set: on this command line, or on an earlier one and kept in `.env`."""
    forgotten = {name for name, value in {**file.own, **environ}.items() if not value.strip()}
    kept = {name: value for name, value in file.managed.items() if name in _known(root) - forgotten}
    wanted = environ["MODEL"].strip() or "tiny" if "MODEL" in environ else file.own.get("MODEL", "")
    if wanted:
        implied = served_model.variables(wanted, root)
        if any(kept.get(name) != implied.get(name) for name in ("EPD_MODEL", "EPD_MODELS")):
            kept = {name: value for name, value in kept.items() if name not in served_model.VARIABLES}
        kept = {**implied, **kept}
    found = {**kept, **_from_environment(root, environ)}
    return {name: value for name, value in found.items() if not _has_password(name, value)}


def _has_password(name: str, value: str) -> bool:
    return name == "TORCH_INDEX_URL" and "@" in urlsplit(value).netloc


def _from_environment(root: Path, environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name].strip() for name in _known(root) if environ.get(name, "").strip()}


def _topology(wanted: str, compose_file: str) -> str:
    """Return the topology: `TOPOLOGY`, else the one of COMPOSE_FILE in `.env`, else 1e1pd."""
    return topology.parse(wanted or next(filter(None, map(_topology_of, compose_file.split(":"))), "1e1pd")).name


def _topology_of(file: str) -> str:
    """Return the topology that a file of COMPOSE_FILE is for; empty when it is an overlay."""
    planned = _PLANNED_FILE.match(file)
    name = planned[1] if planned else Path(file).stem if file.startswith("compose/") else ""
    return name if topology.is_name(name) else ""
