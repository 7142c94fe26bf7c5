import pytest

from epd_connector.config import ConfigError, read_config

GOOD = {"master_server_address": "10.0.0.1:50051"}


def test_only_the_masters_address_is_required() -> None:
    config = read_config(GOOD)
    assert config.metrics_port == 0
    assert config.slab_size_bytes == 256 << 20


def test_every_fault_is_in_one_message() -> None:
    extra = {"store": "disk", "slab_size_mb": "big", "fetch_timeout_ms": True, "metricsport": 1, "slab_dir": "/nowhere"}
    with pytest.raises(ConfigError) as caught:
        read_config(extra, ["a fault of vLLM's configuration"])
    assert len(caught.value.faults) == 7
    for part in (
        "a fault of vLLM's configuration",
        "metricsport: unknown setting, expected one of master_server_address,",
        "store: expected one of mooncake, found 'disk'",
        "slab_size_mb: expected a whole number from 1 to",
        "fetch_timeout_ms: expected a whole number from 1 to 60000, found True",
        "slab_dir: expected a directory",
        "master_server_address: missing",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("address", ["", "host", "host:", ":50051", "host:0", "host:65536", "host:x", 50051])
def test_address_needs_host_and_port(address: object) -> None:
    with pytest.raises(ConfigError, match="master_server_address: expected"):
        read_config({"master_server_address": address})
