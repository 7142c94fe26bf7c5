"""Check that the image has the versions of versions.env and what the connector needs. Imports nothing of CANN.

python check.py VERSIONS_ENV
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PACKAGES = {
    "vllm": "VLLM_VERSION",
    "vllm-ascend": "VLLM_ASCEND_VERSION",
    "torch-npu": "TORCH_NPU_VERSION",
    "triton-ascend": "TRITON_ASCEND_VERSION",
    "mooncake-transfer-engine-npu": "MOONCAKE_NPU_VERSION",
}


def find_faults(versions: Mapping[str, str]) -> list[str]:
    """Return what is missing or of another version; a local version (`+empty`, `+cpu`) does not count."""
    found = []
    for package, name in PACKAGES.items():
        have = installed(package)
        if not have or Version(have).public != Version(versions[name]).public:
            found.append(f"{package}: expected {versions[name]} ({name}), found {have or 'none'}")
    for text in metadata.requires("epd-connector") or []:
        wanted = Requirement(text)
        have = installed(wanted.name)
        if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and have not in wanted.specifier:
            found.append(f"{wanted.name}: expected {wanted.specifier} (epd-connector), found {have or 'none'}")
    if installed("triton"):
        found.append("triton: expected none, it takes the place of triton-ascend's module; found a version for CUDA")
    return found


def installed(package: str) -> str:
    """Return the version of a package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main(path: str) -> int:
    """Print the faults; return the exit code."""
    lines = [line.partition("=") for line in Path(path).read_text().splitlines() if not line.startswith("#")]
    faults = find_faults({name: value for name, _, value in lines})
    for fault in faults:
        print(f"FAIL: {fault}", file=sys.stderr)
    if faults:
        print("  fix: a base image of the versions in docker/versions.env, or those versions there", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
