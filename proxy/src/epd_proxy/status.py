"""What operators and orchestrators ask: is it alive, is it ready, what does it count."""

from collections.abc import Mapping

import orjson

from . import metrics as metrics_module
from .metrics import Metrics
from .pool import Pool
from .server import Request, Response, Routes


class Status:
    """Serves ``/health``, ``/healthcheck``, ``/ready`` and ``/metrics``."""

    def __init__(self, pools: Mapping[str, Pool], metrics: Metrics) -> None:
        self._pools = pools
        self._metrics = metrics

    def add_routes(self, routes: Routes) -> None:
        """Add the four paths."""
        routes.add("GET", "/health", self._health)
        routes.add("GET", "/healthcheck", self._health)
        routes.add("GET", "/ready", self._ready)
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
        """Readiness: every stage has an endpoint that is up."""
        reasons = [f"{stage}: {pool.reason()}" for stage, pool in self._pools.items() if not pool.ready]
        stages = {stage: pool.reason() for stage, pool in self._pools.items() if pool.endpoints}
        if reasons:
            return _json(503, {"status": "not ready", "reasons": reasons, "stages": stages})
        return _json(200, {"status": "ready", "stages": stages})

    async def _show_metrics(self, _request: Request) -> Response:
        return Response(200, self._metrics.exposition(), [("Content-Type", metrics_module.CONTENT_TYPE)])


def _json(status: int, document: Mapping[str, object]) -> Response:
    return Response(status, orjson.dumps(document), [("Content-Type", "application/json")])
