"""Names of instances: a container that is started anew may come back under another address."""

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from epd_proxy.config import Timeouts
from epd_proxy.errors import BackendConnectError, BackendConnectTimeoutError
from epd_proxy.upstream import Call, Upstream, dialing
from fakes.wire import Peer, WireBackend, serve, whole

FIRST, SECOND, NOBODY = "127.0.0.2", "127.0.0.3", "127.0.0.4"


class Names:
    """What ``instance.test`` resolves to."""

    def __init__(self) -> None:
        self.addresses = [FIRST]
        self.asked = 0

    def resolve(self, host: str, port: int, *_more: Any, **_named: Any) -> list[Any]:
        assert host.endswith(".test")
        self.asked += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names()
    monkeypatch.setattr(socket, "getaddrinfo", found.resolve)
    return found


def run(script: Callable[[Upstream, str], Awaitable[None]], connect_s: float = 5.0) -> None:
    """Run ``script`` beside two instances of one port, on asyncio's own loop: uvloop does not ask Python for names."""

    async def play() -> None:
        upstream = Upstream(Timeouts(connect_s=connect_s))
        async with (
            WireBackend(serve(whole(b"first")), host=FIRST) as first,
            WireBackend(serve(whole(b"second")), host=SECOND, port=first.port),
        ):
            await script(upstream, f"http://instance.test:{first.port}")
            await upstream.close()

    asyncio.run(play())


async def fetch(upstream: Upstream, url: str) -> bytes:
    """Ask over a new connection."""
    response = await upstream.send(url, Call("/v1/x", [], 5.0, b"{}", once=True))
    try:
        return await response.read_all(100)
    finally:
        response.close()


def test_a_name_is_resolved_anew_after_a_while(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(upstream: Upstream, url: str) -> None:
        monkeypatch.setattr(dialing, "_RESOLVED_FOR_S", 3600)
        assert [await fetch(upstream, url) for _ in range(3)] == [b"first"] * 3
        names.addresses = [SECOND]
        assert (await fetch(upstream, url), names.asked) == (b"first", 1)
        monkeypatch.setattr(dialing, "_RESOLVED_FOR_S", 0)
        assert (await fetch(upstream, url), names.asked) == (b"second", 2)

    run(script)


def test_a_name_that_leads_nowhere_is_resolved_anew_at_once(names: Names) -> None:
    async def script(upstream: Upstream, url: str) -> None:
        names.addresses = [NOBODY]
        with pytest.raises(BackendConnectError):
            await fetch(upstream, url)
        names.addresses = [SECOND]
        assert (await fetch(upstream, url), names.asked) == (b"second", 2)

    run(script)


def test_each_address_is_tried(names: Names) -> None:
    async def script(upstream: Upstream, url: str) -> None:
        names.addresses = [NOBODY, SECOND]
        assert await fetch(upstream, url) == b"second"

    run(script)


def test_an_address_that_says_nothing_leaves_time_for_the_next(names: Names) -> None:
    """A listener that takes nobody in, whose queue is full, gives no answer at all."""

    async def script(upstream: Upstream, url: str) -> None:
        with contextlib.ExitStack() as open_sockets:
            full = open_sockets.enter_context(socket.socket())
            full.bind((NOBODY, int(url.rpartition(":")[2])))
            full.listen(0)
            for _ in range(4):
                waiting = open_sockets.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            names.addresses = [NOBODY]
            with pytest.raises(BackendConnectTimeoutError):
                await fetch(upstream, url)
            names.addresses = [NOBODY, SECOND]
            assert await fetch(upstream, url) == b"second"

    run(script, connect_s=0.6)


def test_names_that_were_never_asked_for_again_are_forgotten(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(upstream: Upstream, url: str) -> None:
        monkeypatch.setattr(dialing, "_NAMES_MAX", 3)
        for number in range(10):
            assert await fetch(upstream, url.replace("instance", f"instance-{number}")) == b"first"
        assert re.search(r"names=[1-3]>", repr(upstream)), upstream

    run(script)


async def test_a_held_connection_ends_with_the_other_end_and_what_that_says_is_dropped() -> None:
    leave = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(b"x" * 100_000)
        await leave.wait()
        peer.reset()

    async with WireBackend(script) as backend:
        held = await Upstream(Timeouts()).hold(backend.url, 5.0)
        ending = asyncio.create_task(held.ended())
        await asyncio.wait((ending,), timeout=0.2)
        assert not ending.done()
        leave.set()
        await ending
        held.close()
    with pytest.raises(BackendConnectError):
        await Upstream(Timeouts()).hold(backend.url, 5.0)


async def test_a_silent_end_is_found_out_by_the_kernel() -> None:
    """Linux tells of each socket's timers: 02 is that of the keep-alive."""

    def timers(port: int) -> list[str]:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [row[5].partition(":")[0] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"]

    async with WireBackend(serve()) as backend:
        held = await Upstream(Timeouts()).hold(backend.url, 5.0)
        assert timers(backend.port) == ["02"]
        held.close()
