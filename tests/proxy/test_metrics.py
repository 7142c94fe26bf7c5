"""What operators read: times to the first token and between tokens, by stage, retries; no label that clients choose."""

import re
from pathlib import Path

import aiohttp
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from epd_proxy.config import Retry
from epd_proxy.metrics import Count, Spread
from fakes import instances as fake
from fakes.proxy_stack import CHAT, ProxyStack, chat, image_part, read_to_break


async def samples(stack: ProxyStack, name: str) -> dict[tuple[str, ...], float]:
    """Return a metric's samples by their labels' values, without buckets."""
    text = (await stack.get("/metrics")).body.decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {tuple(sample.labels.values()): sample.value for sample in found if sample.name == name}


async def test_streams_are_timed_from_arrival_to_the_first_event_and_between_events() -> None:
    async with ProxyStack(encoders=0) as stack:
        pieces = [fake.chunk(str(number)) for number in range(5)]
        stack.instances[0].default = fake.after(0.3, fake.stream([*pieces, fake.DONE], 0.05))
        assert (await stack.post(chat(stream=True))).status == 200
        stack.instances[0].default = fake.answer
        assert (await stack.post(chat())).status == 200  # no stream: not counted
        first = "epd_proxy_time_to_first_token_seconds"
        assert (await samples(stack, f"{first}_count"))[(CHAT,)] == 1
        assert (await samples(stack, f"{first}_sum"))[(CHAT,)] >= 0.3
        mean_s = (await samples(stack, "epd_proxy_time_per_output_token_seconds_sum"))[(CHAT,)]
        longest_s = (await samples(stack, "epd_proxy_inter_token_max_seconds_sum"))[(CHAT,)]
        assert 0.04 < mean_s <= longest_s


async def test_a_stream_that_breaks_is_not_taken_for_a_fast_one() -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream(fake.TEXT[:2], 0.01, end="cut")
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            assert (await read_to_break(response))[1]
        assert await samples(stack, "epd_proxy_time_to_first_token_seconds_count") == {}
        assert await samples(stack, "epd_proxy_broken_streams_total") == {(): 1}


async def test_stages_are_timed_and_retries_counted() -> None:
    async with ProxyStack(instances=2, retry=Retry(delay_s=0)) as stack:
        stack.encoders[0].default = fake.after(0.1)
        for instance in stack.instances:
            instance.script.append(fake.refuse(503))
        assert (await stack.post(chat(image_part()))).status == 503
        assert (await stack.post(chat())).status == 200
        assert await samples(stack, "epd_proxy_retries_total") == {("prefill_decode",): 1}
        assert (await samples(stack, "epd_proxy_stage_seconds_sum"))[("encode",)] >= 0.1
        assert await samples(stack, "epd_proxy_stage_seconds_count") == {("encode",): 1, ("prefill_decode",): 1}


async def test_the_table_in_the_readme_has_every_metric() -> None:
    table = Path(__file__).parents[2].joinpath("proxy", "README.md").read_text()
    async with ProxyStack(prefills=1, decodes=1) as stack:
        families = list(text_string_to_metric_families((await stack.get("/metrics")).body.decode()))
    for family in families:
        if family.name.endswith("_created"):  # of another one
            continue
        name = family.name + "_total" * (family.type == "counter")
        assert name.startswith("epd_proxy_")
        assert re.search(rf"`{name}\b", table), name


async def test_clients_choose_no_label() -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream(fake.TEXT)
        for name in ("a", "b", "c"):
            async with stack.client.post(f"/v1/{name}", json={"stream": True}) as response:
                assert response.status == 200
                await response.read()
        for name in ("epd_proxy_requests_total", "epd_proxy_time_to_first_token_seconds_count"):
            assert {labels[0] for labels in await samples(stack, name)} == {"/v1/{rest}"}


async def test_a_client_that_leaves_is_no_complete_stream() -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream(fake.TEXT[:1], end="hang")
        async with stack.client.post(CHAT, json=chat(stream=True), timeout=aiohttp.ClientTimeout(total=20)) as response:
            await response.content.readany()
        await stack.until_idle()
        assert await samples(stack, "epd_proxy_time_to_first_token_seconds_count") == {}


@given(st.lists(st.floats(0, 100) | st.sampled_from([0.5, 1.0, 2.5]) | st.none()))
def test_what_is_counted_here_is_what_prometheus_client_would_count(values: list[float | None]) -> None:
    def made() -> tuple[CollectorRegistry, Histogram, Counter]:
        registry = CollectorRegistry()
        return (
            registry,
            Histogram("h", "h", buckets=(0.5, 1, 2.5), registry=registry),
            Counter("c", "c", registry=registry),
        )

    (ours, histogram, counter), (theirs, their_histogram, their_counter) = made(), made()
    spread, count = Spread(histogram), Count(counter)
    for value in values:
        if value is None:  # somebody looks
            spread.flush()
            count.flush()
        else:
            spread.observe(value)
            count.inc()
            their_histogram.observe(value)
            their_counter.inc()
    spread.flush()
    count.flush()
    for name, labels in (
        ("h_count", {}),
        ("c_total", {}),
        *(("h_bucket", {"le": le}) for le in ("0.5", "1.0", "2.5", "+Inf")),
    ):
        assert ours.get_sample_value(name, labels) == theirs.get_sample_value(name, labels)
    shown, expected = ours.get_sample_value("h_sum"), theirs.get_sample_value("h_sum")
    assert abs((shown or 0) - (expected or 0)) < 1e-6
