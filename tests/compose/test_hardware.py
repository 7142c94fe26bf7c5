"""The hardware profiles, role by role, as Compose reads them. Nothing here needs or proves an NPU."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("encode", "prefill-decode", "prefill", "decode", "monolith")
NPUS = ("a2", "a3", "a5")
TRANSFER = {"a2": {"/etc/hccn.conf"}, "a3": {"/etc/hccn.conf"}, "a5": {"/etc/hccl_rootinfo.json", "/etc/hixlep"}}


def run(folder, hardware, role, **environ):
    file = folder / "role.yaml"
    services = ROOT / "compose" / "services.yaml"
    file.write_text(
        f"services:\n  role:\n    extends: {{file: {services}, service: {role}}}\n"
        "    devices: [/dev/davinci3]\nvolumes:\n  models:\n  cache:\n  ec:\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_", "HF_"))}
    return subprocess.run(
        ["docker", "compose", "--env-file", "/dev/null", "-f", str(file), "config"],
        env=clean | {"EPD_HARDWARE": hardware} | environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def service(folder, hardware, role, **environ):
    done = run(folder, hardware, role, EPD_PLANNED="1", **environ)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]["role"]


@pytest.mark.parametrize("hardware", NPUS)
@pytest.mark.parametrize("role", ROLES)
def test_every_role_on_an_npu_has_the_host_network_and_shared_memory(hardware, role, tmp_path):
    found = service(tmp_path, hardware, role)
    assert found["network_mode"] == "host"
    assert int(found["shm_size"]) >= 16 << 30
    assert int(found["mem_limit"]) > int(found["shm_size"])
    assert found["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    assert found["environment"]["https_proxy"] == ""
    assert (found["cap_drop"], found["read_only"]) == (["ALL"], True)


@pytest.mark.parametrize("hardware", NPUS)
@pytest.mark.parametrize("role", ROLES)
def test_the_driver_is_mounted_read_only_and_never_made_up(hardware, role, tmp_path):
    binds = [volume for volume in service(tmp_path, hardware, role)["volumes"] if volume["type"] == "bind"]
    assert all(bind["read_only"] for bind in binds)
    assert not any(bind["bind"].get("create_host_path") for bind in binds)
    targets = {bind["target"] for bind in binds}
    assert {"/usr/local/bin/npu-smi", "/usr/local/dcmi", "/etc/ascend_install.info"} <= targets
    assert any(target.startswith("/usr/local/Ascend/driver") for target in targets)
    assert (TRANSFER[hardware] <= targets) == (role in ("prefill", "decode"))


@pytest.mark.parametrize("hardware", NPUS)
def test_devices_are_the_manager_nodes_and_those_the_plan_adds(hardware, tmp_path):
    found = service(tmp_path, hardware, "encode")
    devices = {device["source"] for device in found["devices"]}
    assert {"/dev/davinci_manager", "/dev/hisi_hdc", "/dev/davinci3"} <= devices
    assert ("/dev/devmm_svm" in devices) == (hardware != "a5")
    assert found.get("privileged", False) == (hardware == "a5")


def test_a_driver_elsewhere_is_mounted_where_the_image_looks_for_it(tmp_path):
    found = service(
        tmp_path, "a2", "prefill", EPD_ASCEND_DRIVER="/opt/hw/driver", EPD_NPU_SMI="/usr/local/sbin/npu-smi"
    )
    mounts = {volume["target"]: volume["source"] for volume in found["volumes"]}
    assert mounts["/usr/local/Ascend/driver/lib64"] == "/opt/hw/driver/lib64"
    assert mounts["/usr/local/bin/npu-smi"] == "/usr/local/sbin/npu-smi"


@pytest.mark.parametrize("hardware", NPUS)
def test_without_a_plan_compose_refuses_and_says_what_to_do(hardware, tmp_path):
    done = run(tmp_path, hardware, "encode")
    assert done.returncode != 0
    assert "make plan" in done.stderr
