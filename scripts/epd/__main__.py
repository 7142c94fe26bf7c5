"""The command line behind the Makefile: `python3 -m epd <command>`, with `scripts` on PYTHONPATH."""

from __future__ import annotations

import sys

MINIMUM_PYTHON = (3, 9)

if sys.version_info < MINIMUM_PYTHON:  # before anything is imported that an older Python cannot read
    sys.exit(
        "FAIL: this Python is too old\n  expected: Python 3.9 or newer\n"
        f"  found:    Python {sys.version.split()[0]} ({sys.executable})\n"
        "  fix:      name a newer one: make PYTHON=/path/to/python3.9 ..."
    )

from epd.cli import main  # noqa: E402 (only once the version is known to do)

sys.exit(main(sys.argv[1:]))
