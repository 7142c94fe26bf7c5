"""One stage, tried on one instance after the other until the first byte is here."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

from ..access import AccessRecord
from ..errors import (
    BackendConnectError,
    BackendConnectTimeoutError,
    BackendDisconnectError,
    BackendError,
    BackendProtocolError,
    BackendTimeoutError,
    MediaFetchError,
    ProxyError,
    RefusedByBackendError,
    UnavailableError,
)
from ..pool import Endpoint, Pool
from ..protocol import find_fetch_failure, is_openai_error
from ..relay import Answer
from ..upstream import Call
from .interface import Stages

log = logging.getLogger(__name__)

_ANSWER_MAX_BYTES = 256 * 1024 * 1024
# The instance is at fault or overloaded, not the request: another one may do better.
_OVERLOADED = frozenset((408, 429, 503))
_FAULTS = frozenset((500, 502, 504))
_RETRIED_STATUSES = _OVERLOADED | _FAULTS


def open_answer(
    stages: Stages,
    pool: Pool,
    call: Call,
    cost: int,
    record: AccessRecord,
    *,
    key: str = "",
    remote_media: bool = False,
    elsewhere: bool = False,
) -> Coroutine[Any, Any, Answer]:
    """Send ``call`` to the endpoint of ``pool`` that is chosen for ``key``, and to others while that fails.

    ``elsewhere``: what is asked for is at one endpoint only, so that a 404 makes the next one be asked, up to the last.
    Raises :class:`ProxyError` for the last failure; then nothing is left open.
    """
    return try_endpoints(
        stages, pool, cost, record, lambda answer: send_call(stages, answer, call, remote_media=remote_media), key=key,
        retried=_is_elsewhere if elsewhere else is_worth_retrying,
        attempts_max=len(pool.endpoints) if elsewhere else None,
    )  # fmt: skip


def _is_elsewhere(error: ProxyError) -> bool:
    return is_worth_retrying(error) or (isinstance(error, RefusedByBackendError) and error.status == 404)


def is_worth_retrying(error: ProxyError) -> bool:
    """Whether another instance may do better. Not after a time-out: the client has waited long enough, and the
    instance may still be busy with it.
    """
    if isinstance(error, RefusedByBackendError):
        return error.status in _RETRIED_STATUSES
    return isinstance(error, BackendError) and not isinstance(error, BackendTimeoutError)


def never_began(error: ProxyError) -> bool:
    """Whether the instance's engine has not seen the request, so that its KV is where it was."""
    if isinstance(error, RefusedByBackendError):
        return error.status in _OVERLOADED
    return isinstance(error, BackendConnectError)


async def try_endpoints(
    stages: Stages,
    pool: Pool,
    cost: int,
    record: AccessRecord,
    open_at: Callable[[Answer], Awaitable[None]],
    *,
    key: str = "",
    tried: list[Endpoint] | None = None,
    retried: Callable[[ProxyError], bool] = is_worth_retrying,
    attempts_max: int | None = None,
) -> Answer:
    """Lease an endpoint of ``pool`` that is not in ``tried``, for ``key``, and have ``open_at`` open its answer.

    Goes on with the next one while what was raised is to be ``retried``; ``tried`` grows by each. Raises
    :class:`ProxyError` for the last failure; then no answer is left open.
    """
    tried = [] if tried is None else tried
    while True:
        answer = Answer(pool.lease(cost, tried, key))
        tried.append(answer.lease.endpoint)
        _note_attempt(record, tried[-1])
        started = time.monotonic()
        error = await _try(answer, open_at)
        if error is None:
            stages.metrics.stage_seconds[pool.stage,].observe(time.monotonic() - started)
            stages.metrics.attempts[pool.stage, "ok"].inc()
            return answer
        stages.metrics.attempts[pool.stage, type(error).__name__].inc()
        log.info("%s of request %s failed at %s: %s", pool.stage, record.request_id, tried[-1].url, error.detail)
        if retried(error) and len(tried) < (attempts_max or stages.config.retry.max_attempts):
            await asyncio.sleep(stages.config.retry.delay_s * 2 ** (len(tried) - 1))
            if pool.has_untried(tried):
                stages.metrics.retries[pool.stage,].inc()
                del error  # with the answer that it has, which may be large: the next attempt may take long
                continue
        try:
            raise_as(_final(error), error)
        finally:
            del error  # see raise_as


