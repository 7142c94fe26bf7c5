"""Policies: who is chosen, and that those of one key meet."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd_proxy.policy import POLICIES, ConsistentHash, LeastLoaded, PowerOfTwo
from epd_proxy.protocol import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Api, parse_request, prefix_of
from epd_proxy.staging import Balance
from fakes.proxy_stack import CHAT as CHAT_PATH
from fakes.proxy_stack import ITEM_KEY, ProxyStack, chat, image_part, picture


@dataclass
class At:
    url: str
    active_cost: int = 0
    active_leases: int = 0
    granted_total: int = 0


def places(*costs: int) -> list[At]:
    return [At(f"http://i{number}:1", cost) for number, cost in enumerate(costs)]


costs = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


@given(costs)
def test_the_least_loaded_one_is_least_loaded(loads: list[int]) -> None:
    assert LeastLoaded().choose(places(*loads), 1, "").active_cost == sorted(loads)[0]


@given(costs)
def test_of_two_the_most_loaded_one_is_never_chosen_but_alone(loads: list[int]) -> None:
    chosen = PowerOfTwo().choose(places(*loads), 1, "").active_cost
    assert chosen in loads
    if len(set(loads)) == len(loads) > 1:
        assert chosen < max(loads)


def test_two_choices_spread_nearly_as_all_do() -> None:
    spots = places(*[0] * 16)
    for _ in range(1600):
        PowerOfTwo().choose(spots, 1, "").active_cost += 1
    loads = [spot.active_cost for spot in spots]
    assert max(loads) - min(loads) <= 30, loads


@given(costs, st.text(min_size=1, max_size=20), st.integers(1, 10**6))
def test_no_key_leads_to_more_than_its_share(loads: list[int], key: str, cost: int) -> None:
    spots = places(*loads)
    chosen = ConsistentHash().choose(spots, cost, key)
    assert chosen.active_cost <= 1.25 * (sum(loads) + cost) / len(loads)


def test_keys_stay_where_they_are_when_instances_come_and_go() -> None:
    spots = places(*[0] * 8)
    keys = [f"session {number}" for number in range(800)]
    before = {key: ConsistentHash().choose(spots, 1, key).url for key in keys}
    spread = Counter(before.values())
    assert len(spread) == 8
    assert max(spread.values()) < 2 * 100
    gone = spots[3].url
    after = {key: ConsistentHash().choose([s for s in spots if s.url != gone], 1, key).url for key in keys}
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == gone}


def test_without_a_key_it_is_the_least_loaded() -> None:
    assert ConsistentHash().choose(places(3, 1, 2), 1, "").active_cost == 1


def begins(document: object, api: Api = CHAT) -> str:
    return prefix_of(parse_request(api, json.dumps(document).encode(), items_max=9, key=ITEM_KEY))


def test_how_a_request_begins() -> None:
    def talk(*said: str) -> str:
        roles = ("system", "user", "assistant", "user")
        return begins({"messages": [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]})

    assert talk("Be brief.", "Hi") == talk("Be brief.", "Hi", "Hello!", "Who are you?") != ""
    assert talk("Be brief.", "Hi") != talk("Be long.", "Hi")
    assert talk("Be brief.", "Hi") != talk("Be brief.", "Ho")
    assert begins(chat(image_part(picture(9)))) == begins(chat(image_part(picture(9)))) != begins(chat(image_part()))
    assert begins({"prompt": "x" * 300 + "a"}, COMPLETIONS) == begins({"prompt": ["x" * 300 + "b"]}, COMPLETIONS)
    assert begins({"prompt": [[1, 2]]}, COMPLETIONS) != begins({"prompt": [[1, 3]]}, COMPLETIONS)
    system = {"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]}
    assert begins(system, MESSAGES) != begins({**system, "system": "Be long."}, MESSAGES)
    assert begins({"input": "Hi"}, RESPONSES) != begins({"input": "Ho"}, RESPONSES) != ""
    for odd in ({}, {"messages": 3}, {"messages": [1]}, {"messages": [{"role": 5, "content": [1, {"text": 3}]}]}):
        assert isinstance(begins(odd), str)
        assert isinstance(begins(odd, COMPLETIONS), str)


async def test_a_session_may_be_of_any_bytes() -> None:
    async with ProxyStack(encoders=0, instances=2, balance=Balance(policy="session")) as stack:
        body = json.dumps(chat()).encode()
        for name in (b"\xff\xfe", "ü".encode(), b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
            head = b"POST %b HTTP/1.1\r\nHost: x\r\nX-Session-Id: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            writer.write(head % (CHAT_PATH.encode(), name, len(body)) + body)
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()


def test_a_beginning_is_cut_and_made_of_texts_alone() -> None:
    long = begins(chat(text="x" * 10_000))
    assert len(long) == 4096
    assert begins(chat(text="x" * 9_000)) == long
    nested: list[object] = []
    for _ in range(200):
        nested = [nested, "y"]
    assert begins({"messages": [{"role": nested, "content": [{"text": nested}]}], "system": {"a": nested}}) == "\0"
    assert begins({"prompt": [nested, 7]}, COMPLETIONS) == ""


@pytest.mark.parametrize("policy", ["session", "prefix"])
async def test_what_belongs_together_meets(policy: str) -> None:
    async with ProxyStack(encoders=0, instances=4, balance=Balance(policy=policy)) as stack:
        for who in range(12):
            before = [len(instance.requests) for instance in stack.instances]
            for turn in range(4):
                asked = chat(text=f"I am {who}" if policy == "prefix" else f"turn {turn}")
                asked["messages"] += [{"role": "assistant", "content": "Ah"}] * turn
                assert (await stack.post(asked, headers={"X-Session-Id": str(who)})).status == 200
            took = [len(instance.requests) - count for instance, count in zip(stack.instances, before, strict=True)]
            assert sorted(took) == [0, 0, 0, 4]
        assert sum(bool(instance.requests) for instance in stack.instances) > 1


@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_every_policy_goes_on_to_another_instance(policy: str) -> None:
    async with ProxyStack(encoders=1, instances=3, balance=Balance(policy=policy)) as stack:
        await stack.instances[0].stop()
        await stack.instances[1].stop()
        headers = {"X-Session-Id": "me"}
        assert [(await stack.post(chat(image_part()), headers=headers)).status for _ in range(4)] == [200] * 4
