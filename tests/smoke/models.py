"""Variants of the tiny model, made in the image that serves."""

from __future__ import annotations

import os
import shutil
import subprocess

from epd import versions
from smoke.client import MODEL
from smoke.stack import ROOT

VERSION = versions.load(ROOT / "docker" / "versions.env")["EPD_VERSION"]


def make_model(name: str, *options: str) -> dict[str, str]:
    """Make a variant by `options` of scripts/tiny_model.py; return the settings that have a stack serve it.

    It goes under the tiny model's name.
    """
    folder = ROOT / "build" / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    image = os.environ.get("EPD_IMAGE", f"ascend-epd-cpu:{VERSION}")
    words = ["docker", "run", "--rm", f"--user={os.getuid()}:{os.getgid()}", f"--volume={folder}:/out"]
    words += [f"--volume={ROOT / 'scripts' / 'tiny_model.py'}:/tiny_model.py:ro", "--entrypoint=python", image]
    words += ["/tiny_model.py", "--out", "/out", *options]
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    folder.chmod(0o755)
    return {"EPD_MODELS": str(folder), "EPD_MODEL": "/models", "EPD_SERVED_MODEL_NAME": MODEL}
