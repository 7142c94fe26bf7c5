"""The doctor beside a stack that runs: its own ports and cards are no fault, and it is looked at from the inside."""

from epd.doctor.finding import Status
from fakes.doctor import listener


def test_our_own_running_stack_is_no_fault(case):
    it = case()
    it.fake.container("ascend-epd-decode-0-1", [2], project="ascend-epd")
    assert it.bad() == {}


def running(it, *, missing=()):
    """Let the stack's instances run, each with its card; `missing` ones have none inside."""
    for index, name in enumerate(("encode-0", "prefill-0", "decode-0", "proxy")):
        cards = [] if name == "proxy" or name in missing else [index]
        it.fake.container(f"ascend-epd-{name}-1", cards, project="ascend-epd", service=name)


def test_a_running_stack_is_looked_at_from_the_inside(case):
    it = case()
    running(it)
    found = {finding.name: finding for finding in it.examine()}
    assert it.bad() == {}
    assert found["inside.cards"].found == "encode-0: 1, prefill-0: 1, decode-0: 1"
    assert found["inside.metaserver"].found == "decode-0 reach 127.0.0.1:8001"


def test_ports_of_what_runs_are_its_own_and_those_of_what_comes_are_looked_at(case):
    it = case()
    running(it)
    listener(8100)(it)  # encode-0's
    assert it.bad() == {}
    it.environ["TOPOLOGY"] = "2e1p1d"
    listener(8101)(it)
    assert it.bad()["ports.free"].found == "8101 (encode-1): in use"


def test_a_container_without_its_card_is_found(case):
    it = case()
    running(it, missing=("prefill-0",))
    assert it.bad()["inside.cards"].found == "prefill-0: 0 of 1"


def test_a_metaserver_that_decode_does_not_reach_is_found(case):
    it = case("cpu")
    it.fake.inside["ascend-epd-decode-0-1"] = "echo 'ConnectionRefusedError: [Errno 111]' >&2; exit 1"
    running(it)
    finding = it.bad()["inside.metaserver"]
    assert (finding.status, "proxy:8001" in finding.expected) == (Status.FAIL, True)
    assert finding.found == "decode-0: ConnectionRefusedError: [Errno 111]"
