"""The EPD_ variables of one container, read once and checked."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epd_serve.hardware import HARDWARE
from epd_serve.reading import Reader
from epd_serve.roles import EC_ROLES, ROLES, VLLM_ROLES

EC_STORES = ("mooncake", "shared_dir", "example")
"""Where embeddings are kept; `example` is vLLM's own ECExampleConnector, whose files nobody removes."""


class ConfigurationError(ValueError):
    """The environment asks for something that cannot work; the message lists each fault with its remedy."""


@dataclass(frozen=True)
class MooncakePorts:
    """TCP ports of the embeddings' pool. Mooncake 0.3.13's defaults; on a host network they may be taken."""

    rpc: int = 50051
    metadata: int = 8080
    metrics: int = 9003
    store: int = 50052
    store_http: int = 9300


@dataclass(frozen=True)
class Parallel:
    """How many cards one instance spans: tensor-parallel size times data-parallel size."""

    tensor: int
    data: int


@dataclass(frozen=True)
class Settings:
    """The EPD_ variables of one container, checked."""

    hardware: str
    model: str
    served_model_name: str
    bind_host: str
    port: int
    advertise_host: str
    ec_store: str
    ec_shared_dir: str
    ec_copy_in_hooks: bool
    mooncake_host: str
    mooncake_ports: MooncakePorts
    store_size_mb: int
    ec_metrics_port: int
    kv_port: int
    parallel: Parallel
    peer_parallel: Parallel
    """Of the other side of the KV transfer: decode for a prefill instance and the reverse."""
    expert_parallel: bool
    interface: str
    max_model_len: int | None
    max_num_seqs: int | None
    allowed_media_domains: tuple[str, ...]
    """The hosts that clients' media may be fetched from; all where there are none."""
    extra_args: tuple[str, ...]
    probe: bool
    """Whether to look at cards and libraries before vLLM starts."""
    proxy_tls: bool
    """Whether the proxy serves HTTPS, which its health check then has to speak."""

    @property
    def mooncake_metadata(self) -> str:
        """How Mooncake's clients find each other; the same for all of a pool."""
        if HARDWARE[self.hardware].npu:
            # The connector shares the transfer engine of vllm-ascend 0.23.0's KV connectors, which asks no server.
            return "P2PHANDSHAKE"
        return f"http://{self.mooncake_host}:{self.mooncake_ports.metadata}/metadata"


def read_settings(role: str, environ: Mapping[str, str]) -> Settings:
    """Return the checked settings of a role.

    Raises:
        ConfigurationError: one or more variables, or the role, are wrong; the message lists all of them.
    """
    read = Reader(environ)
    if role not in ROLES:
        read.faults.append(f"role {role!r}: expected one of {', '.join(ROLES)}")
    parallel = _parallel(read, "EPD")
    # Several instances of a role may meet on one address: each adds its number to the role's ports.
    index = read.number("EPD_INSTANCE_INDEX", 0, 0, 99)
    model = read.text("EPD_MODEL", "/opt/ascend-epd/tiny-model")
    hardware = read.choice("EPD_HARDWARE", "cpu", tuple(HARDWARE))
    settings = Settings(
        hardware=hardware,
        model=model,
        served_model_name=read.text("EPD_SERVED_MODEL_NAME", model.rstrip("/").rsplit("/", 1)[-1]),
        bind_host=read.text("EPD_BIND_HOST", "0.0.0.0"),
        port=read.number("EPD_PORT", 8000, 1, 65535) + index,
        advertise_host=read.peer_host("EPD_ADVERTISE_HOST", role),
        ec_store=read.choice("EPD_EC_STORE", "mooncake", EC_STORES),
        ec_shared_dir=read.text("EPD_EC_SHARED_DIR", "/ec"),
        ec_copy_in_hooks=read.flag("EPD_EC_COPY_IN_HOOKS"),
        mooncake_host=read.peer_host("EPD_MOONCAKE_HOST", "mooncake-master"),
        mooncake_ports=_mooncake_ports(read),
        store_size_mb=read.number("EPD_STORE_SIZE_MB", 512, 16, 16_777_216),
        ec_metrics_port=read.number("EPD_EC_METRICS_PORT", 9400, 1, 65535) + index,
        # The KV connector takes a port for each card.
        kv_port=read.number("EPD_KV_PORT", 36000, 1024, 65000) + index * parallel.tensor * parallel.data,
        parallel=parallel,
        peer_parallel=_parallel(read, "EPD_PEER"),
        expert_parallel=read.flag("EPD_EXPERT_PARALLEL"),
        interface=read.text("EPD_INTERFACE"),
        max_model_len=read.optional_number("EPD_MAX_MODEL_LEN", 16_777_216),
        max_num_seqs=read.optional_number("EPD_MAX_NUM_SEQS", 65536),
        allowed_media_domains=read.words("EPD_ALLOWED_MEDIA_DOMAINS"),
        extra_args=read.words("EPD_EXTRA_ARGS"),
        probe=HARDWARE[hardware].npu and not read.flag("EPD_SKIP_PROBE"),
        proxy_tls=bool(read.text("EPD_PROXY_TLS_CERT")),
    )
    read.faults += _faults(role, settings)
    if read.faults:
        raise ConfigurationError("cannot start:\n" + "\n".join(f"  - {fault}" for fault in read.faults))
    return settings


def _parallel(read: Reader, prefix: str) -> Parallel:
    tensor = read.number(f"{prefix}_TENSOR_PARALLEL_SIZE", 1, 1, 64)
    return Parallel(tensor, read.number(f"{prefix}_DATA_PARALLEL_SIZE", 1, 1, 1024))


def _mooncake_ports(read: Reader) -> MooncakePorts:
    defaults = MooncakePorts()
    return MooncakePorts(
        rpc=read.number("EPD_MOONCAKE_RPC_PORT", defaults.rpc, 1, 65535),
        metadata=read.number("EPD_MOONCAKE_METADATA_PORT", defaults.metadata, 1, 65535),
        metrics=read.number("EPD_MOONCAKE_METRICS_PORT", defaults.metrics, 1, 65535),
        store=read.number("EPD_STORE_PORT", defaults.store, 1, 65535),
        store_http=read.number("EPD_STORE_HTTP_PORT", defaults.store_http, 1, 65535),
    )


def _faults(role: str, settings: Settings) -> list[str]:
    """Return what a role cannot work with, though each value by itself has the right form."""
    found = []
    model, host = settings.model, settings.advertise_host
    if role in VLLM_ROLES and model.startswith("/") and not os.access(Path(model, "config.json"), os.R_OK):
        found.append(
            f"EPD_MODEL={model!r}: no config.json there that user {os.getuid()} can read; "
            "expected a mounted model folder, readable by all, or a hub id"
        )
    if role in VLLM_ROLES and HARDWARE[settings.hardware].npu and not _is_address(host):
        found.append(
            f"EPD_ADVERTISE_HOST={host!r}: expected an IP address on an NPU host: "
            "the transfer engine's id is the address"
        )
    if role in EC_ROLES and settings.ec_store != "mooncake" and not Path(settings.ec_shared_dir).is_dir():
        found.append(
            f"EPD_EC_SHARED_DIR={settings.ec_shared_dir!r}: no directory there; "
            "expected a volume that all instances mount"
        )
    return found


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
