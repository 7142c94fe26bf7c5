"""1E1P1D in real containers: the answers of one vLLM, KV from prefill, embeddings from encode, killed stages."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from smoke.client import CHAT, COMPLETIONS, MODEL, chat_body, post, read_tokens, tokens
from smoke.pictures import picture
from smoke.questions import PICTURES, picture_questions
from smoke.stack import PROJECT, ROOT, Stack, running_stack

MAX_MODEL_LEN = 2048
ENDS_WITHIN_S = 15


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack("1e1p1d", "tests/smoke/copied.yaml") as running:
        yield running


@pytest.fixture(scope="module")
def monolith(stack: Stack) -> str:
    return stack.service_url("monolith")


def prompt_sources(stack: Stack) -> dict[str, float]:
    """Return where decode-0 had its prompt tokens from (docs/layerwise-on-cpu.md)."""
    name = "vllm:prompt_tokens_by_source_total"
    sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
    return {source: stack.total("decode-0", name, source=source) for source in sources}


def completion(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 16, "return_token_ids": True} | more


def assert_equal(stack: Stack, monolith: str, path: str, body: dict[str, Any]) -> None:
    assert tokens(stack.url, path, body) == tokens(monolith, path, body)


def test_pictures_are_answered_as_by_one_vllm_and_encoded_by_the_encoder_alone(stack, monolith):
    before = stack.ec_counters("prefill-0")
    for body in picture_questions().values():
        assert_equal(stack, monolith, CHAT, body)
    after = stack.ec_counters("prefill-0")
    assert after["hits"] - before["hits"] == PICTURES
    assert after["local encodes"] == before["local encodes"]


def test_streamed_pictures_are_answered_as_by_one_vllm(stack, monolith):
    for body in picture_questions(10).values():
        assert_equal(stack, monolith, CHAT, body | {"stream": True})


@pytest.mark.parametrize("length", [1, 2, 15, 127, 128, 129, 500, 1024, 2030])
def test_prompts_of_any_length_are_answered_as_by_one_vllm(stack, monolith, length):
    """The tiny model has one token a byte, so the text's length is the prompt's."""
    text = "".join(chr(97 + i * i % 26) for i in range(length))
    for stream in (False, True):
        assert_equal(stack, monolith, COMPLETIONS, completion(text, stream=stream))


def test_decode_computes_no_prompt_itself(stack):
    before = prompt_sources(stack)
    prompt_tokens = 0
    questions = [chat_body(f"Where from? {i}" * 20, [picture(50 + i)] if i % 2 else ()) for i in range(6)]
    for body in questions:
        status, _, answer = post(stack.url + CHAT, body)
        assert status == 200
        prompt_tokens += json.loads(answer)["usage"]["prompt_tokens"]
    risen = {source: count - before[source] for source, count in prompt_sources(stack).items()}
    assert risen["local_compute"] == 0
    assert risen["external_kv_transfer"] + risen["local_cache_hit"] == prompt_tokens
    assert risen["external_kv_transfer"] > 0


def test_sixteen_at_once(stack, monolith):
    questions = [chat_body(f"Number {i}?", [picture(70 + i)] if i % 2 else (), stream=i % 3 == 0) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: tokens(stack.url, CHAT, body), questions))
    assert answers == [tokens(monolith, CHAT, body) for body in questions]


TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]
# What one vLLM answers, the stack has to answer the same, or refuse with a 400 that says why.
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "a list of prompts": (COMPLETIONS, completion(["one", "two", "three"])),
    "n=2": (COMPLETIONS, completion("seed me", n=2, temperature=0.8, seed=7)),
    "one token": (COMPLETIONS, completion("just one", max_tokens=1)),
    "one chat token": (CHAT, chat_body("Just one.", max_completion_tokens=1)),
    "logprobs": (COMPLETIONS, completion("how sure", logprobs=3)),
    "prompt logprobs": (COMPLETIONS, completion("how likely", prompt_logprobs=2)),
    "echo": (COMPLETIONS, completion("say it again", echo=True)),
    "echo and logprobs": (COMPLETIONS, completion("say it surely", echo=True, logprobs=2)),
    "a JSON schema": (
        CHAT,
        chat_body(
            "As JSON.",
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "flag",
                    "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
                },
            },
        ),
    ),
    "tool_choice required": (CHAT, chat_body("Look.", tools=TOOLS, tool_choice="required", max_tokens=64)),
    "a named tool": (
        CHAT,
        chat_body("Look.", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look"}}, max_tokens=64),
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_requests_are_answered_as_by_one_vllm_or_refused(stack, monolith, name):
    path, body = UNUSUAL[name]
    status, _, answer = post(stack.url + path, body, timeout_s=60)
    if status == 400:
        assert json.loads(answer)["error"]["message"]
        return
    expected_status, _, expected = post(monolith + path, body)
    assert status == expected_status, f"{status} {answer[:500]!r}, one vLLM: {expected_status} {expected[:500]!r}"
    for key in ("token_ids", "text", "logprobs", "prompt_logprobs", "finish_reason"):
        assert [c.get(key) for c in json.loads(answer)["choices"]] == [
            c.get(key) for c in json.loads(expected)["choices"]
        ]


def ask_while_a_stage_dies(stack: Stack, service: str, seed: int) -> tuple[list[dict], list[tuple], list[float]]:
    """Kill a service in the midst of 20 requests; return bodies, answers, and seconds from the kill to each end."""
    questions = [
        chat_body(f"Long {i}?", [picture(seed + i)] if i % 2 else (), stream=i % 4 < 2, max_tokens=250, ignore_eos=True)
        for i in range(20)
    ]
    together = Barrier(len(questions))  # or, on a busy machine, the first have ended when the last begin
    container = stack.container(service)  # asked beforehand: on a busy machine that takes longer than the requests

    def ask(body: dict) -> tuple[tuple, float]:
        together.wait(30)
        answer = post(stack.url + CHAT, body, timeout_s=120)
        return answer, time.monotonic()

    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(ask, body) for body in questions]
        stack.wait_until(lambda: stack.total("proxy", "epd_proxy_leases_in_flight") >= 10, 10, "requests in flight")
        time.sleep(0.5)
        subprocess.run(["docker", "kill", container], check=True, capture_output=True)
        killed_at_s = time.monotonic()
        ended = [future.result() for future in asked]
    return questions, [answer for answer, _ in ended], [max(0.0, at_s - killed_at_s) for _, at_s in ended]


@pytest.mark.parametrize(("service", "seed"), [("prefill-0", 1000), ("decode-0", 1100), ("encode-0", 1200)])
def test_a_killed_stage_ends_no_request_wrongly_and_comes_back(stack, monolith, service, seed):
    questions, answers, seconds = ask_while_a_stage_dies(stack, service, seed)
    assert max(seconds) <= ENDS_WITHIN_S
    for body, answer in zip(questions, answers, strict=True):
        if is_clear_error(answer):
            continue
        assert read_tokens(answer, stream=bool(body.get("stream"))) == tokens(monolith, CHAT, body)

    stack.compose("start", service)
    stack.wait_healthy(service)
    stack.wait_until(lambda: serves(stack, seed + 50), 60, f"an answer after {service} came back", of=service)
    assert_equal(stack, monolith, CHAT, chat_body("Back again?", [picture(seed + 60)]))
    stack.wait_until(lambda: stack.total("proxy", "epd_proxy_leases_in_flight") == 0, 30, "no lease in flight")


def is_clear_error(answer: tuple[int, dict[str, str], bytes]) -> bool:
    """An OpenAI-style error with a status of its own, or, once a stream began, an SSE error event."""
    status, headers, body = answer
    if status != 200:
        assert status in (500, 502, 503, 504), answer
        assert json.loads(body)["error"]["message"]
        return True
    if headers["content-type"].startswith("text/event-stream"):
        return b"event: error" in body and json.loads(body.rsplit(b"data: ", 1)[1])["error"]["message"] != ""
    return False


def serves(stack: Stack, seed: int) -> bool:
    return post(stack.url + CHAT, chat_body("Anyone?", [picture(seed)]))[0] == 200


def test_a_client_that_leaves_frees_every_stage(stack, monolith):
    """The proxy closes all stages, and decode gives the blocks back that it held for the KV to come."""
    for i in range(4):
        body = json.dumps(chat_body("Never mind. " * 60, [picture(1300 + i)], max_tokens=200))
        patience_s = str(0.1 + 0.15 * i)
        curl = ["curl", "-s", "-m", patience_s, "-H", "Content-Type: application/json", "-d", "@-", stack.url + CHAT]
        left = subprocess.run(curl, input=body, text=True, capture_output=True, check=False)
        assert left.returncode == 28, "it was answered before it left"
    stack.wait_until(lambda: stack.total("proxy", "epd_proxy_leases_in_flight") == 0, 30, "no lease in flight")
    stack.wait_until(
        lambda: stack.total("decode-0", "vllm:kv_cache_usage_perc") == 0, 30, "decode's blocks are free", of="decode-0"
    )
    assert_equal(stack, monolith, CHAT, chat_body("Still there?", [picture(1350)]))


def test_the_doctor_looks_from_inside_decode_whether_the_proxy_can_be_called_back(stack):
    """Last, as it stops the proxy."""

    def finding():
        words = ["doctor", "ARGS=--json", "TOPOLOGY=1e1p1d", f"COMPOSE_PROJECT_NAME={PROJECT}", "EPD_HARDWARE=cpu"]
        done = subprocess.run(["make", "-s", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)["findings"]
        return next(one for one in found if one["name"] == "inside.metaserver")

    assert finding()["status"] == "PASS"
    stack.compose("stop", "--timeout", "5", "proxy")
    assert finding()["status"] == "WARN"
    stack.compose("start", "proxy")
    stack.wait_healthy("proxy")
    assert finding()["status"] == "PASS"
