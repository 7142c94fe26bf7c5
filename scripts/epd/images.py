"""Our images: what they are called, whether they are up to date, and how they are built."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from epd import command
from epd.buildlog import BuildLog
from epd.display import Display
from epd.errors import StepError
from epd.settings import Settings
from epd.versions import parse as parse_version

BAKE_FILE = "docker/docker-bake.hcl"
SERVED = ("cpu", "proxy")
"""The bake targets that a stack on the CPU profile runs."""
TESTS = {"connector": "cpu-test", "proxy": "proxy-test"}
"""The bake targets that each package's tests run in: what serves, with pytest."""
COMPAT = ("cpu-compat", "cpu-compat-test")
"""The serving image and the testing one, with another vLLM than ours: see `compat`."""
INPUTS_LABEL = "org.ascend-epd.inputs"
INPUTS = (".dockerignore", "connector", "docker", "proxy", "scripts/tiny_model.py")
"""What goes into the images: the build context, as .dockerignore lets it through."""
_NOT_INPUTS = ("__pycache__", "dist", "build", ".pytest_cache", ".mypy_cache", ".ruff_cache")
_FAILURE_TAIL_LINES = 40
_NO_BASE = ("failed to resolve source metadata", "failed to do request", "pull access denied", "failed to authorize")
"""What BuildKit says when it cannot pull what a Dockerfile is FROM, of Docker 20.10 and newer."""
_SHOW_EVERY_S = 0.5


_VARIABLES = {"proxy": "EPD_PROXY_IMAGE", "store": "EPD_STORE_IMAGE"}
"""What tells Compose the image of a bake target; EPD_IMAGE that of the serving roles."""


def served(profile: str, settings: Settings) -> tuple[str, ...]:
    """Return the bake targets that a stack on a hardware profile runs: that of the serving roles, and those beside it.

    The image for NPUs cannot be the embeddings' pool: its Mooncake wants CANN and a driver.
    """
    if profile == "cpu":
        return SERVED
    return (f"{profile}-openeuler" if settings.ascend_os == "openeuler" else profile, "proxy", "store")


