"""Spans of requests and stages, as a collector gets them, and the context that the instances get."""

import asyncio

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from epd_proxy.errors import ConfigError
from fakes import instances as fake
from fakes.instances import Recorded
from fakes.proxy_stack import CHAT, ProxyStack, chat, image_part

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=x"}


class Collector:
    """Takes spans as an OpenTelemetry collector does. Leaving the stack first makes it send what it has."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""

    async def __aenter__(self) -> "Collector":
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.service = named["service.name"]
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def context(request: Recorded) -> tuple[str, str]:
    """Return the trace id and the parent's span id that an instance got."""
    _, trace, parent, _ = request.headers["traceparent"].split("-")
    return trace, parent


async def test_a_request_is_a_span_in_the_clients_trace_and_each_stage_one_below_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "epd_proxy.access")
    async with Collector() as collector:
        async with ProxyStack(encoders=2, prefills=1, decodes=1, otlp_endpoint=collector.url) as stack:
            assert (await stack.post(chat(image_part(), image_part()), headers=GIVEN)).status == 200
            encoded = [request for encoder in stack.encoders for request in encoder.requests]
            [prefilled], [decoded] = stack.prefills[0].requests, stack.decodes[0].requests
        [root] = collector.named(f"POST {CHAT}")
        assert (root.trace_id.hex(), root.parent_span_id.hex(), root.trace_state) == (TRACE, CALLER, "vendor=x")
        stages = {"encode": encoded, "prefill": [prefilled], "decode": [decoded]}
        for name, requests in stages.items():
            spans = collector.named(name)
            assert len(spans) == len(requests)
            assert {span.parent_span_id for span in spans} == {root.span_id}
            assert all(root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in spans)
            # The instance's own spans come below the stage's.
            assert {context(r) for r in requests} == {(TRACE, span.span_id.hex()) for span in spans}
            assert {r.headers["tracestate"] for r in requests} == {"vendor=x"}
        attributes = {each.key: each.value for each in root.attributes}
        assert attributes["http.response.status_code"].int_value == 200
        assert attributes["epd.handshake"].string_value == "layerwise"
        assert collector.service == "epd-proxy"
        assert [r.fields["trace_id"] for r in caplog.records if r.name == "epd_proxy.access"] == [TRACE]
        assert "ended span" not in caplog.text


async def test_failures_are_marked_and_a_request_without_a_trace_begins_one() -> None:
    async with Collector() as collector:
        async with ProxyStack(encoders=0, instances=2, otlp_endpoint=collector.url) as stack:
            for instance in stack.instances:
                instance.default = fake.refuse(500)
            assert (await stack.post(chat())).status == 500
        [root], tried = collector.named(f"POST {CHAT}"), collector.named("prefill_decode")
        assert root.parent_span_id == b""
        assert len(tried) == 2
        assert {span.status.code for span in (root, *tried)} == {2}  # STATUS_CODE_ERROR


async def test_a_stream_is_traced_to_its_end_and_so_is_one_that_is_given_up() -> None:
    async with Collector() as collector:
        async with ProxyStack(encoders=0, otlp_endpoint=collector.url) as stack:
            stack.instances[0].default = fake.stream(fake.TEXT, 0.1)
            assert (await stack.post(chat(stream=True))).status == 200
            stack.instances[0].default = fake.hang
            sending = asyncio.create_task(stack.post(chat()))
            await stack.until(lambda: stack.instances[0].running == 1)
            sending.cancel()
            await stack.until(lambda: stack.instances[0].aborted == 1)
        whole, given_up = sorted(collector.named("prefill_decode"), key=lambda span: span.start_time_unix_nano)
        assert whole.end_time_unix_nano - whole.start_time_unix_nano > 0.25e9
        assert (whole.status.code, given_up.status.code) == (0, 2)
        assert len(collector.named(f"POST {CHAT}")) == 2


async def test_a_collector_that_is_gone_harms_no_request() -> None:
    async with ProxyStack(encoders=0, otlp_endpoint="http://127.0.0.1:9") as stack:
        assert (await stack.post(chat())).status == 200


async def test_without_an_endpoint_the_context_passes_unchanged() -> None:
    async with ProxyStack() as stack:
        await stack.post(chat(image_part()), headers=GIVEN)
        for fakes in (stack.encoders, stack.instances):
            assert {name: fakes[0].requests[0].headers[name] for name in GIVEN} == GIVEN


def test_the_extra_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from epd_proxy.tracing import Tracing

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"expected epd-proxy\[otel\] to be installed"):
        Tracing("http://a:1")
