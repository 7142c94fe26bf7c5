"""`make soak-proxy`: many requests, some given up, some of them to instances that fail; and many streams at once.

Asserted: each answer is one that such a request may get, and afterwards leases, tasks, tables and memory are where they
were. All traffic stays on loopback.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from pybase64 import b64encode

from epd_proxy.config import Timeouts
from epd_proxy.errors import BackendError
from epd_proxy.upstream import Call, Upstream

HERE = Path(__file__).resolve().parent
CHAT = "/v1/chat/completions"
MIB = 1024 * 1024
ABORTED, FAILING = 0.10, 0.05
GROWTH_MAX_BYTES = 5 * MIB
STREAMS_MAX_BYTES = 1024 * MIB
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LEASES = "epd_proxy_leases_in_flight{"
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    """An answer with a length."""
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def event(data: bytes = EVENT) -> bytes:
    """A chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def resident_bytes(pid: int | str) -> int:
    """What a process has in memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def bodies(chance: random.Random) -> list[bytes]:
    """Texts, streams and pictures, the pictures all different."""

    def document(parts: Any, **more: Any) -> bytes:
        body = {"model": "m", "messages": [{"role": "user", "content": parts}], **more}
        return json.dumps(body, separators=(",", ":")).encode()

    def picture() -> dict[str, Any]:
        size = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + size
            + struct.pack(">I", zlib.crc32(b"IHDR" + size))
        )
        url = "data:image/png;base64," + b64encode(data + chance.randbytes(20_000)).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    texts = [document("word " * n) for n in range(1, 60)]
    streams = [document("word " * n, stream=True) for n in range(1, 20)]
    return [*texts, *streams, *(document([picture()]) for _ in range(10))]


@contextlib.asynccontextmanager
async def instances(failing: float, gap_s: float) -> AsyncIterator[list[str]]:
    """Run three instances in a process of their own, as its connections are as many as ours; gives their URLs."""
    command = (sys.executable, __file__, "--serve-instances", str(failing), str(gap_s))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a pipe was asked for")
    yield [f"http://127.0.0.1:{port}" for port in (await process.stdout.readline()).decode().split()]
    process.stdin.close()
    await process.wait()


async def serve_instances(failing: float, gap_s: float) -> None:
    """Serve until nobody holds the other end of standard input; tell the ports."""
    chance, loop = random.Random(2), asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: Instance(chance, failing, gap_s), "127.0.0.1", 0, backlog=4096)
        for _ in range(3)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.to_thread(sys.stdin.read)


class Proxy:
    """The proxy's process, and what it says of itself."""

    def __init__(self, port: int, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._inspector = f"http://127.0.0.1:{port + 1}"
        self._command = [str(HERE / "inspected.py"), str(port + 1), "--host", "127.0.0.1", "--port", str(port), *flags]

    async def __aenter__(self) -> "Proxy":
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        command = (sys.executable, *self._command, "--log-level", "error", "--health-interval-s", "0.2")
        self.process = await asyncio.create_subprocess_exec(*command, stderr=self._log)
        self._upstream = Upstream(Timeouts())
        await self._upstream.start()
        for _ in range(300):
            try:
                await self.state()
            except BackendError:
                await asyncio.sleep(0.1)
            else:
                return self
        raise RuntimeError("the proxy did not start")

    async def __aexit__(self, *exc: object) -> None:
        await self._upstream.close()
        self.process.terminate()
        await self.process.wait()
        if exc[0]:
            print(*self.errors()[:20], sep="\n", file=sys.stderr)

    def errors(self) -> list[str]:
        """Return what the proxy logged as its own failure."""
        self._log.seek(0)
        lines = [json.loads(line) for line in self._log if line.startswith(b"{")]
        return [f"log: {line['message']}" for line in lines if line["logger"] != "epd_proxy.access"]

    async def state(self) -> dict[str, Any]:
        response = await self._upstream.send(self._inspector, Call("/", [], 120, method="GET"))
        try:
            return json.loads(await response.read_all(MIB))  # type: ignore[no-any-return]
        finally:
            response.close()

    async def rest(self) -> dict[str, Any]:
        """Wait until nothing is under way; return what is left then."""
        for _ in range(150):
            state = await self.state()
            if state["leases"] == state["connections_in_use"] == state.get("clients", 0) == 0:
                break
            await asyncio.sleep(0.2)
        return state


class Workers(Proxy):
    """Several processes on one port, and what can be told of them from outside."""

    def __init__(self, port: int, *flags: str) -> None:
        super().__init__(port, *flags)
        self._command = ["-m", "epd_proxy", "--host", "127.0.0.1", "--port", str(port), *flags]

    async def state(self) -> dict[str, Any]:
        response = await self._upstream.send(self.url, Call("/metrics", [("Connection", "close")], 120, method="GET"))
        try:
            shown = (await response.read_all(MIB)).decode()
        finally:
            response.close()
        leases = sum(int(float(line.split()[-1])) for line in shown.splitlines() if line.startswith(LEASES))
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # noqa: ASYNC240 - not of a disk
        return {"leases": leases, "connections_in_use": 0, "resident_bytes": sum(map(resident_bytes, (pid, *children)))}


async def soak(proxy: Proxy, total: int, connections: int) -> list[str]:
    """Send ``total`` requests; return what was not as it should be."""
    chance = random.Random(1)
    documents = bodies(chance)
    client = Upstream(Timeouts())
    await client.start()
    seen: Counter[str] = Counter()
    left, marked = iter(range(total)), asyncio.Event()
    at_mark = 0

    async def one(number: int) -> None:
        call = Call(CHAT, [("Content-Type", "application/json")], 30, documents[number % len(documents)])
        aborted = chance.random() < ABORTED
        try:
            async with asyncio.timeout(chance.random() * 0.02 if aborted else 60):
                response = await client.send(proxy.url, call)
                try:
                    body = await response.read_all(MIB)
                finally:
                    response.close()
        except TimeoutError:
            seen["given up"] += 1
        except BackendError as error:
            seen[type(error).__name__] += 1
        else:
            seen[str(response.status)] += 1
            if not body:
                seen["empty answers"] += 1

    async def run() -> None:
        nonlocal at_mark
        for number in left:
            await one(number)
            if number == min(20_000, total // 2):
                at_mark = (await proxy.state())["resident_bytes"]
                marked.set()

    before = await proxy.rest()
    started = time.monotonic()
    await asyncio.gather(*(run() for _ in range(connections)))
    took_s = time.monotonic() - started
    last = (await proxy.state())["resident_bytes"]
    await client.close()
    after = await proxy.rest()
    print(f"{total} requests in {took_s:.0f} s: {dict(seen)}\nbefore: {before}\nafter:  {after}")
    return judge_memory(before, at_mark, last) + judge_answers(seen, total) + differences(before, after)


def judge_memory(before: dict[str, Any], at_mark: int, last: int) -> list[str]:
    """Return what is wrong with the proxy's memory, in bytes at the mark and after the last request."""
    growth = (last - at_mark) / MIB
    print(f"resident: {before['resident_bytes'] / MIB:.1f} MiB at the start, {at_mark / MIB:.1f} MiB at the mark, "
          f"{last / MIB:.1f} MiB after the last ({growth:+.1f})")  # fmt: skip
    most = GROWTH_MAX_BYTES / MIB
    return [f"memory: expected at most +{most:g} MiB between the mark and the last request, found {growth:+.1f}"
            for _ in range(growth > most)]  # fmt: skip


def judge_answers(seen: Counter[str], total: int) -> list[str]:
    """Return what is wrong with the answers."""
    strange = sorted(set(seen) - {"200", "500", "502", "503", "given up", "BackendDisconnectError"})
    wrong = [f"answers: expected none of {name}, found {seen[name]}" for name in strange]
    if not seen["given up"] or seen["200"] < 0.8 * total:
        wrong.append(f"answers: expected 80% or more to be 200, and some given up, found {dict(seen)}")
    return wrong


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is not as it was before the load."""
    same = {
        "tasks",
        "clients",
        "leases",
        "cost",
        "bodies_bytes",
        "handlers",
        "flow",
        "connections_in_use",
    }.intersection(before)
    return [f"{name}: expected {before[name]}, found {after[name]}" for name in same if before[name] != after[name]]


async def hold(proxy: Proxy, count: int) -> list[str]:
    """Hold ``count`` streams at once; return what was not as it should be."""
    client = Upstream(Timeouts())
    await client.start()
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}, separators=(",", ":")).encode()
    call = Call(CHAT, [("Content-Type", "application/json")], 120, body)
    before = await proxy.rest()
    streams = []
    for start in range(0, count, 100):
        streams += await asyncio.gather(*(client.send(proxy.url, call) for _ in range(min(100, count - start))))
    bad = sum(response.status != 200 for response in streams)

    async def read_on() -> int:
        async def one(response: Any) -> bool:
            came = asyncio.Event()

            def take(_: bytes) -> bool:
                came.set()
                return True

            rest, first = asyncio.ensure_future(response.pump(take, came.wait)), asyncio.ensure_future(came.wait())
            await asyncio.wait((rest, first), return_when=asyncio.FIRST_COMPLETED)
            for task in (rest, first):
                task.cancel()
            return came.is_set()

        return sum(await asyncio.gather(*map(one, streams)))

    alive = await asyncio.wait_for(read_on(), 120)
    held = await proxy.state()
    print(f"{count} streams: {held['leases']} leases, {alive} went on, resident {held['resident_bytes'] / MIB:.0f} MiB "
          f"({(held['resident_bytes'] - before['resident_bytes']) / count / 1024:.0f} KiB a stream)")  # fmt: skip
    for response in streams:
        response.close()
    await client.close()
    after = await proxy.rest()
    wrong = [f"streams: {bad} were refused"] if bad else []
    if held["leases"] != count or alive != count:
        wrong.append(f"streams: expected {count} at once, found {held['leases']} leases, {alive} that went on")
    if held["resident_bytes"] > STREAMS_MAX_BYTES:
        wrong.append(f"memory: expected at most 1024 MiB, found {held['resident_bytes'] / MIB:.0f}")
    return wrong + differences(before, after)


async def main() -> int:
    """Run what is asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--port", type=int, default=29_700)
    parser.add_argument("--workers", type=int, default=1, help="of the proxy that holds the streams")
    parser.add_argument("--serve-instances", nargs=2, type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if args.serve_instances:
        await serve_instances(*args.serve_instances)
        return 0
    most = args.workers * (files // 2 - 100)  # each takes two in the proxy
    if args.streams > most:
        print(
            f"{args.streams} streams take more than the {files} open files that a process is allowed: {most} are held"
        )
        args.streams = most
    wrong = []
    for name, count, failing, gap_s in (("soak", args.requests, FAILING, 0.0), ("streams", args.streams, 0.0, 5.0)):
        if not count:
            continue
        async with instances(failing, gap_s) as (encode, *rest):
            flags = ("--encode", encode, "--prefill-decode", *rest)
            if name == "soak":
                proxy = Proxy(args.port, *flags)
                async with proxy:
                    wrong += await soak(proxy, count, args.connections)
            else:
                several = Workers(args.port, *flags, "--workers", str(args.workers))
                proxy = several if args.workers > 1 else Proxy(args.port, *flags)
                async with proxy:
                    wrong += await hold(proxy, count)
            wrong += proxy.errors()
    print("\n".join(f"FAIL: {each}" for each in wrong) or "PASS")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
