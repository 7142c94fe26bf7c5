"""Names of topologies and what they ask for."""

import pytest

from epd.errors import StepError
from epd.plan import topology


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("1e1pd", {"encode": 1, "prefill-decode": 1}),
        ("1e1p1d", {"encode": 1, "prefill": 1, "decode": 1}),
        ("2e4p4d", {"encode": 2, "prefill": 4, "decode": 4}),
        ("3e12pd", {"encode": 3, "prefill-decode": 12}),
    ],
)
def test_a_name_tells_the_instances(name, counts):
    assert topology.parse(name).counts == counts


@pytest.mark.parametrize("name", ["", "1e", "0e1pd", "1e0p1d", "1e1p0d", "1e1p1d1d", "1E1PD", "e1pd"])
def test_other_names_are_refused(name):
    with pytest.raises(StepError, match="no such topology"):
        topology.parse(name)


def test_cards_are_counted_and_shown_as_a_sum():
    parallel = topology.read_parallel({"EPD_PREFILL_TP": "2", "EPD_DECODE_TP": "2", "EPD_DECODE_DP": "2"})
    asked = topology.parse("2e1p1d", parallel)
    assert asked.cards == 8
    assert (
        asked.arithmetic()
        == "2 encode x 1 (TP 1 x DP 1) + 1 prefill x 2 (TP 2 x DP 1) + 1 decode x 4 (TP 2 x DP 2) = 8"
    )


@pytest.mark.parametrize("value", ["0", "-1", "two", "65"])
def test_sizes_that_cannot_be_are_refused(value):
    with pytest.raises(StepError, match=f"EPD_ENCODE_TP={value}"):
        topology.read_parallel({"EPD_ENCODE_TP": value})
