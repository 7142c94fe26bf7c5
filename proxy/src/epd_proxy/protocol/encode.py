"""The request that makes an encode instance store one item's embedding."""

from collections.abc import Mapping
from typing import Any

from .media import MediaItem
from .writing import write_json

# What decides how the item is processed, and with that under which name its embedding is stored. All else
# (n, tools, stream_options, sampling, the other messages) would only make the encoder work for nothing.
_KEPT = ("model", "mm_processor_kwargs", "media_io_kwargs", "chat_template", "chat_template_kwargs", "priority")


def encode_body(document: Mapping[str, Any], item: MediaItem) -> bytes:
    """Return the body of the encode request for ``item`` of the client's ``document``.

    vLLM prefers ``max_completion_tokens`` to ``max_tokens``, so it is limited too where the client sent it.
    """
    body: dict[str, Any] = {name: document[name] for name in _KEPT if name in document}
    body["messages"] = [{"role": "user", "content": [item.part]}]
    body["stream"] = False
    body["max_tokens"] = 1
    body["min_tokens"] = 1
    if "max_completion_tokens" in document:
        body["max_completion_tokens"] = 1
    return write_json(body)
