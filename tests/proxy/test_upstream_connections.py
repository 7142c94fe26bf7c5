"""Connections of the client towards backends: which is kept, replaced or closed, and nothing is left of any."""

import asyncio
import contextlib

import pytest

from epd_proxy.errors import BackendDisconnectError, BackendError
from epd_proxy.upstream import Call
from fakes.upstream import call, fetch, opened
from fakes.wire import CHUNKED, Peer, Script, WireBackend, serve, whole


def closes_after(answers: int) -> Script:
    """Answer so many requests, read one more, and close without a word."""

    async def script(peer: Peer) -> None:
        for _ in range(answers):
            await peer.request()
            await peer.send(whole())
        await peer.request()

    return script


async def test_a_stale_connection_is_replaced_once() -> None:
    async with WireBackend(closes_after(1), serve(whole(b"new"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"{}"
        assert await fetch(upstream, backend.url) == b"new"
        assert backend.connections == 2


async def test_a_second_break_is_no_stale_connection() -> None:
    async with WireBackend(closes_after(1), closes_after(0)) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"{}"
        with pytest.raises(BackendDisconnectError):
            await fetch(upstream, backend.url)
        assert backend.connections == 2


async def test_what_was_begun_is_not_sent_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(whole())
        await peer.request()
        await peer.send(b"HTTP/1.1 2", gap_s=0.02)

    async with WireBackend(script) as backend, opened() as upstream:
        await fetch(upstream, backend.url)
        with pytest.raises(BackendDisconnectError):
            await fetch(upstream, backend.url)
        assert backend.connections == 1


async def test_what_nobody_took_of_an_answer_begins_no_other_one() -> None:
    """As when the client leaves just before the end of an answer comes."""
    go_on, ended = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"1\r\na\r\n")
        await go_on.wait()
        await peer.send(b"6\r\nsecret\r\n0\r\n\r\n")
        ended.set()
        await serve(whole(b"other"))(peer)

    async with WireBackend(script, serve(whole(b"other"))) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        go_on.set()
        await ended.wait()
        await asyncio.sleep(0.1)  # it is read meanwhile
        response.close()
        assert await fetch(upstream, backend.url) == b"other"


async def test_a_call_that_may_go_once_takes_a_new_connection_and_leaves_none() -> None:
    async with WireBackend(serve(whole(), whole())) as backend, opened() as upstream:
        await fetch(upstream, backend.url)
        await fetch(upstream, backend.url, call(once=True))
        assert (backend.connections, "kept=1" in repr(upstream)) == (2, True)
        await fetch(upstream, backend.url)
        assert backend.connections == 2


@pytest.mark.parametrize(
    "answer", [whole(headers="Connection: close\r\n"), b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"]
)
async def test_a_connection_that_is_to_be_closed_is_not_kept(answer: bytes) -> None:
    async with WireBackend(serve(answer, answer)) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"{}"
        assert await fetch(upstream, backend.url) == b"{}"
        assert backend.connections == 2


@pytest.mark.parametrize("gap_s", [0.0, 0.05])
async def test_an_answer_to_nothing_is_never_taken_for_the_next_one(gap_s: float) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(whole(b"first"), gap_s=gap_s)
        await peer.send(whole(b"smuggled"))
        await peer.until_closed()

    async with WireBackend(script, serve(whole(b"second"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"first"
        await asyncio.sleep(0.1)
        assert await fetch(upstream, backend.url) == b"second"


async def test_both_in_one_piece() -> None:
    first = serve(whole(b"first") + whole(b"smuggled"))
    async with WireBackend(first, serve(whole(b"second"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"first"
        assert await fetch(upstream, backend.url) == b"second"


async def test_what_was_not_read_to_its_end_is_closed() -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"5\r\nhello\r\n")
        await peer.until_closed()
        closed.set()

    async with WireBackend(script) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        assert response.first == b"hello"
        response.close()
        response.close()
        await asyncio.wait_for(closed.wait(), 5)
        assert "kept=0" in repr(upstream)


async def test_a_cancelled_call_is_aborted_at_the_backend() -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.until_closed()
        gone.set()

    async with WireBackend(script) as backend, opened() as upstream:
        asking = asyncio.create_task(fetch(upstream, backend.url))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(gone.wait(), 5)


async def test_idle_connections_go_after_a_while() -> None:
    async with WireBackend(serve(whole())) as backend, opened() as upstream:
        await fetch(upstream, backend.url)
        assert "open=1 kept=1" in repr(upstream)
        for _ in range(800):
            if "open=0 kept=0" in repr(upstream):
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"still open after 8 s: {upstream}")


async def test_nothing_is_left_of_many_calls() -> None:
    """Broken, cancelled and whole ones: no connection, no timer, no task stays."""
    answers = [whole(), CHUNKED + b"1\r\nx\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answers[backend.connections % len(answers)])

    async with WireBackend(script) as backend, opened() as upstream:

        async def one(number: int) -> None:
            with contextlib.suppress(BackendError, TimeoutError):
                async with asyncio.timeout(0.0005 if number % 3 == 0 else 5):
                    await fetch(upstream, backend.url)

        for _ in range(5):
            await asyncio.gather(*map(one, range(40)))
        for connection in upstream._open:
            assert (connection.keepable, connection._timer, connection._waiter) == (True, None, None)


@pytest.mark.parametrize("delay_s", [0.0, 0.01])
async def test_what_was_not_sent_whole_is_no_connection_for_the_next(delay_s: float) -> None:
    """The backend would read the next request as the rest of this one's body."""

    async def answers_early(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.reader.readexactly(300_000)
        peer.writer.transport.pause_reading()
        await asyncio.sleep(delay_s)
        await peer.send(whole(b"no", status="401 Unauthorized"))
        peer.writer.transport.resume_reading()
        await peer.until_closed()

    for _ in range(5):
        async with WireBackend(answers_early, serve(whole(b"ok"))) as backend, opened() as upstream:
            response = await upstream.send(backend.url, Call("/v1/x", [], 5, b"b" * 30_000_000))
            assert (response.status, await response.read_all(100)) == (401, b"no")
            response.close()
            assert await fetch(upstream, backend.url) == b"ok"
            assert backend.connections == 2
