"""vllm-ascend's ``MooncakeLayerwiseConnector`` on host memory, over Mooncake's TCP transport.

The connector is the one of the vllm-ascend wheel. What is put in its place here is only what asks for a device:
each replacement below says why. Load it with ``--kv-transfer-config``'s
``"kv_connector":"MooncakeLayerwiseConnector","kv_connector_module_path":"epd_connector.cpu.layerwise"``.
"""

from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from mooncake.engine import TransferEngine
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils.network_utils import get_ip

from epd_connector.cpu.npu_stand_in import npu_stand_in
from epd_connector.cpu.pin import require_pinned_vllm_ascend

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

require_pinned_vllm_ascend()
with npu_stand_in():
    from vllm_ascend.distributed.kv_transfer.kv_p2p import mooncake_layerwise_connector as upstream
    from vllm_ascend.distributed.kv_transfer.utils.mooncake_transfer_engine import global_te


def replace(module: ModuleType, name: str, substitute: object) -> None:
    """Set ``module.name``, which has to be there already.

    Raises:
        AttributeError: it is not, so what it stood for has moved and the replacement would do nothing.
    """
    if not hasattr(module, name):
        raise AttributeError(
            f"{module.__name__} has no {name!r} to replace: epd_connector.cpu does not fit this release"
        )
    setattr(module, name, substitute)


class HostSendingThread(upstream.KVCacheSendingLayerThread):  # type: ignore[misc]
    """The sending thread without the selection of ``npu:<rank>``, a device that torch does not know here."""

    def run(self) -> None:
        """Send layers as they come in, for the life of the process."""
        self.ready_event.set()
        while True:
            self._handle_request(self.send_queue.get())


replace(upstream, "KVCacheSendingLayerThread", HostSendingThread)
# The NPU platform plug-in fills vllm-ascend's global configuration, and that plug-in is not loaded here. The
# connector reads two values of it; with prefill and decode of the same tensor-parallel size both are 1.
replace(upstream, "get_ascend_config", lambda: SimpleNamespace(pd_head_ratio=1, num_head_replica=1))


class MooncakeLayerwiseConnector(upstream.MooncakeLayerwiseConnector):  # type: ignore[misc]
    """The connector of vllm-ascend, given a transfer engine that speaks TCP instead of ``ascend``.

    Raises:
        ValueError: prefill and decode differ in tensor-parallel size, or this host's address is unknown.
        RuntimeError: Mooncake could not start its transfer engine.
    """

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig | None" = None
    ) -> None:
        if vllm_config.kv_transfer_config is not None:
            _require_equal_tensor_parallel_size(vllm_config.kv_transfer_config)
        address = _advertised_address()
        if role == KVConnectorRole.WORKER and global_te.transfer_engine is None:
            # vllm-ascend initialises one for "ascend" unless it finds one here.
            global_te.transfer_engine = _tcp_transfer_engine(address)
        super().__init__(vllm_config, role, kv_cache_config)


def _require_equal_tensor_parallel_size(config: "KVTransferConfig") -> None:
    sizes = {stage: config.get_from_extra_config(stage, {}).get("tp_size", 1) for stage in ("prefill", "decode")}
    if sizes["prefill"] != sizes["decode"]:
        raise ValueError(
            "on the CPU profile prefill and decode need the same tp_size in kv_connector_extra_config, "
            f"found {sizes}: resharding KV heads runs on an NPU only."
        )


def _advertised_address() -> str:
    address: str = get_ip()
    if address == "0.0.0.0":
        raise ValueError(
            "this host's address could not be found, and peers cannot send KV to 0.0.0.0. "
            "Set VLLM_HOST_IP to the address by which the other stages reach this one."
        )
    return address


def _tcp_transfer_engine(address: str) -> Any:
    engine = TransferEngine()
    status = engine.initialize(address, "P2PHANDSHAKE", "tcp", "")
    if status != 0:
        raise RuntimeError(f"Mooncake's transfer engine did not start on {address} over TCP (status {status})")
    return engine
