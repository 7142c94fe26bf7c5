"""The proxy's server on a loopback port, with handlers that tell what they were given, and a client of bytes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from epd_proxy.server import Handler, Listener, Request, Response, Routes, error_response

HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


async def echo(request: Request) -> Response:
    body = b""
    while piece := await request.more():
        body += piece
    return Response(200, b"%b %b %b" % (request.method.encode(), request.target.encode(), body), [("X-Mine", "1")])


async def ignore(_request: Request) -> Response:
    return Response(200, b"not read")


async def fail(_request: Request) -> Response:
    raise RuntimeError("a defect")


async def stream(request: Request) -> None:
    sent = request.stream(200, [("Content-Type", "text/event-stream")])
    for number in range(2):
        assert sent.write(b"data: %d\n\n" % number)
    assert sent.end(b"data: 2\n\n")


class Client:
    """A plain connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[bytes, dict[bytes, bytes], bytes]:
        """Return status line, headers and body of the next answer that has a length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines)
        return first, headers, await self.reader.readexactly(int(headers.get(b"content-length", b"0")))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for ``condition``."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


@contextlib.asynccontextmanager
async def served(handler: Handler | None = None, **options: object) -> AsyncIterator[Callable[[], object]]:
    """Serve ``handler``, or all of them by path; gives what opens connections."""
    routes = Routes(lambda _request, error: error_response(error))
    for path, each in (("/echo", echo), ("/ignore", ignore), ("/fail", fail), ("/stream", stream)):
        for method in ("GET", "POST"):
            routes.add(method, path, each)
    listener = Listener(handler or routes.handle, **options)  # type: ignore[arg-type]
    await listener.start("127.0.0.1", 0)
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection(*listener.addresses[0])))
        return clients[-1]

    connect.listener = listener  # type: ignore[attr-defined]
    try:
        yield connect
    finally:
        for client in clients:
            client.writer.close()
        await listener.close(grace_s=0.1)
        assert not listener.connections
