"""Prefill and decode at the same time: decode knows which engine to pull from, and under which transfer id."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import urlsplit

from ..aside import run_aside
from ..errors import BackendProtocolError, PrefillFailedError, ProxyError
from ..plan import Handshake
from ..pool import Endpoint
from ..protocol import (
    BOOTSTRAP_PATH,
    RANK_HEADER,
    bootstrap_decode,
    bootstrap_prefill,
    find_engines,
    prefill_body,
    with_parameters,
)
from ..relay import Answer
from ..upstream import Call
from .attempts import never_began, send_call
from .background import Background
from .colocated import ColocatedFlow
from .fanout import EncodeFanout
from .interface import Job, Stages
from .split import open_on_decode, told_of_prefill

_QUERY_MAX_BYTES = 1024 * 1024


@dataclass(slots=True)
class _Engines:
    """The engines of one prefill instance, by data-parallel rank, as its bootstrap server names them."""

    bootstrap_url: str
    by_rank: dict[str, str]
    outages: int
    turns: Iterator[int] = field(default_factory=count)

    def next(self) -> tuple[str, str]:
        """Return rank and engine id; the ranks take turns."""
        ranks = sorted(self.by_rank)
        rank = ranks[next(self.turns) % len(ranks)]
        return rank, self.by_rank[rank]


class BootstrapFlow:
    """Encode, then prefill and decode side by side. Requests that cannot be split run on a prefill instance alone."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._whole = ColocatedFlow(stages, stages.pools["prefill"])
        self._encode = EncodeFanout(stages)
        self._background = Background()
        self._engines: dict[Endpoint, _Engines] = {}
        stages.metrics.watch_handovers(lambda: 0, lambda: len(self._background))

    def __repr__(self) -> str:
        return f"<BootstrapFlow {self._background} pending=0>"

    async def answer(self, job: Job) -> Answer:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        if job.plan.handshake is Handshake.COLOCATED:
            return await self._whole.answer(job)
        await self._encode.run(job)
        failed: list[Endpoint] = []

        async def open_at(answer: Answer) -> None:
            await self._attempt(job, answer, failed)

        return await open_on_decode(self._stages, job, open_at, failed)

    async def close(self) -> None:
        """See :class:`epd_proxy.flows.interface.Flow`."""
        await self._background.close()

    async def _attempt(self, job: Job, answer: Answer, failed: list[Endpoint]) -> None:
        """Open decode's answer, with a prefill beside it: if one fails, both end. Raises :class:`ProxyError`."""
        prefill = Answer(self._stages.pools["prefill"].lease(job.plan.prompt_cost, failed, job.affinity))
        endpoint = prefill.lease.endpoint
        job.record.prefill_endpoints += (endpoint.url,)
        try:
            engines = await self._find_engines(endpoint)
        except BaseException as error:
            prefill.close()
            raise self._failed(endpoint, failed, error) from error
        request_id, (rank, engine_id) = f"{job.record.request_id}-{uuid.uuid4().hex}", engines.next()
        transfer_id = uuid.uuid4().hex
        decode_with = bootstrap_decode(transfer_id, engines.bootstrap_url, engine_id)
        prefilling = self._background.spawn(
            f"prefill {request_id}", self._prefill(job, prefill, request_id, rank, transfer_id)
        )
        decoding = asyncio.create_task(self._decode(job, answer, request_id, decode_with), name=f"decode {request_id}")
        try:
            await asyncio.wait((prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done() and (failure := prefilling.exception()):
                raise self._failed(endpoint, failed, failure) from failure
            await decoding
        except BaseException:
            for task in (prefilling, decoding):
                task.cancel()
            await asyncio.wait((prefilling, decoding))
            _ = decoding.cancelled() or decoding.exception()  # one that nobody asks for is logged as forgotten
            raise

    def _failed(self, endpoint: Endpoint, failed: list[Endpoint], error: BaseException) -> BaseException:
        """Note that prefill failed; return what that means for the request."""
        self._engines.pop(endpoint, None)  # it may be another process by now
        if not isinstance(error, ProxyError):
            return error
        failed.append(endpoint)
        told = told_of_prefill(error)
        # Decode waits for this very engine, so the next one needs a new attempt.
        return PrefillFailedError(str(told)) if never_began(error) else told

    async def _prefill(self, job: Job, answer: Answer, request_id: str, rank: str, transfer_id: str) -> None:
        started = time.monotonic()
        try:
            parameters = bootstrap_prefill(transfer_id)
            call = Call(
                path=job.request.api.path,
                headers=[*job.headers_for(request_id), (RANK_HEADER, rank)],
                first_byte_s=self._stages.config.timeouts.prefill_s,
                body=await run_aside(
                    len(job.request.body), prefill_body, job.request.document, parameters, job.request.inline
                ),
                once=True,
            )
            await send_call(self._stages, answer, call, remote_media=job.request.has_remote_media)
        finally:
            answer.close()
        job.record.prefill_s = time.monotonic() - started
        self._stages.metrics.prefill_seconds.observe(job.record.prefill_s)

    async def _decode(self, job: Job, answer: Answer, request_id: str, parameters: dict[str, object]) -> None:
        call = Call(
            path=job.request.api.path,
            headers=job.headers_for(request_id),
            first_byte_s=self._stages.config.timeouts.first_byte_s,
            body=await run_aside(len(job.request.body), with_parameters, job.request, parameters),
            once=True,
        )
        await send_call(self._stages, answer, call, remote_media=job.request.has_remote_media)

    async def _find_engines(self, endpoint: Endpoint) -> _Engines:
        """Return the engines of a prefill instance, asked for once a life. Raises :class:`BackendError`."""
        engines = self._engines.get(endpoint)
        if engines is None or engines.outages != endpoint.outages:
            for gone in [each for each in self._engines if each not in self._stages.pools["prefill"].endpoints]:
                del self._engines[gone]
            engines = self._engines[endpoint] = await self._query(endpoint)
        return engines

    async def _query(self, endpoint: Endpoint) -> _Engines:
        host = urlsplit(endpoint.url).hostname or ""
        url = f"http://{f'[{host}]' if ':' in host else host}:{self._stages.config.handshake.bootstrap_port}"
        call = Call(BOOTSTRAP_PATH, [], self._stages.config.timeouts.connect_s, method="GET")
        response = await self._stages.upstream.send(url, call)
        try:
            found = find_engines(await response.read_all(_QUERY_MAX_BYTES)) if response.status == 200 else {}
        finally:
            response.close()
        if not found:
            raise BackendProtocolError(url, f"a bootstrap server named no engine (status {response.status})")
        return _Engines(url, found, endpoint.outages)
