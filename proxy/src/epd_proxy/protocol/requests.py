"""A client's body to an :class:`InferenceRequest`: parsed once, forwarded as it came, items apart."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from ..errors import InvalidRequestError
from .media import MediaItem, find_items
from .naming import Namer
from .writing import write_json

# The stages' own business. In `vllm_xargs` too: vLLM makes them the request's extra arguments, and there the
# connectors look.
_RESERVED = ("kv_transfer_params", "ec_transfer_params")

_CHARS_PER_TOKEN = 4
_OUTPUT_TOKENS_UNKNOWN = 256
_OUTPUT_TOKENS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Api:
    """One endpoint of the OpenAI API. ``stream_end`` is what its complete streams end with."""

    path: str
    stream_end: bytes = b"[DONE]"


CHAT = Api("/v1/chat/completions")
COMPLETIONS = Api("/v1/completions")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What the proxy knows of a request. ``body`` is what PD receives; token counts are estimates."""

    api: Api
    body: bytes
    document: dict[str, Any]
    items: tuple[MediaItem, ...]
    text_tokens: int
    output_tokens: int

    @property
    def model(self) -> str:
        """The model's name, empty when there is none."""
        model = self.document.get("model")
        return model if isinstance(model, str) else ""

    @property
    def stream(self) -> bool:
        """Whether the client asked for a stream."""
        return self.document.get("stream") is True

    @property
    def has_remote_media(self) -> bool:
        """Whether an instance has to fetch something to serve this."""
        return any(item.remote for item in self.items)


def parse_request(api: Api, body: bytes, *, items_max: int, key: bytes, tenant: str = "") -> InferenceRequest:
    """Parse a body; its items are named with ``key``, for ``tenant``.

    Raises :class:`InvalidRequestError` for what is not a JSON object, or for bad media items.
    """
    document = _load(body)
    changed = _strip_reserved(document)
    namer = Namer(key, tenant, document)
    items = tuple(islice(find_items(document.get("messages"), namer), items_max + 1)) if api is CHAT else ()
    if len(items) > items_max:
        raise InvalidRequestError(f"messages: expected at most {items_max} media items, found more")
    if changed or namer.used:
        body = write_json(document)
    text_tokens = _messages_tokens(document) if api is CHAT else _prompt_tokens(document.get("prompt"))
    return InferenceRequest(api, body, document, items, text_tokens, _output_tokens(document))


def _load(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"the body must be a JSON object, found {type(document).__name__}")
    return document


def _strip_reserved(document: dict[str, Any]) -> bool:
    changed = False
    for holder in (document, document.get("vllm_xargs")):
        for name in _RESERVED:
            if isinstance(holder, dict) and name in holder:
                del holder[name]
                changed = True
    return changed


def _messages_tokens(document: dict[str, Any]) -> int:
    messages = document.get("messages")
    chars = 0
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        chars += len(content) if isinstance(content, str) else _parts_chars(content)
    return chars // _CHARS_PER_TOKEN


def _parts_chars(content: object) -> int:
    texts = (part.get("text") if isinstance(part, dict) else part for part in _listed(content))
    return sum(len(text) for text in texts if isinstance(text, str))


def _prompt_tokens(prompt: object) -> int:
    """Weigh a string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(prompt, str):
        return len(prompt) // _CHARS_PER_TOKEN
    return sum(_entry_tokens(entry) for entry in _listed(prompt))


def _entry_tokens(entry: object) -> int:
    if isinstance(entry, str):
        return len(entry) // _CHARS_PER_TOKEN
    return len(entry) if isinstance(entry, list) else 1


def _listed(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else ()


def _output_tokens(document: dict[str, Any]) -> int:
    """Estimate from the limits the client gave; a long limit is seldom used up."""
    limits = (_positive(document.get(name)) for name in ("max_completion_tokens", "max_tokens"))
    limit = next((value for value in limits if value), _OUTPUT_TOKENS_UNKNOWN)
    return min(limit, _OUTPUT_TOKENS_MAX) * min(_positive(document.get("n")) or 1, 128)


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
