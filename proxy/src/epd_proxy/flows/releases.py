"""Frees the blocks that decode holds for requests which nobody waits for any more.

Closing decode's connection does not: it keeps them, and a core busy, until a prefill of that request says done (seen
with vLLM 0.23.0 and vllm-ascend 0.23.0, docs/layerwise-on-cpu.md).
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from ..errors import ProxyError, RefusedByBackendError
from ..metaserver import Ticket
from ..pool import Endpoint, Lease, Pool
from ..protocol import Api, Headers, release_api, release_body
from ..relay import Answer
from ..upstream import Call
from .attempts import send_call
from .interface import Stages

log = logging.getLogger(__name__)

# For decode to notice that the connection is closed; a call that is under way then still comes.
_LATE_CALL_S = 10.0
# For both to notice the same: decode must not take the release for its KV, and prefill is to queue it behind what it
# still sends.
_AFTER_CLOSING_S = 0.5
_BETWEEN_TRIES_S = 1.0
# An instance that does not answer one token by then may be stuck: ask another one.
_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Abandoned:
    """What is needed of a request to free its blocks; ``prefill`` is the instance that may still be sending KV."""

    api: Api
    model: str
    headers: Headers
    request_id: str
    ticket: Ticket
    decode: Endpoint
    prefill: Endpoint | None


async def release(stages: Stages, abandoned: Abandoned) -> None:
    """Have the blocks of ``abandoned`` freed, within ``release_s``, and close its ticket.

    To a decode instance that is down nothing is sent: prefill's whole engine would stand still over it.
    """
    outcome = "expired"
    try:
        async with asyncio.timeout(stages.config.timeouts.release_s):
            outcome = await _release(stages, abandoned)
    except TimeoutError:
        log.warning("the blocks of request %s at %s could not be freed in time", abandoned.request_id,
                    abandoned.decode.url)  # fmt: skip
    finally:
        abandoned.ticket.close()
        stages.metrics.releases[outcome,].inc()


async def _release(stages: Stages, abandoned: Abandoned) -> str:
    late_s = min(_LATE_CALL_S, stages.config.timeouts.release_s / 2)
    await asyncio.wait((abandoned.ticket.called,), timeout=late_s)
    if not abandoned.ticket.called.done():
        return "not_needed"
    parameters = abandoned.ticket.called.result()
    await asyncio.sleep(_AFTER_CLOSING_S)
    # That one sends in order, so there the release comes after all that went before.
    first = abandoned.prefill
    while True:
        lease = _lease(stages.pools["prefill"], first) if abandoned.decode.usable else None
        try:
            if lease:
                await _send(stages, abandoned, parameters, lease)
                return "released"
        except RefusedByBackendError as error:
            log.warning("request %s: %s to a release: %s", abandoned.request_id, error, error.body()[:500])
            if error.status < 500 and error.status not in (408, 429):
                return "refused"
            first = None
        except ProxyError as error:
            log.info("request %s: a release failed: %s", abandoned.request_id, error)
            first = None
        await asyncio.sleep(_BETWEEN_TRIES_S)


async def _send(stages: Stages, abandoned: Abandoned, parameters: dict[str, Any], lease: Lease) -> None:
    answer = Answer(lease)
    api = release_api(abandoned.api)
    call = Call(
        path=api.path,
        headers=[*abandoned.headers, ("X-Request-Id", abandoned.request_id)],
        first_byte_s=_ANSWER_S,
        body=release_body(api, abandoned.model, parameters),
    )
    try:
        await send_call(stages, answer, call)
    finally:
        answer.close()


def _lease(pool: Pool, first: Endpoint | None) -> Lease | None:
    if first is not None and first.usable:
        return Lease(first, 1)
    return pool.lease(1) if pool.has_untried(()) else None
