"""What operators and orchestrators ask: is it alive, is it ready, what does it count."""

from collections.abc import Mapping

import orjson
from aiohttp import web

from . import metrics as metrics_module
from .metrics import Metrics
from .pool import Pool


class Status:
    """Serves ``/health``, ``/healthcheck``, ``/ready`` and ``/metrics``."""

    def __init__(self, pools: Mapping[str, Pool], metrics: Metrics) -> None:
        self._pools = pools
        self._metrics = metrics

    def add_routes(self, app: web.Application) -> None:
        """Add the four paths."""
        app.router.add_get("/health", self._health)
        app.router.add_get("/healthcheck", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._show_metrics)

    async def _health(self, _request: web.Request) -> web.Response:
        """Liveness: the process answers. The counts are those vllm-ascend's example gives at /healthcheck."""
        names = {"encode": "encode", "prefill": "prefill", "decode": "decode", "pd": "prefill_decode"}
        counts = {
            f"{name}_instances": len(pool.endpoints) if (pool := self._pools.get(stage)) else 0
            for name, stage in names.items()
        }
        return _json(200, {"status": "ok", **counts})

    async def _ready(self, _request: web.Request) -> web.Response:
        """Readiness: every stage has an endpoint that is up."""
        reasons = [f"{stage}: {pool.reason()}" for stage, pool in self._pools.items() if not pool.ready]
        stages = {stage: pool.reason() for stage, pool in self._pools.items() if pool.endpoints}
        if reasons:
            return _json(503, {"status": "not ready", "reasons": reasons, "stages": stages})
        return _json(200, {"status": "ready", "stages": stages})

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": metrics_module.CONTENT_TYPE})


def _json(status: int, document: Mapping[str, object]) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(document), content_type="application/json")
