"""Fake prefill and decode instances of the pull and the bootstrap handshake.

A :class:`Ledger` stands for what goes beside HTTP: whose KV lies where, and who came for it.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fakes.instances import Behaviour, FakeInstance, Recorded, answer


@dataclass
class Ledger:
    """KV by request id (pull) or transfer id (bootstrap)."""

    made: dict[str, str] = field(default_factory=dict)
    """Whose KV lies where, until it is pulled."""
    pulled: list[str] = field(default_factory=list)
    computed: int = 0
    """Requests that decode had to prefill itself."""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


def prefills_to_pull(ledger: Ledger) -> Behaviour:
    """Keep the KV, and say where."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        if "kv_transfer_params" not in recorded.document:
            return await answer(instance, request, recorded)
        request_id = recorded.headers["X-Request-Id"]
        ledger.made[request_id] = instance.name
        where = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[7, 8]],
                 "remote_engine_id": instance.name, "remote_request_id": f"chatcmpl-{request_id}-00c0ffee",
                 "remote_host": "10.0.0.1", "remote_port": 5600, "tp_size": 1}  # fmt: skip
        return web.json_response({"id": "x", "choices": [], "kv_transfer_params": where})

    return behave


def pulls(ledger: Ledger, then: Behaviour = answer) -> Behaviour:
    """Fetch the KV that the request names, once, then behave."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        params: dict[str, Any] | None = recorded.document.get("kv_transfer_params")
        if params is None:
            ledger.computed += 1
        else:
            request_id = params["remote_request_id"].removeprefix("chatcmpl-")[:-9]
            assert ledger.made.pop(request_id) == params["remote_engine_id"]
            ledger.pulled.append(request_id)
        return await then(instance, request, recorded)

    return behave


def prefills_for(ledger: Ledger, then: Behaviour = answer, *, work_s: float = 0.0) -> Behaviour:
    """Put the KV under the transfer id, then behave."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        if params := recorded.document.get("kv_transfer_params"):
            await asyncio.sleep(work_s)
            rank = recorded.headers["X-data-parallel-rank"]
            ledger.made[params["transfer_id"]] = f"{instance.name}-engine-{rank}"
            async with ledger.changed:
                ledger.changed.notify_all()
        return await then(instance, request, recorded)

    return behave


def pulls_when_there(ledger: Ledger, then: Behaviour = answer) -> Behaviour:
    """Wait for the KV of the transfer id at the engine that the request names, then behave."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        params = recorded.document["kv_transfer_params"]
        async with ledger.changed:
            await ledger.changed.wait_for(lambda: params["transfer_id"] in ledger.made)
        assert ledger.made.pop(params["transfer_id"]) == params["remote_engine_id"]
        ledger.pulled.append(params["transfer_id"])
        return await then(instance, request, recorded)

    return behave


class BootstrapServer:
    """What a prefill instance's rank 0 serves; ``ranks`` engines, named after the instance."""

    def __init__(self, name: str, ranks: int = 1) -> None:
        self.answer: Any = {
            str(rank): {"engine_id": f"{name}-engine-{rank}", "worker_addr": {"0": {"0": "tcp://10.0.0.1:5"}}}
            for rank in range(ranks)
        }
        self.queries = 0
        self.port = 0

    async def __aenter__(self) -> "BootstrapServer":
        app = web.Application()
        app.router.add_get("/query", self._query)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._runner.cleanup()

    async def _query(self, _request: web.Request) -> web.Response:
        self.queries += 1
        return web.json_response(self.answer)
