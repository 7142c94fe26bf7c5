"""The pull and bootstrap handshakes: every message in its documented shape, and what happens when a stage fails."""

import asyncio
import json
from typing import Any

import pytest

from epd_proxy.config import Timeouts
from epd_proxy.protocol import find_engines, find_parameters
from epd_proxy.staging import HandshakeConfig
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_stack import CHAT, COMPLETIONS, MODEL, ProxyStack, chat, image_part
from fakes.split import BootstrapServer, Ledger, prefills_for, prefills_to_pull, pulls, pulls_when_there


class PullStack(ProxyStack):
    """A stack whose instances speak the pull handshake."""

    def __init__(self, encoders: int = 0, prefills: int = 1, decodes: int = 1, **more: Any) -> None:
        super().__init__(encoders, 0, prefills=prefills, decodes=decodes, handshake=HandshakeConfig("pull"), **more)
        self.ledger = Ledger()
        for prefill in self.prefills:
            prefill.default = prefills_to_pull(self.ledger)
        for decode in self.decodes:
            decode.default = pulls(self.ledger)


class BootstrapStack(ProxyStack):
    """A stack whose instances speak the bootstrap handshake; all prefill instances share the server's host and port."""

    def __init__(self, server: BootstrapServer, encoders: int = 0, prefills: int = 1, decodes: int = 1, **more: Any):
        handshake = HandshakeConfig("bootstrap", server.port)
        super().__init__(encoders, 0, prefills=prefills, decodes=decodes, handshake=handshake, **more)
        self.ledger = Ledger()
        for prefill in self.prefills:
            prefill.name = "p"
            prefill.default = prefills_for(self.ledger)
        for decode in self.decodes:
            decode.default = pulls_when_there(self.ledger)


ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat(temperature=0, seed=3, max_tokens=30, logprobs=True, response_format={"type": "json_object"})),
    (CHAT, chat(image_part(), max_completion_tokens=30)),
    (COMPLETIONS, {"model": MODEL, "prompt": "Once", "max_tokens": 30}),
]


