"""The plan: what holds of every one, and what is refused with its arithmetic."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from epd.errors import StepError
from epd.plan import placing, ports, topology
from epd.plan.hosts import Card, Host
from epd.plan.model import ModelSize
from epd.plan.topology import Parallel

LIMITS = placing.Limits(max_model_len=32768, max_num_seqs=128, store_size_mb=8192)
GIB = 1 << 30


def host(name="node-a", *, hardware="a2", count=8, last=7, roles=(), taken=()):
    cards = [Card(i, i, 65536, 3400, numa=i // 4, taken_by="someone" if i in taken else "") for i in range(count)]
    return Host(name, hardware, f"10.0.0.{last}", "eth0", 1 << 20, roles=roles, cards=tuple(cards))


def model(weights_gib=16.0, kv_heads=4):
    return ModelSize("a-model", int(weights_gib * GIB), True, 57344, kv_heads, 7168, 784, 128000)


def plan(name, hosts, parallel=None, size=None):
    return placing.make(topology.parse(name, parallel), hosts, size, LIMITS)


def listening(plan_, host_):
    """Return every port that a service of this host binds."""
    found = [ports.PROXY, ports.METASERVER, *ports.POOL.values()] if host_ == plan_.head else []
    for instance in plan_.on(host_):
        found += [instance.ports.http, *filter(None, [instance.ports.metrics])]
        if instance.ports.kv:
            found += range(instance.ports.kv, instance.ports.kv + instance.parallel.cards)
    return found


sizes = st.sampled_from([Parallel(1, 1), Parallel(2, 1), Parallel(1, 2), Parallel(4, 1), Parallel(2, 2)])


@given(
    encode=st.integers(1, 4),
    prefill=st.integers(1, 4),
    decode=st.integers(0, 4),
    spans=st.fixed_dictionaries(dict.fromkeys(topology.ROLES, sizes)),
    hosts=st.integers(1, 3),
)
def test_every_plan_keeps_cards_and_ports_apart(encode, prefill, decode, spans, hosts):
    name = f"{encode}e{prefill}p{decode or ''}d"
    assume(not decode or spans["prefill"].tensor % spans["decode"].tensor == 0)
    machines = [host(f"node-{i}", last=i + 1) for i in range(hosts)]
    try:
        found = plan(name, machines, spans)
    except StepError:
        needed = topology.parse(name, spans).cards
        largest = max(spans[role].cards for role in topology.parse(name).counts)
        assert needed > 8 * hosts or (needed > 8 * hosts - largest and hosts > 1)
        return
    assert len(found.instances) == encode + prefill + decode
    for machine in machines:
        taken = [card.id for instance in found.on(machine) for card in instance.cards]
        assert len(taken) == len(set(taken))
        bound = listening(found, machine)
        assert len(bound) == len(set(bound))
        assert not any(port in foreign for port in bound for foreign in ports.FOREIGN.values())
    for instance in found.instances:
        assert len(instance.cards) == spans[instance.role].cards
        if instance.ports.kv:
            assert instance.ports.kv >= 36000


def running(made):
    """Return the hosts of a plan as they are once it runs."""
    serves = {(i.host.name, card.id): i.name for i in made.instances for card in i.cards}
    return [
        replace(host, cards=tuple(replace(card, serves=serves.get((host.name, card.id), "")) for card in host.cards))
        for host in made.hosts
    ]


def places(made):
    return {i.name: (i.host.name, [card.id for card in i.cards], i.ports) for i in made.instances}


def test_what_runs_keeps_its_cards_and_ports_when_others_come_go_or_free_theirs():
    first = plan("1e1p1d", [host(taken=(0, 1))])
    machines = [replace(m, cards=tuple(replace(c, taken_by="") for c in m.cards)) for m in running(first)]
    for name in ("1e1p1d", "2e1p1d", "1e2p1d", "1e1p3d"):
        found = places(plan(name, machines))
        assert {instance: found[instance] for instance in places(first)} == places(first)
    wider = places(plan("1e1p1d", machines, {"prefill": Parallel(2, 1)}))
    assert wider["decode-0"] == places(first)["decode-0"]
    assert len(wider["prefill-0"][1]) == 2


def test_what_runs_moves_where_it_would_leave_no_room_for_the_others():
    cards = [Card(i, i, 65536, group=i // 2) for i in range(4)]
    cards[1] = replace(cards[1], serves="decode-0")
    cards[2] = replace(cards[2], serves="encode-0")
    machine = Host("node-a", "a2", "10.0.0.7", cards=tuple(cards))
    found = plan("1e1p1d", [machine], {"prefill": Parallel(2, 1)})
    assert len({card.group for card in found.of("prefill")[0].cards}) == 1


@given(old=st.integers(1, 4), new=st.integers(1, 4), span=sizes)
def test_a_plan_that_runs_is_planned_as_it_is_and_one_more_or_less_moves_no_other_role(old, new, span):
    first = plan(f"{old}e1pd", [host()], {"prefill-decode": span})
    again = plan(f"{old}e1pd", running(first), {"prefill-decode": span})
    assert places(again) == places(first)
    other = plan(f"{new}e1pd", running(first), {"prefill-decode": span})
    assert places(other)["prefill-decode-0"] == places(first)["prefill-decode-0"]


def test_one_server_gets_one_card_each():
    found = plan("1e1p1d", [host()])
    assert {i.name: [card.id for card in i.cards] for i in found.instances} == {
        "encode-0": [0],
        "prefill-0": [1],
        "decode-0": [2],
    }
    assert {i.name: i.ports.http for i in found.instances} == {"encode-0": 8100, "prefill-0": 8200, "decode-0": 8300}
    assert found.instances[2].ports.kv == 36100


def test_side_channels_of_instances_with_several_cards_do_not_touch():
    found = plan("1e2p2d", [host(count=16)], {"prefill": Parallel(2, 1), "decode": Parallel(2, 2)})
    assert [i.ports.kv for i in found.of("prefill")] == [36000, 36002]
    assert [i.ports.kv for i in found.of("decode")] == [36100, 36104]


def test_roles_of_the_inventory_are_kept_and_bound_hosts_are_filled_first():
    hosts = [host("any", last=1), host("decoders", last=2, roles=("decode",))]
    found = plan("1e1p2d", hosts)
    assert {i.name: i.host.name for i in found.instances} == {
        "encode-0": "any",
        "prefill-0": "any",
        "decode-0": "decoders",
        "decode-1": "decoders",
    }


def test_too_few_cards_are_refused_with_the_sum_and_who_has_the_others():
    with pytest.raises(StepError) as caught:
        plan("2e4p4d", [host(taken=(0,))])
    assert "2 encode x 1 (TP 1 x DP 1) + 4 prefill x 1" in caught.value.expected
    assert "= 10 cards" in caught.value.expected
    assert "node-a 7 of 8 (taken: 0 by someone) = 7 free" in caught.value.found


def test_an_instance_is_not_split_over_hosts():
    with pytest.raises(StepError, match=r"no host has room for one more prefill-decode[\s\S]*cards"):
        plan("1e1pd", [host("a", last=1, count=4), host("b", last=2, count=4)], {"prefill-decode": Parallel(7, 1)})


def test_hosts_of_two_kinds_are_refused():
    with pytest.raises(StepError, match="different hardware"):
        plan("1e1pd", [host("a", last=1), host("b", last=2, hardware="a3")])


def test_the_memory_of_a_7b_model_is_shown():
    notes = plan("1e1p1d", [host()], size=model(15.4)).notes
    assert notes[0].startswith("encode: weights 15770 (files, TP 1) + runtime and activations 4096 of 62136 MiB")
    assert "KV cache for about" in notes[1]
    assert notes[-1].startswith("embeddings' pool: 8192 MiB hold about 896 pictures")


def test_an_encoder_that_cannot_hold_the_weights_is_refused_with_the_sum():
    with pytest.raises(StepError) as caught:
        plan("1e1pd", [host()], {"prefill-decode": Parallel(2, 1)}, model(58))
    assert caught.value.what == "encode: a-model does not fit on a card"
    assert caught.value.expected == "weights 59392 (files, TP 1) + runtime and activations 4096 = 63488 MiB"
    assert caught.value.found == "62136 MiB (HBM 65536, idle use 3400)"
    assert "EPD_ENCODE_TP=2" in caught.value.fix
    plan("1e1pd", [host()], {"prefill-decode": Parallel(2, 1), "encode": Parallel(2, 1)}, model(58))


def test_a_context_that_does_not_fit_the_rest_of_a_card_is_refused():
    with pytest.raises(StepError, match="KV of one request of 32768 tokens 1792"):
        plan("1e1pd", [host()], size=model(52.5))


def test_the_cpu_profile_is_limited_by_memory():
    small = Host("here", "cpu", "127.0.0.1", memory_mib=24000)
    assert plan("1e1p1d", [small]).instances[0].cards == ()
    with pytest.raises(StepError, match=r"10 instances x 2800 MiB = 28000 MiB"):
        plan("2e4p4d", [small])
    with pytest.raises(StepError, match="instances of one card"):
        plan("1e1pd", [small], {"encode": Parallel(2, 1)})
