"""Anthropic's Messages API, as vLLM 0.23.0 makes chat messages of it (``entrypoints/anthropic/serving.py``)."""

from collections.abc import Iterator
from typing import Any

from .texts import count_chars as count_nested

_MEDIA_TYPE = "image/jpeg"  # vLLM's default where the client names none


def find_parts(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pictures as chat parts, those within a tool's results too, with where they are.

    Those that vLLM leaves out stay out: in system messages, and in results that are not the user's.
    """
    messages = document.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict) or message.get("role") == "system":
            continue
        content = message.get("content")
        for number, block in enumerate(content if isinstance(content, list) else ()):
            yield from _read_block(block, message.get("role"), f"messages[{index}].content[{number}]")


def _read_block(block: object, role: object, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(block, dict):
        return
    if block.get("type") == "image" and isinstance(block.get("source"), dict):
        yield where, _picture(block["source"])
    elif block.get("type") == "tool_result" and role == "user":
        inner = block.get("content")
        for number, each in enumerate(inner if isinstance(inner, list) else ()):
            if isinstance(each, dict) and each.get("type") == "image":
                yield from _read_block(each, role, f"{where}.content[{number}]")


def _picture(source: dict[str, Any]) -> dict[str, Any]:
    url = source.get("url", "")
    if source.get("type") != "url":
        url = f"data:{source.get('media_type', _MEDIA_TYPE)};base64,{source.get('data', '')}"
    return {"type": "image_url", "image_url": {"url": url}}


def count_chars(document: dict[str, Any]) -> int:
    """Return how long the texts of the prompt are."""
    return count_nested(document.get("system")) + count_nested(document.get("messages"))


def error_form(body: bytes) -> bytes:
    """Return an error in the form that Anthropic's clients read, which is OpenAI's with a type."""
    return b'{"type":"error",' + body[1:] if body.startswith(b'{"error":') else body