def variables(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that tell Compose these images, given by bake target."""
    return {_VARIABLES.get(target, "EPD_IMAGE"): tag for target, tag in tags.items()}


def compat_versions(root: Path) -> tuple[str, ...]:
    """Return the versions of vLLM that there are locks of beside ours, the oldest first."""
    return tuple(sorted((path.name for path in (root / "docker/cpu/compat").glob("*/")), key=parse_version))


def compat(versions: Mapping[str, str], vllm: str) -> dict[str, str]:
    """Return the variables of the bake file with which the targets COMPAT are those of a version of vLLM."""
    return {**versions, "COMPAT_VLLM_VERSION": vllm}


def inputs_hash(settings: Settings) -> str:
    """Return a hash of what goes into the images: each file's path, mode for execution and bytes, and the settings.

    Of an address only what is no secret: a new password makes no new image.
    """
    digest = hashlib.sha256()
    for path in _input_files(settings.root):
        executable = b"x" if path.stat().st_mode & 0o100 else b"-"
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(f"{path.relative_to(settings.root)}\0".encode() + executable + content)
    torch_index = urlsplit(settings.torch_index_url)
    index = torch_index._replace(netloc=torch_index.netloc.rpartition("@")[2]).geturl()
    told = (settings.base_image, index, settings.ascend_registry, settings.ascend_serving)
    digest.update("\0".join(told).encode())
    return digest.hexdigest()[:32]


def _input_files(root: Path) -> Iterator[Path]:
    for name in INPUTS:
        start = root / name
        paths = sorted(start.rglob("*")) if start.is_dir() else [start]
        for path in paths:
            parts = path.relative_to(root).parts
            skipped = any(part in _NOT_INPUTS or part.endswith(".egg-info") for part in parts)
            if path.is_file() and not skipped:
                yield path


def bake_variables(settings: Settings, versions: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the bake file that the names of the images depend on.

    versions.env wins over the caller's environment, where a CI image may well have a VLLM_VERSION of its own.
    """
    return {**versions, "REGISTRY": settings.registry}


def bake_environment(settings: Settings, versions: Mapping[str, str], *, base: str, inputs: str) -> dict[str, str]:
    """Return the values of all variables of the bake file."""
    revision = command.probe("git", "-C", str(settings.root), "rev-parse", "HEAD").stdout.strip()
    values = {
        **bake_variables(settings, versions),
        "EPD_INPUTS": inputs,
        "EPD_REVISION": revision,
        "CA_BUNDLE": ca_bundle(settings.ca_bundle, os.environ),
        "BASE_IMAGE": base,
        "PIP_INDEX_URL": settings.pip_index_url,
        "TORCH_INDEX_URL": settings.torch_index_url,
        "ASCEND_INDEX_URL": settings.ascend_index_url,
        "EPD_OS_MIRROR_URL": settings.os_mirror_url,
        "EPD_DEBIAN_MIRROR": settings.debian_mirror,
        "EPD_ASCEND_REGISTRY": settings.ascend_registry,
        "EPD_ASCEND_SERVING": settings.ascend_serving,
    }
    return {name: value for name, value in values.items() if value or name == "REGISTRY"}


def ca_bundle(chosen: str, environ: Mapping[str, str]) -> str:
    """Return the certificates for downloads in the build: those chosen, or this machine's; an empty file if none."""
    candidates = (chosen, environ.get("PIP_CERT", ""), "/etc/ssl/certs/ca-certificates.crt")
    return next((name for name in candidates if name and Path(name).is_file()), "/dev/null")


def tags(root: Path, targets: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the image name of each bake target, as the bake file computes it.

    Raises:
        CommandError: the bake file cannot be read.
    """
    argv = ["docker", "buildx", "bake", "-f", str(root / BAKE_FILE), "--print", *targets]
    plan = json.loads(command.read(*argv, env=environment, fix=f"correct {BAKE_FILE}"))
    return {name: plan["target"][name]["tags"][0] for name in targets}


def is_current(tag: str, inputs: str) -> bool:
    """Whether the engine has this image, built from the files of now."""
    found = inputs_label(tag)
    return bool(found) and found == inputs


def inputs_label(tag: str) -> str:
    """Return the hash of the files that an image was built from; empty when the engine does not have it."""
    template = f'{{{{index .Config.Labels "{INPUTS_LABEL}"}}}}'
    result = command.probe("docker", "image", "inspect", "--format", template, tag)
    return result.stdout.strip() if result.ok else ""


def rename(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Give each image of `old` the name that `new` has for its target, as a registry's address is part of the name."""
    for target, tag in old.items():
        command.read("docker", "image", "tag", tag, new[target], fix="`docker images` shows what is there")


def build(
    root: Path,
    targets: tuple[str, ...],
    environment: Mapping[str, str],
    *,
    timeout_s: float,
    output: tuple[str, ...] = ("--load",),
) -> None:
    """Build images with BuildKit, showing the steps that run; `output` says where they go, to the engine by default.

    Raises:
        StepError: the build failed or did not end in time; its last lines are in the message.
    """
    log = root / "build" / "images.log"
    log.parent.mkdir(exist_ok=True)
    argv = ["docker", "buildx", "bake", "-f", BAKE_FILE, *output, "--progress=plain", *_proxies(os.environ), *targets]
    print(f"Building {', '.join(targets)} (the whole log: {log.relative_to(root)}) …", flush=True)
    began_s = time.monotonic()
    with log.open("w") as file:
        progress = _Progress(file)
        code = command.follow(*argv, on_line=progress.take, timeout_s=timeout_s, env=environment, cwd=root)
        progress.end()
    if code != 0:
        tail = log.read_text(errors="replace").splitlines()[-_FAILURE_TAIL_LINES:]
        ended = "no end in time" if code is None else f"exit code {code}"
        raise StepError(
            "the images could not be built",
            expected=f"{', '.join(targets)} within {timeout_s:.0f} s (EPD_BUILD_TIMEOUT_S)",
            found="\n    ".join([f"{ended}; the log ends with", *tail]),
            fix=_advice(tail, log),
        )
    print(f"  built in {time.monotonic() - began_s:.0f} s", flush=True)


def _advice(tail: list[str], log: Path) -> str:
    """Return what helps after a failed build that ended with these lines."""
    if any(words in line.lower() for words in _NO_BASE for line in tail):
        return (
            "a base image cannot be pulled: name a mirror of its registry, EPD_ASCEND_REGISTRY=<mirror>/ascend or "
            "EPD_BASE_IMAGE=<mirror>/library/debian:bookworm-slim (docs/ascend.md, 4); or bring built images here: "
            "REGISTRY=<registry>/ make pull, make load"
        )
    return f"see {log}; a download that broke off is worth a second `make up`, finished steps are kept"


def remove_replaced() -> None:
    """Remove our images that lost their name to a newer one, 6.5 GB each; one that a container uses stays."""
    result = command.probe("docker", "image", "prune", "--force", "--filter", f"label={INPUTS_LABEL}", timeout_s=300)
    lines = [line for line in result.stdout.splitlines() if line.startswith("Total reclaimed space:")]
    if "deleted:" in result.stdout and lines:
        print(f"Removed images that newer ones replaced ({lines[-1].partition(': ')[2]})", flush=True)


class _Progress:
    """Copies the build's output to the log, and shows its steps at most twice a second."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._display = Display()
        self._steps = BuildLog()
        self._shown_s = 0.0

    def take(self, line: str) -> None:
        """Take one line of the build's output."""
        self._log.write(f"{line}\n")
        sentence = self._steps.feed(line)
        if sentence:
            self._display.note(sentence)
        if time.monotonic() - self._shown_s >= _SHOW_EVERY_S:
            self._log.flush()
            self._display.show(self._steps.rows())
            self._shown_s = time.monotonic()

    def end(self) -> None:
        """Take the running steps off the terminal."""
        self._display.show([])


def _proxies(environ: Mapping[str, str]) -> list[str]:
    """Return bake arguments that hand the caller's HTTP proxies to the build; BuildKit knows these build arguments."""
    arguments = []
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        value = environ.get(name) or environ.get(name.lower())
        if value:
            arguments += ["--set", f"*.args.{name}={value}"]
    return arguments