def of_prefill(asked: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """What prefill is to receive of a request."""
    shaping = ("logprobs", "response_format", "stream_options")
    kept = {name: value for name, value in asked.items() if name not in shaping}
    if "max_completion_tokens" in kept:
        kept["max_completion_tokens"] = 1
    return {**kept, "stream": False, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": parameters}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "asked"), ASKED)
async def test_the_messages_of_pull(path: str, asked: dict[str, Any], streamed: bool) -> None:
    async with PullStack() as stack:
        asked = {**asked, "stream": streamed}
        reply = await stack.post(asked, path, headers={"X-Request-Id": "mine", "Authorization": "Bearer key"})
        assert (reply.status, reply.headers["X-Request-Id"]) == (200, "mine")
        [prefill], [decode] = stack.prefills[0].requests, stack.decodes[0].requests
        received = decode.document
        given = received.pop("kv_transfer_params")
        assert given["remote_engine_id"] == "prefill-0"  # the whole object, as prefill gave it
        assert given["tp_size"] == 1
        nowhere = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
                   "remote_block_ids": None, "remote_host": None, "remote_port": None}  # fmt: skip
        assert prefill.document == of_prefill(received, nowhere)
        assert decode.body.startswith(json.dumps(asked).encode()[:-1]) or "messages" in asked
        assert (prefill.path, decode.path) == (path, path)
        assert prefill.headers["X-Request-Id"] == decode.headers["X-Request-Id"]
        assert decode.headers["X-Request-Id"].startswith("mine-")
        assert prefill.headers["Authorization"] == decode.headers["Authorization"] == "Bearer key"
        assert len(stack.ledger.pulled) == 1


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "asked"), ASKED)
async def test_the_messages_of_bootstrap(path: str, asked: dict[str, Any], streamed: bool) -> None:
    async with BootstrapServer("p") as server, BootstrapStack(server) as stack:
        reply = await stack.post({**asked, "stream": streamed}, path, headers={"X-Request-Id": "mine"})
        assert (reply.status, reply.headers["X-Request-Id"]) == (200, "mine")
        [prefill], [decode] = stack.prefills[0].requests, stack.decodes[0].requests
        received = decode.document
        given = received.pop("kv_transfer_params")
        transfer = given["transfer_id"]
        assert given == {
            "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer,
            "remote_bootstrap_addr": f"http://127.0.0.1:{server.port}", "remote_engine_id": "p-engine-0",
        }  # fmt: skip
        assert len(transfer) == 32
        assert prefill.document == of_prefill(
            received, {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
        )
        assert prefill.headers["X-data-parallel-rank"] == "0"
        assert "X-data-parallel-rank" not in decode.headers
        assert prefill.headers["X-Request-Id"] == decode.headers["X-Request-Id"] != "mine"
        assert stack.ledger.pulled == [transfer]


async def test_the_messages_of_colocated() -> None:
    async with ProxyStack(encoders=0) as stack:
        body = json.dumps(chat(temperature=0)).encode()
        assert (await stack.post(body, headers={"X-Request-Id": "mine"})).status == 200
        [request] = stack.instances[0].requests
        assert (request.body, request.headers["X-Request-Id"]) == (body, "mine")


async def test_bootstrap_ranks_take_turns_and_are_asked_for_once() -> None:
    async with BootstrapServer("p", ranks=3) as server, BootstrapStack(server) as stack:
        for _ in range(6):
            assert (await stack.post(chat())).status == 200
        ranks = [request.headers["X-data-parallel-rank"] for request in stack.prefills[0].requests]
        engines = [request.document["kv_transfer_params"]["remote_engine_id"] for request in stack.decodes[0].requests]
        assert ranks == ["0", "1", "2"] * 2
        assert engines == [f"p-engine-{rank}" for rank in ranks]
        assert server.queries == 1


async def test_bootstrap_prefill_and_decode_run_at_once() -> None:
    async with BootstrapServer("p") as server, BootstrapStack(server, encoders=1) as stack:
        stack.prefills[0].default = prefills_for(stack.ledger, work_s=0.4)
        sending = asyncio.create_task(stack.post(chat(image_part())))
        await stack.until(lambda: stack.prefills[0].running == stack.decodes[0].running == 1)
        assert stack.encoders[0].running == 0
        assert len(stack.encoders[0].requests) == 1
        assert (await sending).status == 200


async def test_pull_is_one_after_the_other() -> None:
    async with PullStack(encoders=1) as stack:
        stack.encoders[0].default = fake.after(0.2)
        stack.prefills[0].default = fake.after(0.2, prefills_to_pull(stack.ledger))
        sending = asyncio.create_task(stack.post(chat(image_part())))
        await stack.until(lambda: stack.encoders[0].running == 1)
        assert stack.prefills[0].requests == []
        await stack.until(lambda: stack.prefills[0].running == 1)
        assert stack.decodes[0].requests == []
        assert (await sending).status == 200
        assert stack.prefills[0].requests[0].parts == stack.decodes[0].requests[0].parts


async def test_a_prefill_that_says_nothing_of_its_kv_leaves_it_to_decode(caplog: pytest.LogCaptureFixture) -> None:
    async with PullStack() as stack:
        stack.prefills[0].default = fake.answer
        assert (await stack.post(chat())).status == 200
        assert stack.ledger.computed == 1
        assert "--handshake pull" in caplog.text


@pytest.mark.parametrize("kind", ["pull", "bootstrap"])
async def test_what_cannot_be_split_runs_whole(kind: str) -> None:
    async with BootstrapServer("p") as server, PullStack() if kind == "pull" else BootstrapStack(server) as stack:
        asked = chat(n=2)
        assert (await stack.post(asked)).status == 200
        assert stack.prefills[0].requests[0].document == asked
        assert stack.decodes[0].requests == []
        assert (await stack.get("/v1/models")).document["data"][0]["owned_by"] == "decode-0"


FAULTS = [fake.drop, fake.refuse(500), fake.refuse(503), fake.refuse(429)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["prefills", "decodes"])
async def test_pull_goes_on_elsewhere(stage: str, fault: fake.Behaviour) -> None:
    async with PullStack(prefills=2, decodes=2) as stack:
        failing: list[FakeInstance] = getattr(stack, stage)
        for instance in failing:
            instance.script.append(fault)
        failing[1].script.clear()
        for _ in range(2):
            assert (await stack.post(chat())).status == 200
        assert len(stack.ledger.pulled) == 2
        ids = [request.headers["X-Request-Id"] for decode in stack.decodes for request in decode.requests]
        # One that turned the request away has not touched the KV: the next one gets the same.
        again = stage == "decodes" and fault not in FAULTS[:2]
        assert len(ids) == len(set(ids)) + again


@pytest.mark.parametrize("body", [None, b"no such thing"])
async def test_pull_asks_nobody_else_for_what_all_refuse(body: bytes | None) -> None:
    async with PullStack(decodes=2) as stack:
        for decode in stack.decodes:
            decode.default = fake.refuse(501, body=body)
        assert (await stack.post(chat())).status == (502 if body else 501)
        assert [len(each.requests) for each in (*stack.prefills, *stack.decodes)] == [1, 1, 0]


async def test_pull_prefills_anew_when_decode_may_have_pulled() -> None:
    async with PullStack(decodes=2) as stack:
        for decode in stack.decodes:
            decode.script.append(pulls(stack.ledger, fake.drop))
        stack.decodes[1].script.clear()
        for _ in range(2):
            assert (await stack.post(chat())).status == 200
        assert len(stack.prefills[0].requests) == len(stack.ledger.pulled) == 3
        assert stack.ledger.made == {}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["prefills", "decodes"])
