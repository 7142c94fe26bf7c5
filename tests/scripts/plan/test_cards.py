"""The choice of cards: disjoint, together, and not wasteful."""

from hypothesis import given
from hypothesis import strategies as st

from epd.plan import cards
from epd.plan.hosts import Card


def server(modules=8, chips=1, groups=1):
    per_group = modules // groups
    return [
        Card(m * chips + c, m, 65536, numa=m // 4, group=(m // per_group) * per_group * chips)
        for m in range(modules)
        for c in range(chips)
    ]


def ids(chosen):
    return [card.id for card in chosen]


def test_two_cards_of_one_numa_node():
    free = [card for card in server() if card.id not in (1, 2, 3)]
    assert ids(cards.choose(free, 2)) == [4, 5]


def test_one_card_comes_from_the_smaller_rest():
    free = [card for card in server() if card.id not in (4, 5, 6)]
    assert ids(cards.choose(free, 1)) == [7]


def test_both_chips_of_a_module():
    free = [card for card in server(chips=2) if card.id != 0]
    assert ids(cards.choose(free, 2)) == [2, 3]
    assert ids(cards.choose(free, 1)) == [1]
    assert ids(cards.choose(free, 3)) == [1, 2, 3]


def test_two_numa_nodes_where_one_is_not_enough_but_never_two_groups():
    assert len(cards.choose(server(), 6)) == 6
    assert cards.choose(server(groups=2), 6) is None


@given(
    taken=st.sets(st.integers(0, 15)),
    wanted=st.lists(st.sampled_from([1, 2, 4, 8]), max_size=8),
    groups=st.sampled_from([1, 2]),
)
def test_no_card_is_given_twice_and_no_instance_crosses_a_group(taken, wanted, groups):
    free = [card for card in server(chips=2, groups=groups) if card.id not in taken]
    seen = set(taken)
    for count in wanted:
        chosen = cards.choose(free, count)
        if chosen is None:
            assert all(sum(card.group == group for card in free) < count for group in {card.group for card in free})
            continue
        assert len(chosen) == count
        assert len({card.group for card in chosen}) == 1
        assert not seen & set(ids(chosen))
        seen |= set(ids(chosen))
        free = [card for card in free if card not in chosen]
