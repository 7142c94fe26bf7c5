"""This machine as the plan wants it described, on machines that are folders."""

import pytest

from epd import survey
from epd.errors import StepError
from epd.machine import Machine
from fakes.npu_hosts import FakeHost


def describe(fake, **settings):
    hardware = survey.profile(Machine(fake.root))
    return survey.host(Machine(fake.root), hardware=hardware, name="node-a", project="ascend-epd", settings=settings)


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_a_server_with_npus(hardware, tmp_path):
    fake = FakeHost(tmp_path, hardware)
    host = describe(fake)
    assert (host.hardware, host.address, host.interface) == (hardware, "10.0.0.7", "enp189s0f0")
    assert [card.id for card in host.free_cards] == list(range(fake.count))
    assert {card.numa for card in host.cards} == {0, 1}
    assert host.memory_mib == 1583459328 // 1024
    assert host.roce == (hardware != "a5")


def test_what_npus_there_are_is_said(tmp_path):
    machine = Machine(tmp_path)
    fake = FakeHost(tmp_path, "cpu")
    fake.file("/dev/davincissimo")
    assert survey.sentence(machine, "cpu") == "no NPU found (/dev/davinci*): profile cpu"
    for name in ("davinci10", "davinci2", "davinci_manager"):
        fake.file(f"/dev/{name}")
    assert survey.card_nodes(machine) == [2, 10]
    assert survey.sentence(machine, "a2") == "2 Ascend NPU node(s) found (/dev/davinci*): profile a2"
    assert survey.sentence(machine, "cpu").endswith("the cpu profile leaves them alone")


def test_a_machine_without_npus_is_a_cpu_host(tmp_path):
    host = describe(FakeHost(tmp_path, "cpu"))
    assert (host.hardware, host.cards, host.address) == ("cpu", (), "127.0.0.1")


def test_npus_whose_kind_cannot_be_told_are_no_profile(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.remove("/usr/local/bin/npu-smi")
    assert survey.profile(Machine(tmp_path)) == ""


def test_cards_in_use_are_told_with_their_user(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.processes[2, 0] = (4711, "python3")
    fake.write()
    fake.container("someone-else", [5])
    assert {card.id: card.taken_by for card in describe(fake).cards if card.taken_by} == {
        2: "process 4711 python3",
        5: "container someone-else",
    }


def test_our_own_containers_do_not_stand_in_their_own_way(tmp_path):
    fake = FakeHost(tmp_path, "a3")
    fake.processes[0, 1] = (4711, "VLLMEngineCor")
    fake.write()
    fake.container("ascend-epd-encode-0-1", [1], project="ascend-epd")
    assert all(not card.taken_by for card in describe(fake).cards)


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_what_runs_on_a_card_is_not_what_an_idle_card_takes(hardware, tmp_path):
    fake = FakeHost(tmp_path, hardware)
    idle = describe(fake).cards[7].hbm_used_mib
    assert idle > 0
    fake.container("ascend-epd-encode-0-1", [0], project="ascend-epd")
    fake.container("someone-else", [1])
    assert [card.hbm_used_mib for card in describe(fake).cards[:3]] == [0, 0, idle]


def test_which_of_our_instances_has_a_card_is_told(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.container("ascend-epd-decode-0-1", [5], project="ascend-epd", service="decode-0")
    fake.container("other-decode-0-1", [6], project="other", service="decode-0")
    assert {card.id: (card.serves, card.taken_by) for card in describe(fake).cards[5:7]} == {
        5: ("decode-0", ""),
        6: ("", "container other-decode-0-1"),
    }


def test_a_container_of_the_ascend_runtime_takes_its_cards_too(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.containers = [{"Id": "x", "Name": "/x", "HostConfig": {}, "Config": {"Env": ["ASCEND_VISIBLE_DEVICES=0,2-3"]}}]
    fake.write()
    assert [card.id for card in describe(fake).free_cards] == [1, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "cards"),
    [("0,2-3", {0, 2, 3}), ("Ascend910-0,Ascend910-5", {0, 5}), ("Ascend910B-1-3", {1, 2, 3}), ("void", set())],
)
def test_lists_of_cards_as_the_ascend_runtime_takes_them(text, cards):
    assert survey.numbers(text) == cards


def test_a_card_without_its_device_node_is_not_offered(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.remove("/dev/davinci6")
    assert [card.id for card in describe(fake).cards] == [0, 1, 2, 3, 4, 5, 7]


def test_cards_and_address_can_be_chosen(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.interfaces["eth1"] = "192.168.9.4"
    fake.write()
    host = describe(fake, EPD_CARDS="4-5,7", EPD_INTERFACE="eth1")
    assert [card.id for card in host.cards] == [4, 5, 7]
    assert (host.address, host.interface) == ("192.168.9.4", "eth1")
    assert describe(fake, EPD_HOST_ADDRESS="10.0.0.7").interface == "enp189s0f0"
    with pytest.raises(StepError, match="EPD_CARDS=9"):
        describe(fake, EPD_CARDS="9")


def test_without_a_default_route_the_only_address_will_do_and_of_two_one_must_be_named(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.default_route = ""
    fake.write()
    assert describe(fake).address == "10.0.0.7"
    fake.interfaces["eth1"] = "192.168.9.4"
    fake.write()
    with pytest.raises(StepError, match=r"no default route[\s\S]*EPD_HOST_ADDRESS"):
        describe(fake)


def test_cards_without_a_link_have_no_roce(tmp_path):
    fake = FakeHost(tmp_path, "a2")
    fake.hccn["link 0"] = "DOWN"
    fake.write()
    assert not describe(fake).roce
