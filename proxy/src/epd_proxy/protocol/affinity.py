"""What requests have in common that do well to meet at one instance, where the KV of it is cached."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .apis import COMPLETIONS
from .requests import InferenceRequest

# Long enough to tell system prompts apart. What comes after it may differ.
_CHAT_CHARS = 4096
# A completion's prompt grows with each turn, so only its beginning stays the same.
_PROMPT_CHARS = 256


def prefix_of(request: InferenceRequest) -> str:
    """Return how the request begins: for a chat all up to its first user message, which every later turn repeats.

    Looks at no more than it needs, since it is done on the event loop.
    """
    if request.api is not COMPLETIONS:
        return _join(_beginning(request.document))
    prompt = request.document.get("prompt")
    first = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else prompt
    if isinstance(first, str):
        return first[:_PROMPT_CHARS]
    tokens = first[:_PROMPT_CHARS] if isinstance(first, list) else ()
    return ",".join(str(token) for token in tokens if isinstance(token, int))


def _join(texts: Iterable[str]) -> str:
    found, left = [], _CHAT_CHARS
    for text in texts:
        found.append(text[:left])
        left -= len(text) + 1
        if left <= 0:
            break
    return "\0".join(found)[:_CHAT_CHARS]


def _beginning(document: Mapping[str, Any]) -> Iterator[str]:
    for name in ("system", "instructions"):
        yield from _texts(document.get(name))
    messages = document.get("messages") or document.get("input")
    if isinstance(messages, str):
        yield messages
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return
        role = message.get("role")
        yield role if isinstance(role, str) else ""
        yield from _texts(message.get("content"))
        if role == "user":
            return


def _texts(content: Any) -> Iterator[str]:
    """Yield a text, or those of its parts; a picture's name stands for it."""
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            said = part.get("text") or part.get("uuid")
            yield said if isinstance(said, str) else ""
