"""Media items of a chat request: found, checked, weighed, named. Nothing that a client names is ever opened."""

import binascii
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pybase64

from ..errors import InvalidRequestError
from .apis import Part
from .images import image_size
from .inline import CutWronglyError, Inline
from .naming import Namer

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
    """One picture, video or sound; ``part`` is the client's content part, ``cost`` is in tokens.

    ``name`` is empty where only the instance will know what the item is: what lies behind a URL may change.
    """

    modality: str
    part: Mapping[str, Any]
    remote: bool
    cost: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Source:
    """Content within the request: its media type or format, its base64 text or the mark of it, and where that is."""

    media_type: str
    data: str
    where: str


def find_items(parts: Iterable[Part], namer: Namer, inline: Inline | None) -> Iterator[MediaItem]:
    """Yield the items among the ``parts`` of a prompt that an encoder has work with, in order.

    ``namer`` gives each part its ``uuid``; ``inline`` has what was cut out of the parts. Ready-made embeddings, and
    parts that name a cached item by uuid without its content, need no encoder. What is malformed beyond that is left to
    the instance, whose message names its own rules.

    Raises :class:`InvalidRequestError` for a URL that is not http(s) or data, and for broken data URLs, and
    :class:`CutWronglyError` where what was cut out is not base64 to the letter.
    """
    for where, part in parts:
        if item := _read_part(part, where, namer, inline):
            yield item


def _read_part(part: dict[str, Any], where: str, namer: Namer, inline: Inline | None) -> MediaItem | None:
    field = _field_of(part)
    if part.get("uuid") is not None:  # whatever the part is: ready-made embeddings have a place in the caches too
        part["uuid"] = namer.name_given(part["uuid"])
    modality = _FIELDS[field] if field else None
    if field is None or modality is None:
        return None
    where = f"{where}.{field}"
    value = part.get(field)
    if field == "input_audio":
        if not isinstance(value, dict) or not isinstance(data := value.get("data"), str) or not data:
            return None
        return _read_inline(part, modality, _Source(str(value.get("format")), data, f"{where}.data"), namer, None)
    url = value.get("url") if isinstance(value, dict) else value
    if not url or not isinstance(url, str):
        return None
    where = f"{where}.url"
    if url[:8].lower().startswith(("http://", "https://")):
        return MediaItem(modality, part, remote=True, cost=_TOKENS_UNKNOWN[modality], name=part.get("uuid") or "")
    return _read_inline(part, modality, _split_data_url(url, where), namer, inline)


def _field_of(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    if isinstance(kind, str) and part.get("uuid") is None:
        return _TYPES.get(kind)
    return next((field for field in _FIELDS if field in part), None)


def _split_data_url(url: str, where: str) -> _Source:
    if not url[:5].lower() == "data:":
        raise InvalidRequestError(
            f"{where}: expected an http://, https:// or data: URL, found {url[:32]!r}; "
            "send a local file as data:<media type>;base64,<content>"
        )
    head, comma, data = url.partition(",")
    media_type, _, encoding = head[5:].partition(";")
    if not comma or encoding != "base64":
        raise InvalidRequestError(f"{where}: expected data:<media type>;base64,<content>, found {head[:48]!r}")
    if not data:
        raise InvalidRequestError(f"{where}: there is nothing after 'base64,'")
    return _Source(media_type.lower(), data, where)


def _read_inline(
    part: dict[str, Any], modality: str, source: _Source, namer: Namer, inline: Inline | None
) -> MediaItem:
    cut = inline.find(source.data) if inline else None
    content: bytes | memoryview = source.data.encode() if cut is None else cut
    if modality == "image":
        content = _decode(content, source.where)
        cost = _image_cost(content)
    else:
        if cut is not None and not _is_base64(cut):
            raise CutWronglyError
        if cut is None and source.media_type != "video/jpeg":  # frames joined by commas, each base64 of its own
            _check_loosely(source.data, source.where)
        cost = max(64, min(_TOKENS_MAX[modality], len(content) * 3 // 4 // _BYTES_PER_TOKEN[modality]))
    if inline and cut is not None:
        inline.note_checked(source.data)
    # With a uuid vLLM reads another field of a part that has several.
    if part.get("uuid") is None and sum(field in part for field in _FIELDS) == 1:
        part["uuid"] = namer.name_content(modality, source.media_type, content)
    return MediaItem(modality, part, remote=False, cost=cost, name=part.get("uuid") or "")


def _is_base64(text: memoryview) -> bool:
    try:
        pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _decode(data: bytes | memoryview, where: str) -> bytes:
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
