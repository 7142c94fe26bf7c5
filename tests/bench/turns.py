"""`make bench-turns`: time to the first token when a conversation about a picture goes on.

1E1PD and one ordinary vLLM, live, on the tiny model with a vision tower that is made heavy. Writes its table to
docs/ec-performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
import urllib.request
from typing import Any

import marked
from ec import DOCUMENT

from smoke.client import CHAT, chat_body, tokens
from smoke.models import make_model
from smoke.pictures import picture
from smoke.stack import Stack, running_stack

VISION = ("--vision-depth", "4", "--vision-width", "256")
SIZE, PICTURE_TOKENS = (448, 448), 256
"""Pixels of a picture, and what they make."""
CONSUMER, MONOLITH = "prefill-decode-0", "monolith"
COLD = "one vLLM, second question, its caches cold"
CACHED_TOKENS = 2048
"""Of embeddings in vLLM's own encoder cache."""


def main() -> int:
    """Measure, print and write the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    held = CACHED_TOKENS // PICTURE_TOKENS
    parser.add_argument("--pictures", type=int, default=2 * held)
    pictures = parser.parse_args().pictures
    if pictures <= held:
        parser.error(f"--pictures: expected more than the {held} that the consumer's own cache holds, got {pictures}")
    settings = make_model("heavy", *VISION)
    settings["EPD_PREFILL_DECODE_EXTRA_ARGS"] = f"--max-num-batched-tokens {CACHED_TOKENS}"
    # The proxy takes an item for known for a minute by default; here all pictures come before the first is asked again.
    settings["EPD_PROXY_KNOWN_ITEMS_TTL_S"] = "900"
    with running_stack("1e1pd", "tests/bench/turns.yaml", **settings) as stack:
        begin(stack, pictures)  # what an instance does once only
        rows = [begin(stack, seed) for seed in range(pictures)]
        rows = [row | go_on(stack, seed) for seed, row in enumerate(rows)]
    text = table(rows)
    print(text)
    marked.write(DOCUMENT, "turns", text)
    return 0


def first_turn(seed: int) -> dict[str, Any]:
    """Return a question about a picture."""
    return chat_body("What is it?", [picture(seed, size=SIZE)], max_tokens=8)


def second_turn(seed: int, answer: str) -> dict[str, Any]:
    """Return the conversation with one more question."""
    body = first_turn(seed)
    more = [{"role": "assistant", "content": answer}, {"role": "user", "content": "Which colours has it?"}]
    return body | {"messages": [*body["messages"], *more]}


def begin(stack: Stack, seed: int) -> dict[str, float]:
    """Ask the first question about a picture that nobody has seen; return the seconds to the first token, by case."""
    return {
        "one vLLM, first question": first_token_s(stack.service_url(MONOLITH), first_turn(seed)),
        "split, first question": first_token_s(stack.url, first_turn(seed)),
    }


def go_on(stack: Stack, seed: int) -> dict[str, float]:
    """Ask the second one."""
    proxy, monolith = stack.url, stack.service_url(MONOLITH)
    body = second_turn(seed, "It is a picture.")
    forget(stack, MONOLITH, "prefix", "mm", "encoder")
    times = {COLD: first_token_s(monolith, body)}
    # What the consumer's encoder cache had of this picture made room for the pictures after it.
    forget(stack, CONSUMER, "prefix", "mm")
    before, encoded = stack.ec_counters(CONSUMER), stack.total("encode-0", "vllm:request_success_total")
    times["split, second question, a hit in the store"] = first_token_s(proxy, body)
    after = stack.ec_counters(CONSUMER)
    assert after["hits"] == before["hits"] + 1, "the embedding did not come from the store"
    assert after["local encodes"] == before["local encodes"]
    assert stack.total("encode-0", "vllm:request_success_total") == encoded, "the picture was encoded again"
    assert tokens(proxy, CHAT, body) == tokens(monolith, CHAT, body)
    times["one vLLM, second question, its caches warm"] = first_token_s(monolith, body)
    times["split, second question, the consumer's own caches warm"] = first_token_s(proxy, body)
    return times


def forget(stack: Stack, service: str, *caches: str) -> None:
    """Empty an instance's own caches; the store keeps what it has."""
    for cache in caches:
        request = urllib.request.Request(f"{stack.service_url(service)}/reset_{cache}_cache", data=b"", method="POST")
        urllib.request.urlopen(request, timeout=30).close()


def first_token_s(url: str, body: dict[str, Any]) -> float:
    """Return the seconds until the first event with a token arrives."""
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(url + CHAT, data, {"Content-Type": "application/json"})
    started_s = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            event = line.removeprefix(b"data: ").strip()
            if event.startswith(b"{") and any(choice.get("token_ids") for choice in json.loads(event)["choices"]):
                took_s = time.monotonic() - started_s
                answer.read()
                return took_s
    raise AssertionError("a stream without a token")


def table(rows: list[dict[str, float]]) -> str:
    """Return the medians as Markdown, with their ratios to the cold vLLM."""
    yardstick = statistics.median(row[COLD] for row in rows)
    lines = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores of x86-64, medians over {len(rows)} "
        f"pictures; the machine's load meanwhile was {os.getloadavg()[1]:.1f}.",
        "",
        "| | time to the first token | of one vLLM's, cold |",
        "| --- | --- | --- |",
    ]
    for case in rows[0]:
        median_s = statistics.median(row[case] for row in rows)
        lines.append(f"| {case} | {1000 * median_s:,.0f} ms | {median_s / yardstick:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
