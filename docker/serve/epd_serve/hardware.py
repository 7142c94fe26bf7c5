"""What differs between kinds of hardware: flags, environment, where the KV connector is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
            "KMP_BLOCKTIME": "1",  # ms; Intel's OpenMP would spin for 200 after each use of more than one thread
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several instances share the cores
        },
        kv_connector={
            "kv_connector": "MooncakeLayerwiseConnector",
            "kv_connector_module_path": "epd_connector.cpu.layerwise",
        },
        # All instances and the store share a few cores, and a decode instance that waits for KV keeps one of them busy:
        # with 0.5 s a call, a master that was well was late now and then.
        ec_limits={"rpc_timeout_ms": 1500, "fetch_timeout_ms": 4000, "publish_timeout_ms": 4000},
    ),
    # HCCL_INTRA_ROCE_ENABLE: the compose file says 1 where the cards have a RoCE network.
    "a2": _ascend({"HCCL_INTRA_ROCE_ENABLE": "0"}),
    "a3": _ascend({}),
    "a5": _ascend({}),
}
