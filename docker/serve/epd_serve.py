#!/usr/bin/python3 -I
"""Turn a role and its environment into the exact command that the container runs, print it, and become it.

    epd-serve ROLE [ARGUMENT…]           run ROLE; further arguments go to its command unchanged
    epd-serve --print ROLE [ARGUMENT…]   only print the command, environment first
    epd-serve health                     health check of the role that this container runs (exit code 0 or 1)

Roles: encode, prefill-decode, prefill, decode, monolith (one ordinary vLLM), mooncake-master, mooncake-store, proxy.

What a role is told comes from environment variables named EPD_…; docs/configuration.md lists them with units and
defaults. A value that cannot work is refused before anything starts, all faults in one message.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

VLLM_ROLES = ("encode", "prefill-decode", "prefill", "decode", "monolith")
EC_ROLES = ("encode", "prefill-decode", "prefill")
ROLES = (*VLLM_ROLES, "mooncake-master", "mooncake-store", "proxy")

# What the health check has to know about the running role.
STATE_DIR = Path("/tmp/epd-serve")  # noqa: S108 - a tmpfs of the container's only user


class ConfigurationError(ValueError):
    """The environment asks for something that cannot work; the message lists each fault with its remedy."""


@dataclass(frozen=True)
class Hardware:
    """What differs between kinds of hardware."""

    flags: tuple[str, ...]
    """vLLM flags of every role."""
    environment: Mapping[str, str]
    """Defaults; what is already set in the container wins."""
    kv_connector: Mapping[str, object]
    """Where vLLM finds the layerwise KV connector, as part of --kv-transfer-config."""
    role_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    role_environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Defaults of single roles, over those of every role."""
    ec_limits: Mapping[str, int] = field(default_factory=dict)
    """Time limits of the EC connector, in ms, that differ from its own."""
    npu: bool = False
    """Whether HCCL and the transfer engine run here: then an instance is known by its IP address."""


def _ascend(environment: Mapping[str, str]) -> Hardware:
    """Return an Ascend profile. From vllm-ascend 0.23.0's documents and code; nothing here was run on an NPU."""
    serving = ("--gpu-memory-utilization", "0.9")
    return Hardware(
        flags=(),
        environment={
            "OMP_PROC_BIND": "false",
            "OMP_NUM_THREADS": "1",
            "TASK_QUEUE_ENABLE": "1",
            "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
            "HCCL_OP_EXPANSION_MODE": "AIV",
            "HCCL_CONNECT_TIMEOUT": "1200",  # seconds
            "HCCL_EXEC_TIMEOUT": "204",  # seconds
            "ASCEND_CONNECT_TIMEOUT": "10000",  # milliseconds
            # CANN writes its logs below HOME, a tmpfs: two files of at most 20 MiB a process instead of ten.
            "ASCEND_HOST_LOG_FILE_NUM": "2",
            **environment,
        },
        # vllm-ascend registers the connector itself.
        kv_connector={"kv_connector": "MooncakeLayerwiseConnector"},
        role_flags={
            # One hundredth of the memory, as no KV cache is allocated. Never --mm-encoder-only, which crashes in 0.23:
            # an encoder holds the weights of the whole model.
            "encode": (
                "--gpu-memory-utilization", "0.01", "--enforce-eager",
                "--max-num-batched-tokens", "114688", "--max-num-seqs", "128",
            ),
            "prefill-decode": serving,
            "prefill": serving,
            "decode": (*serving, "--compilation-config", '{"cudagraph_mode":"FULL_DECODE_ONLY"}'),
            "monolith": serving,
        },
        role_environment={"prefill": {"OMP_NUM_THREADS": "10"}, "decode": {"OMP_NUM_THREADS": "10"}},
        npu=True,
    )  # fmt: skip


