"""The messages of the bootstrap handshake: prefill and decode at the same time, decode knows whom to ask.

That of vLLM's own ``MooncakeConnector`` (0.23.0, mooncake_connector.py and mooncake_utils.py).
"""

from collections.abc import Mapping
from typing import Any

import orjson

BOOTSTRAP_PATH = "/query"
RANK_HEADER = "X-data-parallel-rank"


def find_engines(answer: bytes) -> dict[str, str]:
    """Return the engine id of each data-parallel rank, from the bootstrap server's answer; empty when it names none."""
    try:
        document = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return {}
    entries = document.items() if isinstance(document, dict) else ()
    return {
        rank: entry["engine_id"]
        for rank, entry in entries
        if rank.isdecimal() and isinstance(entry, Mapping) and isinstance(entry.get("engine_id"), str)
    }


def bootstrap_prefill(transfer_id: str) -> dict[str, Any]:
    """Return the parameters that prefill gets."""
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


def bootstrap_decode(transfer_id: str, bootstrap_url: str, engine_id: str) -> dict[str, Any]:
    """Return the parameters that decode gets."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": bootstrap_url,
        "remote_engine_id": engine_id,
    }
