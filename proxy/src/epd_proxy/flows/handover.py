"""The KV of one attempt on decode: called for by decode, made by a prefill instance, or released."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from ..aside import run_aside
from ..errors import (
    BackendDisconnectError,
    BackendTimeoutError,
    ProxyError,
)
from ..metaserver import Ticket
from ..pool import Endpoint
from ..protocol import prefill_body
from ..relay import Answer
from ..upstream import Call
from .attempts import never_began, raise_as, send_call, try_endpoints
from .interface import Job, Stages
from .split import told_of_prefill

log = logging.getLogger(__name__)

_BEAT_S = 0.25


@dataclass(slots=True)
class Handover:
    """One attempt: decode holds blocks for it from its call until a prefill under ``request_id`` says done.

    ``encoding`` is done when the items can be prefilled. ``failed`` lists the prefill instances that failed this
    client's request; it is shared by its attempts. ``prefill`` is the instance that the KV comes from, ``answered`` the
    monotonic time of its answer.
    """

    stages: Stages
    job: Job
    request_id: str
    ticket: Ticket
    decode: Endpoint
    encoding: asyncio.Task[bool]
    failed: list[Endpoint]
    prefill: Endpoint | None = None
    answered: float | None = None

    async def run(self) -> None:
        """Wait for decode's call and the items, then prefill. Raises :class:`ProxyError`."""
        parameters = await self._ready()
        # Without blocks decode waits for nothing, and prefill would look in vain for where to send.
        if parameters.get("remote_block_ids"):
            await self._prefill(parameters)
        self.answered = time.monotonic()

    async def _ready(self) -> dict[str, Any]:
        """Return what decode called with, once the items are there too."""
        started = time.monotonic()
        waiting: set[asyncio.Future[Any]] = {self.ticket.called, self.encoding}
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=_BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()  # raises what the encoder refused
            waited_s = time.monotonic() - started
            if self.ticket.called in done:
                self.job.record.callback_s = waited_s
                self.stages.metrics.callback_seconds.observe(waited_s)
            elif self.ticket.called in waiting:
                self._check_decode(waited_s)
        return self.ticket.called.result()

    def _check_decode(self, waited_s: float) -> None:
        if not self.decode.usable:
            raise BackendDisconnectError(self.decode.url, "the decode instance went down before it took the request")
        if waited_s > self.stages.config.timeouts.callback_s:
            raise BackendTimeoutError(self.decode.url, "the decode instance did not take the request in time")

    async def _prefill(self, parameters: dict[str, Any]) -> None:
        """Run the prefill on the first instance that takes it.

        It is sent again, as it is, only where the last one never began: prefill writes whole blocks, and when decode
        has begun a second one overwrites what it wrote there.
        """
        call = Call(
            path=self.job.request.api.path,
            headers=self.job.headers_for(self.request_id),
            first_byte_s=self.stages.config.timeouts.prefill_s,
            body=await run_aside(
                len(self.job.request.body), prefill_body, self.job.request.document, parameters, self.job.request.inline
            ),
            once=True,
        )
        pool, record = self.stages.pools["prefill"], self.job.record
        tried = list(self.failed)
        started = time.monotonic()

        async def open_at(answer: Answer) -> None:
            self.prefill = answer.lease.endpoint
            await send_call(self.stages, answer, call, remote_media=self.job.request.has_remote_media)

        try:
            answer = await try_endpoints(
                self.stages, pool, self.job.plan.prompt_cost, record, open_at, key=self.job.affinity, tried=tried,
                retried=never_began,
            )  # fmt: skip
        except ProxyError as error:
            self.failed[:] = tried
            raise_as(told_of_prefill(error), error)
        answer.close()
        record.prefill_s = time.monotonic() - started
        self.stages.metrics.prefill_seconds.observe(record.prefill_s)
