"""The request that an instance gets while its items are still being encoded."""

from .apis import CHAT
from .requests import ITEMS_PENDING, InferenceRequest
from .writing import with_member, write_json


def can_wait(request: InferenceRequest) -> bool:
    """Whether an instance can be told to wait for the request's items: of the APIs with items, chat has the field."""
    return request.api is CHAT


def pending_body(request: InferenceRequest) -> bytes:
    """Return the client's body, and that its items are on their way."""
    given = request.document.get("vllm_xargs")
    if given is None and "vllm_xargs" not in request.document:
        return with_member(request.body, "vllm_xargs", {ITEMS_PENDING: 1})
    if given is not None and not isinstance(given, dict):
        return request.body  # the instance says what is wrong with it
    return write_json({**request.document, "vllm_xargs": {**(given or {}), ITEMS_PENDING: 1}}, request.inline)
