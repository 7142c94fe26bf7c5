"""What a person sees when the stack is up: a request to copy, and what to do next."""

from __future__ import annotations

import base64
import json
import shlex
import struct
import zlib
from collections.abc import Mapping

from epd import stack as stacks

_SIDE_PIXELS = 56


def picture() -> bytes:
    """Return a small PNG, upper half red and lower half blue, 56 pixels square, 8-bit RGB."""
    rows = b"".join(
        b"\0" + (b"\xd0\x20\x20" if y < _SIDE_PIXELS // 2 else b"\x20\x20\xd0") * _SIDE_PIXELS
        for y in range(_SIDE_PIXELS)
    )
    header = struct.pack(">IIBBBBB", _SIDE_PIXELS, _SIDE_PIXELS, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def model_name(address: str) -> str:
    """Return the name the stack serves its model under; empty when it does not say."""
    status, body = stacks.fetch(f"{address}/v1/models")
    if status != 200:
        return ""
    try:
        name = json.loads(body)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return str(name)


def options(environment: Mapping[str, str]) -> str:
    """Return what curl needs besides: for a certificate that does not name this address, and for a client's key."""
    tls = " -k" if environment.get("EPD_PROXY_TLS_CERT") else ""
    return tls + (' -H "Authorization: Bearer $KEY"' if environment.get("EPD_PROXY_API_KEYS_FILE") else "")


def render(address: str, model: str, topology: str, options: str = "") -> str:
    """Return the closing banner. Every command in it can be copied as it stands, but for $KEY, a key of a client."""
    image = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    text = _request(model, [{"type": "text", "text": "Hello, who are you?"}])
    both = _request(
        model,
        [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is in the picture?"}],
    )
    return f"""
The stack ({topology}) is up: {address}   model: {model}

A request with text only, which the encoder never sees:

  curl -s{options} {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(text)}

One with a picture, which the encoder turns into embeddings first:

  curl -s{options} {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(both)}

Next:
  make status    how it is                make logs      follow its logs
  make down      stop it                  make smoke     live tests, on a stack of their own
  docker compose ps|logs|down works from here too (see .env)
"""


def render_member(topology: str, here: str, head: str) -> str:
    """Return the closing banner of a host that has instances only: the proxy and the pool are on `head`."""
    return f"""
The instances of {topology} on {here} are up. The proxy, on {head}, takes them in by itself: `make status` there.

Next:
  make status    how they are            make logs      follow their logs
  make down      stop them               make doctor    check this host again, and what they reach
"""


def _request(model: str, content: list[dict[str, object]]) -> str:
    message = {"role": "user", "content": content}
    return json.dumps({"model": model, "max_tokens": 24, "temperature": 0, "messages": [message]})
