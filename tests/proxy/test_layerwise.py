"""The layerwise handshake at the wire: who gets what, in which order, and which requests stay whole."""

import asyncio
import json
from typing import Any

import pytest

from epd_proxy.protocol import CHAT as CHAT_API
from epd_proxy.protocol import COMPLETIONS as COMPLETIONS_API
from epd_proxy.protocol import Api, decode_body, parse_request, prefill_body, release_body, why_not_split
from fakes import instances as fake
from fakes.layerwise import pushes_kv, waits_for_kv
from fakes.proxy_stack import CHAT, COMPLETIONS, ITEM_KEY, MODEL, ProxyStack, chat, image_part


def split_stack(encoders: int = 0, prefills: int = 1, decodes: int = 1, **options: Any) -> ProxyStack:
    return ProxyStack(encoders, 0, prefills=prefills, decodes=decodes, **options)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_decode_gets_the_request_and_prefill_the_call(path: str, streamed: bool) -> None:
    async with split_stack() as stack:
        asked = {"model": MODEL, "max_tokens": 30, "stream": streamed, "seed": 7, "temperature": 0}
        asked |= {"prompt": "Once"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
        headers = {"X-Request-Id": "mine", "Authorization": "Bearer key"}
        reply = await stack.post(asked, path, headers=headers)
        assert reply.status == 200
        assert reply.headers["X-Request-Id"] == "mine"
        assert reply.body == b"".join(fake.TEXT) if streamed else reply.document["choices"]
        [decode], [prefill] = stack.decodes[0].requests, stack.prefills[0].requests
        assert (decode.path, prefill.path) == (path, path)
        params = decode.document.pop("kv_transfer_params")
        assert decode.body.startswith(json.dumps(asked).encode()[:-1])  # the client's bytes, and one key more
        assert params == decode.document["kv_transfer_params"]
        assert params["metaserver"].startswith(stack.metaserver.url + "/")  # type: ignore[union-attr]
        request_id = decode.headers["X-Request-Id"]
        assert request_id == prefill.headers["X-Request-Id"] != "mine"
        assert request_id.startswith("mine-")
        assert prefill.headers["Authorization"] == "Bearer key"
        sent = prefill.document
        assert sent.pop("kv_transfer_params")["request_id"] == f"chatcmpl-{request_id}"
        assert sent == {**asked, "stream": False, "max_tokens": 1, "min_tokens": 1}
        assert stack.link.prefilled == [request_id]


async def test_each_request_has_an_id_and_an_address_of_its_own() -> None:
    async with split_stack() as stack:
        replies = await asyncio.gather(*(stack.post(chat(), headers={"X-Request-Id": "same"}) for _ in range(16)))
        assert [r.status for r in replies] == [200] * 16
        sent = stack.decodes[0].requests
        assert len({r.headers["X-Request-Id"] for r in sent}) == 16
        assert len({r.document["kv_transfer_params"]["metaserver"] for r in sent}) == 16


async def test_prefill_waits_for_the_items_and_decode_does_not() -> None:
    async with split_stack(encoders=1) as stack:
        stack.encoders[0].default = fake.after(0.4)
        sending = asyncio.create_task(stack.post(chat(image_part(), image_part())))
        await stack.until(lambda: len(stack.link.held) == 1)  # decode has called back
        assert stack.encoders[0].running == 2
        await asyncio.sleep(0.1)
        assert stack.prefills[0].requests == []
        assert (await sending).status == 200
        assert stack.encoders[0].running == 0
        # Both get the pictures as the client sent them.
        assert stack.prefills[0].requests[0].parts == stack.decodes[0].requests[0].parts


async def test_prefill_waits_for_the_call() -> None:
    async with split_stack(encoders=1) as stack:
        stack.decodes[0].default = waits_for_kv(stack.link, queue_s=0.4)
        sending = asyncio.create_task(stack.post(chat(image_part())))
        await stack.until(lambda: stack.decodes[0].running == 1 and len(stack.encoders[0].requests) == 1)
        await asyncio.sleep(0.2)
        assert stack.prefills[0].requests == []
        assert (await sending).status == 200


async def test_repeated_calls_do_nothing() -> None:
    async with split_stack() as stack:
        stack.decodes[0].default = waits_for_kv(stack.link, calls=3)
        assert (await stack.post(chat())).status == 200
        assert len(stack.prefills[0].requests) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_decode_may_end_before_prefills_answer_is_here(streamed: bool) -> None:
    async with split_stack() as stack:
        stack.prefills[0].default = pushes_kv(stack.link, then=fake.after(0.5))
        assert (await stack.post(chat(stream=streamed))).status == 200
        assert stack.pools["decode"].endpoints[0].active_leases == 0
        assert stack.pools["prefill"].endpoints[0].active_leases == 1
        await stack.until_idle()
        assert stack.prefills[0].aborted == 0


async def test_load_is_that_of_the_prompt_for_prefill_and_of_all_tokens_for_decode() -> None:
    async with split_stack(prefills=2, decodes=2) as stack:
        for prefill in stack.prefills:
            prefill.default = pushes_kv(stack.link, 0.5)
        large = asyncio.create_task(stack.post(chat(text="x" * 4000, max_tokens=50)))
        await stack.until(lambda: sum(p.running for p in stack.prefills) == 1)
        assert sorted(e.active_cost for e in stack.pools["prefill"].endpoints) == [0, 1000]
        assert sorted(e.active_cost for e in stack.pools["decode"].endpoints) == [0, 1050]
        small = [asyncio.create_task(stack.post(chat(text="x" * 40, max_tokens=10))) for _ in range(6)]
        await stack.until(lambda: sum(p.running for p in stack.prefills) == 7)
        for stage in (stack.prefills, stack.decodes):
            assert sorted(len(instance.requests) for instance in stage) == [1, 6]
        assert [(await each).status for each in (large, *small)] == [200] * 7


WHOLE: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": ["a", "b"]}), (COMPLETIONS, {"prompt": [[1, 2], [3]]}), (COMPLETIONS, {"prompt": None}),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 0}), (COMPLETIONS, {"prompt": "a", "prompt_embeds": "QQ"}),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}), (COMPLETIONS, {"prompt": "a", "use_beam_search": True}),
    (CHAT, chat(n=2)), (CHAT, chat(n="2")), (CHAT, chat(prompt_logprobs=0)), (CHAT, chat(echo=True)),
    (CHAT, chat(truncate_prompt_tokens=-1)), (CHAT, chat({"type": "prompt_embeds", "prompt_embeds": "QQ=="})),
    (CHAT, chat(use_beam_search="true")),
]  # fmt: skip


