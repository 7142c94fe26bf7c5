"""The stand-in is there while vllm-ascend is imported, and nobody takes the host for an NPU afterwards."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from transformers.utils import import_utils

from epd_connector.cpu.npu_stand_in import npu_stand_in


@pytest.fixture(autouse=True)
def torch_without_npu() -> Iterator[None]:
    before = vars(torch).pop("npu", None)
    yield
    vars(torch).pop("npu", None)
    if before is not None:
        vars(torch)["npu"] = before


def test_torch_npu_can_be_imported_inside_the_block_only() -> None:
    with npu_stand_in():
        import torch_npu

        assert torch_npu.npu is torch.npu
        assert find_spec("torch_npu") is not None  # raises ValueError on a module without a spec
    assert "torch_npu" not in sys.modules
    assert find_spec("torch_npu") is None


def test_it_is_taken_away_when_the_import_fails() -> None:
    with pytest.raises(ZeroDivisionError), npu_stand_in():
        _ = 1 / 0
    assert "torch_npu" not in sys.modules


def test_no_npu_is_reported_available_during_or_after() -> None:
    import_utils.is_torch_npu_available.cache_clear()
    with npu_stand_in():
        assert not import_utils.is_torch_npu_available()
    import_utils.is_torch_npu_available.cache_clear()
    assert not import_utils.is_torch_npu_available()
    assert not torch.npu.is_available()


def test_an_event_stays_usable_after_the_block() -> None:
    with npu_stand_in():
        pass
    event = torch.npu.Event()
    assert (event.record(), event.wait(), event.synchronize()) == (None, None, None)


def test_a_host_with_the_real_torch_npu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    (tmp_path / "torch_npu.py").write_text("raise AssertionError('must not be imported')")  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="Leave `kv_connector_module_path` out"), npu_stand_in():
        pass
    assert not hasattr(torch, "npu")
