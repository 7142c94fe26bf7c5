"""The encode stage: each item to an encoder, one item a request, all at once, and the same item never twice at a time.

One item a request because an encode-only instance stops after one step: of several items that do not fit it, the rest
would stay un-encoded (docs of the EC connector).
"""

import asyncio
import logging
import time

from ..aside import run_aside
from ..errors import BackendError, ProxyError, RefusedByBackendError, UnavailableError
from ..protocol import CHAT, MediaItem, encode_body, is_openai_error
from ..upstream import Call
from .attempts import open_answer, raise_as
from .flights import Flights
from .interface import Job, Stages

log = logging.getLogger(__name__)


class EncodeFanout:
    """Has the items of a request encoded before the next stage needs them."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._pool = stages.pools.get("encode")
        self._flights = Flights()

    def has_work(self, job: Job) -> bool:
        """Whether an item of the plan has to be encoded, and an encode instance may do it."""
        known = self._stages.known
        return bool(self._pool and self._pool.has_untried(()) and any(i.name not in known for i in job.plan.encode))

    async def run(self, job: Job) -> bool:
        """Return when every item of the plan was encoded, or is left to the next stage: then False.

        Raises :class:`ProxyError` when an item is refused, or an encoder fails and the fallback is off; the other
        items' requests are closed then.
        """
        items = job.plan.encode
        if not items:
            return True
        started = time.monotonic()
        try:
            if len(items) == 1:
                return await self._encode(job, items[0], 0)
            return await self._encode_all(job, items)
        finally:
            job.record.encode_s = time.monotonic() - started
            self._stages.metrics.encode_seconds.observe(job.record.encode_s)

    async def _encode_all(self, job: Job, items: tuple[MediaItem, ...]) -> bool:
        try:
            async with asyncio.TaskGroup() as tasks:
                encoding = [
                    tasks.create_task(self._encode(job, item, index), name=f"encode {job.record.request_id} {index}")
                    for index, item in enumerate(items)
                ]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return all(task.result() for task in encoding)

    async def _encode(self, job: Job, item: MediaItem, index: int) -> bool:
        """Return whether the item is in the store now, as far as is known."""
        if item.name in self._stages.known:
            self._count(item, "known")
            return True
        try:
            encoded = await self._once(job, item, index)
        except (BackendError, UnavailableError, RefusedByBackendError) as error:
            if _is_refusal(error):
                self._count(item, "refused")
                raise_as(_in_openai_form(error), error)
            if self._stages.config.encode_fallback == "off":
                raise UnavailableError(f"the item could not be encoded: {error}") from error
            self._count(item, "local")
            # Its text: a record that is kept would keep the error, and with that the request.
            log.warning("item %d of request %s is left to the next stage: %s", index, job.record.request_id, str(error))
            return False
        self._count(item, "encoded" if encoded else "joined")
        if encoded:
            job.record.encoded += 1
        return True

    async def _once(self, job: Job, item: MediaItem, index: int) -> bool:
        """Have the item encoded, unless another request does so now. Returns whether it was done for this one."""
        if item.name:
            return await self._flights.run(item.name, lambda: self._send(job, item, index))
        await self._send(job, item, index)
        return True

    def _count(self, item: MediaItem, outcome: str) -> None:
        self._stages.metrics.items[item.modality, outcome].inc()

    async def _send(self, job: Job, item: MediaItem, index: int) -> None:
        if self._pool is None:
            raise UnavailableError("there is no encode stage")
        call = Call(
            path=CHAT.path,
            headers=job.headers_for(f"{job.record.request_id}-encode-{index}"),
            first_byte_s=self._stages.config.timeouts.encode_s,
            body=await run_aside(len(job.request.body), encode_body, job.request, item),
        )
        answer = await open_answer(self._stages, self._pool, call, item.cost, job.record, key=item.name,
                                   remote_media=item.remote)  # fmt: skip
        self._stages.known.note(item.name, answer.lease.endpoint)
        answer.close()


def _is_refusal(error: ProxyError) -> bool:
    """Whether the item itself is at fault; 408 and 429 are about the encoder's load."""
    return isinstance(error, RefusedByBackendError) and 400 <= error.status < 500 and error.status not in (408, 429)


def _in_openai_form(error: ProxyError) -> ProxyError:
    if isinstance(error, RefusedByBackendError) and not is_openai_error(error.body()):
        return RefusedByBackendError("encode", error.status, b"", "")
    return error
