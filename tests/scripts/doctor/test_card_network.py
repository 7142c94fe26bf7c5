"""The cards' network: what a plan over several hosts needs of it, and one server does without."""

from epd.doctor.finding import Status
from epd.plan import hosts


def two_hosts(it, loss="0.00", address="10.1.0.77"):
    it.environ["EPD_HOSTS"] = str(it.root / "hosts.json")
    cards = tuple(hosts.Card(i, i, 65536, 3400, address=address) for i in range(8))
    own = hosts.Host("node-a", "a2", "10.0.0.7", roles=("encode", "prefill"), cards=cards)
    other = hosts.Host("node-b", "a2", "10.0.0.8", roles=("decode",), cards=cards)
    (it.root / "hosts.json").write_text(hosts.dump([own, other]))
    it.fake.hccn["loss"] = loss
    it.fake.write()


def test_other_hosts_are_pinged_through_the_cards(case):
    it = case()
    two_hosts(it)
    assert it.bad() == {}
    two_hosts(it, loss="100.00")
    assert "node-b 10.1.0.77" in it.bad()["network.ping"].found
    two_hosts(it, address="")
    assert it.bad()["network.ping"].status is Status.WARN


def test_with_several_hosts_a_cards_network_must_be_well(case):
    it = case()
    two_hosts(it)
    it.fake.hccn["health 1"] = "Fault"
    it.fake.hccn |= {f"link {i}": "DOWN" for i in range(8)}
    it.fake.write()
    bad = it.bad()
    assert (bad["network.health"].status, bad["network.link"].status) == (Status.FAIL, Status.FAIL)


def test_one_server_without_any_link_does_without(case):
    it = case()
    it.fake.hccn = {f"link {i}": "DOWN" for i in range(8)}
    it.fake.write()
    assert it.bad() == {}
