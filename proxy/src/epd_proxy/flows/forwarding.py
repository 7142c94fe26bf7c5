"""Requests that need no stage, each passed on to one instance as it came; and what all instances say together."""

import asyncio
from typing import Any

import orjson

from ..access import AccessRecord
from ..errors import ProxyError, RefusedByBackendError
from ..pool import Endpoint, Lease, Pool
from ..protocol import Headers
from ..relay import Answer
from ..upstream import Call
from .attempts import open_answer, send_call
from .interface import Stages


class Forwarding:
    """Knows which instances serve what needs no stage.

    Where prefill and decode are apart, prefill instances run models: each is a complete engine, and decode's batches
    are left alone. Decode instances tell about models and tokens.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        both = stages.pools.get("prefill_decode")
        self._running = both or stages.pools["prefill"]
        self._telling = both or stages.pools["decode"]

    async def answer(
        self, call: Call, cost: int, record: AccessRecord, *, runs_model: bool = True, elsewhere: bool = False
    ) -> Answer:
        """Return the open answer of one instance; raises as :func:`epd_proxy.flows.attempts.open_answer` does.

        ``elsewhere``: what is asked for is at one instance only, so that a 404 makes the next one be asked.
        """
        pool = self._running if runs_model else self._telling

        return await open_answer(self._stages, pool, call, cost, record, elsewhere=elsewhere)

    async def models(self, headers: Headers, record: AccessRecord) -> bytes:
        """Return the models that the instances serve, each once. Raises :class:`ProxyError` when none answers."""
        pool = self._telling
        call = Call(
            "/v1/models",
            [*headers, ("X-Request-Id", record.request_id)],
            self._stages.config.health.timeout_s,
            method="GET",
        )
        endpoints = [endpoint for endpoint in pool.endpoints if endpoint.eligible]
        if not endpoints:
            raise pool.unavailable()
        answers = await asyncio.gather(*(self._ask(e, call) for e in endpoints), return_exceptions=True)
        record.attempts = len(answers)
        documents = [answer for answer in answers if isinstance(answer, dict)]
        if not documents:
            _raise_worst(answers, pool)
        models = {model.get("id"): model for document in reversed(documents) for model in _models_of(document)}
        return orjson.dumps({"object": "list", "data": list(models.values())})

    async def _ask(self, endpoint: Endpoint, call: Call) -> dict[str, Any]:
        answer = Answer(Lease(endpoint, 0))
        try:
            await send_call(self._stages, answer, call)
            document = orjson.loads(answer.whole or b"")
        finally:
            answer.close()
        return document if isinstance(document, dict) else {}


def _models_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    models = document.get("data")
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []


def _raise_worst(answers: list[dict[str, Any] | BaseException], pool: Pool) -> None:
    """Raise a refusal of the client (its key, say) rather than what is the instances' trouble."""
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    for error in errors:
        if not isinstance(error, ProxyError | orjson.JSONDecodeError):
            raise error
    refusals = [error for error in errors if isinstance(error, RefusedByBackendError) and error.status < 500]
    raise refusals[0] if refusals else pool.unavailable()
