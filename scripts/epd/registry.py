"""Our images in a registry: pushed, and pulled by the digests in `images.lock`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from epd import base_image, command, image_lock, images
from epd.errors import StepError

_DIGEST = re.compile(r"\bdigest: (sha256:[0-9a-f]{64})\b", re.IGNORECASE)
"""Both `docker push` and `docker pull` name it, the latter with a capital D."""
_TRANSFER_TIMEOUT_S = 7200.0
"""An NPU image is some 15 GB."""
_FIRST_ANSWER_S = 60.0
_ADVICE = (
    (("unauthorized", "denied", "no basic auth"), "`docker login {host}` as one who may, then try again"),
    (
        ("server gave http response to https client",),
        '"insecure-registries": ["{host}"] in /etc/docker/daemon.json, restart the engine (a registry without TLS)',
    ),
    (("certificate",), "put the CA's certificate into /etc/docker/certs.d/{host}/ca.crt"),
)


def push(root: Path, tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Push images, write their digests to images.lock, and return the digests by name without registry.

    Raises:
        StepError: one cannot be pushed.
    """
    pushed = {}
    for tag in tags.values():
        print(f"Pushing {tag} …", flush=True)
        lines: list[str] = []
        code = command.follow("docker", "push", tag, on_line=lines.append, timeout_s=_TRANSFER_TIMEOUT_S)
        digest = _digest(lines)
        if code != 0 or not digest:
            raise _refused("push", tag, lines)
        print(f"  {digest}", flush=True)
        pushed[tag.removeprefix(prefix)] = digest
    _lock(root, pushed)
    return pushed


def publish(
    root: Path, tags: Mapping[str, str], prefix: str, environment: Mapping[str, str], *, timeout_s: float
) -> None:
    """Build release images straight into their registry, as the engine's store holds neither both architectures nor
    attestations; write their digests to images.lock.

    Raises:
        StepError: the build or the push failed.
    """
    metadata = root / "build" / "published.json"
    output = ("--push", "--metadata-file", str(metadata))
    released = {**environment, "RELEASE": "1"}
    images.build(root, tuple(tags), released, timeout_s=timeout_s, output=output)
    told = json.loads(metadata.read_text())
    _lock(root, {tag.removeprefix(prefix): told[name]["containerimage.digest"] for name, tag in tags.items()})


def _lock(root: Path, digests: Mapping[str, str]) -> None:
    image_lock.write(root, {**image_lock.read(root), **digests})
    print(f"{image_lock.FILE}: written; hosts that have it start exactly these images with `make pull`", flush=True)


def pull(root: Path, tags: Mapping[str, str], prefix: str, *, anew: bool) -> dict[str, str]:
    """Pull prebuilt images, those that are not here or all of them `anew`; return what to start by bake target.

    An image with a line in images.lock is pulled and started by that digest. One without is pulled by its tag, gets its
    line, and is started by digest from then on; one that is here and came from no registry is started by its tag.

    Raises:
        StepError: one cannot be pulled.
    """
    locked = image_lock.read(root)
    known, started = dict(locked), {}
    for target, tag in tags.items():
        digest = locked.get(tag.removeprefix(prefix), "")
        wanted = image_lock.reference(tag, digest) if digest else tag
        if not anew and base_image.is_there(wanted):
            print(f"Image {wanted}: already here (`make pull` asks the registry, EPD_PULL=0 builds)", flush=True)
            started[target] = wanted
            continue
        named = _pull(wanted)
        digest = digest or named
        known[tag.removeprefix(prefix)] = digest
        started[target] = image_lock.reference(tag, digest)
        # Without a tag it would be one of those that `docker image prune` removes once no container uses it.
        command.read("docker", "image", "tag", started[target], tag, fix="`docker images` shows what is there")
    if known != locked:
        image_lock.write(root, known)
        print(f"{image_lock.FILE}: written", flush=True)
    return started


def _pull(wanted: str) -> str:
    """Pull one image; return the digest that the engine names."""
    print(f"Pulling {wanted} …", flush=True)
    lines: list[str] = []
    reason = base_image.pull(wanted, first_answer_s=_FIRST_ANSWER_S, total_s=_TRANSFER_TIMEOUT_S, on_line=lines.append)
    digest = _digest(lines)
    if reason is None and digest:
        return digest
    raise _refused("pull", wanted, [*lines, reason or "the engine named no digest"])


def _digest(lines: list[str]) -> str:
    found = [match[1] for line in lines if (match := _DIGEST.search(line))]
    return found[-1] if found else ""


def _refused(verb: str, name: str, lines: list[str]) -> StepError:
    """Return the error for what a registry did not do, with the advice that fits its last words."""
    said = next((line for line in reversed(lines) if line.strip()), "nothing")
    fix = "name the registry with REGISTRY=registry.example/team/, or build instead: `make build`"
    if "@" in name and any(word in said.lower() for word in ("not found", "unknown")):
        fix = f"push these images to it, or take the tag as it is now: `mv {image_lock.FILE} {image_lock.FILE}.old`"
    for words, advice in _ADVICE:
        if any(word in said.lower() for word in words):
            fix = advice.format(host=name.partition("/")[0])
    expected = "a registry that takes it" if verb == "push" else "a registry that has it"
    return StepError(f"cannot {verb} {name}", expected=expected, found=said, fix=fix)