@pytest.mark.parametrize(("path", "asked"), WHOLE)
async def test_defect_18_what_cannot_be_split_runs_on_a_prefill_instance(path: str, asked: dict[str, Any]) -> None:
    async with split_stack(encoders=1) as stack:
        assert (await stack.post(asked, path)).status == 200
        [request] = stack.prefills[0].requests
        assert request.document == asked
        assert stack.decodes[0].requests == []


SPLIT: list[tuple[Api, dict[str, Any]]] = [
    (COMPLETIONS_API, {"prompt": "a"}), (COMPLETIONS_API, {"prompt": ["a"]}), (COMPLETIONS_API, {"prompt": [1, 2]}),
    (COMPLETIONS_API, {"prompt": [[1, 2]]}), (COMPLETIONS_API, {"prompt": "a", "echo": True, "n": 1}),
    (COMPLETIONS_API, {"prompt": "a", "logprobs": 3, "truncate_prompt_tokens": 5}),
    (CHAT_API, chat(n=1, max_tokens=1)), (CHAT_API, chat(logprobs=True, top_logprobs=3, n=None, echo=False)),
    (CHAT_API, chat(prompt_logprobs=None, tool_choice="required", tools=[{"type": "function"}])),
    (CHAT_API, chat(response_format={"type": "json_object"}, use_beam_search=False)),
]  # fmt: skip


@pytest.mark.parametrize(("api", "asked"), SPLIT)
async def test_all_else_is_split(api: Api, asked: dict[str, Any]) -> None:
    async with split_stack() as stack:
        assert (await stack.post(asked, api.path)).status == 200
        assert len(stack.link.prefilled) == len(stack.decodes[0].requests) == 1
    assert why_not_split(parse_request(api, json.dumps(asked).encode(), items_max=9, key=ITEM_KEY)) is None


def test_what_shapes_the_answer_stays_off_prefill() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = chat(stream=True, stream_options={"include_usage": True}, n=1, logprobs=True, top_logprobs=2, tools=tools,
                 response_format={"type": "json_object"}, structured_outputs={"regex": "a"}, max_completion_tokens=9,
                 cache_salt="s", mm_processor_kwargs={"a": 1}, request_id="r", truncate_prompt_tokens=7)  # fmt: skip
    params = {"request_id": "x"}
    sent = json.loads(prefill_body(asked, params))
    assert sent == {
        "model": MODEL, "messages": asked["messages"], "stream": False, "max_tokens": 1, "min_tokens": 1,
        "max_completion_tokens": 1, "tools": tools, "tool_choice": None, "cache_salt": "s",
        "mm_processor_kwargs": {"a": 1}, "truncate_prompt_tokens": 7, "kv_transfer_params": params,
    }  # fmt: skip
    assert "max_completion_tokens" not in json.loads(prefill_body(chat(), params))


