"""What the stack needs on the host, what of it is missing, and which packages bring it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epd import apt, command, versions
from epd.errors import StepError
from epd.host import Distribution

PLUGIN_SUITE = "trixie"
"""Debian 12 has Compose version 1 and no buildx. These two packages of Debian 13 need nothing but Debian 12's libc6."""


@dataclass(frozen=True)
class Inventory:
    """The programs found on this machine; a version is empty where the program is missing."""

    client: str
    """Version of the `docker` command."""
    engine_installed: bool
    """Whether `dockerd` is on this machine."""
    engine: str
    """Version of the engine that answers; empty when none does."""
    compose: str
    """Version of the Compose plug-in, wherever the client finds it."""
    buildx: str
    """Version of the buildx plug-in."""
    apparmor_lacks_parser: bool
    """Whether the kernel enforces AppArmor and `apparmor_parser` is missing: then no container starts."""


@dataclass(frozen=True)
class Need:
    """One thing that is missing, and the package that brings it."""

    what: str
    why: str
    package: str
    suite: str = ""
    """The Debian suite to take the package from; empty for the host's own."""


def take_inventory() -> Inventory:
    """Look which programs are there. Changes nothing, asks no network."""
    apparmor = Path("/sys/module/apparmor/parameters/enabled")
    enabled = apparmor.is_file() and apparmor.read_text().strip() == "Y"
    return Inventory(
        client=_version_line("docker", "--version"),
        engine_installed=command.have("dockerd"),
        engine=_version_line("docker", "version", "--format", "{{.Server.Version}}"),
        compose=_version_line("docker", "compose", "version", "--short"),
        buildx=_version_line("docker", "buildx", "version"),
        apparmor_lacks_parser=enabled and not command.have("apparmor_parser"),
    )


def find_missing(inventory: Inventory, minimum: Mapping[str, str], distribution: Distribution) -> list[Need]:
    """Return what is missing or too old, with the package names of `distribution`. Pure."""
    needs = []
    suite = PLUGIN_SUITE if distribution.codename == "bookworm" and distribution.family == "debian" else ""
    if not inventory.engine_installed and not inventory.engine:
        needs.append(Need("Docker engine", "runs the containers", "docker.io"))
    # Debian splits the client off docker.io from 13 on; on 12 and on Ubuntu docker.io holds it.
    if not inventory.client and distribution.family == "debian" and not suite:
        needs.append(Need("docker command", "talks to the engine", "docker-cli"))
    elif not inventory.client and inventory.engine_installed:
        needs.append(Need("docker command", "talks to the engine", "docker.io"))
    if not versions.at_least(inventory.compose, minimum["MIN_COMPOSE"]):
        package = "docker-compose-v2" if distribution.family == "ubuntu" else "docker-compose"
        why = f"starts the services; {_found(inventory.compose)}, {minimum['MIN_COMPOSE']} or newer is needed"
        needs.append(Need("Compose plug-in", why, package, suite))
    if not versions.at_least(inventory.buildx, minimum["MIN_BUILDX"]):
        why = f"builds the images; {_found(inventory.buildx)}, {minimum['MIN_BUILDX']} or newer is needed"
        needs.append(Need("buildx plug-in", why, "docker-buildx", suite))
    if inventory.apparmor_lacks_parser:
        needs.append(Need("apparmor_parser", "the kernel enforces AppArmor, no container starts without", "apparmor"))
    return needs


def explain(needs: list[Need]) -> str:
    """Say what is missing, what for, and where each package comes from."""
    lines = ["This machine lacks:"]
    for need in needs:
        origin = f" of Debian {need.suite} (this package alone, no source is added)" if need.suite else ""
        lines.append(f"  - {need.what} ({need.why})\n      package {need.package}{origin}")
    return "\n".join(lines)


def check_engine_version(inventory: Inventory, minimum: Mapping[str, str]) -> None:
    """Refuse a running engine that is too old.

    Raises:
        StepError: it is older than MIN_DOCKER_ENGINE.
    """
    if inventory.engine and not versions.at_least(inventory.engine, minimum["MIN_DOCKER_ENGINE"]):
        raise StepError(
            "the Docker engine is too old",
            expected=f"{minimum['MIN_DOCKER_ENGINE']} or newer",
            found=inventory.engine,
            fix="upgrade it the way it was installed (`apt-get install docker.io`, or Docker's own packages)",
        )


def provide(needs: list[Need], distribution: Distribution, *, root: bool, no_install: bool, mirror: str) -> None:
    """Install what is missing after saying so; `no_install` (EPD_NO_INSTALL=1) only reports.

    Raises:
        StepError: installing is not wanted, or not ours to do on this machine (no root, another distribution).
        CommandError: apt-get failed.
    """
    if not needs:
        return
    print(explain(needs), flush=True)
    by_hand = manual_fix(needs, distribution)
    found = ", ".join(need.what for need in needs) + " missing"
    if no_install:
        raise StepError("EPD_NO_INSTALL is set", expected="all of the above", found=found, fix=by_hand)
    if not distribution.family:
        raise StepError(
            "no automatic installation here", expected="Debian or Ubuntu", found=distribution.pretty_name, fix=by_hand
        )
    if not root:
        raise StepError("installing needs root", expected="to run as root", found="a plain user", fix=by_hand)
    print("Installing now (EPD_NO_INSTALL=1 would have stopped here) …", flush=True)
    own = sorted({need.package for need in needs if not need.suite})
    if own:
        apt.install(own)
    foreign = sorted({need.package for need in needs if need.suite})
    if foreign:
        address = apt.mirror(apt.host_sources(), distribution.codename, mirror)
        apt.install_from_suite(foreign, apt.Source(address, PLUGIN_SUITE, ("main",)))


def manual_fix(needs: list[Need], distribution: Distribution) -> str:
    """Say what a person does by hand instead."""
    if not distribution.family:
        return "install them (https://docs.docker.com/engine/install/), then run `make up` again"
    own = " ".join(sorted({need.package for need in needs if not need.suite}))
    steps = [f"`apt-get install {own}`"] if own else []
    foreign = " and ".join(sorted({need.package for need in needs if need.suite}))
    if foreign:
        steps.append(f"install {foreign} of Debian {PLUGIN_SUITE} or Docker's own plug-in packages")
    return "run `make up` as root, or: " + ", then ".join(steps)


def check_provided(inventory: Inventory, minimum: Mapping[str, str], distribution: Distribution) -> None:
    """Check after installing that nothing is missing any more.

    Raises:
        StepError: something still is, as when an old plug-in in ~/.docker/cli-plugins hides the new one.
    """
    left = find_missing(inventory, minimum, distribution)
    if left:
        plugins = Path.home() / ".docker" / "cli-plugins"
        raise StepError(
            "the packages were installed, yet something is still missing",
            expected="Compose and buildx plug-ins as new as docker/versions.env says",
            found=", ".join(f"{need.what} ({need.why})" for need in left),
            fix=f"remove an old plug-in that hides the new one (look into {plugins}), then run `make up` again",
        )


def _version_line(*argv: str) -> str:
    """Return what a program says about its version; empty when it is missing, fails, or names none."""
    result = command.probe(*argv, timeout_s=15)
    text = result.stdout.strip()
    return text if result.ok and versions.parse(text) else ""


def _found(version: str) -> str:
    number = ".".join(str(part) for part in versions.parse(version))
    return f"found version {number}" if number else "none was found"
