"""A folder that brings the stack to a host without a network: the project's files, images, maybe a model, checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from epd import checksums, command, images
from epd.errors import StepError

PROJECT = (
    "Makefile", "compose.yaml", "compose", "docker", "connector", "proxy", "scripts", "models", "docs", "LICENSE",
    "README.md", "README.zh.md", "CHANGELOG.md", ".dockerignore", ".env.example",
)  # fmt: skip
"""What of the project goes along, where it is there: all that runs, not what tests it."""
CONTENT = "bundle"
"""The folder in the bundle that holds images, model and manifest."""
_IMAGES, _MODEL, _MANIFEST = "images.tar", "model", "manifest.json"
_TRANSFER_TIMEOUT_S = 7200.0
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", "dist")


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds."""

    version: str
    hardware: str
    registry: str
    """Prefix of the images' names."""
    architecture: str
    """As the engine calls it: `amd64`, `arm64`."""
    images: Mapping[str, str]
    """Label of inputs by name: tells whether the engine really has this image afterwards."""
    model: str
    """Name of the model's folder; empty when there is none."""


def architecture() -> str:
    """Return the architecture of the engine's images."""
    return command.read("docker", "version", "--format", "{{.Server.Arch}}", fix="`make up` starts Docker").strip()


def write(root: Path, folder: Path, manifest: Manifest, model: Path | None) -> None:
    """Write a bundle; it has its name only once it is complete.

    Raises:
        StepError: there is not enough space, or something is in the way.
    """
    if folder.exists() and not (folder / checksums.FILE).is_file():
        raise StepError(
            f"cannot write the bundle to {folder}",
            expected="a new folder, or an older bundle to replace",
            found="a folder of something else",
            fix="name another: make bundle BUNDLE=<folder>",
        )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    content = partial / CONTENT
    content.mkdir(parents=True)
    try:
        _check_space(folder.parent, manifest, model)
        for name in PROJECT:
            _copy(root / name, partial / name)
        if model:
            _copy(model, content / _MODEL / model.name)
        (content / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        print(f"Saving {', '.join(manifest.images)} …", flush=True)
        argv = ["docker", "image", "save", "--output", str(content / _IMAGES), *manifest.images]
        command.show(*argv, timeout_s=_TRANSFER_TIMEOUT_S, fix="see that the disk has room")
        print("Computing checksums …", flush=True)
        checksums.write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def read(folder: Path) -> Manifest:
    """Return what a bundle holds, once its checksums are right.

    Raises:
        StepError: it is damaged, or for engines of another architecture.
    """
    checksums.check(folder, on_file=lambda name: print(f"Checking {name} …") if name.endswith(".tar") else None)
    try:
        manifest = Manifest(**json.loads((folder / CONTENT / _MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StepError(
            f"cannot read {folder / CONTENT / _MANIFEST}",
            expected="the manifest of a bundle of this version",
            found=str(error),
            fix="load a bundle with the Makefile that came in it",
        ) from error
    here = architecture()
    if here != manifest.architecture:
        raise StepError(
            "the bundle is for another kind of machine",
            expected=f"images for {here}, as this machine runs",
            found=manifest.architecture,
            fix=f"make the bundle on a {here} machine",
        )
    return manifest


def load(folder: Path, manifest: Manifest) -> Path | None:
    """Give the engine a bundle's images; return the folder of its model, None without one.

    Raises:
        StepError: the engine does not have them afterwards.
    """
    print(f"Loading {', '.join(manifest.images)} …", flush=True)
    archive = str(folder / CONTENT / _IMAGES)
    command.show(
        "docker", "image", "load", "--quiet", "--input", archive,
        timeout_s=_TRANSFER_TIMEOUT_S, fix="see that the disk of the Docker engine has room (`docker system df`)",
    )  # fmt: skip
    absent = [name for name, inputs in manifest.images.items() if not images.is_current(name, inputs)]
    if absent:
        raise StepError(
            "the engine does not have the bundle's images",
            expected=f"{', '.join(absent)} as built for this bundle",
            found="none, or others of that name",
            fix=f"`docker image load --input {archive}` shows why",
        )
    return folder / CONTENT / _MODEL / manifest.model if manifest.model else None


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=_LEFT_OUT)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _check_space(where: Path, manifest: Manifest, model: Path | None) -> None:
    """Check that the disk holds it; images are about as large on disk as in an archive."""
    argv = ["docker", "image", "inspect", "--format", "{{.Size}}", *manifest.images]
    sizes = [int(size) for size in command.read(*argv, fix="`make build`, or `make pull`").split()]
    files = sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) if model else 0
    need, have = sum(sizes) + files, shutil.disk_usage(where).free
    if need > have:
        raise StepError(
            f"not enough space for the bundle in {where}",
            expected=f"images {_gib(sum(sizes))} + model {_gib(files)} = {_gib(need)} GiB",
            found=f"{_gib(have)} GiB free",
            fix="name a folder on a larger disk: make bundle BUNDLE=<folder>",
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f}"
