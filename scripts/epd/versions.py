"""`docker/versions.env`, the only place versions live, and how two versions compare."""

from __future__ import annotations

import re
from pathlib import Path

from epd.errors import StepError

_LINE = re.compile(r"^([A-Z][A-Z0-9_]*)=(\S+)$")


def load(path: Path) -> dict[str, str]:
    """Read `versions.env`: one `NAME=value` per line, comments with `#`.

    Raises:
        StepError: the file is missing or a line is not of that form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise StepError(
            f"cannot read {path}",
            expected="the file with all versions",
            found=str(error),
            fix="git checkout docker/versions.env",
        ) from error
    versions = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise StepError(
                f"{path}, line {number}",
                expected="NAME=value without spaces or quotes",
                found=repr(line),
                fix="correct that line",
            )
        versions[match[1]] = match[2]
    return versions


def parse(text: str) -> tuple[int, ...]:
    """Return the first dotted number in `text` ("Docker Compose version v2.26.1-4" gives (2, 26, 1)); () if none."""
    match = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def at_least(found: str, minimum: str) -> bool:
    """Whether the version in `found` is `minimum` or newer; a text without a version is not."""
    have, want = parse(found), parse(minimum)
    length = max(len(have), len(want))
    return bool(have) and _padded(have, length) >= _padded(want, length)


def _padded(version: tuple[int, ...], length: int) -> tuple[int, ...]:
    return version + (0,) * (length - len(version))
