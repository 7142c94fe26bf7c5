"""The plan: which instance runs on which host, on which cards, behind which ports. A pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from epd.errors import StepError
from epd.plan import cards as choosing
from epd.plan import fitting
from epd.plan.hosts import Card, Host
from epd.plan.model import ACTIVATIONS_MIB, MIB, ModelSize
from epd.plan.ports import InstancePorts, PortBook
from epd.plan.topology import ROLES, Parallel, Topology, variable

CPU_INSTANCE_MIB = 2800
"""Memory of one vLLM container with the tiny model on the CPU profile (2.0-2.8 GiB were measured)."""
UTILIZATION = 0.9
"""Share of a card that vLLM takes in every role but encode."""


_Place = tuple[Host, tuple[Card, ...]]
"""Where an instance runs."""


@dataclass(frozen=True)
class Limits:
    """What the instances are told of requests."""

    max_model_len: int
    """Tokens of prompt and answer."""
    max_num_seqs: int
    store_size_mb: int
    """Size of the embeddings' pool, MiB."""


@dataclass(frozen=True)
class Instance:
    """One vLLM instance and its place."""

    name: str
    """Name of its service: `encode-0`."""
    role: str
    host: Host
    parallel: Parallel
    cards: tuple[Card, ...]
    ports: InstancePorts


@dataclass(frozen=True)
class Plan:
    """What runs where."""

    topology: Topology
    hosts: tuple[Host, ...]
    instances: tuple[Instance, ...]
    limits: Limits
    notes: tuple[str, ...] = field(default=())
    """What a person should know of it."""

    @property
    def head(self) -> Host:
        """The host that has the proxy and the embeddings' pool."""
        return self.hosts[0]

    def on(self, host: Host) -> tuple[Instance, ...]:
        """Return the instances of one host."""
        return tuple(instance for instance in self.instances if instance.host.name == host.name)

    def of(self, role: str) -> tuple[Instance, ...]:
        """Return the instances of one role, on all hosts."""
        return tuple(instance for instance in self.instances if instance.role == role)


def make(topology: Topology, hosts: Sequence[Host], model: ModelSize | None, limits: Limits) -> Plan:
    """Return the plan.

    Raises:
        StepError: the hosts cannot carry the topology; the message has the arithmetic.
    """
    kinds = sorted({host.hardware for host in hosts})
    if len(kinds) != 1:
        raise StepError(
            "hosts of different hardware in one stack",
            expected="one hardware profile for all hosts: they share one image",
            found=", ".join(f"{host.name}: {host.hardware}" for host in hosts),
            fix="plan a stack for each kind of hardware",
        )
    notes = []
    if kinds == ["cpu"]:
        _check_cpu(topology, hosts)
    else:
        _check_cards(topology, hosts)
        fitting.check(topology, hosts, model, max_model_len=limits.max_model_len, pool_mib=limits.store_size_mb)
        if model is not None:
            notes = _check_memory(topology, hosts, model, limits)
    return Plan(topology, tuple(hosts), _place(topology, hosts), limits, tuple(notes))


def _check_cpu(topology: Topology, hosts: Sequence[Host]) -> None:
    count = sum(topology.counts.values())
    if len(hosts) > 1 or topology.cards != count:
        raise StepError(
            "no such stack on the CPU profile",
            expected="one host, and instances of one card",
            found=f"{len(hosts)} host(s), {topology.arithmetic()} cards",
            fix="leave out EPD_HOSTS, EPD_<ROLE>_TP and EPD_<ROLE>_DP",
        )
    have, need = hosts[0].memory_mib, count * CPU_INSTANCE_MIB
    if 0 < have < need:
        raise StepError(
            f"not enough memory for {topology.name}",
            expected=f"{count} instances x {CPU_INSTANCE_MIB} MiB = {need} MiB",
            found=f"{have} MiB on this host",
            fix="choose fewer instances, e.g. make deploy-1e1pd",
        )


def _check_cards(topology: Topology, hosts: Sequence[Host]) -> None:
    free = sum(len(host.free_cards) for host in hosts)
    if free >= topology.cards:
        return
    raise StepError(
        f"not enough cards for {topology.name}",
        expected=f"{topology.arithmetic()} cards",
        found=" + ".join(_cards_of(host) for host in hosts) + f" = {free} free",
        fix="stop what uses them (`make doctor` names it), choose fewer instances or a smaller TP/DP, or add a host",
    )


def _cards_of(host: Host) -> str:
    taken = [f"{card.id} by {card.taken_by}" for card in host.cards if card.taken_by]
    busy = f" (taken: {', '.join(taken)})" if taken else ""
    return f"{host.name} {len(host.free_cards)} of {len(host.cards)}{busy}"


