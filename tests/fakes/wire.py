"""A backend that speaks bytes: each connection plays a script, so that a test decides what is on the wire and when."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from types import TracebackType

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Peer:
    """One connection, seen from the backend."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[str, bytes]:
        """Read a request; return its head and its body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("utf-8", "surrogateescape")
        length = re.search(r"^content-length: (\d+)", head, re.I | re.M)
        return head, await self.reader.readexactly(int(length[1]) if length else 0)

    async def send(self, *pieces: bytes, gap_s: float = 0.0) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(gap_s)

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()

    async def until_closed(self) -> None:
        """Return when the other side has closed."""
        try:
            while await self.reader.read(65_536):
                pass
        except ConnectionError:
            pass


Script = Callable[[Peer], Awaitable[None]]


class WireBackend:
    """``async with WireBackend(script, …) as backend``: the n-th connection plays the n-th script, or the last one."""

    def __init__(self, *scripts: Script, host: str = "127.0.0.1", port: int = 0) -> None:
        self._scripts = scripts
        self._host = host
        self.port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.closed_by_client = 0

    async def __aenter__(self) -> "WireBackend":
        self._server = await asyncio.start_server(self._accept, self._host, self.port, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://[{self._host}]:{self.port}" if ":" in self._host else f"http://{self._host}:{self.port}"
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _exc: object, _tb: TracebackType | None) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        script = self._scripts[min(self.connections, len(self._scripts) - 1)]
        self.connections += 1
        peer = Peer(reader, writer)
        try:
            await script(peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed_by_client += 1
        finally:
            self._tasks.discard(task)
            writer.close()


def whole(body: bytes = b"{}", *, status: str = "200 OK", headers: str = "") -> bytes:
    """An answer with a length."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def serve(*answers: bytes) -> Script:
    """Answer the requests of a connection with these, in order, then wait for its end."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            await peer.send(answer)
        await peer.until_closed()

    return script


def in_pieces(answer: bytes, size: int) -> list[bytes]:
    return [answer[at : at + size] for at in range(0, len(answer), size)]
