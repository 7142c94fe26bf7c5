"""Fake vLLM instances: real HTTP servers on loopback, with answers in vLLM's form and faults on demand."""

import asyncio
import json
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

MODEL = "fake-model"


@dataclass(frozen=True)
class Recorded:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    method: str = "POST"
    raw_path: str = ""

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")  # type: ignore[no-any-return]

    @property
    def parts(self) -> list[dict[str, Any]]:
        return self.document["messages"][0]["content"]  # type: ignore[no-any-return]


Behaviour = Callable[["FakeInstance", web.Request, Recorded], Awaitable[web.StreamResponse]]


class FakeInstance:
    """One instance. ``script`` holds what the next requests meet, in order; then ``default`` again."""

    host = "127.0.0.1"
    tls: ssl.SSLContext | None = None

    def __init__(self, default: "Behaviour | None" = None, name: str = "fake", port: int = 0) -> None:
        self.name = name
        self.default = default or answer
        self.script: deque[Behaviour] = deque()
        self.requests: list[Recorded] = []
        self.probes = 0
        self.healthy = True
        self.profiler = False
        self.models = [MODEL]
        self.models_status = 200
        self.running = 0
        self.running_max = 0
        self.aborted = 0
        self.port = port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    async def start(self) -> "FakeInstance":
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("*", "/v1/{rest:.*}", self._infer)
        app.router.add_post("/{name:(de)?tokenize}", self._infer)
        app.router.add_post("/{name:(start|stop)_profile}", self._profile)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port, reuse_address=True, ssl_context=self.tls).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> "FakeInstance":
        return await self.start()

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    async def _health(self, _request: web.Request) -> web.Response:
        self.probes += 1
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        self.requests.append(Recorded(request.path, request.headers, b""))
        models = [{"id": model, "object": "model", "owned_by": self.name} for model in self.models]
        return web.json_response({"object": "list", "data": models}, status=self.models_status)

    async def _profile(self, request: web.Request) -> web.Response:
        if not self.profiler:
            raise web.HTTPNotFound
        self.requests.append(Recorded(request.path, request.headers, await request.read()))
        return web.Response()

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        recorded = Recorded(request.path, request.headers, await request.read(), request.method, request.raw_path)
        self.requests.append(recorded)
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        try:
            behaviour = self.script.popleft() if self.script else self.default
            return await behaviour(self, request, recorded)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1


async def answer(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
    """What a well instance does: a completion, streamed when asked for."""
    if recorded.document.get("stream") is True:
        return await stream()(instance, request, recorded)
    document = {
        "id": "chatcmpl-fake", "object": "chat.completion", "created": 1, "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Ein Täßchen 🍵"}, "text": "Ein Täßchen",
                     "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }  # fmt: skip
    return web.json_response(document)


def after(delay_s: float, then: Behaviour = answer) -> Behaviour:
    """Wait, then behave."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        await asyncio.sleep(delay_s)
        return await then(instance, request, recorded)

    return behave


def refuse(
    status: int,
    message: str = "no",
    kind: str = "BadRequestError",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Behaviour:
    """Answer with an error in vLLM's form, or with ``body``."""

    async def behave(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.StreamResponse:
        if body is not None:
            return web.Response(status=status, body=body, content_type="text/plain", headers=headers)
        error = {"message": message, "type": kind, "param": None, "code": status}
        return web.json_response({"error": error}, status=status, headers=headers)

    return behave


def chunk(text: str) -> bytes:
    """One event of a streamed chat completion, as vLLM writes it."""
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None, "text": text}
    document = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
                "choices": [delta]}  # fmt: skip
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
TEXT = (chunk("Ein "), chunk("Täßchen "), chunk("🍵"), DONE)


def stream(pieces: Sequence[bytes] = TEXT, gap_s: float = 0.0, *, end: str = "whole") -> Behaviour:
    """Send server-sent events; ``end`` is whole, joined (the last piece comes with it), cut (connection closed in the
    midst) or hang.
    """

    async def behave(_instance: FakeInstance, request: web.Request, _recorded: Recorded) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces[:-1] if end == "joined" else pieces:
            await response.write(piece)
            await asyncio.sleep(gap_s)
        if end == "joined":
            await response.write_eof(pieces[-1])
        if end == "hang":
            await asyncio.sleep(3600)
        if end == "cut" and request.transport:
            request.transport.abort()
        return response

    return behave


def hang(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> Awaitable[web.StreamResponse]:
    """Never answer."""
    return asyncio.sleep(3600, web.Response())


async def drop(_instance: FakeInstance, request: web.Request, _recorded: Recorded) -> web.StreamResponse:
    """Close the connection instead of an answer, as a process that dies does."""
    if request.transport:
        request.transport.abort()
    return web.Response()


async def cut_json(_instance: FakeInstance, request: web.Request, _recorded: Recorded) -> web.StreamResponse:
    """Announce more than is sent."""
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"id": "chatcmpl-')
    await asyncio.sleep(0.01)
    if request.transport:
        request.transport.abort()
    return response


async def empty(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.StreamResponse:
    """Answer 200 with nothing."""
    return web.Response(status=200, content_type="application/json")


def needs_picture(_instance: FakeInstance, request: web.Request, recorded: Recorded) -> Awaitable[web.StreamResponse]:
    """Refuse inline content that is no picture, as vLLM's image loader does."""
    import base64

    for part in recorded.parts:
        content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        if not content.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")):
            return refuse(400, "Failed to load image: cannot identify image file")(_instance, request, recorded)
    return answer(_instance, request, recorded)
