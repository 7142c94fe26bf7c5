"""What the user of our containers may read of this machine's files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

UID = 1000
"""The user and the group of our images."""


def find_unreadable(start: Path) -> Iterator[Path]:
    """Yield what the user of our containers may not read at or below `start`; hidden files and caches do not count.

    Folders above `start` do not matter: it is mounted by the engine, which is root.
    """
    if not may_read(start):
        yield start
        return
    for folder, folders, files in os.walk(start):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        names = [*folders, *sorted(name for name in files if not name.startswith("."))]
        yield from (path for path in (Path(folder, name) for name in names) if not may_read(path))


def may_read(path: Path) -> bool:
    """Whether the mode of a file or folder lets the user of our containers in; a broken link is not judged here."""
    try:
        found = path.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    wanted = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
    shift = 6 if found.st_uid == UID else 3 if found.st_gid == UID else 0
    return (found.st_mode >> shift) & wanted == wanted


def describe_mode(path: Path) -> str:
    """Say what a file's mode is."""
    try:
        return f"has mode {path.stat().st_mode & 0o7777:04o}"
    except OSError as error:
        return f"cannot even be looked at: {error.strerror}"
