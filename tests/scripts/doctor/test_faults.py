"""The fault matrix: no alarm on a healthy host, and each thing that goes wrong in the field is found and named.

Hosts are folders (tests/fakes/npu_hosts.py); Compose is the real one. Nothing here proves that an NPU works.
"""

import json
import shutil
import socket
from dataclasses import replace

import pytest

from epd import preflight, settings
from epd.doctor import engine, ports, report
from epd.doctor.finding import Status
from epd.doctor.subject import Subject
from epd.machine import Machine
from fakes.doctor import (
    NPUS,
    VERSIONS,
    broken_npu_smi,
    environ,
    fake,
    hccn,
    listener,
    own_compose_file,
    remove,
    someone_elses_container,
    write,
)
from fakes.models import QWEN25_VL_7B


@pytest.mark.parametrize("hardware", [*NPUS, "cpu"])
@pytest.mark.parametrize("topology", ["1e1pd", "1e1p1d"])
def test_no_alarm_on_a_healthy_host(hardware, topology, case):
    it = case(hardware)
    it.environ["TOPOLOGY"] = topology
    found = it.examine()
    assert [finding for finding in found if finding.status is not Status.PASS] == []
    names = {finding.name for finding in found}
    assert {"engine.docker", "engine.compose", "engine.disk", "ports.free", "host.memory"} <= names
    if hardware != "cpu":
        assert {"driver.nodes", "driver.version", "driver.soc", "cards.free", "containers.cards"} <= names
    assert ("network.hccn-conf" in names) == (topology == "1e1p1d" and hardware in ("a2", "a3"))


@pytest.mark.parametrize("hardware", NPUS)
def test_a_plan_that_cannot_be_is_the_only_alarm_on_a_healthy_host(hardware, case):
    for damage in ({"MODEL": ""}, {"TOPOLOGY": "9e9p9d"}):
        it = case(hardware)
        it.environ |= damage
        assert set(it.bad()) == {"plan"}
        assert "driver.nodes" in {finding.name for finding in it.examine()}
        shutil.rmtree(it.root.parent)


def test_nothing_on_the_host_or_in_the_project_is_changed(case):
    it = case()

    def state():
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_mode)
            for folder in (it.fake.root, it.root)
            for path in folder.rglob("*")
        }

    before = state()
    it.examine()
    assert state() == before


