"""Settings from ``ec_connector_extra_config``, validated at once: every fault in one message."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

STORES = ("mooncake", "shared_dir")
PROTOCOLS = ("tcp", "rdma")


class ConfigError(ValueError):
    """The connector cannot start with this configuration; the message lists every fault and its fix."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n  - {fault}" for fault in self.faults)
        super().__init__(f"epd_connector cannot start, {len(self.faults)} fault(s) in its configuration:{lines}")


@dataclass(frozen=True)
class ConnectorConfig:
    """All settings, with units in their names; README.md of the package explains each."""

    master_server_address: str = ""
    store: str = "mooncake"
    metadata_server: str = "P2PHANDSHAKE"
    local_hostname: str = ""
    protocol: str = "tcp"
    devices: str = ""
    rpc_timeout_ms: int = 500
    shared_dir_path: str = ""
    shared_dir_size_mb: int = 1024
    namespace: str = ""
    slab_dir: str = "/dev/shm"  # noqa: S108 - shared memory between the ranks of one engine is the purpose
    slab_size_mb: int = 256
    copy_in_hooks: bool = False
    fetch_timeout_ms: int = 500
    sync_fetch_timeout_ms: int = 200
    arrival_timeout_ms: int = 5000
    publish_timeout_ms: int = 1000
    probe_interval_ms: int = 1000
    ready_ttl_s: int = 60
    io_threads: int = 2
    metrics_host: str = "0.0.0.0"
    metrics_port: int = 0

    @property
    def slab_size_bytes(self) -> int:
        """Budget of shared memory on this host, in bytes."""
        return self.slab_size_mb << 20


_RANGES: dict[str, tuple[int, int]] = {
    "rpc_timeout_ms": (50, 60_000),
    "shared_dir_size_mb": (1, 1 << 30),
    "slab_size_mb": (1, 1 << 20),
    "fetch_timeout_ms": (1, 60_000),
    "sync_fetch_timeout_ms": (0, 10_000),
    "arrival_timeout_ms": (1, 60_000),
    "publish_timeout_ms": (1, 60_000),
    "probe_interval_ms": (50, 60_000),
    "ready_ttl_s": (1, 86_400),
    "io_threads": (1, 32),
    "metrics_port": (0, 65_535),
}

_SWITCHES = ("copy_in_hooks",)


def _is_host_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65_536


def _is_directory(text: str) -> bool:
    return Path(text).is_absolute() and Path(text).is_dir()


_TEXTS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "store": (f"one of {', '.join(STORES)}", STORES.__contains__),
    "protocol": (f"one of {', '.join(PROTOCOLS)}", PROTOCOLS.__contains__),
    "master_server_address": ("host:port", _is_host_port),
    "shared_dir_path": ("an absolute path of a directory that is there", _is_directory),
    "slab_dir": ("a directory (a tmpfs such as /dev/shm)", lambda text: Path(text).is_dir()),
}
_NEEDS = {
    "mooncake": ("master_server_address", "host:port of the Mooncake master, e.g. 10.0.0.1:50051"),
    "shared_dir": ("shared_dir_path", "a directory that all instances see, e.g. a mounted volume /ec"),
}


def read_config(extra: Mapping[str, Any], other_faults: Sequence[str] = ()) -> ConnectorConfig:
    """Turn vLLM's extra config into settings.

    ``other_faults`` are those found elsewhere in vLLM's configuration: they join the same message.
    Raises ConfigError when there is any fault.
    """
    known = {field.name: field for field in fields(ConnectorConfig)}
    faults = list(other_faults)
    for name in sorted(set(extra) - set(known)):
        faults.append(f"{name}: unknown setting, expected one of {', '.join(known)}")
    values: dict[str, Any] = {name: value for name, value in extra.items() if name in known}
    for name, value in values.items():
        faults.extend(_check_value(name, value))
    store = values.get("store", STORES[0])
    needed, example = _NEEDS.get(str(store), ("", ""))
    if needed and needed not in values:
        faults.append(f"{needed}: missing, expected {example}")
    if faults:
        raise ConfigError(faults)
    return ConnectorConfig(**values)


def _check_value(name: str, value: object) -> list[str]:
    if name in _SWITCHES:
        wanted, is_good = "true or false", isinstance(value, bool)
    elif name in _RANGES:
        low, high = _RANGES[name]
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        wanted = f"a whole number from {low} to {high}"
        is_good = is_whole and low <= value <= high  # type: ignore[operator]
    else:
        wanted, check = _TEXTS.get(name, ("a string", lambda _: True))
        is_good = isinstance(value, str) and check(value)
    return [] if is_good else [f"{name}: expected {wanted}, found {value!r}"]
