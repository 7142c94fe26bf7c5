"""OpenTelemetry: a span for each request, within the client's trace, and one for each instance that is asked.

Needs the extra ``epd-proxy[otel]``. Without an endpoint nothing of it is imported, and requests go through none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from . import __version__
from .access import AccessRecord
from .errors import ConfigError
from .upstream import Call

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# An endpoint that does not answer holds up the end of the proxy for so long.
_EXPORT_S = 3.0
_CONTEXT = ("traceparent", "tracestate")


class StageSpan:
    """One instance's part of a request, from sending to the last byte. Ending it twice is harmless."""

    def __init__(self, span: Span, call: Call) -> None:
        self.call = call
        self._span = span

    def end(self, status: int | None, error: str = "") -> None:
        """End it; ``status`` is what the instance answered."""
        if not self._span.is_recording():  # it has ended, or is one of those that are not sampled
            return
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if error or (status or 0) >= 500:
            from opentelemetry.trace import StatusCode  # noqa: PLC0415

            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


class Tracing:
    """Makes spans and sends them, in the background, to a collector that speaks OTLP over HTTP.

    The SDK's own variables hold too: ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, ``OTEL_RESOURCE_ATTRIBUTES``, ….
    """

    def __init__(self, endpoint: str) -> None:
        """``endpoint`` is the collector's base URL. Raises :class:`ConfigError` when the extra is not installed."""
        try:
            from opentelemetry import propagate  # noqa: PLC0415 - an extra
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError([f"--otlp-endpoint: expected epd-proxy[otel] to be installed: {error}"]) from error
        propagate.set_global_textmap(TraceContextTextMapPropagator())
        # Its own name where OTEL_SERVICE_NAME, which Resource.create() reads, says nothing.
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "epd-proxy"}))
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("epd_proxy", __version__)

    @contextlib.contextmanager
    def request(self, headers: Mapping[str, str], record: AccessRecord, route: str) -> Iterator[None]:
        """Give what is done within a span of its own, a child of the client's where it has sent one."""
        from opentelemetry import propagate  # noqa: PLC0415
        from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415

        came = {name: value for name in _CONTEXT if (value := headers.get(name))}
        with self._tracer.start_as_current_span(
            f"{record.method} {route}", propagate.extract(came), SpanKind.SERVER, record_exception=False
        ) as span:
            record.trace_id = f"{span.get_span_context().trace_id:032x}"
            try:
                yield
            finally:
                span.set_attributes({
                    "http.request.method": record.method, "http.route": route,
                    "http.response.status_code": record.status, "epd.request_id": record.request_id,
                    "gen_ai.request.model": record.model, "epd.items": record.items, "epd.encoded": record.encoded,
                    "epd.handshake": record.handshake, "epd.attempts": record.attempts,
                    "epd.first_byte_s": record.first_byte_s,
                })  # fmt: skip
                if record.status >= 500:
                    span.set_status(StatusCode.ERROR, record.error)

    def stage(self, stage: str, url: str, call: Call) -> StageSpan:
        """Begin an instance's part of the current request; its ``call`` has the span's context in its headers."""
        from opentelemetry import propagate  # noqa: PLC0415
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415

        span = self._tracer.start_span(stage, kind=SpanKind.CLIENT, attributes={"url.full": url + call.path})
        headers: dict[str, str] = {}
        propagate.inject(headers, set_span_in_context(span))
        kept = [(name, value) for name, value in call.headers if name.lower() not in _CONTEXT]
        return StageSpan(span, call._replace(headers=[*kept, *headers.items()]))

    def close(self) -> None:
        """Send what is left, and stop. Blocks for up to some seconds when the collector does not answer."""
        self._provider.shutdown()
