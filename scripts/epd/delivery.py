"""The commands that bring images to other hosts: push, publish, bundle, load."""

from __future__ import annotations

import os
from pathlib import Path

from epd import base_image, dotenv, image_lock, images, planning, registry, settings, values
from epd import bundle as bundling
from epd.context import ROOT, Context
from epd.errors import StepError
from epd.provision import prepare_engine, provide_images


def push(it: Context, words: list[str]) -> int:
    """Push the images of this hardware profile, or the bake targets named; build them first unless they are current."""
    _require_registry(it)
    prepare_engine(it)
    registry.push(ROOT, _named_for_registry(it, tuple(words) or _served(it)), it.settings.registry)
    return 0


def publish(it: Context, words: list[str]) -> int:
    """Build the bake targets named for every architecture, with SBOM and provenance, straight into the registry.

    Needs a buildx builder of its own (`docker buildx create --use`), which knows no image of the engine: so the base
    image is one that a registry has.
    """
    _require_registry(it)
    prepare_engine(it)
    targets = tuple(words) or _served(it)
    environment = images.bake_environment(
        it.settings,
        it.versions,
        base=it.settings.base_image or f"debian:{it.versions['DEBIAN_SUITE']}-slim",
        inputs=images.inputs_hash(it.settings),
    )
    tags = images.tags(ROOT, targets, it.bake)
    registry.publish(ROOT, tags, it.settings.registry, environment, timeout_s=it.settings.build_timeout_s)
    return 0


def bundle(it: Context, _: list[str]) -> int:
    """Write a folder with all that a host without a network needs, and the model that this command line names."""
    prepare_engine(it)
    hardware, version, model = _hardware(it), it.versions["EPD_VERSION"], _model(it)
    targets = images.served(hardware, it.settings)
    provide_images(it, targets, pull=it.settings.pull)
    tags = images.tags(ROOT, targets, it.bake)
    folder = _absolute(it.settings.bundle) if it.settings.bundle else ROOT / "dist" / f"ascend-epd-{version}-{hardware}"
    manifest = bundling.Manifest(
        version=version,
        hardware=hardware,
        registry=it.settings.registry,
        architecture=bundling.architecture(),
        images={tag: images.inputs_label(tag) for tag in tags.values()},
        model=model.name if model else "",
    )
    bundling.write(ROOT, folder, manifest, model)
    print(f"\n{folder}: written. Copy it to the other host, and there, in that folder:\n\n  make load\n  make up\n")
    return 0


def load(it: Context, _: list[str]) -> int:
    """Take the images of a bundle, and start from them from now on: EPD_PULL=1 and the bundle's REGISTRY in `.env`."""
    prepare_engine(it)
    folder = _absolute(it.settings.bundle) if it.settings.bundle else ROOT
    manifest = bundling.read(folder)
    if manifest.version != it.versions["EPD_VERSION"]:
        raise StepError(
            "the bundle is of another version",
            expected=f"{it.versions['EPD_VERSION']}, as this folder is",
            found=manifest.version,
            fix=f"run `make load` in {folder}: it brings its own Makefile",
        )
    model = bundling.load(folder, manifest)
    names = {tag.removeprefix(manifest.registry) for tag in manifest.images}
    image_lock.write(ROOT, {name: digest for name, digest in image_lock.read(ROOT).items() if name not in names})
    settings.remember(ROOT, {"EPD_PULL": "1", "REGISTRY": manifest.registry}, comment="set by `make load`")
    word = f" MODEL={os.path.relpath(model, ROOT)}" if model else ""
    print(f"\nThe images are here. Next, without a network:\n\n  make up{word}\n")
    return 0


def _require_registry(it: Context) -> None:
    if not it.settings.registry:
        raise StepError(
            "no registry to push to",
            expected="the prefix of the images' names there",
            found="no REGISTRY",
            fix="make push REGISTRY=registry.example/team/",
        )


def _hardware(it: Context) -> str:
    return planning.choose_hardware(it.settings.hardware, it.machine)


def _served(it: Context) -> tuple[str, ...]:
    return images.served(_hardware(it), it.settings)


def _absolute(folder: str) -> Path:
    return Path(os.path.abspath(ROOT / Path(folder).expanduser()))


def _model(it: Context) -> Path | None:
    """Return the model's folder if this very command line names one: what an earlier one named may be large."""
    named = any(os.environ.get(name, "").strip() for name in ("MODEL", "MODEL_RECIPE"))
    folder = it.settings.planning.get("EPD_MODELS", "")
    return Path(folder) if named and folder else None


def _named_for_registry(it: Context, targets: tuple[str, ...]) -> dict[str, str]:
    """Return the images under the registry's name: those that are here under another one are renamed, not built."""
    tags = images.tags(ROOT, targets, it.bake)
    file = dotenv.read(ROOT / ".env")
    remembered = values.registry({**file.managed, **file.own}.get("REGISTRY", ""))
    here = images.tags(ROOT, targets, {**it.bake, "REGISTRY": remembered})
    if it.settings.pull:  # prebuilt ones, pulled or out of a bundle: nothing is built on this host
        absent = [tag for tag in here.values() if not base_image.is_there(tag)]
        if absent:
            raise StepError(
                "nothing to push", expected=", ".join(absent), found="no such image", fix="make pull, or EPD_PULL=0"
            )
        images.rename(here, tags)
        return tags
    inputs = images.inputs_hash(it.settings)
    missing = [target for target, tag in tags.items() if not images.is_current(tag, inputs)]
    images.rename({target: here[target] for target in missing if images.is_current(here[target], inputs)}, tags)
    return provide_images(it, targets, pull=False)
