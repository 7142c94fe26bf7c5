"""Decode first: it calls back for its KV, which a prefill instance pushes layer by layer."""

import asyncio
import time
import uuid

from ..aside import run_aside
from ..errors import BackendTimeoutError, PrefillFailedError, ProxyError
from ..metaserver import Metaserver
from ..plan import Handshake
from ..pool import Endpoint
from ..protocol import decode_body
from ..relay import Answer
from ..upstream import Call
from .attempts import send_call
from .background import Background
from .colocated import ColocatedFlow
from .fanout import EncodeFanout
from .handover import Handover
from .interface import Job, Stages
from .releases import Abandoned, release
from .split import open_on_decode

_BEAT_S = 1.0
# Prefill answers while the last layers are still queued. Seconds after its death is noticed until a decode instance
# that did not begin is taken to have been left waiting.
_SETTLE_S = 5.0


class LayerwiseFlow:
    """Encode and decode at once, prefill when decode called and the items are there.

    Requests that cannot be split run on a prefill instance alone.
    """

    def __init__(self, stages: Stages, metaserver: Metaserver) -> None:
        self._stages = stages
        self._metaserver = metaserver
        self._whole = ColocatedFlow(stages, stages.pools["prefill"])
        self._encode = EncodeFanout(stages)
        self._background = Background()
        stages.metrics.watch_handovers(lambda: metaserver.pending, lambda: len(self._background))

    def __repr__(self) -> str:
        return f"<LayerwiseFlow {self._background} {self._metaserver}>"

    async def answer(self, job: Job) -> Answer:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        if job.plan.handshake is Handshake.COLOCATED:
            return await self._whole.answer(job)
        encoding = asyncio.create_task(self._encode.run(job), name=f"encode {job.record.request_id}")
        try:
            return await self._decode(job, encoding)
        finally:
            if not encoding.done():
                encoding.cancel()
                await asyncio.wait((encoding,))
            elif not encoding.cancelled():
                encoding.exception()  # decode may have failed first, then nobody else asks

    async def close(self) -> None:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        await self._background.close()

    async def _decode(self, job: Job, encoding: asyncio.Task[bool]) -> Answer:
        failed_prefill: list[Endpoint] = []

        async def open_at(answer: Answer) -> None:
            await self._attempt(job, answer, encoding, failed_prefill)

        return await open_on_decode(self._stages, job, open_at, failed_prefill)

    async def _attempt(
        self, job: Job, answer: Answer, encoding: asyncio.Task[bool], failed_prefill: list[Endpoint]
    ) -> None:
        """Open decode's answer. Raises :class:`ProxyError`; what is left to do for decode then is done aside.

        Each attempt has a request id of its own: decode knows the blocks of a failed one by it.
        """
        request_id, ticket = f"{job.record.request_id}-{uuid.uuid4().hex}", self._metaserver.open()
        try:
            body = await run_aside(len(job.request.body), decode_body, job.request, ticket.url)
        except BaseException:
            ticket.close()
            raise
        handover = Handover(self._stages, job, request_id, ticket, answer.lease.endpoint, encoding, failed_prefill)
        call = Call(
            path=job.request.api.path,
            headers=job.headers_for(request_id),
            first_byte_s=self._stages.config.timeouts.first_byte_s,
            body=body,
            once=True,
        )
        deciding = send_call(self._stages, answer, call, remote_media=job.request.has_remote_media)
        decoding = asyncio.create_task(deciding, name=f"decode {request_id}")
        prefilling = self._background.spawn(f"prefill {request_id}", handover.run())
        try:
            await self._wait(job, handover, decoding, prefilling)
        except BaseException as error:
            self._give_up(handover, decoding, prefilling, lost=isinstance(error, ProxyError))
            await asyncio.wait((decoding,))
            _still_waits(decoding)  # an error that nobody asks for is logged as forgotten
            del decoding, prefilling  # of which one has failed with an error whose traceback holds this frame
            raise
        if handover.answered is None and handover.prefill is None:
            prefilling.cancel()  # decode had no need of it
        handover.ticket.close()

    async def _wait(
        self, job: Job, handover: Handover, decoding: asyncio.Task[None], prefilling: asyncio.Task[None]
    ) -> None:
        """Return when decode's answer has begun; raises what prefill or decode failed with."""
        try:
            await asyncio.wait((decoding, prefilling), return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                prefilling.result()
            down_since = None
            while not decoding.done():
                await asyncio.wait((decoding,), timeout=_BEAT_S)
                if not decoding.done():
                    down_since = down_since or self._died_after_answering(handover)
                    self._check_begun(job, handover, down_since)
            decoding.result()
        finally:
            del decoding, prefilling  # as above

    def _died_after_answering(self, handover: Handover) -> float | None:
        """Return the time when prefill is seen to be down so soon after its answer that it may have died with it."""
        health = self._stages.config.health
        notice_s = 2 * (health.interval_s + health.timeout_s)
        now = time.monotonic()
        down = handover.prefill is not None and handover.prefill.refuses
        return now if down and now - (handover.answered or 0) < notice_s else None

    def _check_begun(self, job: Job, handover: Handover, down_since: float | None) -> None:
        now = time.monotonic()
        if down_since and now - down_since > _SETTLE_S:
            handover.failed += [handover.prefill] if handover.prefill else []
            raise PrefillFailedError("the prefill instance went down, and decode did not begin")
        waited_s = now - (handover.answered or now)
        if job.request.stream and waited_s > self._stages.config.timeouts.handover_s:
            raise BackendTimeoutError(handover.decode.url, "the decode instance did not begin in time")

    def _give_up(
        self, handover: Handover, decoding: asyncio.Task[None], prefilling: asyncio.Task[None], *, lost: bool
    ) -> None:
        """Close every stage, and free decode's blocks where it holds them. ``lost``: its KV may never come."""
        prefilling.cancel()
        holds = _still_waits(decoding) and (lost or handover.answered is None)
        decoding.cancel()
        if not holds:
            handover.ticket.close()
            return
        job = handover.job
        abandoned = Abandoned(job.request.api, job.request.model, job.headers, handover.request_id, handover.ticket,
                              handover.decode, handover.prefill)  # fmt: skip
        self._background.spawn(f"release {handover.request_id}", release(self._stages, abandoned))


def _still_waits(decoding: asyncio.Task[None]) -> bool:
    """Whether decode may be waiting for KV: it has not answered or refused, nor is it gone."""
    return not decoding.done() or (not decoding.cancelled() and isinstance(decoding.exception(), BackendTimeoutError))
