"""Media items: whose they are, that none is encoded twice at a time, or again while the store has it."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from epd_proxy.config import Health
from epd_proxy.flows.flights import Flights
from epd_proxy.known import KnownItems
from epd_proxy.pool import Pool
from epd_proxy.protocol import CHAT, parse_request, tenant_of
from epd_proxy.staging import Items
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_stack import ITEM_KEY, ProxyStack, Reply, chat, image_part, picture, url_part

PICTURE = image_part(picture(64))


def names(*parts: dict[str, Any], key: bytes = ITEM_KEY, tenant: str = "", **more: Any) -> list[Any]:
    """The uuids that the parts of a request get, None where they have none."""
    body = json.dumps(chat(*parts, **more)).encode()
    parsed = parse_request(CHAT, body, items_max=99, key=key, tenant=tenant)
    content = json.loads(parsed.body)["messages"][0]["content"]
    assert content == parsed.document["messages"][0]["content"]
    return [part.get("uuid") for part in content if part != {"type": "text", "text": more.get("text", "What is it?")}]


def test_the_same_content_has_the_same_name() -> None:
    again = {"image_url": PICTURE["image_url"], "type": "image_url"}
    first, second, other = names(PICTURE, again, image_part(picture(65)))
    assert first == second != other
    assert len(first) == len(other) == 64
    assert names(PICTURE) == [first]


@pytest.mark.parametrize(
    "different",
    [{"tenant": "b"}, {"key": b"l" * 32}, {"mm_processor_kwargs": {"max_pixels": 1}},
     {"media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}}}],
)  # fmt: skip
def test_whatever_changes_the_embedding_or_its_owner_changes_the_name(different: dict[str, Any]) -> None:
    assert names(PICTURE, **different) != names(PICTURE)
    # What does not, does not.
    assert names(PICTURE, temperature=1, text="And this?", mm_processor_kwargs={}) == names(PICTURE)


def test_kinds_and_formats_do_not_meet() -> None:
    url = "data:{};base64,QUJDRA=="
    sound = [{"type": "input_audio", "input_audio": {"data": "QUJDRA==", "format": form}} for form in ("wav", "mp3")]
    parts = [url_part(url.format(kind), f"{kind.split('/')[0]}_url")
             for kind in ("image/png", "image/gif", "video/mp4", "video/jpeg", "audio/mp4")]  # fmt: skip
    given = names(*parts, *sound)
    assert None not in given
    assert len(set(given)) == len(given) == 7


def test_what_only_a_url_names_has_no_name() -> None:
    assert names(url_part("http://a.test/x.png"), url_part("https://a.test/x.mp4", "video_url")) == [None, None]


EMBEDS = {"type": "image_embeds", "image_embeds": "QUJD"}


@pytest.mark.parametrize(
    "part", [PICTURE, url_part("http://a.test/x.png"), {"type": "image_url", "image_url": None}, EMBEDS]
)
def test_a_clients_uuid_is_its_own_alone(part: dict[str, Any]) -> None:
    [here], [elsewhere] = names({**part, "uuid": "cat"}, tenant="a"), names({**part, "uuid": "cat"}, tenant="b")
    assert here != elsewhere
    assert here != "cat"
    # With the picture and, next time, without it.
    assert names({"type": "image_url", "image_url": None, "uuid": "cat"}, tenant="a") == [here]


def test_no_uuid_reaches_what_others_sent() -> None:
    [name] = names(PICTURE, tenant="a")
    for guess in (name, [name], {"a": name}, 7, "", True):
        for tenant in ("a", "b"):
            [given] = names({**PICTURE, "uuid": guess}, tenant=tenant)
            assert isinstance(given, str)
            assert given not in (name, guess)


def test_a_part_that_a_uuid_would_make_another_is_left_alone() -> None:
    """vLLM goes by the type of a part, but with a uuid by the first field it knows."""
    both = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,QUJD"}, "image_url": {"url": "x"}}
    assert names(both) == [None]


def test_who_sends_is_told_by_headers() -> None:
    by = Items().tenant_headers
    assert tenant_of({}, by) == ""
    who = [tenant_of(headers, by) for headers in ({"authorization": "Bearer a"}, {"authorization": "Bearer b"},
                                                  {"x-api-key": "Bearer a"})]  # fmt: skip
    assert len(set(who)) == 3
    assert tenant_of({"authorization": "Bearer a"}, ()) == ""


async def test_every_stage_gets_the_same_name() -> None:
    async with ProxyStack(0, 0, prefills=1, decodes=1) as split, ProxyStack() as stack:
        for each in (split, stack):
            assert (await each.post(chat(PICTURE), headers={"Authorization": "Bearer a"})).status == 200
        [encode], [answer] = stack.encoders[0].requests, stack.instances[0].requests
        assert encode.parts[0] == answer.parts[0]
        assert len(encode.parts[0]["uuid"]) == 64
        assert split.prefills[0].requests[0].parts == split.decodes[0].requests[0].parts
        # Another process, another key.
        assert split.decodes[0].requests[0].parts[0]["uuid"] != encode.parts[0]["uuid"]


def counted(metrics: Reply) -> dict[str, float]:
    """Items by outcome."""
    lines = [line for line in metrics.body.decode().splitlines() if line.startswith("epd_proxy_encode_items_total{")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


async def test_one_picture_in_many_requests_at_once_is_encoded_once() -> None:
    async with ProxyStack(encoders=2) as stack:
        for encoder in stack.encoders:
            encoder.default = fake.after(0.3)
        replies = await asyncio.gather(*(stack.post(chat(PICTURE, PICTURE)) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert sum(len(encoder.requests) for encoder in stack.encoders) == 1
        counts = counted(await stack.get("/metrics"))
        assert counts.pop("encoded") == 1
        assert counts["joined"] > 0
        assert sum(counts.values()) == 15  # one that came late, on a busy machine, found it known


async def test_items_without_a_name_are_not_taken_for_each_other() -> None:
    """Whatever their requests are called: clients choose that."""
    async with ProxyStack() as stack:
        stack.encoders[0].default = fake.after(0.3)
        asked = [chat(url_part(f"http://a.test/{name}.png")) for name in "ab"]
        replies = await asyncio.gather(*(stack.post(each, headers={"X-Request-Id": "same"}) for each in asked))
        assert [reply.status for reply in replies] == [200] * 2
        assert len(stack.encoders[0].requests) == 2


async def test_two_tenants_share_nothing() -> None:
    async with ProxyStack() as stack:
        for who in ("a", "b", "a"):
            assert (await stack.post(chat(PICTURE), headers={"Authorization": f"Bearer {who}"})).status == 200
        assert len(stack.encoders[0].requests) == 2


async def test_when_the_first_leaves_another_has_it_encoded() -> None:
    async with ProxyStack() as stack:
        stack.encoders[0].script.append(fake.hang)
        first = asyncio.create_task(stack.post(chat(PICTURE)))
        await stack.until(lambda: stack.encoders[0].running == 1)
        others = [asyncio.create_task(stack.post(chat(PICTURE))) for _ in range(3)]
        await stack.until(lambda: "running=4" in repr(stack.handlers))
        first.cancel()
        assert [(await other).status for other in others] == [200] * 3
        assert (stack.encoders[0].aborted, len(stack.encoders[0].requests)) == (1, 2)


async def test_the_others_do_not_get_the_firsts_refusal() -> None:
    """It may be about its headers, or its chat template."""
    async with ProxyStack() as stack:
        stack.encoders[0].script.append(fake.after(0.3, fake.refuse(401, "bad key")))
        first = asyncio.create_task(stack.post(chat(PICTURE)))
        await stack.until(lambda: stack.encoders[0].running == 1)
        others = [asyncio.create_task(stack.post(chat(PICTURE))) for _ in range(3)]
        assert [(await each).status for each in (first, *others)] == [401, 200, 200, 200]


async def test_flights_that_fail_are_flown_by_each_at_once() -> None:
    flights, begun, now, most = Flights(), 0, 0, 0

    async def fail() -> None:
        nonlocal begun, now, most
        begun, now = begun + 1, now + 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        raise ValueError

    results = await asyncio.gather(*(flights.run("x", fail) for _ in range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 5
    assert (begun, most, repr(flights)) == (5, 4, "<Flights 0>")


async def test_a_known_item_is_not_encoded_again() -> None:
    async with ProxyStack() as stack:
        for _ in range(3):
            assert (await stack.post(chat(PICTURE, image_part()))).status == 200
        assert len(stack.encoders[0].requests) == 4
        assert counted(await stack.get("/metrics")) == {"encoded": 4, "known": 2}
        assert [len(request.parts) for request in stack.instances[0].requests] == [3] * 3


async def test_what_was_not_encoded_is_not_known() -> None:
    async with ProxyStack() as stack:
        stack.encoders[0].script.extend([fake.refuse(500), fake.refuse(400)])
        assert [(await stack.post(chat(PICTURE))).status for _ in range(3)] == [200, 400, 200]
        assert counted(await stack.get("/metrics")) == {"local": 1, "refused": 1, "encoded": 1}


async def test_one_flag_switches_it_off() -> None:
    async with ProxyStack(items=Items(known_ttl_s=0)) as stack:
        for _ in range(3):
            assert (await stack.post(chat(PICTURE))).status == 200
        assert len(stack.encoders[0].requests) == 3


@pytest.mark.parametrize("restarts", ["encoder", "store"])
async def test_a_restart_makes_all_items_unknown(restarts: str) -> None:
    async with FakeInstance() as store:
        options: Mapping[str, Any] = {"items": Items(store=(store.url,)), "health": Health(interval_s=0.05)}
        async with ProxyStack(**options) as stack:
            restarted = stack.encoders[0] if restarts == "encoder" else store
            assert (await stack.post(chat(PICTURE))).status == 200
            probes = restarted.probes
            await restarted.stop()
            await asyncio.sleep(0.3)
            await restarted.start()
            await stack.until(lambda: restarted.probes > probes + 1 and stack.pools["encode"].ready)
            assert (await stack.post(chat(PICTURE))).status == 200
            assert len(stack.encoders[0].requests) == 2
            assert (
                f'epd_proxy_endpoint_up{{endpoint="{store.url}",stage="store"}} 1.0'.encode()
                in (await stack.get("/metrics")).body
            )


class Store:
    """What the proxy sees of a store: its health, and silent connections."""

    def __init__(self) -> None:
        self.port = 0
        self.probes = 0
        self.silent: set[asyncio.StreamWriter] = set()

    @property
    def items(self) -> Items:
        return Items(store=(f"http://127.0.0.1:{self.port}",))

    async def __aenter__(self) -> "Store":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        self.hang_up()

    def hang_up(self) -> None:
        while self.silent:
            self.silent.pop().transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.silent.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.silent.discard(writer)
                self.probes += 1
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def test_a_store_that_is_back_before_the_next_probe_has_lost_all_the_same() -> None:
    async with Store() as store, ProxyStack(items=store.items) as stack:  # probes once a minute
        await stack.until(lambda: store.probes and store.silent)
        for _ in range(2):
            assert (await stack.post(chat(PICTURE))).status == 200
        assert len(stack.encoders[0].requests) == 1
        await store.__aexit__()
        await asyncio.sleep(0.3)
        async with store:
            await stack.until(lambda: store.silent)
            assert (await stack.post(chat(PICTURE))).status == 200
        assert (len(stack.encoders[0].requests), store.probes) == (2, 1)


async def test_a_store_that_ends_silent_connections_has_lost_nothing() -> None:
    async with Store() as store, ProxyStack(items=store.items) as stack:
        for _ in range(3):
            await stack.until(lambda: store.silent)
            assert (await stack.post(chat(PICTURE))).status == 200
            store.hang_up()
        assert len(stack.encoders[0].requests) == 1


async def test_a_store_that_is_down_makes_the_stack_no_less_ready() -> None:
    async with ProxyStack(items=Items(store=("http://127.0.0.1:9",))) as stack:
        assert (await stack.get("/ready")).status == 200
        assert (await stack.post(chat(PICTURE))).status == 200


def test_the_table_forgets() -> None:
    now = 100.0
    encoder, other = Pool("encode", ["http://a:1", "http://b:1"]).endpoints
    [store] = Pool("store", ["http://s:1"]).endpoints
    known = KnownItems(10, [store], clock=lambda: now)
    known.note("x", encoder)
    known.note("", encoder)
    assert ("x" in known, "" in known, "y" in known, len(known)) == (True, False, False, 1)
    now = 109.9
    assert "x" in known
    now = 110.0
    assert "x" not in known
    for gone in (encoder, store):
        known.note("x", encoder)
        other.mark_unreachable("gone")
        assert "x" in known
        gone.mark_unreachable("gone")
        assert "x" not in known
        gone.mark_probe(None)
        assert "x" not in known
    for number in range(70_000):
        known.note(str(number), encoder)
    assert len(known) < 66_000
    assert ("0" in known, "69999" in known) == (False, True)
