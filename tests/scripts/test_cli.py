"""The commands as a person runs them, through make."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from epd import cli

ROOT = Path(__file__).resolve().parents[2]


def make(*words, **environ):
    done = subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_help_is_the_default_and_lists_every_target():
    code, text = make()
    assert code == 0
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    for target in targets:
        assert f"make {target}" in text


def test_every_command_that_the_makefile_calls_exists():
    called = re.findall(r"\$\(EPD\) ([a-z-]+)", (ROOT / "Makefile").read_text())
    assert set(called) <= set(cli.COMMANDS)
    assert set(cli.COMMANDS) <= set(called)


def test_a_value_that_cannot_be_ends_in_one_clear_error():
    code, text = make("up", "EPD_PROXY_PORT=99999")
    assert code != 0
    assert "expected: a number from 1 to 65535" in text
    assert "fix:" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("path", [".ci/run", *[str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*.sh")]])
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)
