"""Docker, Compose, images and the space they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from epd import versions
from epd.doctor.finding import Finding, failed, passed, warned
from epd.doctor.subject import Subject

_GIB = 1 << 30
_SPACE_FOR_IMAGES_GIB = 15
_SPACE_FOR_NPU_IMAGES_GIB = 40
_SPACE_TO_RUN_GIB = 5
HARDWARE_LABEL = "org.ascend-epd.hardware"


def check(subject: Subject) -> Iterator[Finding]:
    """Check what starts the containers."""
    engine = subject.machine.run("docker", "version", "--format", "{{.Server.Version}}")
    yield _at_least("engine.docker", "Docker engine", engine.stdout if engine.ok else "", subject, "MIN_DOCKER_ENGINE")
    compose = subject.machine.run("docker", "compose", "version", "--short")
    yield _at_least("engine.compose", "Compose", compose.stdout if compose.ok else "", subject, "MIN_COMPOSE")
    if not engine.ok:
        return
    labels = {image: subject.image_labels(image) for image in subject.images}
    absent = [image for image, found in labels.items() if found is None]
    yield from _images(subject, absent)
    yield from _kind(subject, labels)
    yield _space(subject, lacks_images=bool(absent))


def _at_least(name: str, what: str, found: str, subject: Subject, minimum: str) -> Finding:
    wanted = subject.versions[minimum]
    if versions.at_least(found, wanted):
        return passed(name, found.strip())
    return failed(
        name,
        expected=f"{what} {wanted} or newer",
        found=found.strip() or "no answer",
        fix="`make up` installs it on Debian and Ubuntu; elsewhere https://docs.docker.com/engine/install/",
    )


def _images(subject: Subject, absent: list[str]) -> Iterator[Finding]:
    if subject.images and not absent:
        yield passed("engine.images", ", ".join(subject.images))
    elif absent and not subject.will_start:
        yield warned(
            "engine.images",
            expected="the images on this machine, or a way to get them",
            found=f"missing: {', '.join(absent)}",
            fix="`make build`, REGISTRY=<registry>/ make pull, or `make load BUNDLE=<folder>` without a network",
        )


def _kind(subject: Subject, labels: Mapping[str, Mapping[str, str] | None]) -> Iterator[Finding]:
    """Check that an image is for this kind of chip: vllm-ascend refuses to start on another one."""
    for image, found in labels.items():
        kind = (found or {}).get(HARDWARE_LABEL, "")
        if kind and kind not in (subject.hardware, "any"):
            yield failed(
                "engine.image-hardware",
                expected=f"an image for {subject.hardware}",
                found=f"{image} is for {kind}",
                fix=f"`make build` or `make pull` for {subject.hardware}; look at EPD_IMAGE in .env",
            )


def _space(subject: Subject, *, lacks_images: bool) -> Finding:
    root = subject.machine.run("docker", "info", "--format", "{{.DockerRootDir}}").stdout.strip() or "/var/lib/docker"
    free_gib = subject.free_bytes(subject.machine.path(root)) // _GIB
    images_gib = _SPACE_FOR_NPU_IMAGES_GIB if subject.npu else _SPACE_FOR_IMAGES_GIB
    need_gib = images_gib if lacks_images else _SPACE_TO_RUN_GIB
    if free_gib < need_gib:
        return failed(
            "engine.disk",
            expected=f"{need_gib} GiB free where Docker keeps images ({root})",
            found=f"{free_gib} GiB",
            fix="`docker system prune` frees what is not used; or move Docker's data-root to a larger disk",
        )
    return passed("engine.disk", f"{free_gib} GiB free in {root}")
