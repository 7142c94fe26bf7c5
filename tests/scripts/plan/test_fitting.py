"""Sizes that do not go together are refused before anything starts, with both of them in the message."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.errors import StepError
from epd.plan import fitting, topology
from epd.plan.hosts import Host
from epd.plan.model import ModelSize
from epd.plan.topology import Parallel

HEAD = Host("node-a", "a2", "10.0.0.7", memory_mib=1 << 20)
QWEN = ModelSize("Qwen2.5-VL-7B-Instruct", 16 << 30, True, 57344, 4, 7168, 784, 128000, heads=28)


def check(name="1e1p1d", *, model=QWEN, head=HEAD, max_model_len=32768, pool_mib=8192, **tensors):
    spans = {role.replace("_", "-"): Parallel(size) for role, size in tensors.items()}
    fitting.check(topology.parse(name, spans), [head], model, max_model_len=max_model_len, pool_mib=pool_mib)


def refused(**asked):
    with pytest.raises(StepError) as caught:
        check(**asked)
    return caught.value


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_a_prefill_tp_that_is_a_multiple_of_decode_s_is_fine(prefill, decode):
    check(prefill=prefill, decode=decode)


@given(prefill=st.integers(1, 64), decode=st.integers(1, 64))
def test_any_other_is_refused_with_a_way_that_works(prefill, decode):
    if prefill % decode == 0:
        check(model=None, prefill=prefill, decode=decode)
        return
    error = refused(model=None, prefill=prefill, decode=decode)
    assert f"{prefill} mod {decode} = {prefill % decode}" in error.found
    wanted = int(re.search(r"EPD_PREFILL_TP=(\d+)", error.fix)[1])
    check(model=None, prefill=wanted, decode=decode)
    check(model=None, prefill=prefill, decode=prefill)


def test_without_a_transfer_there_is_nothing_to_match():
    check("1e1pd", prefill_decode=2)


def test_heads_are_split_evenly():
    check("1e1pd", prefill_decode=4)
    error = refused(name="1e1pd", prefill_decode=8)
    assert error.expected == "a TP that divides its 28 attention heads: 1, 2, 4, …"
    assert "EPD_PREFILL_DECODE_TP=8: 28 mod 8 = 4" in error.found
    assert error.fix == "EPD_PREFILL_DECODE_TP=4"
    check("1e1pd", model=replace(QWEN, heads=0), prefill_decode=8)


def test_a_context_that_the_model_was_not_made_for():
    check(max_model_len=128000)
    assert refused(max_model_len=128001).fix == "EPD_MAX_MODEL_LEN=128000"


def test_a_pool_larger_than_the_first_host():
    error = refused(head=replace(HEAD, memory_mib=10000))
    assert error.expected == "pool 8192 + its process 2048 = 10240 MiB"
    check(head=replace(HEAD, memory_mib=0))
