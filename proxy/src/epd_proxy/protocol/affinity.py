"""What requests have in common that do well to meet at one instance, where the KV of it is cached."""

from collections.abc import Iterator, Mapping
from typing import Any

from .apis import COMPLETIONS
from .requests import InferenceRequest

# Long enough to tell system prompts apart. What comes after it may differ.
_CHAT_CHARS = 4096
# A completion's prompt grows with each turn, so only its beginning stays the same.
_PROMPT_CHARS = 256


def prefix_of(request: InferenceRequest) -> str:
    """Return how the request begins: for a chat all up to its first user message, which every later turn repeats."""
    if request.api is not COMPLETIONS:
        return "\0".join(_beginning(request.document))[:_CHAT_CHARS]
    prompt = request.document.get("prompt")
    first = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else prompt
    return str(first[:_PROMPT_CHARS]) if isinstance(first, str | list) else ""


def _beginning(document: Mapping[str, Any]) -> Iterator[str]:
    yield from (str(document.get(name) or "") for name in ("system", "instructions"))
    messages = document.get("messages") or document.get("input")
    if isinstance(messages, str):
        yield messages
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return
        yield str(message.get("role"))
        content = message.get("content")
        yield content if isinstance(content, str) else "\0".join(_parts(content))
        if message.get("role") == "user":
            return


def _parts(content: Any) -> Iterator[str]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            yield str(part.get("text") or part.get("uuid") or "")
