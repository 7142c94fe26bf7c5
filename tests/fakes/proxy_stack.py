"""The real proxy on a loopback port, in front of fake instances."""

import asyncio
import base64
import copy
import io
import itertools
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import aiohttp

from epd_proxy.app import build_app
from epd_proxy.config import Health, Limits, Listen, MetaserverConfig, ProxyConfig, Retry, Timeouts, Topology
from fakes.instances import MODEL, FakeInstance
from fakes.layerwise import KvLink, decode_instance, prefill_instance
from fakes.proxy_process import free_port

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ITEM_KEY = b"k" * 32
_COLORS = itertools.count()


class ProxyStack:
    """``async with ProxyStack(encoders=2) as stack``. Leaving it asserts that nothing was left in flight.

    With ``prefills`` and ``decodes`` these take the place of the ``instances``. ``more`` are other parts of the
    configuration.
    """

    def __init__(self, encoders: int = 1, instances: int = 1, *, prefills: int = 0, decodes: int = 0,
                 timeouts: Timeouts | None = None, retry: Retry | None = None, limits: Limits | None = None,
                 health: Health | None = None, encode_fallback: str = "local", **more: Any) -> None:  # fmt: skip
        self.encoders = [FakeInstance(name=f"encode-{i}") for i in range(encoders)]
        self.instances = [FakeInstance(name=f"prefill-decode-{i}") for i in range(0 if decodes else instances)]
        self.link = KvLink()
        self.prefills = [prefill_instance(self.link, f"prefill-{i}") for i in range(prefills)]
        self.decodes = [decode_instance(self.link, f"decode-{i}") for i in range(decodes)]
        self.fakes = [*self.encoders, *self.instances, *self.prefills, *self.decodes]
        self._options: dict[str, Any] = {
            "timeouts": timeouts or Timeouts(drain_s=1),
            "retry": retry or Retry(), "limits": limits or Limits(), "health": health or Health(interval_s=60),
            "encode_fallback": encode_fallback, **more,
        }  # fmt: skip
        self.url = ""

    async def __aenter__(self) -> "ProxyStack":
        for fake in self.fakes:
            await fake.start()
        topology = Topology(*(tuple(fake.url for fake in stage)
                              for stage in (self.encoders, self.instances, self.prefills, self.decodes)))  # fmt: skip
        metaserver = MetaserverConfig("127.0.0.1", free_port())
        self.config = ProxyConfig(
            listen=Listen("127.0.0.1", 0), topology=topology, metaserver=metaserver, **self._options
        )
        self.app = build_app(self.config)
        self._running = self.app.running()
        await self._running.__aenter__()
        await self.app.listener.start("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.app.listener.addresses[0][1]}"
        self.client = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=30))
        self.pools = self.app.stages.pools
        self.handlers = self.app.handlers
        self.flow = self.app.flow
        self.metaserver = self.app.metaserver
        self.admin = self.app.admin
        self.membership = self.app.membership
        await self.until(lambda: all(pool.ready for pool in self.pools.values()))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _exc: object, _tb: TracebackType | None) -> None:
        try:
            if kind is None:
                await self.until_idle()
        finally:
            await self.client.close()
            await self._running.__aexit__(None, None, None)
            for fake in self.fakes:
                await fake.stop()

    async def until(self, condition: Any, timeout_s: float = 15.0) -> None:
        """Wait for ``condition()``; fail with the state of the pools when it does not come true."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, (
                f"not within {timeout_s} s: {self.handlers} {self.flow} {self.link} {self.pools}"
            )
            await asyncio.sleep(0.005)

    async def until_idle(self) -> None:
        """Wait until no request runs, then assert that no lease and no cost is left."""
        await self.until(lambda: "running=0" in repr(self.handlers))
        if self.metaserver:
            await self.until(lambda: "pending=0" in repr(self.metaserver))
        if self.decodes:
            await self.until(lambda: "running=" not in repr(self.flow) or "running=0" in repr(self.flow))
            assert self.link.harm == []
        for pool in self.pools.values():
            for endpoint in pool.endpoints:
                assert (endpoint.active_leases, endpoint.active_cost) == (0, 0), endpoint

    async def post(self, document: Any, path: str = CHAT, **options: Any) -> "Reply":
        """POST a document (or bytes) and return the whole reply."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        async with self.client.post(path, data=io.BytesIO(data), headers=headers, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str) -> "Reply":
        async with self.client.get(path) as response:
            return Reply(response.status, response.headers, await response.read())


class Reply:
    """A response, read."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.body[:300]!r}>"

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after asserting that it has OpenAI's form."""
        assert self.headers["Content-Type"].startswith("application/json"), self
        error = self.document["error"]
        assert set(error) == {"message", "type", "param", "code"}, self
        assert error["code"] == self.status, self
        assert error["message"], self
        return error  # type: ignore[no-any-return]


def chat(*parts: dict[str, Any], text: str = "What is it?", **more: Any) -> dict[str, Any]:
    """A chat request; without parts its content is a plain string."""
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    return {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": content}], **more}


def picture(side: int = 32, form: str = "PNG", color: str = "red", **save: Any) -> bytes:
    """An encoded picture of ``side`` x ``side`` pixels."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (side, side), color).save(out, form, **save)
    return out.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_part(content: bytes | None = None, **more: Any) -> dict[str, Any]:
    """A picture; without ``content`` another one each time."""
    content = content or picture(color=f"#{next(_COLORS) % 2**24:06x}")
    return {"type": "image_url", "image_url": {"url": data_url(content)}, **more}


def unnamed(document: dict[str, Any]) -> dict[str, Any]:
    """The document without the names that the proxy gave its items."""
    document = copy.deepcopy(document)
    for message in document["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else ():
            part.pop("uuid", None)
    return document


def url_part(url: str, field: str = "image_url") -> dict[str, Any]:
    return {"type": field, field: {"url": url}}


async def read_to_break(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """Return what came of a body, and whether it was cut short."""
    body = b""
    try:
        async for piece in response.content.iter_any():
            body += piece
    except aiohttp.ClientPayloadError:
        return body, True
    return body, False