HARDWARE: Mapping[str, Hardware] = {
    # Tried on 2 cores and 24 GiB with vLLM 0.23.0.
    "cpu": Hardware(
        flags=("--enforce-eager", "--dtype", "bfloat16"),
        environment={
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several instances share the cores
        },
        kv_connector={
            "kv_connector": "MooncakeLayerwiseConnector",
            "kv_connector_module_path": "epd_connector.cpu.layerwise",
        },
        # All instances share a few cores, and a decode instance that waits for KV keeps one of them busy.
        ec_limits={"fetch_timeout_ms": 2000, "publish_timeout_ms": 2000},
    ),
    # HCCL_INTRA_ROCE_ENABLE: the compose file says 1 where the cards have a RoCE network.
    "a2": _ascend({"HCCL_INTRA_ROCE_ENABLE": "0"}),
    "a3": _ascend({}),
    "a5": _ascend({}),
}


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
    extra_args: tuple[str, ...]


class _Reader:
    """Reads typed values from an environment and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def text(self, name: str, default: str = "") -> str:
        return self._environ.get(name, "").strip() or default

    def number(self, name: str, default: int, low: int, high: int) -> int:
        value = self.text(name, str(default))
        if value.isdecimal() and low <= int(value) <= high:
            return int(value)
        self.faults.append(f"{name}={value!r}: expected a whole number from {low} to {high}")
        return default

    def optional_number(self, name: str, high: int) -> int | None:
        return self.number(name, 1, 1, high) if self.text(name) else None

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        value = self.text(name, default)
        if value not in choices:
            self.faults.append(f"{name}={value!r}: expected one of {', '.join(choices)}")
            return default
        return value

    def flag(self, name: str) -> bool:
        return self.choice(name, "0", ("0", "1")) == "1"

    def parallel(self, prefix: str) -> Parallel:
        tensor = self.number(f"{prefix}_TENSOR_PARALLEL_SIZE", 1, 1, 64)
        return Parallel(tensor, self.number(f"{prefix}_DATA_PARALLEL_SIZE", 1, 1, 1024))

    def mooncake_ports(self) -> MooncakePorts:
        defaults = MooncakePorts()
        return MooncakePorts(
            rpc=self.number("EPD_MOONCAKE_RPC_PORT", defaults.rpc, 1, 65535),
            metadata=self.number("EPD_MOONCAKE_METADATA_PORT", defaults.metadata, 1, 65535),
            metrics=self.number("EPD_MOONCAKE_METRICS_PORT", defaults.metrics, 1, 65535),
            store=self.number("EPD_STORE_PORT", defaults.store, 1, 65535),
            store_http=self.number("EPD_STORE_HTTP_PORT", defaults.store_http, 1, 65535),
        )

    def words(self, name: str) -> tuple[str, ...]:
        try:
            return tuple(shlex.split(self.text(name)))
        except ValueError as error:
            self.faults.append(f"{name}={self.text(name)!r}: not words as a shell reads them ({error})")
            return ()

    def peer_host(self, name: str, default: str) -> str:
        """Return a name under which *other* containers reach a host."""
        value = self.text(name, default)
        if value in ("0.0.0.0", "::", "localhost", "127.0.0.1", "::1"):
            self.faults.append(f"{name}={value!r}: other hosts cannot reach that; expected a name or address they can")
        return value


def read_settings(role: str, environ: Mapping[str, str]) -> Settings:
    """Return the checked settings of a role.

    Raises:
        ConfigurationError: one or more variables, or the role, are wrong; the message lists all of them.
    """
    read = _Reader(environ)
    if role not in ROLES:
        read.faults.append(f"role {role!r}: expected one of {', '.join(ROLES)}")
    model = read.text("EPD_MODEL", "/opt/ascend-epd/tiny-model")
    settings = Settings(
        hardware=read.choice("EPD_HARDWARE", "cpu", tuple(HARDWARE)),
        model=model,
        served_model_name=read.text("EPD_SERVED_MODEL_NAME", model.rstrip("/").rsplit("/", 1)[-1]),
        bind_host=read.text("EPD_BIND_HOST", "0.0.0.0"),
        port=read.number("EPD_PORT", 8000, 1, 65535),
        advertise_host=read.peer_host("EPD_ADVERTISE_HOST", role),
        ec_store=read.choice("EPD_EC_STORE", "mooncake", ("mooncake", "shared_dir")),
        ec_shared_dir=read.text("EPD_EC_SHARED_DIR", "/ec"),
        mooncake_host=read.peer_host("EPD_MOONCAKE_HOST", "mooncake-master"),
        mooncake_ports=read.mooncake_ports(),
        store_size_mb=read.number("EPD_STORE_SIZE_MB", 512, 16, 16_777_216),
        ec_metrics_port=read.number("EPD_EC_METRICS_PORT", 9400, 1, 65535),
        kv_port=read.number("EPD_KV_PORT", 36000, 1024, 65000),
        parallel=read.parallel("EPD"),
        peer_parallel=read.parallel("EPD_PEER"),
        expert_parallel=read.flag("EPD_EXPERT_PARALLEL"),
        interface=read.text("EPD_INTERFACE"),
        max_model_len=read.optional_number("EPD_MAX_MODEL_LEN", 16_777_216),
        max_num_seqs=read.optional_number("EPD_MAX_NUM_SEQS", 65536),
        extra_args=read.words("EPD_EXTRA_ARGS"),
    )
    if role in VLLM_ROLES and model.startswith("/") and not os.access(Path(model, "config.json"), os.R_OK):
        read.faults.append(
            f"EPD_MODEL={model!r}: no config.json there that user {os.getuid()} can read; "
            "expected a mounted model folder, readable by all, or a hub id"
        )
    if role in VLLM_ROLES and HARDWARE[settings.hardware].npu and not _is_address(settings.advertise_host):
        found = f"EPD_ADVERTISE_HOST={settings.advertise_host!r}"
        read.faults.append(f"{found}: expected an IP address on an NPU host: the transfer engine's id is the address")
    if role in EC_ROLES and settings.ec_store == "shared_dir" and not Path(settings.ec_shared_dir).is_dir():
        found = f"EPD_EC_SHARED_DIR={settings.ec_shared_dir!r}"
        read.faults.append(f"{found}: no directory there; expected a volume that all instances mount")
    if read.faults:
        raise ConfigurationError("cannot start:\n" + "\n".join(f"  - {fault}" for fault in read.faults))
    return settings


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def vllm_environment(role: str, settings: Settings) -> dict[str, str]:
    """Return the defaults of a vLLM role's environment."""
    hardware = HARDWARE[settings.hardware]
    environment = {**hardware.environment, **hardware.role_environment.get(role, {})}
    if hardware.npu:
        environment |= {"VLLM_HOST_IP": settings.advertise_host, "HCCL_IF_IP": settings.advertise_host}
        if settings.interface:
            names = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
            environment |= dict.fromkeys(names, settings.interface)
    return environment


