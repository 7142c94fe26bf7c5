"""1E1PD whose consumer gets a request while its pictures are being encoded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from smoke.client import CHAT, tokens
from smoke.questions import PICTURES, picture_questions
from smoke.stack import EC_METRICS_PORT, Stack, running_stack

ROUNDS = 2
CONSUMER = "prefill-decode-0"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack("1e1pd", EPD_PROXY_CONSUMERS_WAIT="on") as running:
        yield running


def test_pictures_that_are_still_being_encoded_are_waited_for(stack: Stack) -> None:
    monolith = stack.service_url("monolith")
    for seed in range(0, 10 * ROUNDS, 10):
        for name, body in picture_questions(seed).items():
            assert tokens(stack.url, CHAT, body) == tokens(monolith, CHAT, body), name
    counters = stack.ec_counters(CONSUMER)
    assert sum(counters.values()) == ROUNDS * PICTURES
    # Not all, as a master that a busy machine keeps from answering twice is a reason to encode.
    assert counters["hits"] > 0.75 * ROUNDS * PICTURES
    assert stack.total(CONSUMER, "epd_ec_hook_errors_total", EC_METRICS_PORT) == 0
