"""What every start needs first: the engine and its plug-ins, and the images."""

from __future__ import annotations

import os

from epd import base_image, engine, host, images, needs, registry
from epd.context import ROOT, Context


def prepare_engine(it: Context) -> None:
    """Install what is missing, start the engine, check versions."""
    found = needs.take_inventory()
    missing = needs.find_missing(found, it.versions, it.distribution)
    needs.provide(
        missing,
        it.distribution,
        root=it.root_user,
        no_install=it.settings.no_install,
        mirror=it.settings.debian_mirror,
    )
    engine.ensure_running(os.environ, root=it.root_user, systemd=host.has_systemd())
    found = needs.take_inventory()
    needs.check_provided(found, it.versions, it.distribution)
    needs.check_engine_version(found, it.versions)


def provide_images(it: Context, targets: tuple[str, ...], *, pull: bool) -> dict[str, str]:
    """Build or `pull` images unless they are up to date; return what to start by bake target, pulled ones by digest."""
    tags = images.tags(ROOT, targets, it.bake)
    if pull:
        return registry.pull(ROOT, tags, it.settings.registry, anew=it.settings.pull_anew)
    inputs = images.inputs_hash(it.settings)
    stale = tuple(name for name, tag in tags.items() if not images.is_current(tag, inputs))
    if not stale:
        print(f"Images: up to date ({', '.join(tags.values())})", flush=True)
        return tags
    base = base_image.obtain(it.settings, it.versions["DEBIAN_SUITE"], it.distribution, root=it.root_user)
    environment = images.bake_environment(it.settings, it.versions, base=base, inputs=inputs)
    images.build(ROOT, stale, environment, timeout_s=it.settings.build_timeout_s)
    images.remove_replaced()
    return tags
