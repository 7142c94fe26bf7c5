"""Just enough of ``torch_npu`` to import vllm-ascend's KV connector where there is no NPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch


class HostEvent:
    """Stands for ``torch.npu.Event``: work on the host is done when its call returns, so there is nothing to await."""

    def record(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class HostStream:
    """Stands for ``torch.npu.Stream``, which the connector names in annotations."""


def _module(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)  # importlib.util.find_spec raises on a module without one
    vars(module).update(attributes)
    return module


@contextmanager
def npu_stand_in() -> Iterator[None]:
    """Provide ``torch_npu`` while the block imports vllm-ascend, and ``torch.npu`` from then on.

    ``torch_npu`` is taken away again so that transformers and others, which look for it to detect an NPU,
    do not find one. ``torch.npu`` stays: the connector makes an ``Event`` of it for each layer it sends.

    Raises:
        ImportError: the real torch_npu is installed, so this is not the CPU profile.
    """
    if "torch_npu" not in sys.modules and find_spec("torch_npu") is not None:
        raise ImportError(
            "torch_npu is installed, but epd_connector.cpu is for hosts without an NPU. "
            "Leave `kv_connector_module_path` out of --kv-transfer-config and let vllm-ascend register "
            "MooncakeLayerwiseConnector itself."
        )
    npu = _module("torch.npu", Event=HostEvent, Stream=HostStream, is_available=lambda: False)
    vars(torch)["npu"] = npu
    sys.modules["torch_npu"] = _module("torch_npu", npu=npu)
    try:
        yield
    finally:
        del sys.modules["torch_npu"]
