"""Which endpoint takes the next request. Pure."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What a policy may look at."""

    @property
    def active_cost(self) -> int:
        """Estimated tokens of the requests now at the endpoint."""

    @property
    def active_leases(self) -> int:
        """Number of requests now at the endpoint."""

    @property
    def granted_total(self) -> int:
        """Number of requests ever sent there."""


C = TypeVar("C", bound=Candidate)


def choose(candidates: Iterable[C]) -> C | None:
    """Return the candidate with the least active cost, or None when there is none.

    Equal ones take turns: fewer requests in flight first, then fewer ever granted, so that requests which weigh
    nothing, or come one at a time, still spread.
    """
    return min(candidates, key=lambda c: (c.active_cost, c.active_leases, c.granted_total), default=None)
