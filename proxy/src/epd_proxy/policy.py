"""Which endpoint takes the next request. Pure, but for the dice of one policy."""

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

# An endpoint that has so many times the average load gets no more for the sake of affinity.
_BOUND = 1.25


class Candidate(Protocol):
    """What a policy may look at."""

    @property
    def url(self) -> str:
        """Its name: no two have the same one."""

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


class Policy(Protocol):
    """A way to choose."""

    def choose(self, candidates: Sequence[C], cost: int, key: str) -> C:
        """Return one of the ``candidates``, of which there is at least one, for a request that weighs ``cost`` tokens.

        Requests of one ``key`` do well to meet at one endpoint; an empty one tells nothing.
        """


class LeastLoaded:
    """The candidate with the least active cost.

    Looked for among all each time, so it is exact whatever happened to them. A heap has to be told of every change, and
    is faster from some twenty candidates on (docs/architecture.md).
    """

    def choose(self, candidates: Sequence[C], cost: int, key: str) -> C:  # noqa: ARG002
        """See :class:`Policy`. Equal ones take turns."""
        return min(candidates, key=_load)


class PowerOfTwo:
    """The less loaded of two candidates drawn by lot: several proxies that know nothing of each other do not herd."""

    def choose(self, candidates: Sequence[C], cost: int, key: str) -> C:  # noqa: ARG002
        """See :class:`Policy`."""
        return min(random.sample(candidates, min(2, len(candidates))), key=_load)


class ConsistentHash:
    """The candidate that the key leads to, as long as that one has no more than 1.25 times the average load.

    Rendezvous hashing: when a candidate comes or goes, only its own keys move, and every proxy chooses the same.
    """

    def choose(self, candidates: Sequence[C], cost: int, key: str) -> C:
        """See :class:`Policy`; without a key it is the least loaded one."""
        if not key:
            return min(candidates, key=_load)
        limit = _BOUND * (sum(c.active_cost for c in candidates) + cost) / len(candidates)
        room = [c for c in candidates if c.active_cost <= limit]  # the least loaded one has
        return max(
            room, key=lambda c: blake2b(f"{key}\0{c.url}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
        )


POLICIES: dict[str, type[Policy]] = {
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "prefix": ConsistentHash,
    "session": ConsistentHash,
}


def _load(candidate: Candidate) -> tuple[int, int, int]:
    """Order by cost, then by requests in flight, then by those ever granted: what weighs nothing still spreads."""
    return candidate.active_cost, candidate.active_leases, candidate.granted_total