FAULTS = {
    # the pains of the field
    "hccn.conf is empty": ("a2", write("/etc/hccn.conf", ""), "network.hccn-conf", "empty or missing"),
    "hccn.conf is missing": ("a3", remove("/etc/hccn.conf"), "network.hccn-conf", "empty or missing"),
    "hccn.conf lacks a card": ("a2", write("/etc/hccn.conf", "address_0=10.1.0.1\n"), "network.hccn-conf", "1, 2"),
    "hccn_tool is missing": (
        "a2", remove("/usr/local/Ascend/driver/tools/hccn_tool"), "network.hccn-tool", "cards 1, 2",
    ),
    "transfer on a bridge": (
        "a2",
        own_compose_file("services: {prefill-0: {network_mode: !reset null, networks: [own]}}\nnetworks: {own: {}}\n"),
        "containers.network",
        "prefill-0 on a bridge",
    ),
    "one card in two containers": (
        "a2",
        own_compose_file("services: {decode-0: {devices: !override [/dev/davinci1]}}\n"),
        "containers.cards",
        "card 1: prefill-0 and decode-0",
    ),
    "every card is taken": ("a2", someone_elses_container, "plan", "0 by container training-job"),
    "a port is given twice": (
        "a2",
        own_compose_file('services: {decode-0: {environment: {EPD_PORT: "8200"}}}\n'),
        "ports.distinct",
        "8200: decode-0 and prefill-0",
    ),
    "a port in the transport's range": ("a2", environ(EPD_PROXY_PORT="21000"), "ports.range", "the NPU transport"),
    "a wildcard is advertised": (
        "a2",
        own_compose_file("services: {decode-0: {environment: {EPD_ADVERTISE_HOST: 0.0.0.0}}}\n"),
        "network.address",
        "decode-0: 0.0.0.0",
    ),
    "an address of another machine": ("a2", environ(EPD_HOST_ADDRESS="10.9.9.9"), "network.address", "none has it"),
    "loopback is advertised": ("a2", environ(EPD_HOST_ADDRESS="127.0.0.1"), "network.address", "127.0.0.1"),
    "a name is advertised": ("a3", environ(EPD_HOST_ADDRESS="node-a"), "network.address", "node-a"),
    "libascend_hal is missing": (
        "a2", remove("/usr/local/Ascend/driver/lib64/driver/libascend_hal.so"), "driver.library", "no such file",
    ),
    "dcmi is missing": ("a2", remove("/usr/local/dcmi"), "containers.mounts", "/usr/local/dcmi (decode-0"),
    "a transfer file of A5 is missing": ("a5", remove("/usr/bin/urma_admin"), "containers.mounts", "urma_admin"),
    "the driver is old": (
        "a2", write("/usr/local/Ascend/driver/version.info", "Version=24.1.rc3\n"), "driver.version", "24.1.rc3",
    ),
    "the driver is missing": (
        "a2", remove("/usr/local/Ascend/driver/version.info"), "driver.version", "none",
    ),
    "the driver is elsewhere": (
        "a2",
        write("/etc/ascend_install.info", "Driver_Install_Path_Param=/opt/Ascend\n"),
        "driver.path",
        "/opt/Ascend/driver is installed",
    ),
    "the image is for another chip": (
        "a3", fake(image_labels={"org.ascend-epd.hardware": "a2"}), "engine.image-hardware", "is for a2",
    ),
    "the profile is for another chip": ("a2", environ(EPD_HARDWARE="a3"), "driver.soc", "910B3, which is a2"),
    "a link is down": ("a2", hccn(link_1="DOWN"), "network.link", "card 1: DOWN"),
    "the network is ill": ("a2", hccn(health_2="Fault"), "network.health", "card 2: Fault"),
    "TLS differs": ("a3", hccn(tls_1="1"), "network.tls", "on: 1; off: 2"),
    "64 MB of shared memory": (
        "a2", own_compose_file("services: {encode-0: {shm_size: 64m}}\n"), "containers.shm", "encode-0: 64 MiB",
    ),
    "less shared memory than asked": ("a2", environ(EPD_SHM_SIZE="4g"), "containers.shm", "4096 MiB"),
    "no image and no network": ("a2", fake(absent_images=True), "engine.images", "missing:"),
    "hub id while offline": (
        "a2", environ(MODEL="Qwen/Qwen2.5-VL-7B-Instruct", HF_HUB_OFFLINE="1"), "model.files", "OFFLINE",
    ),
    "someone listens where a worker of the proxy will": (
        "a2",
        lambda it: (environ(EPD_PROXY_WORKERS="3")(it), listener(8003)(it)),
        "ports.free",
        "8003 (proxy): in use",
    ),
    "someone listens on a port": ("a2", listener(8100), "ports.free", "8100 (encode-0): in use"),
    # and what a host may lack besides
    "npu-smi fails": ("a2", broken_npu_smi, "driver.npu-smi", "ret is -8005"),
    "a card is ill": ("a2", fake(health={(1, 0): "Alarm"}), "driver.health", "card 1: Alarm"),
    "a manager node is missing": ("a2", remove("/dev/hisi_hdc"), "driver.nodes", "/dev/hisi_hdc"),
    "A5 without uburma": ("a5", remove("/dev/uburma"), "driver.nodes", "/dev/uburma"),
    "Docker is old": ("a2", fake(docker_version="19.3.15"), "engine.docker", "19.3.15"),
    "Docker does not answer": ("a2", fake(docker_version=""), "engine.docker", "no answer"),
    "Compose is missing": ("a2", fake(compose_version=""), "engine.compose", "no answer"),
    "the Ascend runtime is missing": ("a2", environ(EPD_OVERLAYS="runtime-ascend"), "containers.runtime", "runc"),
    "little memory": (
        "cpu", write("/proc/meminfo", "MemTotal: 24000000 kB\nMemAvailable: 3000000 kB\n"), "host.memory", "2929",
    ),
    "a file that Compose cannot read": (
        "a2", own_compose_file("services: {a: {bild: .}}\n"), "containers.config", "bild",
    ),
}  # fmt: skip


