"""`make deploy-1e1p1d` on an NPU server from its first line to its last, on servers that are folders.

The engine is made up: it writes down what it is told to do, and its containers are healthy at once. Compose's and
buildx's reading of our files is real.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from epd.plan import hosts
from fakes.models import QWEN3_VL_30B_A3B, QWEN25_VL_7B
from fakes.npu_hosts import FakeHost

ROOT = Path(__file__).resolve().parents[2]
UP = """
import sys
from pathlib import Path
from epd import cli, context, host, versions
from epd.machine import Machine

found = versions.load(context.ROOT / "docker" / "versions.env")
cli.context = lambda: context.Context(found, host.distribution(), True, Machine(Path(sys.argv[1])))
sys.exit(cli.main([sys.argv[2]]))
"""
DOCKER = """#!/bin/sh
cd "$(dirname "$0")"; echo "$*" >> calls.txt; cd - > /dev/null
case "$*" in
  *bake*--print*|"compose "*config*|"compose version"*|"buildx version"*) exec REAL "$@";;
  --version|version*) echo 26.1.4;;
  info*) echo id;;
  "image inspect"*debian*) echo id;;
  "image inspect"*) exit 1;;
  compose*" up "*) touch "$(dirname "$0")/is-up";;
  ps*) if [ -e "$(dirname "$0")/is-up" ]; then echo a; fi;;
  inspect*) cat "$(dirname "$0")/containers.json";;
esac
"""


def environment():
    """Return this process's environment without what would be a setting of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_", "HF_"))}


