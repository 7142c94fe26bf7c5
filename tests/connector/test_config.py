from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd_connector.config import ConfigError, ConnectorConfig, read_config

GOOD = {"master_server_address": "10.0.0.1:50051"}


def test_only_the_masters_address_is_required() -> None:
    config = read_config(GOOD)
    assert config.metrics_port == 0
    assert config.slab_size_bytes == 256 << 20


def test_every_fault_is_in_one_message() -> None:
    extra = {"store": "disk", "slab_size_mb": "big", "fetch_timeout_ms": True, "metricsport": 1, "slab_dir": "/nowhere"}
    extra["copy_in_hooks"] = 1
    with pytest.raises(ConfigError) as caught:
        read_config(extra, ["a fault of vLLM's configuration"])
    assert len(caught.value.faults) == 7
    for part in (
        "a fault of vLLM's configuration",
        "metricsport: unknown setting, expected one of master_server_address,",
        "store: expected one of mooncake, shared_dir, found 'disk'",
        "slab_size_mb: expected a whole number from 1 to",
        "fetch_timeout_ms: expected a whole number from 1 to 60000, found True",
        "slab_dir: expected a directory",
        "copy_in_hooks: expected true or false, found 1",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("address", ["", "host", "host:", ":50051", "host:0", "host:65536", "host:x", 50051])
def test_address_needs_host_and_port(address: object) -> None:
    with pytest.raises(ConfigError, match="master_server_address: expected"):
        read_config({"master_server_address": address})


def test_each_store_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"master_server_address: missing, expected host:port"):
        read_config({})
    with pytest.raises(ConfigError, match=r"shared_dir_path: missing, expected a directory that all instances see"):
        read_config({"store": "shared_dir"})
    config = read_config({"store": "shared_dir", "shared_dir_path": str(tmp_path), "shared_dir_size_mb": 5})
    assert config.shared_dir_size_mb == 5


@pytest.mark.parametrize("path", ["", ".", "relative", "/nowhere/at/all", "/dev/null", "\0"])
def test_shared_directory_has_to_be_there(path: str) -> None:
    with pytest.raises(ConfigError, match="shared_dir_path: expected an absolute path of a directory that is there"):
        read_config({"store": "shared_dir", "shared_dir_path": path})


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())


@given(st.dictionaries(st.sampled_from([*ConnectorConfig.__dataclass_fields__, "unknown"]), values))
def test_any_json_gives_settings_or_a_list_of_faults(extra: dict[str, object]) -> None:
    faults: tuple[str, ...] = ()
    try:
        config = read_config(extra)
    except ConfigError as error:
        faults = error.faults
    if faults:
        assert all(": " in fault for fault in faults)
    else:
        assert "unknown" not in extra
        assert all(getattr(config, name) == value for name, value in extra.items())