def ec_transfer_config(role: str, settings: Settings) -> dict[str, object]:
    """Return vLLM's --ec-transfer-config; keys under the extra config are those of connector/README.md."""
    return {
        "ec_connector": "ECMooncakeStoreConnector",
        "ec_connector_module_path": "epd_connector.connector",
        "ec_role": "ec_producer" if role == "encode" else "ec_consumer",
        "ec_connector_extra_config": {
            **ec_store_config(settings),
            **HARDWARE[settings.hardware].ec_limits,
            "metrics_host": settings.bind_host,
            "metrics_port": settings.ec_metrics_port,
        },
    }


def ec_store_config(settings: Settings) -> dict[str, object]:
    """Return the part of the EC connector's configuration that says where embeddings are kept."""
    if settings.ec_store == "shared_dir":
        return {
            "store": "shared_dir",
            "shared_dir_path": settings.ec_shared_dir,
            "shared_dir_size_mb": settings.store_size_mb,
        }
    return {
        "store": "mooncake",
        "master_server_address": f"{settings.mooncake_host}:{settings.mooncake_ports.rpc}",
        "metadata_server": f"http://{settings.mooncake_host}:{settings.mooncake_ports.metadata}/metadata",
        "local_hostname": settings.advertise_host,
    }


def kv_transfer_config(role: str, settings: Settings) -> dict[str, object]:
    """Return vLLM's --kv-transfer-config of a prefill or decode instance; each side has to know the sizes of both.

    No engine_id: vLLM draws a new one at each start. Prefill remembers the addresses of a decode instance by that id,
    so one that came back under the same id would be sent its KV to where it no longer listens
    (docs/layerwise-on-cpu.md).
    """
    own, peer = settings.parallel, settings.peer_parallel
    prefill, decode = (own, peer) if role == "prefill" else (peer, own)
    return {
        **HARDWARE[settings.hardware].kv_connector,
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
        "kv_port": str(settings.kv_port),
        "kv_connector_extra_config": {
            "prefill": {"dp_size": prefill.data, "tp_size": prefill.tensor},
            "decode": {"dp_size": decode.data, "tp_size": decode.tensor},
        },
    }


