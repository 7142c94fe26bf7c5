"""One instance prefills and decodes: it gets the client's body as it came."""

import asyncio
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
            return await self._answer_overlapped(job)
        await self._encode.run(job)
        return await self._open(job, job.request.body)

    async def _answer_overlapped(self, job: Job) -> Answer:
        encoding = asyncio.create_task(self._encode.run(job), name=f"encode {job.record.request_id}")
        opening = asyncio.create_task(self._open_pending(job), name=f"answer {job.record.request_id}")
        try:
            await asyncio.wait((encoding, opening), return_when=asyncio.FIRST_COMPLETED)
            if opening.done() or await encoding:
                return await opening
            # Some item will not come: rather than wait in vain, the instance is asked anew, and encodes it.
            await _cancel(opening)
            return await self._open(job, job.request.body)
        except BaseException:
            await _cancel(opening)
            raise
        finally:
            await _cancel(encoding)  # whoever has answered had no need of it

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


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End the task. An answer that it has opened meanwhile is closed; an error that nobody asks for is forgotten."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and task.exception() is None and isinstance(task.result(), Answer):
        task.result().close()
