"""`MODEL=`, what to serve: the variables it stands for, and whether containers can read the folder."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from epd.errors import StepError

MODEL_MOUNT = "/models"
"""Where the containers see the folder or volume EPD_MODELS."""
VARIABLES = ("EPD_MODEL", "EPD_MODELS", "EPD_SERVED_MODEL_NAME", "HF_HUB_OFFLINE")
"""What MODEL stands for."""
CONTAINER_UID = 1000
"""The user of our images."""
_TINY = "tiny"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def variables(wanted: str, root: Path) -> dict[str, str]:
    """Return the variables for `MODEL=`: a folder, a hub id, or `tiny`.

    Raises:
        StepError: it is none of these, or containers cannot read the folder.
    """
    if wanted == _TINY:
        return {}
    folder = Path(wanted).expanduser()
    folder = Path(os.path.realpath(folder if folder.is_absolute() else root / folder))
    if os.path.isdir(folder):  # Path.is_dir would raise where a folder above may not be entered
        _check_folder(folder)
        return {"EPD_MODEL": MODEL_MOUNT, "EPD_MODELS": str(folder), "EPD_SERVED_MODEL_NAME": folder.name}
    if _HUB_ID.match(wanted):
        return {"EPD_MODEL": wanted, "EPD_SERVED_MODEL_NAME": wanted, "HF_HUB_OFFLINE": "0"}
    raise StepError(
        "MODEL is not usable",
        expected=f"an existing folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or {_TINY!r}",
        found=f"MODEL={wanted}",
        fix="correct it, or leave MODEL out to serve the tiny model",
    )


def find_unreadable(start: Path) -> Iterator[Path]:
    """Yield what the user of our containers may not read at or below `start`; hidden files do not count.

    Folders above `start` do not matter: it is mounted by the engine, which is root.
    """
    if not _readable(start):
        yield start
        return
    for folder, folders, files in os.walk(start):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [*folders, *sorted(name for name in files if not name.startswith("."))]
        for path in (Path(folder, name) for name in names):
            if not _readable(path):
                yield path


def _readable(path: Path) -> bool:
    """Whether the mode of a file or folder lets the user of our containers in; a broken link is not judged here."""
    try:
        found = path.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    wanted = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
    shift = 6 if found.st_uid == CONTAINER_UID else 3 if found.st_gid == CONTAINER_UID else 0
    return (found.st_mode >> shift) & wanted == wanted


def _check_folder(folder: Path) -> None:
    """Check that a folder can be served when nothing but itself is mounted."""
    unreadable = next(find_unreadable(folder), None)
    if unreadable:
        raise StepError(
            "MODEL cannot be read by the containers",
            expected=f"files that uid {CONTAINER_UID}, the user in the containers, may read",
            found=f"{unreadable} has mode {_mode(unreadable)}",
            fix=f"chmod -R o+rX '{folder}'",
        )
    outside = [path for path in folder.iterdir() if not path.resolve().is_relative_to(folder)]
    if outside:
        raise StepError(
            "MODEL cannot be mounted",
            expected="a folder that holds its files itself",
            found=f"{outside[0].name} is a link to {outside[0].resolve()}",
            fix=f"copy the files once, `cp -rL {folder} <new folder>`, and name that",
        )
    if not (folder / "config.json").is_file():
        raise StepError(
            "MODEL is not a model",
            expected="a folder with a config.json in it",
            found=f"{folder} has none",
            fix="name the folder of a Hugging Face model (the one with config.json and *.safetensors)",
        )


def _mode(path: Path) -> str:
    try:
        return f"{path.stat().st_mode & 0o7777:04o}"
    except PermissionError:
        return "that hides it even from you"
