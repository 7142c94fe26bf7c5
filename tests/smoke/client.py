"""Asks a question and returns the answer's tokens, whole or streamed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.message import Message
from http.client import HTTPResponse, IncompleteRead
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL = "tiny-model"


def chat_body(text: str, pictures: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Return a chat request at temperature 0 whose answer lists its token ids."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    parts.append({"type": "text", "text": text})
    message = {"role": "user", "content": parts}
    return {"model": MODEL, "messages": [message], "temperature": 0, "max_tokens": 24, "return_token_ids": True} | more


def post(url: str, body: Any, timeout_s: float = 120) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers (names in lower case) and body of the answer; `body` goes as JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, _lower(answer.headers), _read(answer)
    except urllib.error.HTTPError as error:
        return error.code, _lower(error.headers), error.read()


def _read(answer: HTTPResponse) -> bytes:
    try:
        return answer.read()
    except IncompleteRead as cut:  # a stream that broke: what came before is what counts
        return bytes(cut.partial)


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def tokens(base_url: str, path: str, body: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of each choice of a whole, good answer."""
    return read_tokens(post(base_url + path, body), stream=bool(body.get("stream")))


def read_tokens(answer: tuple[int, dict[str, str], bytes], *, stream: bool) -> list[list[int]]:
    """Return the token ids of each choice; the status must be 200, and a stream must end with [DONE]."""
    status, headers, body = answer
    assert status == 200, f"{status} {body[:2000]!r}"
    if not stream:
        return [choice["token_ids"] for choice in json.loads(body)["choices"]]
    assert headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", body[-2000:]
    found: dict[int, list[int]] = {}
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            found.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
    return [found[index] for index in sorted(found)]