class Server:
    """A checkout on a fake NPU server, and an engine that is made up."""

    def __init__(self, folder, hardware):
        self.fake = FakeHost(folder / "host", hardware)
        self.fake.image_labels = {"org.ascend-epd.hardware": "any"}
        self.fake.write_docker()
        self.folder, self.bin = folder / "checkout", folder / "bin"
        self.bin.mkdir()
        for name in ("scripts", "compose", "docker", "models", "connector", "proxy"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / ".dockerignore", self.folder)
        self.model = self.folder / "Qwen2.5-VL-7B-Instruct"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(QWEN25_VL_7B))
        (self.model / "model.safetensors").write_bytes(b"weights")
        self.fake.file(str(self.model / "config.json"))
        self.calls = self.bin / "calls.txt"
        docker = self.bin / "docker"
        docker.write_text(DOCKER.replace("REAL", shutil.which("docker")))
        docker.chmod(0o755)

    def will_run(self, *services, port):
        """Say which containers there are once Compose was told to start them."""
        containers = []
        for name in services:
            state = {"Status": "running", "ExitCode": 0, "StartedAt": "t", "Health": {"Status": "healthy", "Log": []}}
            config = {"Labels": {"com.docker.compose.service": name}, "Env": [f"EPD_PORT={port}"] * (name == "proxy")}
            host = {"NetworkMode": "host"}
            containers.append({"Id": name, "State": state, "Config": config, "HostConfig": host, "RestartCount": 0})
        (self.bin / "containers.json").write_text(json.dumps(containers))

    def run(self, word="up", **environ):
        told = {"TOPOLOGY": "1e1p1d", "EPD_HOST": "node-a", **environ}
        if "MODEL_RECIPE" not in environ:
            told.setdefault("MODEL", str(self.model))
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        return subprocess.run(
            [sys.executable, "-c", UP, str(self.fake.root), word],
            cwd=self.folder, env={**environment(), "PYTHONPATH": "scripts", **told, "PATH": path},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    def done(self):
        """Return the calls that change something, shortened: what was built, pulled and started."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        builds = [" ".join(c.split()[-3:]) for c in calls if " bake " in c and "--print" not in c]
        starts = [c for c in calls if " up " in c or c.startswith("pull")]
        return builds + starts


@pytest.fixture
def free_port():
    for port in range(40000, 60000, 7):  # none of HCCL's or the NPU transport's
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


SERVICES = ("mooncake-master", "mooncake-store", "encode-0", "prefill-0", "decode-0", "proxy")


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_plan_checks_images_start_banner_and_all_of_it_again(hardware, tmp_path, free_port):
    server = Server(tmp_path, hardware)
    server.will_run(*SERVICES, port=free_port)
    first = server.run(EPD_PROXY_PORT=str(free_port))
    assert first.returncode == 0, first.stdout + first.stderr
    said = [first.stdout.find(text) for text in (
        f"profile {hardware}", "Plan: 1e1p1d on node-a", "0 FAIL", f"Building {hardware}, proxy, store",
        "Starting 1e1p1d", "proxy              healthy", f"The stack (1e1p1d) is up: http://127.0.0.1:{free_port}",
    )]  # fmt: skip
    assert -1 not in said
    assert said == sorted(said)
    assert '"model": "Qwen2.5-VL-7B-Instruct"' in first.stdout
    assert f"{server.fake.count} Ascend NPU node(s) found" in first.stdout
    assert server.done() == [f"{hardware} proxy store", "compose --progress plain up -d --no-build --remove-orphans"]

    for card, name in enumerate(("encode-0", "prefill-0", "decode-0")):  # which fill their cards now
        server.fake.container(f"ascend-epd-{name}-1", [card], project="ascend-epd", service=name)
    with socket.socket() as proxy:  # the one that runs now has its port
        proxy.bind(("127.0.0.1", free_port))
        proxy.listen()
        again = server.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.findall(r"cards \d", again.stdout) == re.findall(r"cards \d", first.stdout)
    assert ".env: unchanged" in again.stdout
    assert "yet:" not in again.stdout  # nothing wrong inside


def test_an_instance_that_runs_on_other_cards_than_it_will_get_does_not_stand_in_the_way(tmp_path, free_port):
    server = Server(tmp_path, "a2")
    server.will_run(*SERVICES, port=free_port)
    server.fake.container("ascend-epd-prefill-0-1", [1], project="ascend-epd", service="prefill-0")
    done = server.run(EPD_PROXY_PORT=str(free_port), EPD_PREFILL_TP="2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("damage", "environ", "words"),
    [
        (lambda fake: fake.file("/etc/hccn.conf", ""), {}, "found:    network.hccn-conf"),
        (lambda fake: fake.remove("/usr/local/dcmi"), {}, "found:    containers.mounts"),
        (lambda fake: fake.container("training", range(8)), {}, "not enough cards for 1e1p1d"),
        (lambda fake: fake.remove("/usr/local/bin/npu-smi"), {}, "NPUs of a kind that cannot be told"),
        (lambda fake: None, {"MODEL": ""}, "no model to serve on NPUs"),
        (lambda fake: None, {"MODEL": "/no/such/model"}, "MODEL is not usable"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built_or_started(damage, environ, words, tmp_path):
    server = Server(tmp_path, "a2")
    damage(server.fake)
    done = server.run(**environ)
    assert done.returncode == 1
    assert words in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert server.done() == []
    assert not (server.folder / ".env").exists()


def test_a_recipe_becomes_a_stack_that_compose_understands(tmp_path, free_port):
    hardware = "a3"
    server = Server(tmp_path, hardware)
    server.will_run(*SERVICES, port=free_port)
    model = server.folder / "model-files" / "Qwen3-VL-30B-A3B-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(QWEN3_VL_30B_A3B))
    (model / "model.safetensors").write_bytes(b"weights")
    server.fake.file(str(model / "config.json"))
    done = server.run(MODEL_RECIPE="qwen3-vl-30b-a3b", EPD_PROXY_PORT=str(free_port))
    assert done.returncode == 0, done.stdout + done.stderr

    config = subprocess.run(
        ["docker", "compose", "config", "--format", "json"],
        cwd=server.folder, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    services = json.loads(config.stdout)["services"]
    kinds = {"encode-0": hardware, "prefill-0": hardware, "decode-0": hardware, "proxy": "proxy"}
    kinds |= {"mooncake-master": "store", "mooncake-store": "store"}
    assert {name: service["image"].partition(":")[0] for name, service in services.items()} == {
        name: f"ascend-epd-{kind}" for name, kind in kinds.items()
    }
    for name in ("encode-0", "prefill-0", "decode-0"):
        service = services[name]
        assert service["environment"]["EPD_TENSOR_PARALLEL_SIZE"] == "2"
        assert service["environment"]["HCCL_BUFFSIZE"] == "1024"
        assert service["environment"]["EPD_SERVED_MODEL_NAME"] == "Qwen3-VL-30B-A3B-Instruct"
        assert service["environment"].get("EPD_EXPERT_PARALLEL") == (None if name == "encode-0" else "1")
        assert len([device for device in service["devices"] if device["source"][-1].isdigit()]) == 2
        assert service["init"] is True


def test_the_doctor_looks_at_all_else_where_the_model_is_not_there_yet(tmp_path):
    done = Server(tmp_path, "a2").run("doctor", MODEL="/data/not-yet")
    assert done.returncode == 1
    assert "FAIL settings\n       expected: an existing folder" in done.stdout
    assert "PASS driver.nodes" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("2 FAIL")  # and that there is nothing to plan for
    assert done.stderr == ""


def test_what_is_wrong_inside_of_the_containers_is_said_once_they_run(tmp_path, free_port):
    server = Server(tmp_path, "a2")
    server.will_run(*SERVICES, port=free_port)
    server.fake.inside["ascend-epd-decode-0-1"] = "echo 'TimeoutError: timed out' >&2; exit 1"
    server.fake.container("ascend-epd-decode-0-1", [2], project="ascend-epd", service="decode-0")
    done = server.run(EPD_PROXY_PORT=str(free_port))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inside.metaserver\n       expected: every decode instance can connect to 127.0.0.1:8001" in done.stdout
    assert "decode-0: TimeoutError: timed out" in done.stdout
    assert "inside.cards" in done.stdout


def test_a_server_of_the_inventory_starts_its_own_part_and_names_where_the_proxy_is(tmp_path, free_port):
    server = Server(tmp_path, "a2")
    cards = tuple(hosts.Card(i, i, 65536, 3400, address="10.1.0.77") for i in range(8))
    head = hosts.Host("node-z", "a2", "10.0.0.8", roles=("encode", "prefill"), cards=cards)
    here = hosts.Host("node-a", "a2", "10.0.0.7", roles=("decode",), cards=cards)
    (server.folder / "hosts.json").write_text(hosts.dump([head, here]))
    server.will_run("decode-0", port=free_port)
    with socket.socket() as other:  # whatever has the proxy's port here is no concern of this server
        other.bind(("127.0.0.1", free_port))
        other.listen()
        done = server.run(EPD_HOSTS="hosts.json", EPD_PROXY_PORT=str(free_port))
        assert done.returncode == 0, done.stdout + done.stderr
    assert "The instances of 1e1p1d on node-a are up. The proxy, on node-z, takes them in" in done.stdout
    assert "curl" not in done.stdout
    status = server.run("status")
    assert status.returncode == 0, status.stdout + status.stderr
    assert "the proxy is on another host" in status.stdout
