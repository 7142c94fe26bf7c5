"""The endpoints of one stage: their load, their health, and the leases on them. Synchronous, no I/O."""

from collections.abc import Collection, Iterable
from enum import Enum

from .breaker import Breaker
from .errors import UnavailableError
from .loads import Load, LoadRow
from .metrics import EndpointSample
from .policy import POLICIES
from .staging import Balance

# One broken connection may be bad luck; a refused one is not.
DISCONNECTS_UNTIL_DOWN = 3
# A busy instance may miss one probe.
PROBES_UNTIL_DOWN = 2


class Health(Enum):
    """What is known of an endpoint. UNKNOWN (never probed) takes requests but does not make a stage ready."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


class Endpoint:
    """One instance: its URL, what it is doing now, and whether it lives."""

    def __init__(self, stage: str, url: str, load: Load | None = None, breaker: Breaker | None = None) -> None:
        self.stage = stage
        self.url = url
        self.load = load or Load()
        self.breaker = breaker or Breaker(0, 0)
        self.granted_total = 0
        self.health = Health.UNKNOWN
        self.outages = 0  # how often it went down: what it held then is gone
        self.last_error = "not probed yet"
        self.refuses = False  # nothing listens there: it is gone, not slow
        self.draining = False  # gets no new requests; those it has go on
        self._disconnects = 0
        self._failed_probes = 0

    def __repr__(self) -> str:
        load = f"leases={self.active_leases} cost={self.active_cost}{' draining' if self.draining else ''}"
        return f"<Endpoint {self.stage} {self.url} {self.health.value} {load}>"

    @property
    def active_cost(self) -> int:
        """Estimated tokens of the requests that are now there, of all workers."""
        return self.load.tokens

    @property
    def active_leases(self) -> int:
        """Number of requests that are now there, of all workers."""
        return self.load.requests

    @property
    def usable(self) -> bool:
        """Whether it lives, as far as is known: what it has may go on here."""
        return self.health is not Health.DOWN

    @property
    def eligible(self) -> bool:
        """Whether new requests may be sent here."""
        return self.health is not Health.DOWN and not self.draining

    def mark_answered(self) -> None:
        """A request was answered: whatever its status, the instance talks."""
        self._disconnects = 0

    def mark_unreachable(self, error: str) -> None:
        """No connection could be made: take it out until a probe succeeds."""
        self.refuses = True
        self._go_down(error)

    def mark_disconnected(self, error: str) -> None:
        """A connection broke, or took too long to come about: take the endpoint out when that goes on."""
        self._disconnects += 1
        if self._disconnects >= DISCONNECTS_UNTIL_DOWN:
            self._go_down(error)

    def mark_probe(self, error: str | None, *, refused: bool = False) -> bool:
        """Take in a probe's outcome (None is success). Returns whether the health changed."""
        before = self.health
        if error is None:
            self.refuses = False
            self._failed_probes = 0
            self._disconnects = 0
            self.health = Health.UP
            self.last_error = ""
        elif refused:
            self.mark_unreachable(error)
        else:
            self._failed_probes += 1
            self.last_error = error
            if self.health is not Health.UP or self._failed_probes >= PROBES_UNTIL_DOWN:
                self._go_down(error)
        return self.health is not before

    def mark_restarted(self) -> None:
        """Another process is in its place, or will be: what it held is gone, although no probe has seen it down."""
        self.outages += 1

    def _go_down(self, error: str) -> None:
        self.outages += self.health is not Health.DOWN
        self.health = Health.DOWN
        self.last_error = error


class Lease:
    """A request's share of an endpoint, from choice to release. Releasing twice is harmless."""

    __slots__ = ("_held", "_is_trial", "cost", "endpoint")

    def __init__(self, endpoint: Endpoint, cost: int) -> None:
        self.endpoint = endpoint
        self.cost = cost
        self._held = True
        self._is_trial = endpoint.breaker.begin()
        endpoint.load.add(1, cost)
        endpoint.granted_total += 1

    def release(self) -> None:
        """Give the share back."""
        if self._held:
            self._held = False
            self.endpoint.load.add(-1, -self.cost)
            if self._is_trial:
                self.endpoint.breaker.end()


class Pool:
    """The endpoints of one stage."""

    def __init__(
        self, stage: str, urls: Iterable[str], loads: LoadRow | None = None, balance: Balance | None = None
    ) -> None:
        self.stage = stage
        self._loads = loads
        self._balance = balance or Balance()
        self._policy = POLICIES[self._balance.policy]()
        self.endpoints = [self._open(url) for url in urls]

    def __repr__(self) -> str:
        return f"<Pool {self.stage} {self.endpoints}>"

    def find(self, url: str) -> Endpoint | None:
        """Return the endpoint at ``url``."""
        return next((e for e in self.endpoints if e.url == url), None)

    def add(self, url: str) -> Endpoint:
        """Return the endpoint at ``url``, a new one or one that is there; it takes requests from here on."""
        endpoint = self.find(url)
        if endpoint is None:
            endpoint = self._open(url)
            self.endpoints = [*self.endpoints, endpoint]
        endpoint.draining = False
        return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """Forget ``endpoint``; leases on it stay good."""
        self.endpoints = [e for e in self.endpoints if e is not endpoint]

    def lease(self, cost: int, tried: Collection[Endpoint] = (), key: str = "") -> Lease:
        """Lease the endpoint that the policy chooses of those that were not tried yet.

        One whose breaker is open is taken where there is no other: it may be the requests that are at fault. Raises
        :class:`UnavailableError` when there is none at all.
        """
        candidates = [e for e in self.endpoints if e.eligible and e not in tried]
        candidates = [e for e in candidates if e.breaker.admits] or candidates
        if not candidates:
            raise self.unavailable()
        if len(candidates) == 1:
            return Lease(candidates[0], cost)
        return Lease(self._policy.choose(candidates, cost, key), cost)

    def unavailable(self) -> UnavailableError:
        """Return the error that says no endpoint of this stage can be asked."""
        return UnavailableError(f"no {self.stage} instance can take the request now: {self.reason()}")

    def has_untried(self, tried: Collection[Endpoint]) -> bool:
        """Whether a further attempt has somewhere to go."""
        return any(e.eligible and e not in tried for e in self.endpoints)

    @property
    def ready(self) -> bool:
        """Whether at least one endpoint that takes requests is known to be up, or none is needed."""
        return not self.endpoints or any(e.health is Health.UP and not e.draining for e in self.endpoints)

    def reason(self) -> str:
        """Say how many endpoints are not up. Names no address, since clients read it."""
        up = sum(e.health is Health.UP and not e.draining for e in self.endpoints)
        return f"{up} of {len(self.endpoints)} up"

    def samples(self) -> list[EndpointSample]:
        """Return the state of every endpoint for the metrics."""
        return [
            EndpointSample(self.stage, e.url, e.health is Health.UP, e.active_leases, e.active_cost,
                           e.breaker.state, e.breaker.opened_total)
            for e in self.endpoints
        ]  # fmt: skip

    def _open(self, url: str) -> Endpoint:
        load = self._loads.open(self.stage, url) if self._loads else None
        breaker = Breaker(self._balance.breaker_failures, self._balance.breaker_open_s)
        return Endpoint(self.stage, url, load, breaker)
