"""The `.env` that plain `docker compose` reads: one block of ours in it, every other line the user's own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epd.errors import StepError

BEGIN = "# >>> ascend-epd: kept by `make up`; a line of your own outside this block wins, a deleted line is its default"
END = "# <<< ascend-epd"
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=(.*)$")
_PLAIN = re.compile(r"^[A-Za-z0-9_./:@%+,=-]*$")


@dataclass(frozen=True)
class Entry:
    """One variable of the managed block and the comment above it."""

    name: str
    value: str
    comment: str


@dataclass(frozen=True)
class Dotenv:
    """A `.env` taken apart."""

    own: Mapping[str, str]
    """What the user set outside the block; it wins, and an empty value there stands for the default."""
    managed: Mapping[str, str]
    """What the block held when it was read."""
    outside: str
    """The text outside the block."""


def parse(text: str) -> Dotenv:
    """Take the text of a `.env` apart.

    Raises:
        StepError: the block begins and does not end, so that where the user's lines go on cannot be told.
    """
    outside: list[str] = []
    inside: list[str] = []
    in_block = False
    for line in text.splitlines():
        if line.startswith("# >>> ascend-epd"):
            in_block = True
        elif line.startswith(END):
            in_block = False
        else:
            (inside if in_block else outside).append(line)
    if in_block:
        raise StepError(
            "cannot read .env",
            expected=f"the line {END!r} at the end of the block written by `make up`",
            found="a block that does not end",
            fix="put that line back, or delete the block (it is written anew)",
        )
    return Dotenv(own=_assignments(outside), managed=_assignments(inside), outside="\n".join(outside).strip("\n"))


def render(outside: str, entries: list[Entry]) -> str:
    """Return the text of a `.env`: the user's lines untouched, then our block."""
    block = [BEGIN]
    for entry in entries:
        block += [f"# {entry.comment}", f"{entry.name}={_quoted(entry.value)}"]
    block.append(END)
    head = f"{outside}\n\n" if outside else ""
    return head + "\n".join(block) + "\n"


def read(path: Path) -> Dotenv:
    """Read a `.env`; a missing one is empty."""
    return parse(path.read_text() if path.is_file() else "")


def write(path: Path, entries: list[Entry]) -> bool:
    """Renew our block, leaving out what the user sets outside of it; return whether the file changed.

    The file is replaced in one step: whoever reads it meanwhile sees the old or the new one, never half of it.
    """
    before = read(path)
    text = render(before.outside, [entry for entry in entries if not before.own.get(entry.name)])
    return _replace(path, text)


def remove_block(path: Path) -> bool:
    """Take our block out, and the file too if nothing else is in it; return whether there was one."""
    if not path.is_file():
        return False
    outside = read(path).outside
    if outside:
        return _replace(path, outside + "\n")
    path.unlink()
    return True


def _replace(path: Path, text: str) -> bool:
    if path.is_file() and path.read_text() == text:
        return False
    mode = path.stat().st_mode & 0o777 if path.is_file() else 0o644
    handle, name = tempfile.mkstemp(prefix=".env.", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(name).chmod(mode)
    Path(name).replace(path)
    return True


def _assignments(lines: list[str]) -> dict[str, str]:
    values = {}
    for line in lines:
        match = _ASSIGNMENT.match(line)
        if match:
            values[match[1]] = _unquoted(match[2].strip())
    return values


def _quoted(value: str) -> str:
    """Quote a value where Compose would otherwise read a blank, a `$` or a `#` in it as its own syntax."""
    if _PLAIN.match(value):
        return value
    if "'" in value or "\n" in value:
        raise StepError(
            "a value cannot be written to .env",
            expected="no single quote and no line break in it",
            found=repr(value),
            fix="use another path or name",
        )
    return f"'{value}'"


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] in "'\"":
        end = value.find(value[0], 1)
        return value[1:end] if end > 0 else value
    return value.split(" #", 1)[0].rstrip()