def _check_memory(topology: Topology, hosts: Sequence[Host], model: ModelSize, limits: Limits) -> list[str]:
    """Check the cards' memory role by role; return what is worth knowing."""
    cards = [card for host in hosts for card in host.free_cards]
    hbm, used = min(card.hbm_mib for card in cards), max(card.hbm_used_mib for card in cards)
    origin = "files" if model.exact else "estimated from config.json"
    notes = []
    for role in topology.counts:
        span = topology.of(role)
        weights = model.weights_mib(span.tensor)
        have = hbm - used if role == "encode" else min(int(hbm * UTILIZATION), hbm - used)
        room = have - weights - ACTIVATIONS_MIB
        kv_bytes = 0 if role == "encode" else model.kv_bytes_per_card(span.tensor)
        need = limits.max_model_len * kv_bytes // MIB
        parts = f"weights {weights} ({origin}, TP {span.tensor}) + runtime and activations {ACTIVATIONS_MIB}"
        if kv_bytes:
            parts += f" + KV of one request of {limits.max_model_len} tokens {need}"
        if room < need:
            share = "" if role == "encode" else f", share {UTILIZATION}"
            raise StepError(
                f"{role}: {model.name} does not fit on a card",
                expected=f"{parts} = {weights + ACTIVATIONS_MIB + need} MiB",
                found=f"{have} MiB (HBM {hbm}, idle use {used}{share})",
                fix=f"{variable(role, 'TP')}={span.tensor * 2}" + ", or a smaller EPD_MAX_MODEL_LEN" * bool(kv_bytes),
            )
        notes.append(
            f"{role}: {parts.split(' + KV')[0]} of {have} MiB"
            + (f"; KV cache for about {room * MIB // kv_bytes} tokens" if kv_bytes else "")
        )
    return [*notes, _pool_note(model, limits)]


def _pool_note(model: ModelSize, limits: Limits) -> str:
    held = limits.store_size_mb * MIB // model.picture_bytes
    return (
        f"embeddings' pool: {limits.store_size_mb} MiB hold about {held} pictures of 1024 x 1024 "
        f"({model.picture_tokens} tokens x {model.embedding_bytes_per_token} bytes each)"
    )


def _place(topology: Topology, hosts: Sequence[Host]) -> tuple[Instance, ...]:
    """Give each instance a host and cards: those that it runs on now, or else any.

    An instance that keeps its cards is not started anew, and its successor on them need not wait for it to leave.
    """
    try:
        placed = _assign(topology, hosts, _kept(topology, hosts))
    except StepError:  # what stays where it is may leave no group that is large enough for the others
        placed = _assign(topology, hosts, {})
    books = {host.name: PortBook() for host in hosts}
    return tuple(
        Instance(
            f"{role}-{index}",
            role,
            placed[role, index][0],
            topology.of(role),
            placed[role, index][1],
            books[placed[role, index][0].name].take(role, topology.of(role).cards),
        )
        for role, index in _order(topology)
    )


def _order(topology: Topology) -> list[tuple[str, int]]:
    return [(role, index) for role, count in topology.counts.items() for index in range(count)]


def _kept(topology: Topology, hosts: Sequence[Host]) -> dict[tuple[str, int], _Place]:
    """Return the places of the instances that run on as many cards as they are to have."""
    found = {}
    for role, index in _order(topology):
        for host in hosts:
            cards = tuple(card for card in host.free_cards if card.serves == f"{role}-{index}")
            if host.accepts(role) and len(cards) == topology.of(role).cards:
                found[role, index] = (host, cards)
    return found


def _assign(
    topology: Topology, hosts: Sequence[Host], kept: Mapping[tuple[str, int], _Place]
) -> dict[tuple[str, int], _Place]:
    """Return a place for each instance that has none yet: large ones first, on the first host that has room."""
    stay = {(host.name, card.id) for host, cards in kept.values() for card in cards}
    free = {host.name: [card for card in host.free_cards if (host.name, card.id) not in stay] for host in hosts}
    placed = dict(kept)
    for role, index in sorted(_order(topology), key=lambda item: -topology.of(item[0]).cards):
        if (role, index) not in kept:
            host, cards = _find(role, topology.of(role), hosts, free)
            free[host.name] = [card for card in free[host.name] if card not in cards]
            placed[role, index] = (host, cards)
    return placed


def _find(
    role: str, span: Parallel, hosts: Sequence[Host], free: dict[str, list[Card]]
) -> tuple[Host, tuple[Card, ...]]:
    """Return where the next instance goes. Hosts that are for few roles come first: no one else may use them."""
    for host in sorted(hosts, key=lambda host: len(host.roles) or len(ROLES)):
        if host.hardware == "cpu":
            return host, ()
        cards = choosing.choose(free[host.name], span.cards) if host.accepts(role) else None
        if cards is not None:
            return host, cards
    barred = {host.name: "" if host.accepts(role) else f" (not for {role})" for host in hosts}
    left = "; ".join(f"{host.name}: {_groups(free[host.name])}{barred[host.name]}" for host in hosts)
    raise StepError(
        f"no host has room for one more {role} instance",
        expected=f"{span.cards} free cards of one group on one host (TP {span.tensor} x DP {span.data})",
        found=f"left over: {left}",
        fix="choose a smaller TP or DP for this role, fewer instances, or other roles in the inventory",
    )


def _groups(cards: Sequence[Card]) -> str:
    groups: dict[int, list[int]] = {}
    for card in cards:
        groups.setdefault(card.group, []).append(card.id)
    return " and ".join(f"cards {', '.join(map(str, ids))}" for ids in groups.values()) or "no card"
