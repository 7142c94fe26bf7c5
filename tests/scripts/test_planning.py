"""From settings and a machine to a plan's files, on machines that are folders."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from epd import planning, settings
from epd.errors import StepError
from epd.machine import Machine
from epd.plan import hosts
from fakes.models import QWEN25_VL_7B
from fakes.npu_hosts import FakeHost

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "compose", folder / "compose")
    model = folder / "my-model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN25_VL_7B))
    return folder


@pytest.fixture
def fake(tmp_path):
    return FakeHost(tmp_path / "host", "a2")


def make(root, fake, **environ):
    loaded = settings.load(root, environ)
    hardware = planning.choose_hardware(loaded.hardware, Machine(fake.root))
    return planning.make(loaded, hardware, Machine(fake.root))


def test_an_npu_host_gets_a_file_of_its_own_and_the_memory_is_shown(root, fake):
    planned = make(root, fake, TOPOLOGY="1e1p1d", MODEL="my-model", EPD_HOST="node-a", EPD_OVERLAYS="non-root")
    assert planned.compose_files == ("deploy/1e1p1d/node-a/compose.yaml", "deploy/1e1p1d/node-a/non-root.yaml")
    assert planned.variables == {"EPD_HARDWARE": "a2", "EPD_PLANNED": "1e1p1d"}
    written = planning.write(root, planned)
    assert set(planned.compose_files) <= {str(path.relative_to(root)) for path in written}
    assert '"../../../compose/services.yaml"' in written[0].read_text()
    text = planning.table(planned.plan)
    assert "decode-0           node-a           cards 2, port 8300, kv 36100" in text
    assert "weights" in text


def test_the_cpu_profile_uses_the_file_that_is_there_and_plans_the_others(root, tmp_path):
    cpu = FakeHost(tmp_path / "cpu-host", "cpu")
    assert make(root, cpu).compose_files == ("compose/1e1pd.yaml",)
    assert planning.write(root, make(root, cpu)) == []
    planned = make(root, cpu, TOPOLOGY="2e2pd", EPD_HOST="here")
    assert planned.compose_files == ("deploy/2e2pd/here/compose.yaml",)
    assert len(planning.write(root, planned)) == 1


def test_the_topology_of_a_planned_file_is_remembered(root, fake):
    planned = make(root, fake, TOPOLOGY="1e2p1d", MODEL="my-model", EPD_PREFILL_TP="2")
    (root / ".env").write_text(f"COMPOSE_FILE={':'.join(planned.compose_files)}\nEPD_PREFILL_TP=2\n")
    again = make(root, fake, MODEL="my-model")
    assert again.plan.topology == planned.plan.topology


def test_without_a_model_npus_have_nothing_to_serve(root, fake):
    with pytest.raises(StepError, match="no model to serve on NPUs"):
        make(root, fake)


def test_a_hub_id_is_planned_without_its_memory(root, fake):
    assert make(root, fake, MODEL="Qwen/Qwen2.5-VL-7B-Instruct").plan.notes == ()


def test_npus_that_cannot_be_told_stop_with_what_npu_smi_said(root, fake):
    fake.program("/usr/local/bin/npu-smi", {}, default="echo 'dcmi module initialize failed. ret is -8005'; exit 255")
    with pytest.raises(StepError, match=r"ret is -8005[\s\S]*EPD_HARDWARE=a2"):
        make(root, fake)
    assert planning.choose_hardware("cpu", Machine(fake.root)) == "cpu"


def test_an_inventory_is_planned_anywhere_and_this_machine_finds_itself_in_it(root, fake):
    here = make(root, fake, MODEL="my-model").host
    other = hosts.Host("node-b", "a2", "10.0.0.8", cards=here.cards)
    (root / "hosts.json").write_text(hosts.dump([other, here]))
    planned = make(root, fake, MODEL="my-model", EPD_HOSTS="hosts.json", TOPOLOGY="2e8p4d")
    assert planned.host.address == "10.0.0.7"
    everywhere = planning.for_inventory(
        settings.load(root, {"EPD_HOSTS": "hosts.json", "TOPOLOGY": "2e8p4d", "MODEL": "my-model"})
    )
    assert everywhere == planned.plan
    folders = {path.parent.name for path in planning.write_all(root, everywhere)}
    assert folders == {"node-b", here.name}
    (root / "hosts.json").write_text(hosts.dump([other]))
    with pytest.raises(StepError, match=r"not in the inventory[\s\S]*EPD_HOST="):
        make(root, fake, MODEL="my-model", EPD_HOSTS="hosts.json")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"EPD_OVERLAYS": "debug"}, "no such overlay"),
        ({"EPD_MAX_MODEL_LEN": "many"}, "EPD_MAX_MODEL_LEN=many"),
        ({"EPD_DECODE_TP": "0"}, "EPD_DECODE_TP=0"),
        ({"EPD_HOSTS": "none.json"}, "cannot read the inventory"),
    ],
)
def test_what_cannot_be_is_refused(environ, message, root, fake):
    with pytest.raises(StepError, match=message):
        make(root, fake, MODEL="my-model", **environ)


def test_a_pool_that_does_not_fit_into_its_container_is_refused(root, fake, tmp_path):
    cpu = FakeHost(tmp_path / "cpu-host", "cpu")
    with pytest.raises(StepError, match=r"4096 \+ 128 = 4224 MiB; EPD_STORE_MEMORY_LIMIT=2g is 2048 MiB"):
        make(root, cpu, EPD_STORE_SIZE_MB="4096")
    make(root, cpu, EPD_STORE_SIZE_MB="4096", EPD_STORE_MEMORY_LIMIT="5g")
    make(root, fake, MODEL="my-model", EPD_STORE_SIZE_MB="16384")  # there the limit follows the size
    with pytest.raises(StepError, match=r"8192 \+ 128"):
        make(root, fake, MODEL="my-model", EPD_STORE_MEMORY_LIMIT="4g")


def test_the_default_limit_is_the_one_in_the_compose_file():
    text = (ROOT / "compose" / "services.yaml").read_text()
    assert f"${{EPD_STORE_MEMORY_LIMIT:-{planning._STORE_MEMORY_LIMIT}}}" in text


def test_each_host_of_an_inventory_gets_what_compose_has_to_be_told_there(root, fake):
    here = make(root, fake, MODEL="my-model").host
    other = hosts.Host("node-b", "a2", "10.0.0.8", cards=here.cards)
    (root / "hosts.json").write_text(hosts.dump([other, here]))
    environ = {"EPD_HOSTS": "hosts.json", "TOPOLOGY": "1e9pd", "MODEL": "my-model", "EPD_OVERLAYS": "non-root"}
    loaded = settings.load(root, environ)
    plan = planning.for_inventory(loaded)
    planning.write_all(root, plan)
    (root / "deploy" / "1e9pd" / "node-b" / ".env").write_text("EPD_PROXY_BIND=10.0.0.8\n")
    paths = planning.write_environments(loaded, plan, {"EPD_IMAGE": "r/a2:1", "EPD_PROXY_IMAGE": "r/proxy:1"})
    assert {path.parent.name for path in paths} == {"node-b", here.name}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_"))}
    for path in paths:
        name = path.parent.name
        done = subprocess.run(
            ["docker", "compose", "--env-file", str(path.relative_to(root)), "config", "--format", "json"],
            cwd=root, env=clean, capture_output=True, text=True, check=True,
        )  # fmt: skip
        services = json.loads(done.stdout)["services"]
        instances = {instance.name for instance in plan.instances if instance.host.name == name}
        assert set(services) == instances | (
            {"mooncake-master", "mooncake-store", "proxy"} if name == "node-b" else set()
        )
        assert {services[instance]["image"] for instance in instances} == {"r/a2:1"}
        assert {services[instance]["user"] for instance in instances} == {"1000:1000"}
        if name == "node-b":
            assert services["proxy"]["environment"]["EPD_BIND_HOST"] == "10.0.0.8"


def test_several_hosts_need_a_folder_that_all_have_or_the_pool(root, fake):
    cards = tuple(hosts.Card(i, i, 65536) for i in range(8))
    inventory = [hosts.Host(f"node-{i}", "a2", f"10.0.0.{7 + i}", cards=cards) for i in range(2)]
    (root / "hosts.json").write_text(hosts.dump(inventory))
    environ = {"TOPOLOGY": "1e1pd", "MODEL": "my-model", "EPD_HOSTS": "hosts.json", "EPD_EC_STORE": "shared_dir"}
    with pytest.raises(StepError, match=r"embeddings would not leave[\s\S]*EPD_EC_SHARED_DIR=<folder"):
        make(root, fake, **environ)
    assert make(root, fake, **environ, EPD_EC_SHARED_DIR="/shared/ec").plan.hosts == tuple(inventory)
    del environ["EPD_HOSTS"]
    assert len(make(root, fake, **environ).plan.hosts) == 1
