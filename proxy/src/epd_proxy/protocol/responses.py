"""OpenAI's Responses API, as vLLM 0.23.0 makes chat messages of it (``entrypoints/openai/responses/utils.py``)."""

from collections.abc import Iterator
from typing import Any

from .texts import count_chars as count_nested


def find_parts(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the content parts of messages and of functions' results, as chat parts, with where they are."""
    items = document.get("input")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        name = "output" if item.get("type") == "function_call_output" else "content"
        parts = item.get(name)
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict):
                yield f"input[{index}].{name}[{number}]", _chat_part(part)


def _chat_part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "input_image":
        return {"type": "image_url", "image_url": {"url": part.get("image_url")}}
    return {name: value for name, value in part.items() if name != "uuid"}  # which this API does not know


def count_chars(document: dict[str, Any]) -> int:
    """Return how long the texts of the prompt are."""
    return count_nested(document.get("instructions")) + count_nested(document.get("input"))


def names_stored(document: dict[str, Any]) -> bool:
    """Whether the request builds on a response that one instance has stored."""
    return document.get("previous_response_id") is not None
