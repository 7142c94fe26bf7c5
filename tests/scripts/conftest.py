"""Fake programs at the process boundary: real executables, first on the PATH, that write down how they were called."""

import os
import stat
import sys
from pathlib import Path

import pytest

SYSTEM_TOOLS = ("/usr/bin", "/bin")


class Programs:
    """A folder of fake executables."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls_file = folder / "calls.txt"

    def add(self, name, body="exit 0"):
        """Add a program whose shell body runs after the call was written down."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.calls_file}"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def add_python(self, name, body):
        """Add a program written in Python."""
        path = self.folder / name
        path.write_text(f"#!{sys.executable}\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self):
        """Every call so far, in order."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Fake programs in front of the system's; `docker` and `apt-get` fail unless a test adds its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), *SYSTEM_TOOLS]))
    fakes = Programs(folder)
    for name in ("docker", "dockerd", "apt-get", "systemctl", "debootstrap"):
        fakes.add(name, f'echo "{name}: not expected in this test" >&2; exit 99')
    return fakes
