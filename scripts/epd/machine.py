"""Looking at a machine: its files and what its programs say. Reads, changes nothing.

Everything goes through one root folder, so that tests show the same code a host that is not there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from epd import command

_FOLDERS = ("usr/local/bin", "usr/local/sbin", "usr/bin", "usr/sbin", "bin", "sbin")
PROGRAM_TIMEOUT_S = 20.0
"""npu-smi takes seconds on a busy host; one that hangs is a finding, not a reason to hang."""


@dataclass(frozen=True)
class Machine:
    """A file system and the programs in it."""

    root: Path = Path("/")

    def path(self, name: str) -> Path:
        """Return where an absolute path of the machine is."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Whether there is something at an absolute path."""
        return self.path(name).exists()

    def text(self, name: str) -> str:
        """Return a file's text; empty when it is missing or may not be read."""
        try:
            return self.path(name).read_text(errors="replace")
        except OSError:
            return ""

    def program(self, name: str) -> str:
        """Return the path of a program, absolute or by name; empty when the machine lacks it."""
        if "/" in name:
            return str(self.path(name)) if self.path(name).is_file() else ""
        found = shutil.which(name, path=":".join(str(self.root / folder) for folder in _FOLDERS))
        if not found and self.root == Path("/"):
            found = shutil.which(name, path=command.search_path())
        return found or ""

    def run(self, name: str, *arguments: str, timeout_s: float = PROGRAM_TIMEOUT_S) -> command.Result:
        """Run a program of the machine and return what it said; exit code 127 when the machine lacks it."""
        program = self.program(name)
        if not program:
            return command.Result(127, "", f"{name}: not found")
        return command.probe(program, *arguments, timeout_s=timeout_s)
