"""`images.lock`: which images a folder starts, by the digest that a registry knows them by.

A digest names the bytes, wherever they are, so the registry's address is no part of it: a mirror serves the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from epd.errors import StepError

FILE = "images.lock"
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
_HEAD = """\
# The images that `make pull` starts, by digest: written by `make push`, and by `make pull` for an image without a line.
# Without a line, or without this file, the tag decides. REGISTRY says which registry or mirror to ask.
"""


def read(root: Path) -> dict[str, str]:
    """Return the digest of each image, by its name without registry: `ascend-epd-cpu:0.1.0`. Empty without a file.

    Raises:
        StepError: a line is not a name and a digest.
    """
    path, found = root / FILE, {}
    if not path.is_file():
        return {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 2 or not _DIGEST.match(words[1]):
            raise StepError(
                f"cannot read {FILE}, line {number}",
                expected="<name>:<tag> sha256:<64 hexadecimal digits>",
                found=line,
                fix=f"correct it, or take the file out of the way: `mv {FILE} {FILE}.old`",
            )
        found[words[0]] = words[1]
    return found


def write(root: Path, digests: Mapping[str, str]) -> None:
    """Write the file anew; without digests there is none."""
    path = root / FILE
    if not digests:
        path.unlink(missing_ok=True)
        return
    new = path.with_name(f"{FILE}.new")
    new.write_text(_HEAD + "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())))
    new.replace(path)


def pinned(root: Path, names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return names of images by whatever key, those with a line in the file by digest instead of tag."""
    locked = read(root)
    digests = {key: locked.get(tag.removeprefix(prefix), "") for key, tag in names.items()}
    return {key: reference(tag, digests[key]) if digests[key] else tag for key, tag in names.items()}


def reference(tag: str, digest: str) -> str:
    """Return the name by which the engine knows an image of this digest: `registry.example/team/image@sha256:…`."""
    return f"{repository(tag)}@{digest}"


def repository(tag: str) -> str:
    """Return an image's name without its tag; a colon before the last slash belongs to the registry's port."""
    head, slash, name = tag.rpartition("/")
    return f"{head}{slash}{name.partition(':')[0]}"