def vllm_command(role: str, settings: Settings) -> list[str]:
    """Return the command line of one vLLM instance.

    The module is named instead of the `vllm` command, which fails where the package is vllm-cpu.
    """
    hardware = HARDWARE[settings.hardware]
    command = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model]
    command += ["--served-model-name", settings.served_model_name]
    command += ["--host", settings.bind_host, "--port", str(settings.port), "--enable-request-id-headers"]
    if settings.max_model_len:
        command += ["--max-model-len", str(settings.max_model_len)]
    role_flags = hardware.role_flags.get(role, ())
    if settings.max_num_seqs and "--max-num-seqs" not in role_flags:
        command += ["--max-num-seqs", str(settings.max_num_seqs)]
    command += [*parallel_flags(settings), *hardware.flags, *role_flags]
    if role == "encode":
        # An encode-only instance allocates no KV cache, so there is no prefix to keep.
        command += ["--no-enable-prefix-caching"]
    if role in EC_ROLES:
        command += ["--ec-transfer-config", json.dumps(ec_transfer_config(role, settings))]
    if role in ("prefill", "decode"):
        command += ["--kv-transfer-config", json.dumps(kv_transfer_config(role, settings))]
    return command


def parallel_flags(settings: Settings) -> list[str]:
    """Return vLLM's flags for an instance that spans several cards; none for one card."""
    flags = []
    if settings.parallel.tensor > 1:
        flags += ["--tensor-parallel-size", str(settings.parallel.tensor)]
    if settings.parallel.data > 1:
        flags += ["--data-parallel-size", str(settings.parallel.data)]
    if settings.expert_parallel:
        flags += ["--enable-expert-parallel"]
    return flags


def master_command(settings: Settings) -> list[str]:
    """Return the command of Mooncake's master with its HTTP metadata server."""
    return [
        "mooncake_master",
        f"--rpc_port={settings.mooncake_ports.rpc}",
        f"--metrics_port={settings.mooncake_ports.metrics}",
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_port={settings.mooncake_ports.metadata}",
        # Or the address of a client that died stays, and its successor is refused.
        "--enable_metadata_cleanup_on_timeout=true",
        "--enable_metric_reporting=false",  # a log line of 2 kB every ten seconds; /metrics is not concerned
        "--logtostderr=true",
    ]


def store_command(settings: Settings) -> list[str]:
    """Return the command of the standalone client that owns the pool's memory, so it survives a vLLM restart."""
    return [
        "mooncake_client",
        f"--host={settings.advertise_host}",
        f"--port={settings.mooncake_ports.store}",
        f"--global_segment_size={settings.store_size_mb}MB",
        "--local_buffer_size=16MB",
        "--protocol=tcp",
        f"--master_server_address={settings.mooncake_host}:{settings.mooncake_ports.rpc}",
        f"--metadata_server=http://{settings.mooncake_host}:{settings.mooncake_ports.metadata}/metadata",
        "--enable_http_server=true",
        f"--http_port={settings.mooncake_ports.store_http}",
        "--logtostderr=true",
    ]


