"""The internal listener: who is answered how."""

import contextlib
import io
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from epd_proxy.config import MetaserverConfig
from epd_proxy.metaserver import Metaserver
from fakes.proxy_process import free_port


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Metaserver]:
    metaserver = Metaserver(MetaserverConfig("127.0.0.1", free_port()).resolved())
    await metaserver.start()
    yield metaserver
    await metaserver.close()


async def post(url: str, data: bytes = b"{}", method: str = "POST") -> int:
    async with aiohttp.ClientSession() as client, client.request(method, url, data=io.BytesIO(data)) as response:
        return response.status


async def test_a_ticket_takes_the_first_call_and_dies() -> None:
    async with started() as metaserver:
        first, second = metaserver.open(), metaserver.open()
        assert len({first.url, second.url}) == 2
        assert len(first.url.rpartition("/")[2]) >= 43  # 256 random bits
        assert await post(first.url, json.dumps({"a": 1}).encode()) == 200
        assert await post(first.url, json.dumps({"a": 2}).encode()) == 200
        assert (await first.called, second.called.done()) == ({"a": 1}, False)
        first.close()
        first.close()
        assert await post(first.url) == 404
        assert (metaserver.pending, "pending=1" in repr(metaserver)) == (1, True)
        second.close()


@pytest.mark.parametrize(
    ("data", "method", "status"),
    [(b"{", "POST", 400), (b"[]", "POST", 400), (b"", "POST", 400), (b"{}", "GET", 405), (b"{}", "PUT", 405),
     (b"x" * (4 * 1024 * 1024 + 1), "POST", 413)],
)  # fmt: skip
async def test_defect_22_bad_calls_leave_the_ticket_open(data: bytes, method: str, status: int) -> None:
    async with started() as metaserver:
        ticket = metaserver.open()
        assert await post(ticket.url, data, method) == status
        assert not ticket.called.done()
        for url in (f"{metaserver.url}/v1/metaserver/guessed", f"{metaserver.url}/v1/metaserver", f"{metaserver.url}/"):
            assert await post(url) == 404
