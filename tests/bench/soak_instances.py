"""The instances of the soak, some of whose answers fail, in a process of their own. Arguments: FAILING GAP-S."""

import asyncio
import contextlib
import random
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    """An answer with a length."""
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def event(data: bytes = EVENT) -> bytes:
    """A chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Instance(asyncio.Protocol):
    """Answers at once, or with an event a ``gap_s``; a share ``failing`` of the requests meets a fault."""

    def __init__(self, chance: random.Random, failing: float, gap_s: float) -> None:
        self._chance, self._failing, self._gap_s = chance, failing, gap_s
        self._buffer = bytearray()
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = LENGTH.search(self._buffer, 0, end)
        size = end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < size:
            return
        request, self._buffer = bytes(self._buffer[:size]), self._buffer[size:]
        if request.startswith(b"GET"):
            self._transport.write(whole(b"{}"))
        elif self._chance.random() < self._failing:
            self._fail(b'"stream":true' in request)
        elif b'"stream":true' not in request:
            self._transport.write(whole(b'{"choices":[{"message":{"content":"word"}}]}'))
        elif self._gap_s:
            self._streaming = asyncio.ensure_future(self._stream())
        else:
            self._transport.write(HEAD + event() * 5 + DONE)

    def _fail(self, streamed: bool) -> None:
        fault = self._chance.randrange(4)
        if fault < 2:
            self._transport.write(whole(b"no", b"500 No" if fault else b"503 Not now"))
        else:
            if fault == 3:
                self._transport.write(HEAD + event() if streamed else whole(b"x" * 100)[:-50])
            self._transport.close()

    async def _stream(self) -> None:
        self._transport.write(HEAD)
        while not self._transport.is_closing():
            self._transport.write(event())
            await asyncio.sleep(self._gap_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._streaming:
            self._streaming.cancel()


@contextlib.asynccontextmanager
async def instances(failing: float, gap_s: float) -> AsyncIterator[list[str]]:
    """Run three instances in a process of their own, as its connections are as many as ours; gives their URLs."""
    command = (sys.executable, __file__, str(failing), str(gap_s))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a pipe was asked for")
    yield [f"http://127.0.0.1:{port}" for port in (await process.stdout.readline()).decode().split()]
    process.stdin.close()
    await process.wait()


async def serve(failing: float, gap_s: float) -> None:
    """Serve until nobody holds the other end of standard input; tell the ports."""
    chance, loop = random.Random(2), asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: Instance(chance, failing, gap_s), "127.0.0.1", 0, backlog=4096)
        for _ in range(3)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(serve(*map(float, sys.argv[1:])))
