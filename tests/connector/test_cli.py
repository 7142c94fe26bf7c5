"""The command epd-ec against a real pool and a real directory."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mooncake_pool import MooncakePool, find_port

from epd_connector import cli
from epd_connector.config import ConnectorConfig, read_config
from epd_connector.device import HostDevice
from epd_connector.keys import KEY_PREFIX
from epd_connector.metrics import Collector, Metrics, MetricsServer
from epd_connector.store.factory import make_store

MODELS = ("a" * 64, "b" * 64)
SIZE_BYTES = 100_000


@pytest.fixture(params=["mooncake", "shared_dir"])
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Arguments that name the store."""
    if request.param == "shared_dir":
        return ["--store", "shared_dir", "--shared-dir", str(tmp_path), "--shared-dir-size-mb", "64"]
    pool: MooncakePool = request.getfixturevalue("pool")
    addresses = ["--master", pool.master_address, "--metadata-server", pool.metadata_server]
    return [*addresses, "--master-metrics", pool.metrics_url]


@pytest.fixture
def config(words: list[str], tmp_path: Path) -> ConnectorConfig:
    if "shared_dir" in words:
        return read_config({"store": "shared_dir", "shared_dir_path": str(tmp_path), "shared_dir_size_mb": 64})
    return read_config({"master_server_address": words[1], "metadata_server": words[3], "local_hostname": "127.0.0.1"})


@pytest.fixture
def buffer(config: ConnectorConfig) -> Iterator[memoryview]:
    """Three embeddings of two models, and in Mooncake one object of somebody else; the buffer they came from."""
    store = make_store(config, lambda: "127.0.0.1", HostDevice())
    slab = memoryview(bytearray(SIZE_BYTES))
    store.connect(slab)
    keys = [f"{KEY_PREFIX}/{MODELS[number % 2]}/{number:064x}" for number in range(3)]
    for key in [*keys, *(["other/object"] if config.store == "mooncake" else [])]:
        store.put(key, [slab])
    yield slab
    store.close()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert cli.main([*words, "--json"], {}) == 0
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_stat_counts_embeddings_and_bytes(words, config, buffer, capsys) -> None:
    report = run(capsys, "stat", *words)
    assert report["objects"] == 3
    assert report["capacity_bytes"] == 64 << 20
    if config.store == "mooncake":
        assert report["objects_by_model"] == {MODELS[0]: 2, MODELS[1]: 1}
        assert report["evicted_objects"] == 0
        assert 4 * SIZE_BYTES <= report["used_bytes"] < 5 * SIZE_BYTES  # the other's object too
    else:
        assert report["used_bytes"] == 3 * SIZE_BYTES


def test_purge_removes_every_embedding_also_under_lease_and_nothing_else(words, config, buffer, capsys) -> None:
    store = make_store(config, lambda: "127.0.0.1", HostDevice())
    store.connect(memoryview(bytearray(4096)))
    assert store.exists(f"{KEY_PREFIX}/{MODELS[0]}/{0:064x}")  # takes a lease of Mooncake's
    assert run(capsys, "purge", *words)["removed_objects"] == 3
    assert run(capsys, "stat", *words)["objects"] == 0
    if config.store == "mooncake":
        assert store.exists("other/object")
    assert run(capsys, "purge", *words)["removed_objects"] == 0
    store.close()


def test_check_measures_a_round_trip_and_leaves_nothing(words, buffer, capsys) -> None:
    report = run(capsys, "check", *words, "--object-mb", "2")
    assert report["size_bytes"] == 2 << 20
    assert report["put_s"] > 0
    assert report["get_bytes_per_s"] == pytest.approx((2 << 20) / report["get_s"])
    assert run(capsys, "stat", *words)["objects"] == 3


def test_check_notices_a_pool_that_has_lost_its_memory(pool, capsys) -> None:
    pool.kill_owner()
    addresses = ["--master", pool.master_address, "--metadata-server", pool.metadata_server]
    assert cli.main(["check", *addresses], {}) == 1
    assert "epd-ec: " in capsys.readouterr().err


def test_check_notices_bytes_that_changed(tmp_path, monkeypatch, capsys) -> None:
    from epd_connector.store import shared_dir

    write = shared_dir._write
    monkeypatch.setattr(shared_dir, "_write", lambda path, parts: write(path, [b"".join(parts)[:-1] + b"?"]))
    words = ["--store", "shared_dir", "--shared-dir", str(tmp_path)]
    results = [cli.main(["check", *words, "--object-mb", "1"], {}) for _ in range(2)]  # "?" may be the right byte
    assert 1 in results
    assert "other bytes than it was given" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stat", "check", "purge"])
def test_no_master_is_said_at_once_with_its_address(command, capsys) -> None:
    address = f"127.0.0.1:{find_port()}"
    assert cli.main([command, "--master", address, "--master-metrics", f"http://{address}"], {}) == 1
    error = capsys.readouterr().err
    assert address in error
    assert "refused" in error


def test_wrong_metrics_port_is_said(pool, capsys) -> None:
    pool_of_http = pool.metadata_server.removesuffix("/metadata")
    assert cli.main(["stat", "--master-metrics", pool_of_http], {}) == 1
    assert pool_of_http in capsys.readouterr().err


def test_stat_adds_up_the_hits_of_its_consumers(tmp_path, capsys) -> None:
    words = ["--store", "shared_dir", "--shared-dir", str(tmp_path)]
    servers, urls = [], []
    for hits, encodes in ((5, 1), (4, 2)):
        metrics, port = Metrics(), find_port()
        metrics.count("epd_ec_hits", hits)
        metrics.count("epd_ec_local_encodes", encodes)
        gauges = {"epd_ec_breaker_open": lambda: 0.0, "epd_ec_slab_used_bytes": lambda: 0.0}
        servers.append(MetricsServer(Collector([metrics.snapshot], gauges), "127.0.0.1", port))
        urls += ["--instance-metrics", f"http://127.0.0.1:{port}/metrics"]
    (tmp_path / "epd-ec-v1").mkdir()
    report = run(capsys, "stat", *words, *urls)
    assert (report["hits"], report["local_encodes"], report["hit_rate"]) == (9, 3, 0.75)
    servers.pop().close()
    assert cli.main(["stat", *words, *urls], {}) == 1  # half of the sum would pass for the whole
    servers.pop().close()


def test_variables_of_the_container_are_the_defaults(tmp_path, capsys) -> None:
    environ = {
        "EPD_EC_STORE": "shared_dir",
        "EPD_EC_SHARED_DIR": str(tmp_path),
        "EPD_STORE_SIZE_MB": "7",
        "EPD_EC_METRICS_PORT": str(find_port()),
    }
    assert cli.main(["stat"], environ) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for expected in (["capacity", "7.0", "MiB"], ["objects", "0"], ["hit", "rate", "unknown"]):
        assert expected in lines


@pytest.mark.parametrize("size", ["0", "1025", "x", "-1"])
def test_wrong_object_size_is_refused(size, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", "--object-mb", size], {})
    assert caught.value.code == 2
    assert "expected a whole number from 1 to 1024" in capsys.readouterr().err
