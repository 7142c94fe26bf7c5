"""The fault matrix: no alarm on a healthy host, and each thing that goes wrong in the field is found and named.

Hosts are folders (tests/fakes/npu_hosts.py); Compose is the real one. Nothing here proves that an NPU works.
"""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from epd import planning, preflight, settings, versions
from epd.doctor import engine, ports, report
from epd.doctor.finding import Status
from epd.doctor.subject import Subject
from epd.machine import Machine
from epd.plan import hosts
from fakes.models import QWEN25_VL_7B
from fakes.npu_hosts import FakeHost

ROOT = Path(__file__).resolve().parents[3]
NPUS = ("a2", "a3", "a5")
VERSIONS = versions.load(ROOT / "docker" / "versions.env")


class Case:
    """A fake host, a project folder and a model; tests damage one of them and look."""

    def __init__(self, folder, hardware):
        self.fake = FakeHost(folder / "host", hardware)
        self.root = folder / "project"
        shutil.copytree(ROOT / "compose", self.root / "compose")
        shutil.copytree(ROOT / "docker", self.root / "docker")
        # Mounted into containers, so the host must have it: a folder of both trees.
        self.model = folder / "my-model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(QWEN25_VL_7B))
        (self.model / "model-00001.safetensors").write_bytes(b"0" * 64)
        self.fake.file(str(self.model / "config.json"))
        self.environ = {"TOPOLOGY": "1e1p1d", "EPD_HOST": "node-a"}
        if hardware != "cpu":
            self.environ["MODEL"] = str(self.model)

    def examine(self):
        loaded = settings.load(self.root, self.environ)
        return preflight.examine(loaded, VERSIONS, Machine(self.fake.root))

    def bad(self):
        """Return what is not well, by name."""
        return {finding.name: finding for finding in self.examine() if finding.status is not Status.PASS}


@pytest.fixture
def case(tmp_path):
    def make(hardware="a2"):
        return Case(tmp_path, hardware)

    return make


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


def remove(name):
    return lambda it: it.fake.remove(name)


def write(name, text):
    return lambda it: it.fake.file(name, text)


def hccn(**states):
    def damage(it):
        it.fake.hccn = {key.replace("_", " "): value for key, value in states.items()}
        it.fake.write()

    return damage


def fake(**values):
    def damage(it):
        for name, value in values.items():
            setattr(it.fake, name, value)
        it.fake.write()

    return damage


def environ(**values):
    return lambda it: it.environ.update(values)


def broken_npu_smi(it):
    it.fake.program(
        "/usr/local/bin/npu-smi", {}, default="echo 'dcmi module initialize failed. ret is -8005'; exit 255"
    )
    it.environ["EPD_HARDWARE"] = it.fake.hardware


def own_compose_file(text):
    """Lay a file of the user's own over the plan's, as the lines of .env allow."""

    def damage(it):
        loaded = settings.load(it.root, it.environ)
        planned = planning.make(loaded, it.fake.hardware, Machine(it.fake.root))
        planning.write(it.root, planned)
        (it.root / "mine.yaml").write_text(text)
        (it.root / ".env").write_text(f"COMPOSE_FILE={planned.compose_files[0]}:mine.yaml\n")

    return damage


def listener(port):
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = f"   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
    return write("/proc/net/tcp", head + row)


def someone_elses_container(it):
    it.fake.container("training-job", [0, 1, 2, 3, 4, 5, 6, 7])


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


def test_our_own_running_stack_is_no_fault(case):
    it = case()
    it.fake.container("ascend-epd-decode-0-1", [2], project="ascend-epd")
    assert it.bad() == {}


def running(it, *, missing=()):
    """Let the stack's instances run, each with its card; `missing` ones have none inside."""
    for index, name in enumerate(("encode-0", "prefill-0", "decode-0", "proxy")):
        cards = [] if name == "proxy" or name in missing else [index]
        it.fake.container(f"ascend-epd-{name}-1", cards, project="ascend-epd", service=name)


def test_a_running_stack_is_looked_at_from_the_inside(case):
    it = case()
    running(it)
    found = {finding.name: finding for finding in it.examine()}
    assert it.bad() == {}
    assert found["inside.cards"].found == "encode-0: 1, prefill-0: 1, decode-0: 1"
    assert found["inside.metaserver"].found == "decode-0 reach 127.0.0.1:8001"


def test_ports_of_what_runs_are_its_own_and_those_of_what_comes_are_looked_at(case):
    it = case()
    running(it)
    listener(8100)(it)  # encode-0's
    assert it.bad() == {}
    it.environ["TOPOLOGY"] = "2e1p1d"
    listener(8101)(it)
    assert it.bad()["ports.free"].found == "8101 (encode-1): in use"


def test_a_container_without_its_card_is_found(case):
    it = case()
    running(it, missing=("prefill-0",))
    assert it.bad()["inside.cards"].found == "prefill-0: 0 of 1"


def test_a_metaserver_that_decode_does_not_reach_is_found(case):
    it = case("cpu")
    it.fake.inside["ascend-epd-decode-0-1"] = "echo 'ConnectionRefusedError: [Errno 111]' >&2; exit 1"
    running(it)
    finding = it.bad()["inside.metaserver"]
    assert (finding.status, "proxy:8001" in finding.expected) == (Status.FAIL, True)
    assert finding.found == "decode-0: ConnectionRefusedError: [Errno 111]"


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


def two_hosts(it, loss="0.00", address="10.1.0.77"):
    it.environ["EPD_HOSTS"] = str(it.root / "hosts.json")
    cards = tuple(hosts.Card(i, i, 65536, 3400, address=address) for i in range(8))
    own = hosts.Host("node-a", "a2", "10.0.0.7", roles=("encode", "prefill"), cards=cards)
    other = hosts.Host("node-b", "a2", "10.0.0.8", roles=("decode",), cards=cards)
    (it.root / "hosts.json").write_text(hosts.dump([own, other]))
    it.fake.hccn["loss"] = loss
    it.fake.write()


def test_other_hosts_are_pinged_through_the_cards(case):
    it = case()
    two_hosts(it)
    assert it.bad() == {}
    two_hosts(it, loss="100.00")
    assert "node-b 10.1.0.77" in it.bad()["network.ping"].found
    two_hosts(it, address="")
    assert it.bad()["network.ping"].status is Status.WARN


def test_with_several_hosts_a_cards_network_must_be_well(case):
    it = case()
    two_hosts(it)
    it.fake.hccn["health 1"] = "Fault"
    it.fake.hccn |= {f"link {i}": "DOWN" for i in range(8)}
    it.fake.write()
    bad = it.bad()
    assert (bad["network.health"].status, bad["network.link"].status) == (Status.FAIL, Status.FAIL)


def test_one_server_without_any_link_does_without(case):
    it = case()
    it.fake.hccn = {f"link {i}": "DOWN" for i in range(8)}
    it.fake.write()
    assert it.bad() == {}


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
