"""The proxy's client towards backends, opened for a test, and calls of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from epd_proxy.config import Timeouts
from epd_proxy.upstream import Call, Upstream

MIB = 1024 * 1024


@contextlib.asynccontextmanager
async def opened(**timeouts: float) -> AsyncIterator[Upstream]:
    upstream = Upstream(Timeouts(**timeouts))
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.close()
        for _ in range(100):
            if "open=0" in repr(upstream):
                break
            await asyncio.sleep(0.01)
        assert "open=0" in repr(upstream)


def call(body: bytes | None = b"{}", limit_s: float = 5.0, **more: object) -> Call:
    return Call("/v1/x", [("Content-Type", "application/json")], limit_s, body, **more)  # type: ignore[arg-type]


async def fetch(upstream: Upstream, url: str, asked: Call | None = None) -> bytes:
    response = await upstream.send(url, asked or call())
    try:
        return await response.read_all(64 * MIB)
    finally:
        response.close()
