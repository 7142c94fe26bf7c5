"""What every handshake gets and gives."""

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..access import AccessRecord
from ..config import ProxyConfig
from ..known import KnownItems
from ..metrics import Metrics
from ..plan import Plan
from ..pool import Pool
from ..protocol import Headers, InferenceRequest
from ..relay import Answer
from ..tracing import Tracing
from ..upstream import Upstream


@dataclass(frozen=True, slots=True)
class Stages:
    """What the flows share: the pools by stage name, the way to them, what was encoded, and where to count."""

    pools: Mapping[str, Pool]
    upstream: Upstream
    config: ProxyConfig
    metrics: Metrics
    known: KnownItems
    tracing: Tracing | None = None


class Job(NamedTuple):
    """One request on its way; ``headers`` are the client's that go to every stage, without a request id.

    ``affinity`` is what it has in common with those it does well to meet at an instance.
    """

    request: InferenceRequest
    plan: Plan
    headers: Headers
    record: AccessRecord
    affinity: str = ""

    def headers_for(self, request_id: str) -> Headers:
        """Return the headers of a stage's request."""
        return [*self.headers, ("X-Request-Id", request_id)]


class Flow(Protocol):
    """A handshake between the stages."""

    def answer(self, job: Job) -> Coroutine[Any, Any, Answer]:
        """Run the stages and return the open answer, its first bytes read; the caller closes it.

        Raises :class:`epd_proxy.errors.ProxyError`; then no lease, connection or task is left.
        """

    async def close(self) -> None:
        """End what the flow still does for requests whose handlers have ended."""
