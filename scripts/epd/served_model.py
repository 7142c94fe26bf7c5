"""`MODEL=`, what to serve: the variables it stands for, and whether containers can read the folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from epd import container_user
from epd.errors import StepError

MODEL_MOUNT = "/models"
"""Where the containers see the folder or volume EPD_MODELS."""
VARIABLES = ("EPD_MODEL", "EPD_MODELS", "EPD_SERVED_MODEL_NAME", "HF_HUB_OFFLINE")
"""What MODEL stands for."""
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


def _check_folder(folder: Path) -> None:
    """Check that a folder can be served when nothing but itself is mounted."""
    unreadable = next(container_user.find_unreadable(folder), None)
    if unreadable:
        raise StepError(
            "MODEL cannot be read by the containers",
            expected=f"files that uid {container_user.UID}, the user in the containers, may read",
            found=f"{unreadable} {container_user.describe_mode(unreadable)}",
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
