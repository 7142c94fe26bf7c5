"""What the flows share in which decode instances have the request while prefill instances work for it."""

from collections.abc import Awaitable, Callable

from ..errors import BackendTimeoutError, PrefillFailedError, ProxyError, RefusedByBackendError, UnavailableError
from ..pool import Endpoint
from ..relay import Answer
from .attempts import never_began, try_endpoints
from .interface import Job, Stages


async def open_on_decode(
    stages: Stages, job: Job, open_at: Callable[[Answer], Awaitable[None]], failed_prefill: list[Endpoint]
) -> Answer:
    """Try decode instances, and each again when prefill failed, which ``open_at`` notes in ``failed_prefill``.

    Raises :class:`ProxyError`; then nothing is left open.
    """
    prefill, tried = stages.pools["prefill"], list[Endpoint]()
    while True:
        if not prefill.has_untried(failed_prefill):
            raise prefill.unavailable()  # or decode would hold blocks for KV that cannot come
        try:
            return await try_endpoints(
                stages, stages.pools["decode"], job.plan.cost, job.record, open_at, key=job.affinity, tried=tried
            )
        except PrefillFailedError:
            tried.pop()  # not its fault
            left = stages.config.retry.max_attempts - len(failed_prefill)
            if left < 1 or not prefill.has_untried(failed_prefill):
                raise


def told_of_prefill(error: ProxyError) -> ProxyError:
    """Return what a failed prefill means for the request: its own fault, a time-out, or worth another attempt."""
    if isinstance(error, UnavailableError | BackendTimeoutError):
        return error
    told: UnavailableError
    if isinstance(error, RefusedByBackendError) and never_began(error):
        told = UnavailableError(f"no prefill instance took the request: {error}")
    elif error.status < 500:
        return error
    else:
        told = PrefillFailedError(f"prefill failed: {error}")
    told.retry_after = error.retry_after
    return told
