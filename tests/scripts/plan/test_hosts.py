"""The inventory: written, read back, and refused when it cannot be."""

import json

import pytest

from epd.errors import StepError
from epd.plan import hosts

NODE = {"name": "node-a", "hardware": "a2", "address": "10.0.0.7", "cards": [{"id": 0, "module": 0, "hbm_mib": 65536}]}


def load(tmp_path, *entries):
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"hosts": entries}))
    return hosts.load(path)


def test_what_is_written_is_read_back(tmp_path):
    host = hosts.Host(
        "a", "a3", "10.0.0.7", "eth0", 1024, True, ("encode",), (hosts.Card(1, 0, 65536, 3000, 1, 0, "x"),)
    )
    path = tmp_path / "hosts.json"
    path.write_text(hosts.dump([host]))
    assert hosts.load(path) == [host]


def test_only_what_has_no_default_must_be_there(tmp_path):
    assert load(tmp_path, NODE)[0].cards[0].numa == -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": "0.0.0.0"}, "other hosts can reach"),
        ({"address": "127.0.0.1"}, "other hosts can reach"),
        ({"address": "node-a"}, "expected an IP address"),
        ({"hardware": "h100"}, "hardware h100"),
        ({"name": "Node A"}, "small letters"),
        ({"roles": ["encoder"]}, "no such role encoder"),
        ({"color": "red"}, "color: no such key"),
        ({"memory_mib": "64"}, "memory_mib: expected int"),
        ({"cards": [{"id": 0}]}, "missing"),
        ({"cards": [NODE["cards"][0]] * 2}, "card 0 is given twice"),
        ({"cards": [7]}, "expected an object"),
    ],
)
def test_faults_are_named(change, message, tmp_path):
    with pytest.raises(StepError, match=message):
        load(tmp_path, NODE | change)


def test_names_and_addresses_are_distinct(tmp_path):
    with pytest.raises(StepError, match=r"name node-a is given twice; address 10.0.0.7 is given twice"):
        load(tmp_path, NODE, NODE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hosts": []}'])
def test_an_inventory_without_hosts_is_refused(text, tmp_path):
    path = tmp_path / "hosts.json"
    path.write_text(text)
    with pytest.raises(StepError, match="inventory"):
        hosts.load(path)