async def test_bootstrap_goes_on_elsewhere(stage: str, fault: fake.Behaviour) -> None:
    async with BootstrapServer("p") as server, BootstrapStack(server, prefills=2, decodes=2) as stack:
        failing: list[FakeInstance] = getattr(stack, stage)
        for instance in failing:
            instance.script.append(fault)
        failing[1].script.clear()
        assert [(await stack.post(chat())).status for _ in range(2)] == [200, 200]
        transfers = [r.document["kv_transfer_params"]["transfer_id"] for d in stack.decodes for r in d.requests]
        assert len(transfers) == len(set(transfers))


@pytest.mark.parametrize("kind", ["pull", "bootstrap"])
@pytest.mark.parametrize(("stage", "fault", "status"), [
    ("prefills", fake.refuse(400, "bad prompt"), 400), ("decodes", fake.refuse(400, "bad prompt"), 400),
    ("prefills", fake.hang, 504), ("decodes", fake.hang, 504),
    ("prefills", fake.drop, None), ("decodes", fake.drop, None),
])  # fmt: skip
async def test_without_another_instance_the_client_is_told(
    kind: str, stage: str, fault: fake.Behaviour, status: int | None
) -> None:
    limits = Timeouts(prefill_s=0.4, first_byte_s=0.8) if fault is fake.hang else Timeouts()
    async with (
        BootstrapServer("p") as server,
        PullStack(timeouts=limits) if kind == "pull" else BootstrapStack(server, timeouts=limits) as stack,
    ):
        getattr(stack, stage)[0].default = fault
        reply = await stack.post(chat(stream=True))
        assert reply.status == status if status else reply.status in (502, 503)
        if status == 400:
            assert reply.error["message"] == "bad prompt"
        await stack.until(lambda: sum(i.running for i in (*stack.prefills, *stack.decodes)) == 0)


@pytest.mark.parametrize("kind", ["pull", "bootstrap"])
@pytest.mark.parametrize("stage", ["prefills", "decodes"])
async def test_a_client_that_leaves_closes_every_stage(kind: str, stage: str) -> None:
    async with BootstrapServer("p") as server, PullStack() if kind == "pull" else BootstrapStack(server) as stack:
        getattr(stack, stage)[0].default = fake.hang
        sending = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: getattr(stack, stage)[0].running == 1)
        sending.cancel()
        await stack.until(lambda: sum(i.running for i in (*stack.prefills, *stack.decodes)) == 0)
        assert getattr(stack, stage)[0].aborted == 1


async def test_a_bootstrap_server_that_names_nobody() -> None:
    async with BootstrapServer("p") as server, BootstrapStack(server) as stack:
        good = server.answer
        for bad in ({}, [], None, {"0": {}}, {"0": {"engine_id": 3}}, {"x": {"engine_id": "e"}}):
            server.answer = bad
            reply = await stack.post(chat())
            assert (reply.status, stack.decodes[0].requests) == (503, [])
            for endpoint in stack.pools["prefill"].endpoints:
                endpoint.mark_probe(None)
        server.answer = good
        assert (await stack.post(chat())).status == 200


async def test_a_prefill_instance_that_restarted_is_asked_again() -> None:
    async with BootstrapServer("p") as server, BootstrapStack(server) as stack:
        assert (await stack.post(chat())).status == 200
        stack.prefills[0].name = "q"
        server.answer = {"0": {"engine_id": "q-engine-0"}}
        [endpoint] = stack.pools["prefill"].endpoints
        endpoint.mark_unreachable("gone")
        endpoint.mark_probe(None)
        assert (await stack.post(chat())).status == 200
        assert server.queries == 2


def test_what_an_answer_may_hold() -> None:
    for nothing in (b"", b"x", b"[]", b"{}", b'{"kv_transfer_params": null}', b'{"kv_transfer_params": []}'):
        assert find_parameters(nothing) is None
        assert find_engines(nothing) == {}
    assert find_parameters(b'{"kv_transfer_params": {"a": 1}}') == {"a": 1}
