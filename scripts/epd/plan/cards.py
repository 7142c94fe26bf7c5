"""Which cards an instance gets: close to one another, and never shared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from epd.plan.hosts import Card


def choose(free: Sequence[Card], count: int) -> tuple[Card, ...] | None:
    """Return `count` of the free cards that are closest to one another; None when no group of them is large enough.

    Cards of one instance talk to each other in every layer, so they never come from two groups (across PCIe). Within a
    group one NUMA node is better than two. Of the places that fit, the smallest is taken, which leaves the large ones
    for large instances; and of a module with two chips both are taken before a second module is begun.
    """
    places = _by(free, lambda card: (card.group, card.numa))
    fitting = [place for place in places if len(place) >= count]
    if not fitting:
        fitting = [place for place in _by(free, lambda card: card.group) if len(place) >= count]
    if not fitting:
        return None
    smallest = min(fitting, key=lambda place: (len(place), place[0].id))
    return tuple(sorted(_fill_modules(smallest, count), key=lambda card: card.id))


def _by(cards: Sequence[Card], key: Callable[[Card], Hashable]) -> list[list[Card]]:
    places: dict[Hashable, list[Card]] = defaultdict(list)
    for card in sorted(cards, key=lambda card: card.id):
        places[key(card)].append(card)
    return list(places.values())


def _fill_modules(place: Sequence[Card], count: int) -> list[Card]:
    """Take whole modules while they fit, then the rest from the module with the fewest free chips."""
    modules = sorted(_by(place, lambda card: card.module), key=lambda chips: (-len(chips), chips[0].id))
    taken: list[Card] = []
    left: list[list[Card]] = []
    for chips in modules:
        if len(chips) <= count - len(taken):
            taken += chips
        else:
            left.append(chips)
    for chips in sorted(left, key=lambda chips: (len(chips), chips[0].id)):
        taken += chips[: count - len(taken)]
    return taken
