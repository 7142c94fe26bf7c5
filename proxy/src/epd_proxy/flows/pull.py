"""Prefill first: its answer says where its KV lies, and decode pulls it from there."""

import logging
import time
import uuid
from typing import Any

from ..aside import run_aside
from ..errors import ProxyError
from ..plan import Handshake
from ..pool import Endpoint
from ..protocol import PULL_PREFILL, find_parameters, prefill_body, with_parameters
from ..relay import Answer
from ..upstream import Call
from .attempts import is_worth_retrying, never_began, open_answer, send_call, try_endpoints
from .colocated import ColocatedFlow
from .fanout import EncodeFanout
from .interface import Job, Stages

log = logging.getLogger(__name__)


class PullFlow:
    """Encode, prefill, decode, one after the other. Requests that cannot be split run on a prefill instance alone.

    Prefill keeps the blocks until decode has them, or until the connector's own time is up: so nothing has to be
    released here when a client leaves in between.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._whole = ColocatedFlow(stages, stages.pools["prefill"])
        self._encode = EncodeFanout(stages)

    async def answer(self, job: Job) -> Answer:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        if job.plan.handshake is Handshake.COLOCATED:
            return await self._whole.answer(job)
        await self._encode.run(job)
        tried: list[Endpoint] = []
        while True:
            # An id of its own for each attempt: an instance may still hold blocks of the last one.
            request_id = f"{job.record.request_id}-{uuid.uuid4().hex}"
            parameters = await self._prefill(job, request_id)
            try:
                return await self._decode(job, request_id, parameters, tried)
            except ProxyError as error:
                # It may have pulled some of the KV, after which prefill lets go of it: prefill anew.
                failure = error.__cause__ if isinstance(error.__cause__, ProxyError) else error
                left = self._stages.config.retry.max_attempts - len(tried)
                if not is_worth_retrying(failure) or left < 1 or not self._stages.pools["decode"].has_untried(tried):
                    raise

    async def close(self) -> None:
        """See :class:`epd_proxy.flows.interface.Flow`."""

    async def _prefill(self, job: Job, request_id: str) -> dict[str, Any] | None:
        """Return where the KV lies. None: nowhere, so decode has to compute it itself."""
        started = time.monotonic()
        call = Call(
            path=job.request.api.path,
            headers=job.headers_for(request_id),
            first_byte_s=self._stages.config.timeouts.prefill_s,
            body=await run_aside(
                len(job.request.body), prefill_body, job.request.document, PULL_PREFILL, job.request.inline
            ),
            once=True,  # a second one would hold blocks that nobody pulls
        )
        answer = await open_answer(
            self._stages, self._stages.pools["prefill"], call, job.plan.prompt_cost, job.record, key=job.affinity,
            remote_media=job.request.has_remote_media,
        )  # fmt: skip
        answer.close()
        job.record.prefill_s = time.monotonic() - started
        self._stages.metrics.prefill_seconds.observe(job.record.prefill_s)
        parameters = find_parameters(answer.whole or b"")
        if parameters is None:
            log.warning("prefill of request %s says nothing of its KV: decode computes it itself. Is it started with "
                        "the connector that --handshake pull is for?", request_id)  # fmt: skip
        return parameters

    async def _decode(
        self, job: Job, request_id: str, parameters: dict[str, Any] | None, tried: list[Endpoint]
    ) -> Answer:
        """Open the answer of the first decode instance that takes the request."""
        body = job.request.body
        call = Call(
            path=job.request.api.path,
            headers=job.headers_for(request_id),
            first_byte_s=self._stages.config.timeouts.first_byte_s,
            body=await run_aside(len(body), with_parameters, job.request, parameters) if parameters else body,
            once=True,
        )

        async def open_at(answer: Answer) -> None:
            await send_call(self._stages, answer, call, remote_media=job.request.has_remote_media)

        return await try_endpoints(
            self._stages, self._stages.pools["decode"], job.plan.cost, job.record, open_at, key=job.affinity,
            tried=tried, retried=never_began,
        )  # fmt: skip
