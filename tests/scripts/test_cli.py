"""The commands as a person runs them, through make."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epd import cli, command, images, settings
from epd.errors import StepError
from epd_serve.hardware import HARDWARE

ROOT = Path(__file__).resolve().parents[2]


# A host that has all, with an image registry of its own; each build writes down which registry it was told.
DOCKER = """case "$*" in
  --version|version*|"compose version"*|"buildx version"*) echo 29.1.2;;
  info*) echo id;;
  *bake*--print*) printf '{"target": {'; for n in cpu cpu-test proxy proxy-test; do
    printf '"%s": {"tags": ["%sascend-epd-%s:1"]}, ' $n "$REGISTRY" $n; done; for n in cpu-compat cpu-compat-test; do
    printf '"%s": {"tags": ["%sascend-epd-%s:%s"]}, ' $n "$REGISTRY" $n $COMPAT_VLLM_VERSION; done
    echo '"x": {"tags": ["x"]}}}';;
  "image inspect"*debian*) echo id;;
  "image inspect"*) exit 1;;
  *bake*) echo "built for $REGISTRY" >> "$(dirname "$0")/calls.txt";;
esac"""
BLOCK = """# >>> ascend-epd: kept
COMPOSE_PROJECT_NAME=ascend-epd
COMPOSE_FILE=compose/1e1pd.yaml
EPD_IMAGE=r.example/ascend-epd-cpu:0.0.9
EPD_PROXY_IMAGE=r.example/ascend-epd-proxy:0.0.9
EPD_PROXY_PORT=8000
EPD_PULL=1
REGISTRY=r.example/
# <<< ascend-epd
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what `make` needs, for commands that change the project's folder."""
    for name in ("REGISTRY", "EPD_PULL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("scripts", "compose", "docker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def make(*words, cwd=ROOT):
    done = subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=60,
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


def test_clean_removes_what_make_up_made_also_under_earlier_names(programs, checkout):
    programs.add("docker", DOCKER.replace('"image inspect"*) exit 1', '"image inspect"*) echo id'))
    (checkout / ".env").write_text(f"MY_LINE=1\n{BLOCK}")
    (checkout / "build").mkdir()
    (checkout / "build" / "images.log").touch()
    code, text = make("clean", cwd=checkout)
    assert code == 0, text
    assert "docker compose down --remove-orphans --timeout 30 --volumes" in programs.calls
    (removed,) = [call.split() for call in programs.calls if call.startswith("docker image rm")]
    assert {"r.example/ascend-epd-cpu:0.0.9", "r.example/ascend-epd-proxy:0.0.9"} <= set(removed)
    assert {"r.example/ascend-epd-cpu:1", "r.example/ascend-epd-cpu-test:1"} <= set(removed)
    assert {"r.example/ascend-epd-proxy:1", "r.example/ascend-epd-proxy-test:1"} <= set(removed)
    assert {f"r.example/ascend-epd-cpu-compat:{vllm}" for vllm in images.compat_versions(ROOT)} <= set(removed)
    assert "docker image prune --force --filter label=org.ascend-epd.inputs" in programs.calls
    assert not (checkout / "build").exists()
    assert (checkout / ".env").read_text() == "MY_LINE=1\n"


def test_build_builds_under_the_remembered_registry_and_removes_what_it_replaced(programs, checkout):
    programs.add("docker", DOCKER)
    (checkout / ".env").write_text(BLOCK)
    code, text = make("build", cwd=checkout)
    assert code == 0, text
    built = programs.calls.index("built for r.example/")
    assert programs.calls[built + 1] == "docker image prune --force --filter label=org.ascend-epd.inputs"
    assert not any(call.startswith("docker pull") for call in programs.calls)


PYTEST = """#!/bin/sh
echo "EPD_IMAGE=$EPD_IMAGE EPD_PROXY_IMAGE=$EPD_PROXY_IMAGE pytest $*" >> "{calls}"
"""


@pytest.mark.parametrize(("vllm", "tag"), [("0.18.0", "cpu-compat:0.18.0"), ("0.23.0", "cpu:1")])
def test_another_vllm_has_to_pass_the_contract_and_the_live_tests(programs, checkout, vllm, tag):
    programs.add("docker", DOCKER)
    pytest_ = checkout / ".venv" / "bin" / "pytest"
    pytest_.parent.mkdir(parents=True)
    pytest_.write_text(PYTEST.format(calls=programs.calls_file))
    pytest_.chmod(0o755)
    checkout.chmod(0o755)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    words = ("--old-file=venv", "test-compat", f"VLLM={vllm}", "PYTEST_ARGS=-x")
    code, text = make(*words, cwd=checkout)
    assert code == 0, text
    contract, live = programs.calls[-2:]
    assert contract.endswith(
        f" ascend-epd-{tag.replace(':', '-test:')} -p no:cacheprovider tests/connector/test_contract.py"
    )
    assert live == f"EPD_IMAGE=ascend-epd-{tag} EPD_PROXY_IMAGE=ascend-epd-proxy:1 pytest tests/smoke/test_1e1pd.py -x"


@pytest.mark.parametrize("asked", ["", "0.17.3"])
def test_a_vllm_that_there_is_no_image_of_is_refused_with_those_that_there_are(asked):
    code, text = make("--old-file=venv", "test-compat", f"VLLM={asked}")
    assert code != 0
    assert "0.14.1, 0.18.0, 0.32.0, 0.23.0" in text
    assert "fix:" in text
    assert "Traceback" not in text


def test_a_typo_is_told_and_does_not_stop_anything(programs, checkout):
    programs.add("docker", DOCKER)
    (checkout / ".env").write_text(f"EPD_PROXI_PORT=9000\n{BLOCK}")
    code, text = make("down", cwd=checkout)
    assert code == 0, text
    assert "Warning: EPD_PROXI_PORT (in .env) is not a setting; did you mean EPD_PROXY_PORT?" in text


def test_a_stack_can_be_stopped_whatever_is_wrong_with_the_settings(programs, checkout):
    programs.add("docker", DOCKER)
    (checkout / ".env").write_text(f"MODEL=/no/such/folder\nEPD_MEMORY_LIMIT=much\n{BLOCK}")
    assert make("down", cwd=checkout)[0] == 0
    code, text = make("plan", cwd=checkout)
    assert code != 0
    assert "MODEL is not usable" in text


def test_on_npus_a_start_is_waited_for_longer_than_vllm_waits_for_its_engine(tmp_path):
    usual, chosen = settings.load(tmp_path, {}), settings.load(tmp_path, {"EPD_UP_TIMEOUT_S": "60"})
    for profile in ("a2", "a3", "a5"):
        engine_s = float(HARDWARE[profile].environment["VLLM_ENGINE_READY_TIMEOUT_S"])
        assert cli.up_timeout_s(usual, profile) > engine_s > cli.up_timeout_s(usual, "cpu")
        assert cli.up_timeout_s(chosen, profile) == 60


def test_a_program_that_is_missing_is_a_clear_error():
    with pytest.raises(StepError, match=r"no-such-program is missing[\s\S]*install it"):
        command.attach("no-such-program", fix="install it")
    assert command.attach("sh", "-c", "exit 3", fix="") == 3


@pytest.mark.parametrize(("name", "mode"), [(".", 0o700), ("tests", 0o700), ("tests/test_x.py", 0o600)])
def test_a_checkout_that_containers_cannot_read_is_refused_with_the_way_to_open_it(tmp_path, name, mode):
    tmp_path.chmod(0o755)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").touch()
    for path in (tmp_path / "tests", tmp_path / "tests" / "test_x.py"):
        path.chmod(0o755)
    cli.require_readable_checkout(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(StepError, match="the test container cannot read this folder") as caught:
        cli.require_readable_checkout(tmp_path)
    assert f"{tmp_path / name} has mode {mode:04o}" in caught.value.found
    subprocess.run(["sh", "-c", caught.value.fix], check=True)
    cli.require_readable_checkout(tmp_path)