@pytest.mark.parametrize(
    ("choice", "sent"),
    [("auto", None), ("required", None), ({"type": "function"}, None), (None, None), ("none", "none")],
)
def test_the_tools_of_the_prompt_stay_the_same_on_prefill(choice: object, sent: object) -> None:
    """With "none" vLLM may leave the tools out of the prompt, otherwise they are in it, as with null."""
    body = json.loads(prefill_body(chat(tools=[{}], tool_choice=choice), {}))
    assert (body["tools"], body["tool_choice"]) == ([{}], sent)


@pytest.mark.parametrize(
    "body", [b"{}", b" { } ", b'{"prompt": "a", "a": 1, "a": 2}\n', b'{"big":12345678901234567890}']
)
def test_decodes_body_is_the_clients_with_one_key_more(body: bytes) -> None:
    sent = decode_body(parse_request(COMPLETIONS_API, body, items_max=9, key=ITEM_KEY), "http://m/t")
    params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": "http://m/t"}
    assert json.loads(sent) == {**json.loads(body), "kv_transfer_params": params}
    assert sent.startswith(body.rstrip()[:-1])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_client_cannot_choose_where_decode_calls(path: str) -> None:
    async with split_stack() as stack:
        evil = {"metaserver": "http://attacker.test/"}
        asked = {"prompt": "x", **chat(kv_transfer_params=evil, vllm_xargs={"kv_transfer_params": "x"})}
        assert (await stack.post(asked, path)).status == 200
        for request in (*stack.decodes[0].requests, *stack.prefills[0].requests):
            assert b"attacker" not in request.body


@pytest.mark.parametrize(("given", "sent"), [([[5, 6], [7]], [[0] * 256] * 2), ([5, 6], [0] * 256)])
def test_a_release_is_short_and_writes_to_no_block_in_use(given: object, sent: object) -> None:
    params = {"request_id": "x", "remote_block_ids": given, "remote_port": 1}
    body = json.loads(release_body(CHAT_API, "m", params))
    assert body["kv_transfer_params"] == {**params, "remote_block_ids": sent}
    assert (body["max_tokens"], body["stream"], len(body["messages"])) == (1, False, 1)
    assert json.loads(release_body(COMPLETIONS_API, "", params))["prompt"] == [0]
    assert params["remote_block_ids"] == given


async def test_models_readiness_and_counts() -> None:
    async with split_stack(encoders=1, prefills=2, decodes=2) as stack:
        models = await stack.get("/v1/models")
        assert models.document["data"][0]["owned_by"].startswith("decode-")
        ready = await stack.get("/ready")
        assert ready.document["stages"] == {"encode": "1 of 1 up", "prefill": "2 of 2 up", "decode": "2 of 2 up"}
        counts = (await stack.get("/healthcheck")).document
        assert (counts["prefill_instances"], counts["decode_instances"], counts["pd_instances"]) == (2, 2, 0)
        stack.pools["decode"].endpoints[0].mark_unreachable("gone")
        assert (await stack.get("/ready")).status == 200
        stack.pools["decode"].endpoints[1].mark_unreachable("gone")
        assert (await stack.get("/ready")).document["reasons"] == ["decode: 0 of 2 up"]


async def test_metrics_and_the_access_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "epd_proxy.access"):
        async with split_stack(encoders=1) as stack:
            stack.prefills[0].default = pushes_kv(stack.link, 0.2)
            assert (await stack.post(chat(image_part()))).status == 200
            shown = (await stack.get("/metrics")).body.decode()
            urls = stack.prefills[0].url, stack.decodes[0].url
    for line in ("epd_proxy_prefill_seconds_count 1.0", "epd_proxy_callback_seconds_count 1.0",
                 "epd_proxy_pending_callbacks 0.0", "epd_proxy_handover_tasks 0.0"):  # fmt: skip
        assert line in shown.splitlines()
    [line] = [r.fields for r in caplog.records if r.fields["path"] == CHAT]  # type: ignore[attr-defined]
    assert (line["handshake"], line["prefill_endpoints"], line["endpoint"]) == ("layerwise", (urls[0],), urls[1])
    assert 0 < line["callback_s"] < line["first_byte_s"]
    assert 0.2 <= line["prefill_s"] <= line["total_s"]
