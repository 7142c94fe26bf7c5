"""What a backend's error answer means."""

import orjson

from .anthropic import error_form
from .apis import MESSAGES

# What aiohttp says inside vLLM when a media URL cannot be fetched (vllm.connections, 0.23). vLLM answers these with
# 500, although the URL is the client's; the empty message is a time-out's.
_FETCH_FAILURES = (
    "Cannot connect to host",
    "Connection timeout to host",
    "Server disconnected",
    "Connection reset by peer",
    "Response payload is not completed",
    "message='",  # "404, message='Not Found', url='…'"
    "Name or service not known",
    "Timeout on reading data from socket",
)


def error_for(path: str, body: bytes) -> bytes:
    """Return an error's body in the form that the clients of ``path`` read."""
    return error_form(body) if path.startswith(MESSAGES.path) else body


def is_openai_error(body: bytes) -> bool:
    """Whether ``body`` is ``{"error": {…}}`` with a message, as OpenAI and vLLM answer."""
    return _error_message(body) is not None


def find_fetch_failure(status: int, body: bytes) -> str | None:
    """Return why the instance could not fetch the client's media URL when that is what this answer means, else None.

    For the log only: told to clients, it would let them find out what listens in the instance's network.
    """
    if status != 500:
        return None
    message = _error_message(body)
    if message is None or (message and not any(sign in message for sign in _FETCH_FAILURES)):
        return None
    return message or "it did not answer in time"


def _error_message(body: bytes) -> str | None:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None
