"""The parameters of the pull handshake: prefill first, which says in its answer where its KV lies.

That of ``MooncakeConnectorV1`` and ``MooncakeHybridConnector`` (vllm-ascend 0.23.0) and of ``NixlConnector`` (vLLM).
"""

from typing import Any

import orjson

# Nothing is known yet of where the KV will lie.
PULL_PREFILL: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def find_parameters(answer: bytes) -> dict[str, Any] | None:
    """Return the ``kv_transfer_params`` of prefill's answer, None where it holds no KV for anyone."""
    try:
        document = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    parameters = document.get("kv_transfer_params") if isinstance(document, dict) else None
    return parameters if isinstance(parameters, dict) else None
