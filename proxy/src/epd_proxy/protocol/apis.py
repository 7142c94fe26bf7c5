"""The APIs whose requests go through the stages, and what differs between them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import anthropic, responses

Part = tuple[str, dict[str, Any]]
"""A content part in the form of a chat's, and where in the document it is."""

CHARS_PER_TOKEN = 4

# What decides how an item is processed, and with that under which name its embedding is stored. All else
# (n, tools, stream_options, sampling, the other messages) would only make the encoder work for nothing.
_ITEM_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")
_TEMPLATE_OPTIONS = ("chat_template", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Api:
    """One path that clients send prompts to.

    ``stream_end`` is what its complete streams end with, empty where that cannot be told. ``find_parts`` yields the
    parts that may be media, ``count_chars`` weighs the text. ``encode_keeps`` names the fields that the encode request
    takes over. ``own_parts``: the parts are the document's own, so that what is written into them reaches the instance.
    ``splits``: prefill and decode can be apart.
    """

    path: str
    find_parts: Callable[[dict[str, Any]], Iterator[Part]]
    count_chars: Callable[[dict[str, Any]], int]
    stream_end: bytes = b"[DONE]"
    encode_keeps: tuple[str, ...] = ("model", *_ITEM_OPTIONS, *_TEMPLATE_OPTIONS, "priority")
    own_parts: bool = True
    splits: bool = True


def _chat_parts(document: dict[str, Any]) -> Iterator[Part]:
    messages = document.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and (part.get("type") != "text" or "uuid" in part):  # most are just text
                yield f"messages[{index}].content[{number}]", part


def _no_parts(_document: dict[str, Any]) -> Iterator[Part]:
    return iter(())


def _chat_chars(document: dict[str, Any]) -> int:
    messages = document.get("messages")
    chars = 0
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        chars += len(content) if isinstance(content, str) else _parts_chars(content)
    return chars


def _parts_chars(content: object) -> int:
    chars = 0
    for part in content if isinstance(content, list) else ():
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            chars += len(text)
    return chars


def _prompt_chars(document: dict[str, Any]) -> int:
    """Weigh a string, a list of strings, a list of token ids, or a list of such lists."""
    prompt = document.get("prompt")
    if isinstance(prompt, str):
        return len(prompt)
    return sum(_entry_chars(entry) for entry in (prompt if isinstance(prompt, list) else ()))


def _entry_chars(entry: object) -> int:
    if isinstance(entry, str):
        return len(entry)
    return CHARS_PER_TOKEN * (len(entry) if isinstance(entry, list) else 1)


CHAT = Api("/v1/chat/completions", _chat_parts, _chat_chars)
COMPLETIONS = Api("/v1/completions", _no_parts, _prompt_chars)
# vLLM 0.23 makes a chat request of it that has none of the item's options.
MESSAGES = Api("/v1/messages", anthropic.find_parts, anthropic.count_chars, b'data: {"type":"message_stop"}',
               encode_keeps=("model",), own_parts=False)  # fmt: skip
# Its requests may call tools of the server between several generations, and build on what an instance has stored. The
# last event of its streams is as long as the answer.
RESPONSES = Api("/v1/responses", responses.find_parts, responses.count_chars, b"", own_parts=False, splits=False,
                encode_keeps=("model", *_ITEM_OPTIONS, "chat_template_kwargs", "priority"))  # fmt: skip
APIS = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
