"""One instance prefills and decodes: it gets the client's body as it came."""

from collections.abc import Coroutine
from typing import Any

from ..aside import run_aside
from ..pool import Pool
from ..protocol import can_wait, pending_body
from ..relay import Answer
from ..upstream import Call
from .attempts import open_answer
from .fanout import EncodeFanout
from .interface import Job, Stages
from .overlapping import open_overlapped


class ColocatedFlow:
    """Encode, then prefill and decode in one place, an instance of ``pool``; with ``overlap`` all at once.

    Overlapped, the instance tokenizes and queues the request while its items are encoded, and waits for them to come.
    """

    def __init__(self, stages: Stages, pool: Pool, *, overlap: bool = False) -> None:
        self._stages = stages
        self._pool = pool
        self._encode = EncodeFanout(stages)
        self._overlap = overlap

    def answer(self, job: Job) -> Coroutine[Any, Any, Answer]:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        return self._answer_with_items(job) if job.plan.encode else self._open(job, job.request.body)

    async def _answer_with_items(self, job: Job) -> Answer:
        if self._overlap and can_wait(job.request) and self._encode.has_work(job):
            return await open_overlapped(
                self._encode.run(job),
                self._open_pending(job),
                lambda: self._open(job, job.request.body),
                job.record.request_id,
            )
        await self._encode.run(job)
        return await self._open(job, job.request.body)

    async def _open_pending(self, job: Job) -> Answer:
        return await self._open(job, await run_aside(len(job.request.body), pending_body, job.request))

    def _open(self, job: Job, body: bytes) -> Coroutine[Any, Any, Answer]:
        call = Call(
            path=job.request.api.path,
            headers=job.headers_for(job.record.request_id),
            first_byte_s=self._stages.config.timeouts.first_byte_s,
            body=body,
        )
        return open_answer(
            self._stages,
            self._pool,
            call,
            job.plan.cost,
            job.record,
            key=job.affinity,
            remote_media=job.request.has_remote_media,
            elsewhere=job.request.names_stored,
        )

    async def close(self) -> None:
        """See :class:`epd_proxy.flows.interface.Flow`."""