def build_command(role: str, settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Return the whole command of a role; `arguments` and then EPD_EXTRA_ARGS come last, so that they win."""
    if role in VLLM_ROLES:
        command = vllm_command(role, settings)
    elif role == "mooncake-master":
        command = master_command(settings)
    elif role == "mooncake-store":
        command = store_command(settings)
    else:
        command = ["epd-proxy", "--host", settings.bind_host, "--port", str(settings.port)]
    return [*command, *arguments, *settings.extra_args]


def health_url(role: str, settings: Settings) -> str:
    """Return the URL that answers 200 when the role works."""
    ports = {"mooncake-master": settings.mooncake_ports.metrics, "mooncake-store": settings.mooncake_ports.store_http}
    wildcard = role in ports or settings.bind_host in ("0.0.0.0", "::")
    host = "127.0.0.1" if wildcard else settings.bind_host
    return f"http://{f'[{host}]' if ':' in host else host}:{ports.get(role, settings.port)}/health"


def remember(role: str, url: str, state_dir: Path) -> None:
    """Leave what `epd-serve health` needs; a restart of the container starts afresh."""
    state_dir.mkdir(parents=True, exist_ok=True)
    (state_dir / "ready").unlink(missing_ok=True)
    (state_dir / "role.json").write_text(json.dumps({"role": role, "url": url, "started_at_s": time.time()}))


def check_health(state_dir: Path, timeout_s: float = 15.0) -> tuple[bool, str]:
    """Return whether the role answers, and a sentence that tells loading from dead.

    Both fail the check. Docker does not count failures of the start period, so loading is "starting" and only what
    answered once, or loads longer than that period, becomes "unhealthy".
    """
    try:
        state = json.loads((state_dir / "role.json").read_text())
    except FileNotFoundError:
        return False, "no role was started in this container: run `epd-serve ROLE`"
    ready = state_dir / "ready"
    reason = _ask(state["url"], timeout_s)
    if not reason:
        ready.touch()
        return True, f"{state['role']}: ready"
    if ready.exists():
        return False, f"{state['role']}: dead: it was ready, now {state['url']} gives {reason}"
    return False, f"{state['role']}: loading for {time.time() - state['started_at_s']:.0f} s ({reason})"


def _ask(url: str, timeout_s: float) -> str:
    """Return why a GET of the URL did not give 200, or nothing.

    By hand, as this runs in every container every few seconds and urllib alone costs more than all the rest; and never
    through an HTTP proxy that the environment may name.
    """
    authority, path = url.removeprefix("http://").split("/", 1)
    host, port = authority.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as connection:
            connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode())
            with connection.makefile("rb") as answer:
                status_line = answer.readline().decode("latin-1").strip()
    except OSError as error:
        return str(error)
    return "" if status_line.split(" ")[1:2] == ["200"] else status_line or "no answer"


def show(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """Return the command as a person would type it, one option a line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    for word in command:
        if word.startswith("-") or word == command[0]:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def become(environment: Mapping[str, str], command: Sequence[str]) -> NoReturn:
    """Replace this process by the command, so that it gets the container's signals."""
    os.environ.update(environment)
    os.execvp(command[0], list(command))  # noqa: S606 - the purpose of this program


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit code unless the process becomes the role's command."""
    only_print = arguments[:1] == ["--print"]
    words = arguments[1:] if only_print else arguments
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    role, *rest = words
    if role == "health":
        healthy, sentence = check_health(STATE_DIR)
        print(sentence)
        return 0 if healthy else 1
    try:
        settings = read_settings(role, os.environ)
    except ConfigurationError as error:
        print(f"epd-serve: {error}", file=sys.stderr)
        return 2
    defaults = vllm_environment(role, settings) if role in VLLM_ROLES else {}
    environment = {name: os.environ.get(name, value) for name, value in defaults.items()}
    command = build_command(role, settings, rest)
    print(show(environment, command), flush=True)
    if only_print:
        return 0
    remember(role, health_url(role, settings), STATE_DIR)
    become(environment, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
