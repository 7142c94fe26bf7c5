"""The virtual environment that lint and tests run in; `make up` needs none."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from epd import command, needs
from epd.errors import StepError
from epd.host import Distribution

LOCK = "tests/requirements.lock"
_PYTHON = (3, 11)
"""What the lock file is for; what runs on a host does with less."""
_STAMP = "lock.sha256"
_TIMEOUT_S = 1200.0


def program(root: Path, name: str) -> Path:
    """Return the path of a program in the virtual environment.

    Raises:
        StepError: it is not there.
    """
    path = root / ".venv" / "bin" / name
    if not path.exists():
        raise StepError(f"{name} is missing", expected=str(path), found="no such file", fix="make venv")
    return path


def provide(root: Path, distribution: Distribution, *, root_user: bool, no_install: bool) -> None:
    """Make `.venv` with exactly the packages of the lock file, unless it has them already.

    Raises:
        StepError: Python is too old, or cannot make virtual environments and its package may not be installed.
        CommandError: a download failed, or its hash is not the one in the lock file.
    """
    folder, lock = root / ".venv", root / LOCK
    wanted = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if sys.version_info < _PYTHON:
        raise StepError(
            "this Python is too old for lint and tests",
            expected="Python 3.11 or newer",
            found=f"Python {sys.version.split()[0]} ({sys.executable})",
            fix="name a newer one: make PYTHON=/path/to/python3.11 ...",
        )
    _require_venv(distribution, root_user=root_user, no_install=no_install)
    print(f"Making .venv from {LOCK} …", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    fix = "see what it says; a download that broke off is worth a second try"
    command.show(sys.executable, "-m", "venv", str(folder), timeout_s=_TIMEOUT_S, fix=fix)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command.show(*pip, "--require-hashes", "-r", str(lock), timeout_s=_TIMEOUT_S, fix=fix)
    stamp.write_text(wanted)


def _require_venv(distribution: Distribution, *, root_user: bool, no_install: bool) -> None:
    """Install python3-venv where the system's Python lacks it: Debian and Ubuntu split it off."""
    if command.probe(sys.executable, "-c", "import venv, ensurepip").ok:
        return
    if not os.path.realpath(sys.executable).startswith("/usr/bin/"):
        raise StepError(
            "this Python cannot make virtual environments",
            expected="the modules venv and ensurepip",
            found=f"{sys.executable} lacks them",
            fix="use another one: make PYTHON=/usr/bin/python3 …",
        )
    package = f"python3.{sys.version_info.minor}-venv"
    need = needs.Need(package, "makes the virtual environment of the tests", package)
    needs.provide([need], distribution, root=root_user, no_install=no_install, mirror="")
