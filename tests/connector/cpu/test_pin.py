"""The adapter refuses a vllm-ascend it was not written against, and says what to do."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from epd_connector.cpu import pin

VERSIONS_ENV = Path(__file__).parents[3] / "docker" / "versions.env"


def found(version: str) -> Callable[[str], str]:
    return lambda distribution: {"vllm-ascend": version}[distribution]


def missing(distribution: str) -> str:
    raise PackageNotFoundError(distribution)


def test_the_pin_is_the_version_that_the_images_install() -> None:
    versions = dict(line.split("=", 1) for line in VERSIONS_ENV.read_text().splitlines() if line and line[0] != "#")
    assert versions["VLLM_ASCEND_VERSION"] == pin.PINNED_VLLM_ASCEND


def test_the_pinned_version_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin, "version", found(pin.PINNED_VLLM_ASCEND))
    pin.require_pinned_vllm_ascend()


@pytest.mark.parametrize("other", ["0.22.0", "0.23.0.post1", "0.23.1", "0.24.0rc1"])
def test_any_other_version_is_refused_with_the_command_that_fixes_it(
    monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr(pin, "version", found(other))
    with pytest.raises(ImportError) as refusal:
        pin.require_pinned_vllm_ascend()
    assert f"expected vllm-ascend {pin.PINNED_VLLM_ASCEND}, found {other}." in str(refusal.value)
    assert f"pip install --no-deps vllm-ascend=={pin.PINNED_VLLM_ASCEND}" in str(refusal.value)


def test_a_missing_vllm_ascend_is_refused_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin, "version", missing)
    with pytest.raises(ImportError, match="found none"):
        pin.require_pinned_vllm_ascend()
