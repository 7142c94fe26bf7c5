"""Whether the sizes that were asked for go together: those of both sides of a transfer, the model's, the hosts'.

vLLM and vllm-ascend refuse the same, after minutes of loading and with an assertion.
"""

from __future__ import annotations

from collections.abc import Sequence

from epd.errors import StepError
from epd.plan.hosts import Host
from epd.plan.model import ModelSize
from epd.plan.topology import Topology, variable

STORE_PROCESS_MIB = 2048
"""What the pool's process may need besides the pool; the plan's memory limit of its container adds it."""


def check(
    topology: Topology, hosts: Sequence[Host], model: ModelSize | None, *, max_model_len: int, pool_mib: int
) -> None:
    """Check what needs no arithmetic on cards.

    Raises:
        StepError: two sizes do not go together; the message has both.
    """
    _check_transfer(topology)
    _check_pool(hosts[0], pool_mib)
    if model is not None:
        _check_heads(topology, model)
        _check_context(model, max_model_len)


def _check_transfer(topology: Topology) -> None:
    """Prefill's TP is a multiple of decode's (vllm_ascend/ascend_config.py asserts it)."""
    prefill, decode = topology.of("prefill").tensor, topology.of("decode").tensor
    if "decode" in topology.counts and prefill % decode:
        raise StepError(
            "prefill and decode cannot hand over a KV cache",
            expected="a TP of prefill that is a multiple of decode's",
            found=f"TP {prefill} of prefill, TP {decode} of decode: {prefill} mod {decode} = {prefill % decode}",
            fix=f"EPD_PREFILL_TP={-(-prefill // decode) * decode}, or EPD_DECODE_TP={prefill}",
        )


def _check_heads(topology: Topology, model: ModelSize) -> None:
    """Each card of an instance takes as many attention heads as the next one."""
    for role in topology.counts:
        tensor = topology.of(role).tensor
        if model.heads % tensor:
            usable = [size for size in (1, 2, 4, 8, 16) if model.heads % size == 0]
            raise StepError(
                f"{role}: {model.name} cannot be split over {tensor} cards",
                expected=f"a TP that divides its {model.heads} attention heads: {', '.join(map(str, usable))}, …",
                found=f"{variable(role, 'TP')}={tensor}: {model.heads} mod {tensor} = {model.heads % tensor}",
                fix=f"{variable(role, 'TP')}={max(size for size in usable if size <= tensor)}",
            )


def _check_context(model: ModelSize, max_model_len: int) -> None:
    if max_model_len > model.context_tokens:
        raise StepError(
            f"{model.name} was not made for so long a context",
            expected=f"at most {model.context_tokens} tokens (max_position_embeddings in its config.json)",
            found=f"EPD_MAX_MODEL_LEN={max_model_len}",
            fix=f"EPD_MAX_MODEL_LEN={model.context_tokens}",
        )


def _check_pool(head: Host, pool_mib: int) -> None:
    """The embeddings' pool is memory of the first host, not of a card."""
    need = pool_mib + STORE_PROCESS_MIB
    if 0 < head.memory_mib < need:
        raise StepError(
            "the embeddings' pool does not fit into the first host's memory",
            expected=f"pool {pool_mib} + its process {STORE_PROCESS_MIB} = {need} MiB",
            found=f"{head.memory_mib} MiB on {head.name}",
            fix="choose a smaller EPD_STORE_SIZE_MB, or put a host with more memory first in the inventory",
        )
