"""The check at the end of the Ascend image's build, over folders that are as installed packages are."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "docker" / "ascend" / "check.py"
VERSIONS = {
    "VLLM_VERSION": "0.23.0",
    "VLLM_ASCEND_VERSION": "0.23.0",
    "TORCH_NPU_VERSION": "2.10.0.post4",
    "TRITON_ASCEND_VERSION": "3.2.2",
    "MOONCAKE_NPU_VERSION": "0.3.11.post1",
}
INSTALLED = {
    "vllm": "0.23.0+empty",
    "vllm_ascend": "0.23.0",
    "torch_npu": "2.10.0.post4",
    "triton_ascend": "3.2.2",
    "mooncake_transfer_engine_npu": "0.3.11.post1",
    "epd_connector": "0.1.0",
    "xxhash": "3.7.0",
}


def check(folder, installed):
    for name, version in installed.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        needs = "Requires-Dist: xxhash>=3.4\n" if name == "epd_connector" else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    versions = folder / "versions.env"
    versions.write_text("# a comment\n" + "".join(f"{name}={value}\n" for name, value in VERSIONS.items()))
    # The folder comes first on the path, so that what the machine itself has does not count; -S leaves that out.
    packaging = Path(__import__("packaging").__file__).parents[1]
    link = folder / "packaging"
    link.symlink_to(packaging / "packaging")
    return subprocess.run(
        [sys.executable, "-S", str(CHECK), str(versions)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_an_image_of_the_right_versions_passes(tmp_path):
    done = check(tmp_path, INSTALLED)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vllm": "0.22.0"}, "vllm: expected 0.23.0 (VLLM_VERSION), found 0.22.0"),
        ({"mooncake_transfer_engine_npu": None}, "mooncake-transfer-engine-npu: expected 0.3.11.post1"),
        ({"xxhash": "3.0.0"}, "xxhash: expected >=3.4 (epd-connector), found 3.0.0"),
        ({"triton": "3.6.0"}, "triton: expected none"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(change, message, tmp_path):
    done = check(tmp_path, {name: version for name, version in (INSTALLED | change).items() if version})
    assert done.returncode == 1
    assert f"FAIL: {message}" in done.stderr
    assert "fix:" in done.stderr
