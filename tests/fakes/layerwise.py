"""Fake prefill and decode instances that speak the layerwise handshake over HTTP.

What goes beside HTTP in a real stack, KV and the "done" message, goes through :class:`KvLink`, which keeps books of
decode's blocks: who holds them, who waits, who was written to when that does harm.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from fakes.instances import Behaviour, FakeInstance, Recorded, answer

NULL_BLOCK = 0


@dataclass
class Held:
    """One request's blocks on decode. They go when it is done *and* its KV came (or was released)."""

    request_id: str
    blocks: list[int]
    kv: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    decoding: bool = False


class KvLink:
    """What prefill writes into decode's memory, and what decode makes of it."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.harm: list[str] = []
        self.prefilled: list[str] = []
        self.released: list[str] = []
        self.calls: set[asyncio.Task[int]] = set()
        self._next_block = 1

    def __repr__(self) -> str:
        return f"<KvLink held={list(self.held)} harm={self.harm}>"

    def allocate(self, request_id: str) -> Held:
        if request_id in self.held:
            self.harm.append(f"{request_id} was used twice")
        held = self.held[request_id] = Held(request_id, [self._next_block, self._next_block + 1])
        self._next_block += 2
        return held

    def leave(self, held: Held) -> None:
        """The request ended on decode; before its KV came its blocks stay."""
        held.gone = True
        if held.kv.is_set():
            self.held.pop(held.request_id, None)

    def write(self, request_id: str, blocks: list[int]) -> None:
        """Prefill pushed ``blocks`` and said done."""
        held = self.held.get(request_id)
        if blocks[0] == NULL_BLOCK:
            self.released.append(request_id)
            if held and not held.gone:
                self.harm.append(f"{request_id} was released while it waits")
        else:
            self.prefilled.append(request_id)
            if held is None or held.gone or held.decoding or blocks != held.blocks:
                self.harm.append(f"{request_id} was written to in vain: {held}")
        if held:
            held.kv.set()
            if held.gone:
                self.held.pop(request_id, None)


def decode_instance(link: KvLink, name: str, then: Behaviour = answer, *, queue_s: float = 0.0) -> FakeInstance:
    """An instance that asks for its KV before it answers; without transfer parameters it just answers."""
    return FakeInstance(waits_for_kv(link, then, queue_s=queue_s), name)


def waits_for_kv(link: KvLink, then: Behaviour = answer, *, queue_s: float = 0.0, calls: int = 1) -> Behaviour:
    """Call back ``calls`` times after ``queue_s``, wait for the KV, behave."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        params = recorded.document.get("kv_transfer_params")
        if params is None:
            return await then(instance, request, recorded)
        assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
        await asyncio.sleep(queue_s)
        held = link.allocate(recorded.headers["X-Request-Id"])
        try:
            for _ in range(calls):
                # The real one calls from a thread of its own: a call that is due goes out, whoever leaves.
                calling = asyncio.create_task(call_back(params["metaserver"], held, instance))
                link.calls.add(calling)
                calling.add_done_callback(link.calls.discard)
                await asyncio.shield(calling)
            await held.kv.wait()
            held.decoding = True
            return await then(instance, request, recorded)
        finally:
            link.leave(held)

    return behave


async def call_back(url: str, held: Held, instance: FakeInstance) -> int:
    """POST what decode POSTs; return the status."""
    call = {
        "token_ids": [], "request_id": f"chatcmpl-{held.request_id}", "do_remote_prefill": False,
        "do_remote_decode": True, "remote_block_ids": [held.blocks], "remote_block_size": [128],
        "remote_engine_id": instance.name, "remote_host": "127.0.0.1", "remote_port": instance.port,
        "remote_tp_size": 1, "remote_pcp_size": 1, "remote_dcp_size": 1, "remote_cached_tokens": 0,
    }  # fmt: skip
    # Decode waits for the answer in one of 32 threads: it has to come at once.
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as client, client.post(url, json=call) as response:
        return response.status


def prefill_instance(link: KvLink, name: str, prefill_s: float = 0.0) -> FakeInstance:
    """An instance that pushes the KV and answers; without transfer parameters it just answers."""
    return FakeInstance(pushes_kv(link, prefill_s), name)


def pushes_kv(link: KvLink, prefill_s: float = 0.0, then: Behaviour = answer) -> Behaviour:
    """Work, push, say done, behave."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        params: dict[str, Any] | None = recorded.document.get("kv_transfer_params")
        if params is None:
            return await then(instance, request, recorded)
        assert (params["do_remote_prefill"], params["do_remote_decode"]) == (False, True)
        assert params["request_id"] == "chatcmpl-" + recorded.headers["X-Request-Id"]
        await asyncio.sleep(prefill_s)
        link.write(recorded.headers["X-Request-Id"], params["remote_block_ids"][0])
        return await then(instance, request, recorded)

    return behave