WARNINGS = ("the driver is old", "the network is ill", "less shared memory than asked", "no image and no network",
            "hub id while offline", "little memory")  # fmt: skip
"""What a person should know of, and a start goes on with. Everything else stops it."""


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_named_and_comes_with_a_fix(name, case):
    hardware, damage, finding, text = FAULTS[name]
    it = case(hardware)
    damage(it)
    bad = it.bad()
    assert finding in bad, bad
    assert text in bad[finding].found
    assert bad[finding].expected
    assert bad[finding].fix
    assert bad[finding].status is (Status.WARN if name in WARNINGS else Status.FAIL)


def test_listening_ports_are_read_from_the_kernels_tables():
    with socket.socket() as server, socket.socket(socket.AF_INET6) as other:
        server.bind(("127.0.0.1", 0))
        other.bind(("::1", 0))
        ours = {server.getsockname()[1], other.getsockname()[1]}
        assert not ours & ports.listening(Machine())
        server.listen()
        other.listen()
        assert ours <= ports.listening(Machine())


def test_a_card_that_a_process_uses_is_named(case):
    it = case()
    it.environ["EPD_CARDS"] = "0-2"
    it.fake.processes[1, 0] = (4711, "python3")
    it.fake.write()
    assert "1 by process 4711 python3" in it.bad()["plan"].found


def test_an_encoder_out_of_memory_is_refused_with_the_sum(case):
    it = case()
    (it.model / "config.json").write_text(json.dumps(QWEN25_VL_7B | {"num_hidden_layers": 130}))
    (it.model / "model-00001.safetensors").unlink()
    finding = it.bad()["plan"]
    assert "weights" in finding.expected
    assert "EPD_ENCODE_TP=2" in finding.fix


@pytest.mark.parametrize("missing", ["model-00002.safetensors", "config.json"])
def test_a_download_that_broke_off(missing, case):
    it = case()
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (it.model / "model.safetensors.index.json").write_text(json.dumps(index))
    it.environ["EPD_SKIP_MEMORY_CHECK"] = "1"
    if missing == "config.json":
        loaded = settings.load(it.root, it.environ)
        (it.model / missing).unlink()
        found = preflight.examine(loaded, VERSIONS, Machine(it.fake.root))
        bad = {finding.name: finding for finding in found if finding.status is not Status.PASS}
    else:
        bad = it.bad()
    assert "fetch-model" in bad["model.files"].fix


def test_a_check_that_breaks_is_told_and_the_others_go_on(case, monkeypatch):
    it = case()
    monkeypatch.setattr(Machine, "exists", lambda *_: (_ for _ in ()).throw(OSError("disk on fire")))
    found = {finding.name: finding for finding in it.examine()}
    assert "disk on fire" in found["driver.check"].found
    assert "ports.free" in found


def test_little_disk_is_a_failure_where_images_are_missing(case):
    it = case("cpu")
    loaded = settings.load(it.root, it.environ)
    subject = Subject(Machine(it.fake.root), loaded, VERSIONS, "cpu", images=("a:1",), free_bytes=lambda _: 7 << 30)
    assert {f.name: f.status for f in engine.check(subject)}["engine.disk"] is Status.PASS
    it.fake.absent_images = True
    it.fake.write()
    found = {f.name: f for f in engine.check(replace(subject, will_start=True))}
    assert found["engine.disk"].status is Status.FAIL
    assert "engine.images" not in found


def test_a_report_for_people_and_one_for_programs(case):
    it = case()
    it.fake.remove("/etc/hccn.conf")
    found = it.examine()
    text = report.text(found)
    assert "FAIL network.hccn-conf\n       expected: /etc/hccn.conf with an address" in text
    assert "PASS driver.soc" in text
    document = json.loads(report.as_json(found))
    assert document["totals"]["FAIL"] == sum(f["status"] == "FAIL" for f in document["findings"]) > 0
    assert report.exit_code(found) == 1
    assert report.exit_code([f for f in found if f.status is Status.PASS]) == 0
