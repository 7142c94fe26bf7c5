"""What Compose makes of our files: golden copies, and rules every topology has to keep."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
TOPOLOGIES = sorted(path.stem for path in (ROOT / "compose").glob("*e*.yaml") if path.stem[0].isdigit())


def compose_config(topology, **environ):
    """Return what `docker compose config` prints for a topology, away from the caller's own settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_", "HF_"))}
    done = subprocess.run(
        ["docker", "compose", "--env-file", "/dev/null", "-f", f"compose/{topology}.yaml", "config"],
        cwd=ROOT, env=clean | environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_config_equals_the_golden_copy(topology):
    """`EPD_UPDATE_GOLDEN=1 pytest tests/compose` writes the copies anew; read their diff before you commit it."""
    golden = GOLDEN / f"{topology}-cpu.yaml"
    found = compose_config(topology)
    if os.environ.get("EPD_UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_service_is_hardened_bounded_and_healthy_before_its_dependants(topology):
    services = yaml.safe_load(compose_config(topology))["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["restart"] == "unless-stopped", name
        assert int(service["mem_limit"]) > 0, name
        assert int(service["pids_limit"]) > 0, name
        assert "privileged" not in service, name
        assert service["logging"]["options"]["max-size"], name
        assert all(d["condition"] == "service_healthy" for d in service.get("depends_on", {}).values()), name


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_only_the_proxy_is_published_and_only_on_loopback(topology):
    services = yaml.safe_load(compose_config(topology))["services"]
    assert [name for name, service in services.items() if service.get("ports")] == ["proxy"]
    assert {port["host_ip"] for port in services["proxy"]["ports"]} == {"127.0.0.1"}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_instance_advertises_the_name_it_is_reached_by(topology):
    services = yaml.safe_load(compose_config(topology))["services"]
    for name, service in services.items():
        if "EPD_MODEL" in service.get("environment", {}) or name == "mooncake-store":
            assert service["environment"]["EPD_ADVERTISE_HOST"] == name


def test_compose_yaml_in_the_root_starts_1e1pd_without_settings():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_", "HF_"))}
    done = subprocess.run(
        ["docker", "compose", "--env-file", "/dev/null", "-f", "compose.yaml", "config"],
        cwd=ROOT, env=clean, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == compose_config("1e1pd")


def test_files_of_the_proxy_are_mounted_and_named_only_where_they_are_given():
    keys = "EPD_PROXY_API_KEYS_FILE"
    proxy = yaml.safe_load(compose_config("1e1pd", **{keys: "/etc/keys"}))["services"]["proxy"]
    mounts = {volume["target"]: volume for volume in proxy["volumes"]}
    assert (mounts["/run/secrets/api-keys"]["source"], proxy["environment"][keys]) == (
        "/etc/keys",
        "/run/secrets/api-keys",
    )
    assert not mounts["/run/secrets/api-keys"]["bind"].get("create_host_path")
    for name, value in proxy["environment"].items():
        if name.endswith(("_FILE", "_TLS_CERT", "_TLS_KEY")):
            assert (value in mounts) if name == keys else value == "", name
    assert all(volume["read_only"] for volume in mounts.values())
    others = [volume["source"] for target, volume in mounts.items() if target != "/run/secrets/api-keys"]
    assert set(others) == {"/dev/null"}


def test_an_own_model_folder_is_mounted():
    config = yaml.safe_load(compose_config("1e1pd", EPD_MODELS="/data/models", EPD_MODEL="/models/mine"))
    encode = config["services"]["encode-0"]
    models = next(volume for volume in encode["volumes"] if volume["target"] == "/models")
    assert (models["type"], models["source"], models["read_only"]) == ("bind", "/data/models", True)
    assert encode["environment"]["EPD_MODEL"] == "/models/mine"
