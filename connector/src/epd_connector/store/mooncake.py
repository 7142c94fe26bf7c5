"""Mooncake Store as backend. This process contributes no memory: the pool belongs to a store service.

Return codes were measured with Mooncake 0.3.13.post1 over TCP: -200 no room, -600 bad argument or not set up, -703
being written, -704 absent, -800 transfer failed (the pool's owner died), -900 master unreachable, -901 master too late.
After a master's restart the client registers itself again without help, and the pool's owner remounts its memory within
about 2 s.
"""

import logging
import os
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import ConfigError, ConnectorConfig
from ..device import Device, TransferMemory
from ..keys import KEY_PREFIX
from .base import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger(__name__)

_NO_SPACE = -200
_BEING_WRITTEN = -703
_ABSENT = -704
_MASTER_UNREACHABLE = -900
_MASTER_TOO_LATE = -901


class MooncakeStore:
    """Client of a Mooncake master. Raises ConfigError when Mooncake is not installed."""

    # Its documents ask for registered memory. TCP goes without, yet a read that was given up might still arrive.
    reaches_any_memory = False

    def __init__(self, config: ConnectorConfig, local_hostname: str, device: Device) -> None:
        self._config = config
        self._local_hostname = local_hostname
        self._device = device
        self._memory: TransferMemory | None = None
        self._module = _import_mooncake(config.rpc_timeout_ms)
        self._client: Any = None

    def connect(self, memory: memoryview) -> None:
        """Set the client up; gives up at once when nothing listens where the master should be."""
        config = self._config
        # Without a master, setup() holds the GIL for 4.4 s a try, and tries 20 times when it may choose the port
        # (measured): every thread of the engine would stand still. So ask first, and choose the port.
        _check_master_listens(config.master_server_address, config.rpc_timeout_ms / 1000)
        engine = self._device.find_engine(self._local_hostname)
        client = self._module.MooncakeDistributedStore()
        code = client.setup(
            f"{self._local_hostname}:{engine.get_rpc_port()}" if engine else _add_port(self._local_hostname),
            config.metadata_server,
            0,
            0,
            config.protocol,
            config.devices,
            config.master_server_address,
            **({"engine": engine.get_engine()} if engine else {}),
        )
        if code != 0:
            raise StoreUnavailableError(f"Mooncake setup with {config.master_server_address} returned {code}")
        if self._memory is None:  # a second attempt has it already
            self._memory = self._device.open_memory(memory)
        # vllm-ascend's own wrapper registers once in a process, and a KV connector may have been first.
        register = engine.register_memory if engine else client.register_buffer
        code = register(self._memory.address, self._memory.size_bytes)
        if code != 0:
            client.close()
            raise StoreError(f"Mooncake could not register {len(memory)} bytes: {code}")
        self._client = client

    def exists(self, key: str) -> bool:
        """See Store."""
        # The code is -900 for an unreachable master, and bool(-900) is True: compare, never convert.
        return bool(_checked(self._ready()[0].is_exist(key), "is_exist") == 1)

    def find_size(self, key: str) -> int | None:
        """See Store."""
        return _size_or_none(self._ready()[0].get_size(key), "get_size")

    def put(self, key: str, parts: Sequence[memoryview]) -> None:
        """See Store."""
        client, memory = self._ready()
        parts = [part for part in parts if len(part)]
        for part in parts:
            memory.push(part)
        addresses, sizes = [memory.find_address(part) for part in parts], [len(part) for part in parts]
        (code,) = client.batch_put_from_multi_buffers([key], [addresses], [sizes])
        _checked(code, "batch_put_from_multi_buffers")

    def get(self, key: str, out: memoryview) -> int | None:
        """See Store."""
        client, memory = self._ready()
        size_bytes = _size_or_none(client.get_into(key, memory.find_address(out), len(out)), "get_into")
        if size_bytes is not None:
            memory.pull(out)
        return size_bytes

    def remove(self, key: str) -> None:
        """See Store."""
        code = self._ready()[0].remove(key, True)
        if code != _ABSENT:
            _checked(code, "remove")

    def remove_all(self) -> int:
        """See Store. What others keep in the pool stays."""
        return _checked(self._ready()[0].remove_by_regex(f"^{KEY_PREFIX}/", True), "remove_by_regex")

    def close(self) -> None:
        """See Store."""
        # Any later call on a closed client crashes the process (measured): drop it first.
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _ready(self) -> tuple[Any, TransferMemory]:
        client, memory = self._client, self._memory
        if client is None or memory is None:
            raise StoreUnavailableError("Mooncake is not connected yet")
        return client, memory


def _import_mooncake(rpc_timeout_ms: int) -> "ModuleType":
    # Mooncake reads its environment when it is loaded. Without a limit a hung master blocks a call for 30 s.
    os.environ.setdefault("MC_RPC_TIMEOUT_MS", str(rpc_timeout_ms))
    try:
        from mooncake import store
    except ImportError as error:
        fix = "install mooncake-transfer-engine-non-cuda (or the NPU wheel) with libibverbs1, libnuma1 and libcurl4"
        raise ConfigError([f"store: mooncake cannot be imported ({error}): {fix}"]) from error
    module: ModuleType = store
    return module


def _check_master_listens(address: str, timeout_s: float) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        raise StoreUnavailableError(f"Mooncake's master {address} does not answer: {error}") from error


def _add_port(host: str) -> str:
    """Return the address of a client with a port that is free now; one with a port stays as it is."""
    if re.fullmatch(r".+\]:\d+|[^:]+:\d+", host):
        return host
    is_ipv6 = ":" in host
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"[{host.strip('[]')}]:{port}" if is_ipv6 else f"{host}:{port}"


def _size_or_none(code: int, operation: str) -> int | None:
    # What is being written is as good as absent, and no fault of the store.
    return None if code in (_ABSENT, _BEING_WRITTEN) else _checked(code, operation)


def _checked(code: int, operation: str) -> int:
    if code >= 0:
        return code
    if code == _NO_SPACE:
        raise StoreFullError(f"Mooncake {operation} returned {code}: the pool has no room")
    if code == _MASTER_UNREACHABLE:
        raise StoreUnavailableError(f"Mooncake {operation} returned {code}: the master does not answer")
    if code == _MASTER_TOO_LATE:
        raise StoreTimeoutError(f"Mooncake {operation} returned {code}: the master did not answer in time")
    raise StoreError(f"Mooncake {operation} returned {code}")
