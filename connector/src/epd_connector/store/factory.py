"""Makes the backend that the configuration names."""

from collections.abc import Callable
from pathlib import Path

from ..config import ConnectorConfig
from ..device import Device
from .base import Store


def make_store(config: ConnectorConfig, find_host_address: Callable[[], str], device: Device) -> Store:
    """Return the backend, not connected yet. Raises ConfigError when what it needs is not installed.

    ``find_host_address`` is asked when the configuration names no address of this host and the backend needs one;
    ``device`` is where its transfers run.
    """
    # Imported here: a process loads only the client that it uses.
    if config.store == "shared_dir":
        from .shared_dir import SharedDirStore

        return SharedDirStore(Path(config.shared_dir_path), config.shared_dir_size_mb << 20)
    from .mooncake import MooncakeStore

    return MooncakeStore(config, config.local_hostname or find_host_address(), device)
