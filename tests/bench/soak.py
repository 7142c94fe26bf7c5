"""`make soak-proxy`: many requests, some given up, some of them to instances that fail; and many streams at once.

Asserted: each answer is one that such a request may get, and afterwards leases, tasks, tables and memory are where they
were. All traffic stays on loopback.
"""

import argparse
import asyncio
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from typing import Any

import uvloop
from pybase64 import b64encode
from soak_instances import instances
from soak_proxy import MIB, Proxy, Workers

from epd_proxy.config import Timeouts
from epd_proxy.errors import BackendError
from epd_proxy.upstream import Call, Upstream

CHAT = "/v1/chat/completions"
ABORTED, FAILING = 0.10, 0.05
GROWTH_MAX_BYTES = 5 * MIB
STREAMS_MAX_BYTES = 1024 * MIB


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
    args = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
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
