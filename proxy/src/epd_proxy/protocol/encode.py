"""The request that makes an encode instance store one item's embedding."""

from typing import Any

from .media import MediaItem
from .requests import InferenceRequest
from .writing import write_json


def encode_body(request: InferenceRequest, item: MediaItem) -> bytes:
    """Return the body of the encode request, a chat, for ``item`` of the client's ``request``.

    vLLM prefers ``max_completion_tokens`` to ``max_tokens``, so it is limited too where the client sent it.
    """
    document = request.document
    body: dict[str, Any] = {name: document[name] for name in request.api.encode_keeps if name in document}
    body["messages"] = [{"role": "user", "content": [item.part]}]
    body["stream"] = False
    body["max_tokens"] = 1
    body["min_tokens"] = 1
    if "max_completion_tokens" in document:
        body["max_completion_tokens"] = 1
    return write_json(body, request.inline)
