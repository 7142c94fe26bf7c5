"""Media items of a chat request: found, checked, weighed. Nothing that a client names is ever opened."""

import binascii
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pybase64

from ..errors import InvalidRequestError
from .images import image_size

# A vision token of the Qwen-VL family covers 28 x 28 pixels (patch 14, merged 2 x 2), at most 16384 of them.
# Other families differ by a small factor; the balance needs proportions, not truth.
_TOKEN_PIXELS = 28
_IMAGE_TOKENS_MAX = 16_384
_IMAGE_TOKENS_UNKNOWN = 1_024
# Guesses by size: compressed video about 256 bytes a token, audio about 1280 (16-bit, 16 kHz, 25 tokens a second).
_BYTES_PER_TOKEN = {"video": 256, "audio": 1_280}
_TOKENS_UNKNOWN = {"image": _IMAGE_TOKENS_UNKNOWN, "video": 4_096, "audio": 512}
_TOKENS_MAX = {"video": 65_536, "audio": 16_384}

# In vLLM's order (chat_utils, 0.23): where `type` is missing or a uuid is given, the first key that is there counts.
_FIELDS = {
    "image_url": "image",
    "image_embeds": None,
    "audio_embeds": None,
    "prompt_embeds": None,
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
_TYPES = {"image_url": "image_url", "input_image": "image_url", **{field: field for field in _FIELDS}}


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One picture, video or sound; ``part`` is the client's content part as it came, ``cost`` is in tokens."""

    modality: str
    part: Mapping[str, Any]
    remote: bool
    cost: int


def find_items(messages: object) -> Iterator[MediaItem]:
    """Yield the items of ``messages`` that an encoder has work with, in order.

    Ready-made embeddings, and parts that name a cached item by uuid without its content, need no encoder. What is
    malformed beyond that is left to the instance, whose message names its own rules.

    Raises :class:`InvalidRequestError` for a URL that is not http(s) or data, and for broken data URLs.
    """
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                item = _read_part(part, f"messages[{index}].content[{number}]")
                if item:
                    yield item


def _read_part(part: Mapping[str, Any], where: str) -> MediaItem | None:
    field = _field_of(part)
    modality = _FIELDS[field] if field else None
    if field is None or modality is None:
        return None
    value = part.get(field)
    if field == "input_audio":
        data = value.get("data") if isinstance(value, dict) else None
        return _inline(part, modality, data, "", f"{where}.{field}.data") if data and isinstance(data, str) else None
    url = value.get("url") if isinstance(value, dict) else value
    if not url or not isinstance(url, str):
        return None
    return _from_url(part, modality, url, f"{where}.{field}.url")


def _field_of(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    if isinstance(kind, str) and part.get("uuid") is None:
        return _TYPES.get(kind)
    return next((field for field in _FIELDS if field in part), None)


def _from_url(part: Mapping[str, Any], modality: str, url: str, where: str) -> MediaItem:
    scheme = url[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return MediaItem(modality, part, remote=True, cost=_TOKENS_UNKNOWN[modality])
    if not scheme.startswith("data:"):
        raise InvalidRequestError(
            f"{where}: expected an http://, https:// or data: URL, found {url[:32]!r}; "
            "send a local file as data:<media type>;base64,<content>"
        )
    head, comma, data = url.partition(",")
    media_type, _, encoding = head[5:].partition(";")
    if not comma or encoding != "base64":
        raise InvalidRequestError(f"{where}: expected data:<media type>;base64,<content>, found {head[:48]!r}")
    return _inline(part, modality, data, media_type.lower(), where)


def _inline(part: Mapping[str, Any], modality: str, data: str, media_type: str, where: str) -> MediaItem:
    if not data:
        raise InvalidRequestError(f"{where}: there is nothing after 'base64,'")
    if modality == "image":
        cost = _image_cost(_decode(data, where))
    else:
        if media_type != "video/jpeg":  # frames joined by commas, each base64 of its own
            _check_loosely(data, where)
        size_bytes = len(data) * 3 // 4
        cost = max(64, min(_TOKENS_MAX[modality], size_bytes // _BYTES_PER_TOKEN[modality]))
    return MediaItem(modality, part, remote=False, cost=cost)


def _decode(data: str, where: str) -> bytes:
    try:
        return pybase64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{where}: the content is not base64 ({error})") from error


def _check_loosely(data: str, where: str) -> None:
    """Refuse only what vLLM refuses: for sound and video it skips what is not of the alphabet."""
    try:
        pybase64.b64decode(data)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{where}: the content is not base64 ({error})") from error


def _image_cost(data: bytes) -> int:
    size = image_size(data)
    if size is None:
        return _IMAGE_TOKENS_UNKNOWN
    width, height = size
    return min(_IMAGE_TOKENS_MAX, math.ceil(width / _TOKEN_PIXELS) * math.ceil(height / _TOKEN_PIXELS))
