"""The Ascend Dockerfile, built for real on a stand-in for CANN's image: every instruction that runs without CANN.

Not shown here: that CANN's and the vendor's image are as the stand-in, that kernels compile (A3, A5), that anything
runs on an NPU. `make check-ascend-image` runs this.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN, CANN, VENDOR_BASE, VENDOR = (f"ascend-epd-check-{name}" for name in ("base", "cann", "vendor-base", "vendor"))
INDEX = "file:///opt/stand-in/index"
VERSIONS = dict(
    line.split("=", 1)
    for line in (ROOT / "docker" / "versions.env").read_text().splitlines()
    if line and not line.startswith("#")
)


def docker(*words, **environ):
    done = subprocess.run(
        ["docker", *words],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, f"docker {' '.join(words)}:\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout


def bake(tag, serving, base, chip="ascend910b1", stage="", **environ):
    """Build the target a2 with another base and name than the bake file says."""
    sets = [f"a2.args.SERVING_IMAGE={base}", f"a2.tags={tag}", f"a2.args.SOC_VERSION={chip}", f"a2.target={stage}"]
    words = [word for value in sets for word in ("--set", value)]
    docker(
        "buildx", "bake", "-f", "docker/docker-bake.hcl", "--load", "--progress=plain", *words, "a2",
        **VERSIONS, EPD_ASCEND_SERVING=serving, EPD_INPUTS="check", **environ,
    )  # fmt: skip
    return tag


@pytest.fixture(scope="module")
def base():
    """The stand-in, and the archive of Debian that its own base takes packages from."""
    origin = os.environ["CHECK_BASE_IMAGE"]
    docker("build", "--tag", STAND_IN, "--build-arg", f"BASE_IMAGE={origin}", "tests/images/stand_in")
    sources = docker("run", "--rm", origin, "sh", "-c", "cat /etc/apt/sources.list /etc/apt/sources.list.d/* || true")
    archive = next(word for word in sources.split() if word.startswith("http"))
    yield archive.rstrip("/")
    docker("image", "rm", "--force", STAND_IN)


@pytest.fixture(scope="module")
def cann(base):
    yield bake(CANN, "cann", STAND_IN, TORCH_INDEX_URL=INDEX, ASCEND_INDEX_URL=INDEX, EPD_OS_MIRROR_URL=base)
    docker("image", "rm", "--force", CANN)


@pytest.fixture(scope="module")
def vendor(base):
    """What the stage `cann` makes has what the vendor's image has, so it stands in for that one."""
    environ = {"TORCH_INDEX_URL": INDEX, "ASCEND_INDEX_URL": INDEX, "EPD_OS_MIRROR_URL": base}
    yield bake(VENDOR, "vendor", bake(VENDOR_BASE, "cann", STAND_IN, stage="cann", **environ))
    docker("image", "rm", "--force", VENDOR, VENDOR_BASE)


def run(image, *words, options=()):
    return docker("run", "--rm", *options, image, *words)


def test_without_huawei_s_index_the_build_says_what_to_do(cann, base):
    with pytest.raises(AssertionError, match="expected: ASCEND_INDEX_URL, the address of Huawei's package index"):
        bake("none", "cann", STAND_IN, chip="no-index", TORCH_INDEX_URL=INDEX, EPD_OS_MIRROR_URL=base)


def test_for_another_chip_kernels_are_compiled_as_far_as_that_goes_without_cann(cann, base):
    environ = {"TORCH_INDEX_URL": INDEX, "ASCEND_INDEX_URL": INDEX, "EPD_OS_MIRROR_URL": base}
    with pytest.raises(AssertionError, match=r"building custom ops .* for ascend910_9391[\s\S]*toolkit package"):
        bake("none", "cann", STAND_IN, chip="ascend910_9391", **environ)


def test_the_image_has_the_versions_of_versions_env_and_vllm_for_no_device(cann):
    names = ("vllm", "vllm-ascend", "torch", "epd-connector")
    text = f"from importlib.metadata import version; print(*map(version, {names}))"
    found = run(cann, "-c", text, options=("--entrypoint", "python")).split()
    assert found == ["0.23.0+empty", "0.23.0", "2.10.0+cpu", "0.1.0"]


@pytest.mark.parametrize("variant", ["cann", "vendor"])
def test_roles_start_in_the_environment_of_cann(variant, request, tmp_path):
    image = request.getfixturevalue(variant)
    environ = {"EPD_HARDWARE": "a2", "EPD_MODEL": "org/model", "EPD_ADVERTISE_HOST": "10.0.0.7"}
    options = [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
    words = run(image, "--print", "prefill", options=options)
    assert "MooncakeLayerwiseConnector" in words
    assert "OMP_NUM_THREADS=10 " in words
    spy = tmp_path / "epd-serve"
    spy.write_text("#!/bin/sh\nenv\necho role=$1\n")
    spy.chmod(0o755)
    options = [f"--volume={spy}:/usr/local/bin/epd-serve:ro", "--env=EPD_JEMALLOC=1"]
    lines = run(image, "encode", options=options).splitlines()
    assert "STAND_IN_SOURCED=ascend-toolkit/set_env.sh nnal/atb/set_env.sh " in lines
    assert "role=encode" in lines
    assert any(line.startswith("LD_PRELOAD=/") and line.endswith("libjemalloc.so.2") for line in lines)
    assert any(line.startswith("LD_LIBRARY_PATH=") and line.endswith(":/usr/local/lib") for line in lines)


def test_the_proxy_works_by_itself_and_uid_1000_has_a_name(vendor):
    assert "--prefill-decode" in run(vendor, "--help", options=("--entrypoint", "epd-proxy"))
    assert run(vendor, "-un", options=("--user=1000:1000", "--entrypoint=id")).strip() == "HwHiAiUser"
    assert "no role was started" in docker_failing("run", "--rm", "--user=1000:1000", "--read-only", vendor, "health")


def docker_failing(*words):
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_labels_tell_what_is_in_the_image_and_no_address_of_a_mirror_is_kept(cann):
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", cann))
    assert labels["org.ascend-epd.hardware"] == "a2"
    assert labels["org.ascend-epd.cann"] == VERSIONS["CANN_VERSION"]
    assert labels["org.ascend-epd.mooncake"] == VERSIONS["MOONCAKE_NPU_VERSION"]
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", cann)
    assert "epd-entrypoint" in history
    assert INDEX not in history
    sources = run(cann, "/etc/apt/sources.list", options=("--entrypoint", "cat"))
    assert "archive.invalid" in sources
