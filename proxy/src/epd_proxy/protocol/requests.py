"""A client's body to an :class:`InferenceRequest`: parsed once, forwarded as it came, items apart."""

from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import orjson

from ..errors import InvalidRequestError
from .apis import CHARS_PER_TOKEN, RESPONSES, Api
from .inline import CutWronglyError, Inline, cut_out
from .media import MediaItem, find_items
from .naming import Namer
from .responses import names_stored
from .weighing import check_weight
from .writing import write_json

# In `vllm_xargs`: tells our EC connector that the items are being encoded, so that it waits for them to arrive.
ITEMS_PENDING = "ec_items_pending"
# The stages' own business. In `vllm_xargs` too: vLLM makes them the request's extra arguments, and there the
# connectors look.
_RESERVED = frozenset(("kv_transfer_params", "ec_transfer_params", ITEMS_PENDING))

_OUTPUT_TOKENS_UNKNOWN = 256
_OUTPUT_TOKENS_MAX = 4_096


class InferenceRequest(NamedTuple):
    """What the proxy knows of a request. ``body`` is what PD receives; token counts are estimates.

    ``inline`` are the contents that ``document`` has only marks for.
    """

    api: Api
    body: bytes
    document: dict[str, Any]
    items: tuple[MediaItem, ...]
    text_tokens: int
    output_tokens: int
    inline: Inline | None = None

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
    def names_stored(self) -> bool:
        """Whether it builds on a response that one instance has stored."""
        return self.api is RESPONSES and names_stored(self.document)

    @property
    def has_remote_media(self) -> bool:
        """Whether an instance has to fetch something to serve this."""
        return any(item.remote for item in self.items)


def parse_request(api: Api, body: bytes, *, items_max: int, key: bytes, tenant: str = "") -> InferenceRequest:
    """Parse a body; its items are named with ``key``, for ``tenant``.

    Raises :class:`InvalidRequestError` for what is not a JSON object, or for bad media items.
    """
    outline, inline = cut_out(body)
    if inline:
        try:
            request = _parse(api, body, outline, inline, items_max=items_max, key=key, tenant=tenant)
        except (CutWronglyError, InvalidRequestError):
            if not inline.unchecked:
                raise
        else:
            if not inline.unchecked:
                return request
    return _parse(api, body, body, None, items_max=items_max, key=key, tenant=tenant)


def _parse(
    api: Api, body: bytes, outline: bytes, inline: Inline | None, *, items_max: int, key: bytes, tenant: str
) -> InferenceRequest:
    document = _load(outline)
    changed = _strip_reserved(document)
    items: tuple[MediaItem, ...] = ()
    if parts := list(api.find_parts(document)):  # most prompts are just text
        namer = Namer(key, tenant, document)
        items = tuple(islice(find_items(parts, namer, inline), items_max + 1))
        if len(items) > items_max:
            raise InvalidRequestError(f"messages: expected at most {items_max} media items, found more")
        if not api.own_parts:
            items = tuple(_unnamed(item, api) for item in items)
        changed |= namer.used and api.own_parts
    if changed:
        body = write_json(document, inline)
    text_tokens = api.count_chars(document) // CHARS_PER_TOKEN
    return InferenceRequest(api, body, document, items, text_tokens, _output_tokens(document), inline)


def _unnamed(item: MediaItem, api: Api) -> MediaItem:
    """Return ``item`` as the instance that prefills will see it: it learns no uuid and hashes the content itself."""
    part = {name: value for name, value in item.part.items() if name != "uuid"}
    return replace(item, part=part, name=f"{api.path} {item.name}" if item.name else "")


def strip_transfer_params(body: bytes) -> bytes:
    """Return ``body`` without what only the stages may say; as it is, where there is none of it.

    Raises :class:`InvalidRequestError` for what is not a JSON object: an instance might read it all the same.
    """
    document = _load(body)
    return write_json(document) if _strip_reserved(document) else body


def _load(body: bytes) -> dict[str, Any]:
    check_weight(body)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"the body must be a JSON object, found {type(document).__name__}")
    return document


def _strip_reserved(document: dict[str, Any]) -> bool:
    extra = document.get("vllm_xargs")
    changed = not _RESERVED.isdisjoint(document) and _strip(document)
    return (isinstance(extra, dict) and _strip(extra)) or changed


def _strip(holder: dict[str, Any]) -> bool:
    found = _RESERVED.intersection(holder)
    for name in found:
        del holder[name]
    return bool(found)


def _output_tokens(document: dict[str, Any]) -> int:
    """Estimate from the limits the client gave; a long limit is seldom used up."""
    get = document.get
    limit = (
        _positive(get("max_completion_tokens"))
        or _positive(get("max_tokens"))
        or _positive(get("max_output_tokens"))
        or _OUTPUT_TOKENS_UNKNOWN
    )
    return min(limit, _OUTPUT_TOKENS_MAX) * min(_positive(get("n")) or 1, 128)


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
