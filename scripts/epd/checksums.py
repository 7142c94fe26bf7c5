"""`SHA256SUMS` of a folder, in the format of sha256sum(1), so that `sha256sum -c SHA256SUMS` checks it as well."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from epd.errors import StepError

FILE = "SHA256SUMS"
_BLOCK_BYTES = 1 << 20


def write(folder: Path) -> None:
    """Write the sums of all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    (folder / FILE).write_text("".join(f"{sha256(path)}  {path.relative_to(folder)}\n" for path in paths))


def check(folder: Path, *, on_file: Callable[[str], None] = lambda _: None) -> None:
    """Check every file that the sums name; `on_file` is told of each before it is read.

    Raises:
        StepError: the sums or a file are missing, or a file is not what it was.
    """
    path = folder / FILE
    if not path.is_file():
        raise StepError(
            f"no {FILE} in {folder}",
            expected="a folder that `make bundle` wrote, wholly copied",
            found="no such file",
            fix="name it: make load BUNDLE=<folder>",
        )
    wrong = []
    for line in path.read_text().splitlines():
        wanted, _, name = line.partition("  ")
        on_file(name)
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256(folder / name) != wanted:
            wrong.append(f"{name} has another sum")
    if wrong:
        raise StepError(
            "the bundle was damaged on its way",
            expected=f"every file as {path} lists it",
            found="; ".join(wrong),
            fix="copy it again (`rsync -c` copies only what differs), then `make load`",
        )


def sha256(path: Path) -> str:
    """Return the sum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
