"""The adapter around the real vllm-ascend wheel, with real Mooncake over loopback TCP.

These run in the CPU image, where vLLM, vllm-ascend and Mooncake are; elsewhere they fail.
"""

import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

# As in the image: otherwise vllm-ascend's plug-in makes vLLM look for an NPU.
os.environ["VLLM_PLUGINS"] = ""

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, supports_hma

from epd_connector.cpu import layerwise


def transfer_config(**extra: Any) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="MooncakeLayerwiseConnector",
        kv_connector_module_path="epd_connector.cpu.layerwise",
        kv_role="kv_consumer",
        kv_port=36200,
        kv_connector_extra_config=extra,
    )


def test_vllm_finds_the_connector_by_its_module_path() -> None:
    found = KVConnectorFactory.get_connector_class(transfer_config())
    assert found is layerwise.MooncakeLayerwiseConnector
    assert issubclass(found, layerwise.upstream.MooncakeLayerwiseConnector)
    assert supports_hma(found)


def test_only_what_asks_for_a_device_is_overridden() -> None:
    assert set(vars(layerwise.MooncakeLayerwiseConnector)) & set(
        vars(layerwise.upstream.MooncakeLayerwiseConnector)
    ) <= {"__init__", "__module__", "__doc__", "__abstractmethods__", "_abc_impl", "__parameters__"}
    assert vars(layerwise.HostSendingThread).keys() & {"run", "_handle_request", "_transfer_kv_cache"} == {"run"}


def test_importing_it_alone_leaves_no_trace_of_an_npu() -> None:
    check = (
        "import epd_connector.cpu.layerwise, sys;"
        "from transformers.utils import is_torch_npu_available;"
        "from vllm.platforms import current_platform;"
        "assert 'torch_npu' not in sys.modules;"
        "assert not is_torch_npu_available();"
        "assert current_platform.is_cpu(), current_platform"
    )
    search_path = os.pathsep.join(sys.path)
    environment = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": search_path}
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_moved_is_not_replaced_silently() -> None:
    module = ModuleType("moved")
    with pytest.raises(AttributeError, match="moved has no 'get_ascend_config' to replace"):
        layerwise.replace(module, "get_ascend_config", lambda: None)


def test_the_worker_reads_a_head_ratio_of_one() -> None:
    config = layerwise.upstream.get_ascend_config()
    assert (config.pd_head_ratio, config.num_head_replica) == (1, 1)


def test_unequal_tensor_parallel_sizes_are_refused() -> None:
    vllm_config = SimpleNamespace(kv_transfer_config=transfer_config(prefill={"tp_size": 2}, decode={"tp_size": 1}))
    with pytest.raises(ValueError, match=r"same tp_size .* found \{'prefill': 2, 'decode': 1\}"):
        layerwise.MooncakeLayerwiseConnector(vllm_config, KVConnectorRole.SCHEDULER)


def test_a_wildcard_address_is_not_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "get_ip", lambda: "0.0.0.0")
    vllm_config = SimpleNamespace(kv_transfer_config=transfer_config())
    with pytest.raises(ValueError, match="Set VLLM_HOST_IP"):
        layerwise.MooncakeLayerwiseConnector(vllm_config, KVConnectorRole.SCHEDULER)


def test_the_sending_thread_writes_host_memory_to_a_peer_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of two blocks goes through the thread, the real transfer meta and a real Mooncake write."""
    upstream = layerwise.upstream
    block_bytes = 4096
    source = torch.arange(4 * block_bytes, dtype=torch.int32).to(torch.uint8).reshape(4, block_bytes)
    target = torch.zeros_like(source)
    sender, receiver = layerwise._tcp_transfer_engine("127.0.0.1"), layerwise._tcp_transfer_engine("127.0.0.1")
    for engine, tensor in ((sender, source), (receiver, target)):
        assert engine.register_memory(tensor.data_ptr(), tensor.nbytes) == 0

    def metadata(tensor: torch.Tensor) -> Any:
        return upstream.LayerMetadata([0], [tensor.data_ptr()], [block_bytes], [1])

    ready, done = threading.Event(), threading.Event()
    signals: list[tuple[str, bool]] = []

    def on_done(request_id: str, request: Any, group: int, trans_flag: bool) -> None:
        signals.append((request_id, trans_flag))
        done.set()

    thread = upstream.KVCacheSendingLayerThread(
        engine=sender,
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="none"), speculative_config=None),
        kv_cache_config=None,
        kv_cache_specs=[None],
        attn_resharding_group_idx=set(),
        total_layers=1,
        ready_event=ready,
        tp_size=1,
        tp_rank=0,
        pd_head_ratio=1,
        num_head_replica=1,
        layer_metadata={"layer.0": metadata(source)},
        use_mla=False,
        use_attn_mamba_hybrid=False,
        k_buffer=None,
        v_buffer=None,
        enable_kv_quant=False,
        enable_c8_quant=False,
        resharding_stream=None,
        callback_func=on_done,
    )
    assert isinstance(thread, layerwise.HostSendingThread)
    thread.start()
    assert ready.wait(5)
    # Blocks 1 and 2 here become blocks 2 and 0 there.
    request = SimpleNamespace(
        local_block_ids=[[1, 2]],
        remote_block_ids=[[2, 0]],
        remote_layer_metadata={"layer.0": metadata(target)},
        remote_host="127.0.0.1",
        remote_te_rpc_port=receiver.get_rpc_port(),
        chunk_finish=True,
    )
    event = torch.npu.Event()
    event.record()
    thread.send_queue.put(
        upstream.SendTask(send_request={"r": request}, wait_event=event, layer_idx=0, layer_name="layer.0")
    )
    assert done.wait(20)
    assert signals == [("r", True)]
    expected = torch.zeros_like(source)
    expected[2], expected[0] = source[1], source[2]
    assert torch.equal(target, expected)
