"""One instance prefills and decodes: it gets the client's body as it came."""

from ..pool import Pool
from ..relay import Answer
from ..upstream import Call
from .attempts import open_answer
from .fanout import EncodeFanout
from .interface import Job, Stages


class ColocatedFlow:
    """Encode, then prefill and decode in one place, an instance of ``pool``."""

    def __init__(self, stages: Stages, pool: Pool) -> None:
        self._stages = stages
        self._pool = pool
        self._encode = EncodeFanout(stages)

    async def answer(self, job: Job) -> Answer:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        await self._encode.run(job)
        call = Call(
            path=job.request.api.path,
            headers=job.headers_for(job.record.request_id),
            first_byte_s=self._stages.config.timeouts.first_byte_s,
            body=job.request.body,
        )
        return await open_answer(
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