async def _try(answer: Answer, open_at: Callable[[Answer], Awaitable[None]]) -> ProxyError | None:
    """Return why the answer could not be opened. However it fails, it is closed."""
    try:
        await open_at(answer)
    except ProxyError as error:
        answer.close()
        return error
    except BaseException:
        answer.close()
        raise
    return None


def raise_as(told: ProxyError, error: ProxyError) -> NoReturn:
    """Raise what is ``told`` of ``error``, which may be itself.

    Neither must be kept by what it leaves behind, its own cause or a frame that it came through: the client's body
    would be kept with it until garbage is looked for.
    """
    try:
        if told is not error:
            told.__cause__ = error  # compiled code's `raise … from` sets none
        raise told
    finally:
        del told, error


def _note_attempt(record: AccessRecord, endpoint: Endpoint) -> None:
    if endpoint.stage == "encode":
        record.encode_endpoints += (endpoint.url,)
    elif endpoint.stage == "prefill" and record.handshake != "colocated":
        record.prefill_endpoints += (endpoint.url,)
    else:
        record.endpoint = endpoint.url
        record.attempts += 1


async def send_call(stages: Stages, answer: Answer, call: Call, *, remote_media: bool = False) -> None:
    """Send ``call`` to the endpoint that ``answer`` has leased and mark what comes of it.

    Raises :class:`ProxyError` unless the client can have the answer. A stream is left open after its first bytes.
    """
    endpoint = answer.lease.endpoint
    if stages.tracing:
        answer.span = stages.tracing.stage(endpoint.stage, endpoint.url, call)
        call = answer.span.call
    try:
        answer.response = await stages.upstream.send(endpoint.url, call)
        if not (answer.response.is_event_stream and answer.response.status < 300):
            answer.whole = await answer.response.read_all(_ANSWER_MAX_BYTES)
        _check_status(answer, remote_media=remote_media)
    except ProxyError as error:
        _mark(endpoint, error)
        raise
    endpoint.mark_answered()
    endpoint.breaker.note_success()


def _mark(endpoint: Endpoint, error: ProxyError) -> None:
    """Note what a failure tells about the instance: whether it is there, and whether it does its work."""
    if isinstance(error, BackendDisconnectError | BackendConnectTimeoutError):
        endpoint.mark_disconnected(str(error))
    elif isinstance(error, BackendConnectError):
        endpoint.mark_unreachable(str(error))
    elif not isinstance(error, BackendTimeoutError):
        endpoint.mark_answered()
    if isinstance(error, BackendError) or (isinstance(error, RefusedByBackendError) and error.status in _FAULTS):
        if endpoint.breaker.note_failure():
            why = str(error)  # a record of the error itself would keep the request
            log.warning("%s instance %s fails, and is spared for a while: %s", endpoint.stage, endpoint.url, why)
    elif error.status not in _OVERLOADED:
        endpoint.breaker.note_success()


def _check_status(answer: Answer, *, remote_media: bool) -> None:
    """Raise unless the answer is one that the client can have."""
    endpoint, response = answer.lease.endpoint, answer.response
    if response is None or response.status >= 400:
        _refuse(answer, remote_media=remote_media)
    elif response.status >= 300:
        raise BackendProtocolError(endpoint.url, f"the {endpoint.stage} instance answered with a redirect")
    elif not response.first and not answer.whole:
        raise BackendProtocolError(endpoint.url, f"the {endpoint.stage} instance sent an empty answer")


def _refuse(answer: Answer, *, remote_media: bool) -> None:
    response, body, stage = answer.response, answer.whole or b"", answer.lease.endpoint.stage
    if response is None:
        raise RuntimeError("the answer was not opened")
    if remote_media and (reason := find_fetch_failure(response.status, body)):
        raise MediaFetchError(reason)
    raise RefusedByBackendError(stage, response.status, body, response.content_type, response.header(b"retry-after"))


def _final(error: ProxyError) -> ProxyError:
    """Return what the client is told: a server error's body is passed on only when it is of OpenAI's form."""
    if isinstance(error, RefusedByBackendError) and error.status >= 500 and not is_openai_error(error.body()):
        return BackendError("", f"the instance failed with status {error.status}")
    if isinstance(error, BackendConnectError):
        return UnavailableError(str(error))
    return error
