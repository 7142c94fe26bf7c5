"""Write docs/proxy-settings.md from what `epd-proxy --help` says: `make docs`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "proxy-settings.md"
_OPTION = re.compile(
    r"^  (--(?!version)[a-z0-9-]+) [^\n]*?\s{2,}(.*?) \[(EPD_PROXY_[A-Z0-9_]+); default: (.*?)\]$",
    re.MULTILINE | re.DOTALL,
)
_HEAD = """\
# Settings of the proxy

Written by `make docs` from `epd-proxy --help`: change the text there. A flag beats its variable, and that the default.
Sizes in MiB and times in seconds say so in their names. Those that compose hands to the container are listed in
`compose/services.yaml`.

| flag | variable | default | meaning |
| --- | --- | --- | --- |
"""


def render() -> str:
    """Return the document's text."""
    environment = {**os.environ, "COLUMNS": "100000", "PYTHONPATH": str(ROOT / "proxy" / "src")}
    argv = [sys.executable, "-m", "epd_proxy", "--help"]
    text = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
    rows = []
    for flag, told, variable, default in _OPTION.findall(text):
        meaning = " ".join(told.split()).replace("|", "\\|")
        rows.append(f"| `{flag}` | `{variable}` | {'none' if default == 'none' else f'`{default}`'} | {meaning} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    TARGET.write_text(render())
