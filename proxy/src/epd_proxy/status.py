"""What operators and orchestrators ask: is it alive, is it ready, what does it count."""

from collections.abc import Callable, Iterable, Mapping
from html import escape

import orjson

from . import __version__
from . import metrics as metrics_module
from .metrics import Metrics
from .pool import Endpoint, Pool
from .server import Request, Response, Routes

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>epd-proxy: {title}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: .3em 1em; text-align: left }}
td.bad {{ color: #b00020 }}</style></head>
<body><h1>{title}</h1><p>{reasons}</p><table>{rows}</table>
<p>epd-proxy {version}. This page renews itself; <a href="metrics">metrics</a></p></body></html>
"""


class Status:
    """Serves ``/health``, ``/healthcheck``, ``/ready``, ``/status`` and ``/metrics``."""

    def __init__(self, pools: Mapping[str, Pool], metrics: Metrics, draining: Callable[[], bool]) -> None:
        self._pools = pools
        self._metrics = metrics
        self._draining = draining

    def add_routes(self, routes: Routes) -> None:
        """Add the five paths."""
        routes.add("GET", "/health", self._health)
        routes.add("GET", "/healthcheck", self._health)
        routes.add("GET", "/ready", self._ready)
        routes.add("GET", "/status", self._show)
        routes.add("GET", "/metrics", self._show_metrics)

    async def _health(self, _request: Request) -> Response:
        """Liveness: the process answers. The counts are those vllm-ascend's example gives at /healthcheck."""
        names = {"encode": "encode", "prefill": "prefill", "decode": "decode", "pd": "prefill_decode"}
        counts = {
            f"{name}_instances": len(pool.endpoints) if (pool := self._pools.get(stage)) else 0
            for name, stage in names.items()
        }
        return _json(200, {"status": "ok", **counts})

    async def _ready(self, _request: Request) -> Response:
        """Readiness: every stage has an endpoint that is up, and new requests are taken."""
        reasons = self._reasons()
        stages = {stage: pool.reason() for stage, pool in self._pools.items() if pool.endpoints}
        if reasons:
            return _json(503, {"status": "not ready", "reasons": reasons, "stages": stages})
        return _json(200, {"status": "ready", "stages": stages})

    async def _show(self, _request: Request) -> Response:
        """Show people what ``/metrics`` tells machines of the instances, and no more: clients can read both."""
        reasons = self._reasons()
        page = _PAGE.format(
            title="not ready" if reasons else "ready",
            reasons=escape("; ".join(reasons)),
            rows=_row("th", ("stage", "instance", "health", "breaker", "requests", "tokens"))
            + "".join(_row("td", _cells(each)) for pool in self._pools.values() for each in pool.endpoints),
            version=escape(__version__),
        )
        return Response(
            200, page.encode(), [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")]
        )

    def _reasons(self) -> list[str]:
        """Return why requests cannot be served now, one sentence each."""
        found = ["the proxy is shutting down"] if self._draining() else []
        return found + [f"{stage}: {pool.reason()}" for stage, pool in self._pools.items() if not pool.ready]

    async def _show_metrics(self, _request: Request) -> Response:
        return Response(200, self._metrics.exposition(), [("Content-Type", metrics_module.CONTENT_TYPE)])


def _cells(endpoint: Endpoint) -> tuple[str, ...]:
    health = f"{endpoint.health.value}, drained" if endpoint.draining else endpoint.health.value
    breaker = endpoint.breaker.state.name.lower().replace("_", " ")
    return endpoint.stage, endpoint.url, health, breaker, str(endpoint.active_leases), str(endpoint.active_cost)


def _row(kind: str, cells: Iterable[str]) -> str:
    marks = {"down": " class=bad", "open": " class=bad"}
    shown = (f"<{kind}{marks.get(cell, '')}>{escape(cell)}</{kind}>" for cell in cells)
    return f"<tr>{''.join(shown)}</tr>\n"


def _json(status: int, document: Mapping[str, object]) -> Response:
    return Response(status, orjson.dumps(document), [("Content-Type", "application/json")])
