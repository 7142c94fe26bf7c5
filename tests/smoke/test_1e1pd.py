"""1E1PD in real containers: the answers of one vLLM, embeddings from the store, faults survived."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import openai
import pytest

from smoke.client import CHAT, COMPLETIONS, MODEL, chat_body, post, tokens
from smoke.pictures import picture
from smoke.questions import PICTURES, picture_questions
from smoke.stack import EC_METRICS_PORT, Stack, running_stack


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack("1e1pd") as running:
        yield running


@pytest.fixture(scope="module")
def monolith(stack: Stack) -> str:
    return stack.service_url("monolith")


def ec_counters(stack: Stack) -> dict[str, float]:
    return stack.ec_counters("prefill-decode-0")


def encoder_requests(stack: Stack) -> float:
    return stack.total("encode-0", "vllm:request_success_total")


def test_pictures_are_answered_as_by_one_vllm_and_every_embedding_comes_from_the_store(stack, monolith):
    before = ec_counters(stack)
    for name, body in picture_questions().items():
        assert tokens(stack.url, CHAT, body) == tokens(monolith, CHAT, body), name
    after = ec_counters(stack)
    assert after["hits"] - before["hits"] == PICTURES
    assert after["local encodes"] == before["local encodes"]


def test_streamed_answers_equal_those_of_one_vllm(stack, monolith):
    for seed, (name, body) in enumerate(picture_questions().items(), start=100):
        fresh = chat_body(f"Look again: {name}", [picture(seed)])
        for question in (body, fresh):
            streamed = tokens(stack.url, CHAT, question | {"stream": True})
            assert streamed == tokens(monolith, CHAT, question), name


def test_answers_depend_on_the_picture(stack):
    """Or the equality above would show nothing."""
    answers = {str(tokens(stack.url, CHAT, chat_body("What is it?", [picture(seed)]))) for seed in range(110, 116)}
    assert len(answers) > 1


def test_text_never_touches_the_encoder_but_a_picture_does(stack, monolith):
    before = encoder_requests(stack)
    for text in ("a", "What is the capital of France?", "long " * 300):
        for stream in (False, True):
            body = chat_body(text, stream=stream)
            assert tokens(stack.url, CHAT, body) == tokens(monolith, CHAT, body)
            prompt = {key: body[key] for key in ("model", "temperature", "max_tokens", "return_token_ids", "stream")}
            prompt["prompt"] = text
            assert tokens(stack.url, COMPLETIONS, prompt) == tokens(monolith, COMPLETIONS, prompt)
    assert encoder_requests(stack) == before
    tokens(stack.url, CHAT, chat_body("And this?", [picture(190)]))
    assert encoder_requests(stack) == before + 1


def timed(stack: Stack, seed: int) -> tuple[float, list[list[int]], dict]:
    body = chat_body("How fast?", [picture(seed)])
    start = time.monotonic()
    answer = tokens(stack.url, CHAT, body)
    return time.monotonic() - start, answer, body


def test_requests_outlive_the_store_master_and_hits_come_back(stack, monolith):
    usual_s = max(timed(stack, seed)[0] for seed in range(200, 205))
    stack.compose("kill", "mooncake-master")
    try:
        for seed in range(210, 218):
            took_s, answer, body = timed(stack, seed)
            assert took_s <= usual_s + 2, f"request {seed - 210} after the kill"
            assert answer == tokens(monolith, CHAT, body)
    finally:
        stack.compose("start", "mooncake-master")
        stack.wait_healthy("mooncake-master")

    deadline = time.monotonic() + 60
    for seed in range(220, 320):
        before = ec_counters(stack)
        _, answer, body = timed(stack, seed)
        assert answer == tokens(monolith, CHAT, body)
        if ec_counters(stack)["hits"] == before["hits"] + 1:
            return
        assert time.monotonic() < deadline, "no hit within 60 s after the master came back"
        time.sleep(1)


def test_an_item_encoded_before_the_encoder_restarts_is_still_a_hit(stack, monolith):
    """Both instances begin with nothing, so that only the store can know the item afterwards."""
    body = chat_body("Still there?", [picture(400)])
    assert tokens(stack.url, CHAT, body) == tokens(monolith, CHAT, body)
    stack.compose("kill", "encode-0", "prefill-decode-0")
    try:
        stack.compose("start", "prefill-decode-0")
        stack.wait_healthy("prefill-decode-0")
        stack.wait_up("prefill-decode-0")
        before = ec_counters(stack)
        assert tokens(stack.url, CHAT, body) == tokens(monolith, CHAT, body)
        after = ec_counters(stack)
    finally:
        stack.compose("start", "encode-0")
        stack.wait_healthy("encode-0")
        stack.wait_up("encode-0")
    assert after["hits"] - before["hits"] == 1
    assert after["local encodes"] == before["local encodes"]
    assert_serves(stack, monolith, 401)


def assert_serves(stack: Stack, monolith: str, seed: int) -> None:
    body = chat_body("And now?", [picture(seed)])
    assert tokens(stack.url, CHAT, body) == tokens(monolith, CHAT, body)


BAD_REQUESTS: dict[str, object] = {
    "no JSON": b'{"model": ',
    "no messages": {"model": MODEL},
    "unknown model": chat_body("x") | {"model": "gpt-17"},
    "broken base64": chat_body("x", ["data:image/png;base64,%%%%"]),
    "a text file as image": chat_body("x", ["data:image/png;base64,aGVsbG8gd29ybGQ="]),
    "a local file": chat_body("x", ["file:///etc/passwd"]),
    "an unreachable URL": chat_body("x", ["http://127.0.0.1:9/picture.png"]),
    "no URL at all": chat_body("x", ["picture.png"]),
    "300 MB": b'{"model": "' + b"x" * 300_000_000 + b'"}',
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_input_gets_an_openai_error_and_the_stack_serves_on(stack, monolith, name):
    status, headers, answer = post(stack.url + CHAT, BAD_REQUESTS[name])
    assert 400 <= status < 500, f"{status} {answer[:500]!r}"
    assert headers["content-type"].startswith("application/json")
    error = json.loads(answer)["error"]
    assert error["message"]
    assert error["type"]
    assert_serves(stack, monolith, 500 + sorted(BAD_REQUESTS).index(name))


def test_the_openai_client_works_unchanged(stack):
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]

    body = chat_body("What is it?", [picture(600)])
    question = {key: body[key] for key in ("model", "messages", "temperature", "max_tokens")}
    answer = client.chat.completions.create(**question)
    text = answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0

    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens

    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**question | {"model": "gpt-17"})


def test_containers_run_without_root_and_nothing_broke_inside(stack):
    for service in ("mooncake-master", "mooncake-store", "encode-0", "prefill-decode-0", "proxy"):
        assert stack.compose("exec", "-T", service, "id", "-u").strip() == "1000"
    assert "Traceback" not in stack.logs("proxy", lines=5000)
    for service in ("encode-0", "prefill-decode-0"):
        assert stack.total(service, "epd_ec_hook_errors_total", EC_METRICS_PORT) == 0
