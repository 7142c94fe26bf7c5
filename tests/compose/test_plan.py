"""What Compose makes of the plan's files: every topology on every kind of hardware, against golden copies."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from epd import survey
from epd.machine import Machine
from epd.plan import compose, placing, topology
from epd_proxy.settings import load_config
from fakes.npu_hosts import FakeHost

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
NPUS = ("a2", "a3", "a5")
TOPOLOGIES = ("1e1pd", "1e1p1d", "2e6pd", "2e3p3d")
LIMITS = placing.Limits(max_model_len=32768, max_num_seqs=128, store_size_mb=8192)


def plan(hardware, name, tmp_path, parallel=None):
    fake = FakeHost(tmp_path / "host", hardware)
    host = survey.host(Machine(fake.root), hardware=hardware, name="node-a", project="ascend-epd", settings={})
    return placing.make(topology.parse(name, parallel), [host], None, LIMITS)


def config(made, folder, *overlays, host=None):
    files = render(made, host)
    folder.mkdir(exist_ok=True)
    (folder / "compose.yaml").write_text(files.compose)
    words = ["-f", str(folder / "compose.yaml")]
    for overlay in overlays:
        (folder / f"{overlay}.yaml").write_text(files.overlays[overlay])
        words += ["-f", str(folder / f"{overlay}.yaml")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_", "HF_"))}
    done = subprocess.run(
        ["docker", "compose", "--env-file", "/dev/null", *words, "config"],
        env=clean | compose.variables(made), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(made, host=None):
    return compose.render(made, host or made.head, fragments=str(ROOT / "compose"))


@pytest.mark.parametrize("hardware", NPUS)
@pytest.mark.parametrize("name", TOPOLOGIES[:2])
def test_config_equals_the_golden_copy(name, hardware, tmp_path):
    """`EPD_UPDATE_GOLDEN=1 pytest tests/compose` writes the copies anew; read their diff before you commit it."""
    found = config(plan(hardware, name, tmp_path), tmp_path / "files")
    golden = GOLDEN / f"{name}-{hardware}.yaml"
    if os.environ.get("EPD_UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("name", TOPOLOGIES[:2])
def test_on_the_cpu_profile_the_plan_is_the_file_in_compose(name, tmp_path):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("EPD_", "COMPOSE_", "HF_"))}
    ours = subprocess.run(
        ["docker", "compose", "--env-file", "/dev/null", "-f", f"compose/{name}.yaml", "config"],
        cwd=ROOT, env=clean, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert config(plan("cpu", name, tmp_path), tmp_path / "files") == ours


@pytest.mark.parametrize("hardware", NPUS)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_on_a_host_network_cards_and_ports_are_disjoint_and_nothing_listens_outside(name, hardware, tmp_path):
    services = yaml.safe_load(config(plan(hardware, name, tmp_path), tmp_path / "files"))["services"]
    cards, ports = [], []
    for service in services.values():
        environment = service.get("environment", {})
        assert service["network_mode"] == "host"
        assert "ports" not in service
        assert environment.get("EPD_BIND_HOST", "127.0.0.1") == "127.0.0.1"
        assert environment.get("EPD_ADVERTISE_HOST", "10.0.0.7") == "10.0.0.7"
        cards += [d["source"] for d in service.get("devices", []) if d["source"][-1].isdigit()]
        own = ("EPD_PORT", "EPD_KV_PORT", "EPD_EC_METRICS_PORT")
        ports += [int(environment[name]) for name in own if name in environment]
    assert len(cards) == len(set(cards)) == sum(topology.parse(name).counts.values())
    assert len(ports) == len(set(ports))


def test_only_a_privileged_container_is_told_which_cards_it_may_use(tmp_path):
    for hardware in NPUS:
        services = yaml.safe_load(render(plan(hardware, "1e1pd", tmp_path / hardware)).compose)["services"]
        environment = services["prefill-decode-0"]["environment"]
        assert environment.get("ASCEND_RT_VISIBLE_DEVICES") == ("1" if hardware == "a5" else None)


def test_sizes_of_both_sides_are_told_to_prefill_and_decode(tmp_path):
    parallel = {"prefill": topology.Parallel(2, 1), "decode": topology.Parallel(1, 4)}
    services = yaml.safe_load(render(plan("a3", "1e1p1d", tmp_path, parallel)).compose)["services"]
    prefill, decode = services["prefill-0"], services["decode-0"]
    assert prefill["environment"]["EPD_TENSOR_PARALLEL_SIZE"] == "2"
    assert prefill["environment"]["EPD_PEER_DATA_PARALLEL_SIZE"] == "4"
    assert decode["environment"]["EPD_PEER_TENSOR_PARALLEL_SIZE"] == "2"
    assert (len(prefill["devices"]), len(decode["devices"])) == (2, 4)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_proxy_understands_what_it_is_told_and_opens_no_second_door(name, tmp_path):
    services = yaml.safe_load(config(plan("a3", name, tmp_path), tmp_path / "files"))["services"]
    told = load_config(services["proxy"]["command"], {})
    urls = [url for stage in told.topology.stages().values() for url in stage]
    assert sorted(url.rpartition(":")[2] for url in urls) == sorted(
        services[i]["environment"]["EPD_PORT"] for i in services if i[-1].isdigit()
    )
    if "decode" in topology.parse(name).counts:
        assert (told.metaserver.host, told.metaserver.advertise_url) == ("127.0.0.1", "http://127.0.0.1:8001")


@pytest.mark.parametrize("hardware", NPUS)
def test_the_overlays(hardware, tmp_path):
    made = plan(hardware, "1e1p1d", tmp_path)
    services = yaml.safe_load(config(made, tmp_path / "files", "runtime-ascend", "non-root"))["services"]
    for name in ("encode-0", "prefill-0", "decode-0"):
        assert services[name]["runtime"] == "ascend"
        assert services[name]["user"] == "1000:1000"
        assert not services[name].get("devices")
        assert not services[name].get("cap_add")
    assert services["decode-0"]["environment"]["ASCEND_VISIBLE_DEVICES"] == "2"
    assert "runtime" not in services["proxy"]


@pytest.mark.parametrize("hardware", NPUS)
def test_the_overlays_equal_the_golden_copy(hardware, tmp_path):
    texts = render(plan(hardware, "1e1p1d", tmp_path)).overlays
    found = "".join(f"### {name}.yaml\n{text}" for name, text in texts.items())
    golden = GOLDEN / f"overlays-1e1p1d-{hardware}.txt"
    if os.environ.get("EPD_UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


def test_two_hosts_get_a_file_each_and_the_proxy_is_told_of_all(tmp_path):
    first = plan("a2", "1e1pd", tmp_path).head
    second = type(first)(**{**vars(first), "name": "node-b", "address": "10.0.0.8", "roles": ("prefill-decode",)})
    made = placing.make(topology.parse("1e2pd"), [first, second], None, LIMITS)
    texts = [config(made, tmp_path / host.name, host=host) for host in made.hosts]
    services = [yaml.safe_load(text)["services"] for text in texts]
    assert set(services[1]) == {"prefill-decode-0", "prefill-decode-1"}
    assert {"mooncake-master", "mooncake-store", "encode-0", "proxy"} == set(services[0])
    command = services[0]["proxy"]["command"]
    assert command[:2] == ["--encode", "http://10.0.0.7:8100"]
    assert command[2:] == ["--prefill-decode", "http://10.0.0.8:8400", "http://10.0.0.8:8401",
                           "--store", "http://10.0.0.7:8503", "http://10.0.0.7:8512"]  # fmt: skip
    environment = services[1]["prefill-decode-1"]["environment"]
    assert environment["EPD_BIND_HOST"] == environment["EPD_ADVERTISE_HOST"] == "10.0.0.8"
    assert environment["EPD_MOONCAKE_HOST"] == "10.0.0.7"
