"""Everything that depends on vLLM's version: 0.14.1 to 0.32.0.

The connector's base class is declared for the type checker here, because vLLM is present only in the images.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .keys import ModelIdentity

if TYPE_CHECKING:
    import enum

    import torch

    class ECConnectorRole(enum.Enum):
        """Declaration of vLLM's class."""

        SCHEDULER = 0
        WORKER = 1

    class ECConnectorMetadata:
        """Declaration of vLLM's class."""

    class ECConnectorBase:
        """Declaration of what the connector uses of vLLM's class."""

        def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None: ...
        def _get_connector_metadata(self) -> ECConnectorMetadata: ...

    EncoderCache = dict[str, torch.Tensor]

    @dataclass
    class ECConnectorStats:
        """Declaration of vLLM's class, which it has from 0.31 on."""

        data: dict[str, Any] = field(default_factory=dict)

    class ECConnectorPromMetrics:
        """Declaration of what the connector uses of vLLM's class, which it has from 0.31 on."""

        _counter_cls: Any
        _labelnames: list[str]
        per_engine_labelvalues: dict[int, list[object]]

        def __init__(
            self,
            vllm_config: Any,
            metric_types: dict[type, type],
            labelnames: list[str],
            per_engine_labelvalues: dict[int, list[object]],
        ) -> None: ...
else:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole

    EncoderCache = dict
    try:
        from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats
    except ImportError:  # before 0.31 nobody asks for these
        from prometheus_client import Counter

        @dataclass
        class ECConnectorStats:
            """Stands in for vLLM's."""

            data: dict[str, Any] = field(default_factory=dict)

        class ECConnectorPromMetrics:
            """Stands in for vLLM's."""

            def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> None:  # noqa: ARG002
                self._counter_cls = metric_types[Counter]
                self._labelnames = labelnames
                self.per_engine_labelvalues = per_engine_labelvalues


__all__ = [
    "ECConnectorBase",
    "ECConnectorMetadata",
    "ECConnectorPromMetrics",
    "ECConnectorRole",
    "ECConnectorStats",
    "EncoderCache",
    "Engine",
    "Feature",
    "Lookup",
    "Place",
    "adopt_logging",
    "describe_engine",
    "find_device",
    "find_faults",
    "find_host_address",
    "find_lookup",
    "find_place",
    "read_features",
    "share_transfer_engine",
]


# From find_lookup to vLLM: the hook and what guards it lie in between.
_CALLER_FRAMES = 8


@dataclass(frozen=True)
class Engine:
    """What both roles of the connector know of the engine they belong to."""

    engine_id: str
    data_parallel_rank: int
    loader_count: int
    """Ranks that copy embeddings to a device: those of the first pipeline stage (tensor x prefill-context ranks)."""
    is_producer: bool
    is_consumer: bool
    extra_config: Mapping[str, Any]
    identity: ModelIdentity


@dataclass(frozen=True)
class Place:
    """Where this worker stands among the ranks of its engine."""

    loader_index: int
    """Index among the ranks that copy embeddings, -1 when it is not in the first pipeline stage."""

    @property
    def runs_service(self) -> bool:
        """One worker per engine talks to the store for all."""
        return self.loader_index == 0


@dataclass(frozen=True)
class Feature:
    """One media item of a request."""

    item_id: str
    rows: int
    """Embeddings that vLLM gathers for it."""
    end: int
    """First prompt position after its placeholder."""


@dataclass(frozen=True)
class Lookup:
    """The request on whose behalf vLLM asks for an item, and its media items from that one on."""

    request_id: str
    features: list[Feature]


def adopt_logging() -> None:
    """Send this package's log lines where vLLM's go: vLLM configures its own logger only, and no root handler."""
    ours, theirs = logging.getLogger("epd_connector"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False


def describe_engine(vllm_config: Any, namespace: str = "") -> Engine:
    """Read what the connector needs from a VllmConfig."""
    transfer = vllm_config.ec_transfer_config
    parallel = vllm_config.parallel_config
    return Engine(
        engine_id=str(transfer.engine_id),
        data_parallel_rank=int(parallel.data_parallel_rank),
        loader_count=int(parallel.tensor_parallel_size) * int(parallel.prefill_context_parallel_size),
        is_producer=bool(transfer.is_ec_producer),
        is_consumer=bool(transfer.is_ec_consumer),
        extra_config=dict(transfer.ec_connector_extra_config),
        identity=_identify_model(vllm_config, namespace),
    )


def _identify_model(vllm_config: Any, namespace: str) -> ModelIdentity:
    import vllm

    model = vllm_config.model_config
    multimodal = model.multimodal_config
    overrides = model.hf_overrides
    return ModelIdentity(
        model=str(model.model),
        revision=model.revision,
        dtype=str(model.dtype),
        vllm_minor=".".join(vllm.__version__.split(".")[:2]),
        mm_processor_kwargs=(multimodal and multimodal.mm_processor_kwargs) or {},
        hf_overrides=overrides if isinstance(overrides, dict) else {"callable": repr(overrides)},
        video_pruning_rate=multimodal and getattr(multimodal, "video_pruning_rate", None),  # gone in 0.32
        namespace=namespace,
    )


def find_faults(vllm_config: Any) -> list[str]:
    """Return what in vLLM's own configuration would give wrong or no embeddings, with the fix."""
    faults = []
    multimodal = vllm_config.model_config.multimodal_config
    caches_off = multimodal is not None and multimodal.mm_processor_cache_gb == 0
    if caches_off and not vllm_config.cache_config.enable_prefix_caching:
        # vllm/renderers/base.py (0.23.0): ids become a per-process counter, equal for different pictures.
        faults.append(
            "--mm-processor-cache-gb 0 with prefix caching off: vLLM then numbers media items instead of hashing "
            "them, and different pictures would share one embedding; leave --mm-processor-cache-gb above 0 "
            "or pass --enable-prefix-caching"
        )
    if vllm_config.parallel_config.nnodes_within_dp > 1:
        faults.append("one engine over several nodes: not supported, keep all ranks of an engine on one node")
    return faults


def find_place() -> Place:
    """Return this worker's place. Needs vLLM's parallel groups, which exist when vLLM makes the worker connector."""
    from vllm.distributed.parallel_state import get_pcp_group, get_pp_group, get_tp_group

    if not get_pp_group().is_first_rank:
        return Place(loader_index=-1)
    tensor = get_tp_group()
    return Place(loader_index=get_pcp_group().rank_in_group * tensor.world_size + tensor.rank_in_group)


def find_device() -> str:
    """Return the device type that vLLM runs on, e.g. ``cpu`` or ``npu``; torch adds the current index."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def find_host_address() -> str:
    """Return the address other hosts reach this one at (VLLM_HOST_IP, else that of the default route)."""
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def share_transfer_engine(hostname: str) -> Any:
    """Return the one transfer engine of this process on an NPU, made by whoever asks first: us or a KV connector.

    Its class is ``mooncake.engine.TransferEngine``. vllm-ascend 0.23.0 initialises it for the ascend transport, under a
    lock. Raises RuntimeError when that fails.
    """
    from vllm_ascend.distributed.kv_transfer.utils.mooncake_transfer_engine import global_te

    return global_te.get_transfer_engine(hostname, None)


def read_features(request: Any) -> list[Feature]:
    """Return the media items of a request, in the order of vLLM's index."""
    return [
        Feature(
            item_id=feature.identifier,
            rows=_count_rows(feature.mm_position),
            end=feature.mm_position.offset + feature.mm_position.length,
        )
        for feature in request.mm_features
    ]


def awaits_arrival(request: Any) -> bool:
    """Return whether the sender of a request says that its items are being encoded elsewhere at this moment.

    ``vllm_xargs`` of the OpenAI APIs become ``extra_args``; a pooling request has no sampling parameters.
    """
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    return isinstance(extra, dict) and bool(extra.get("ec_items_pending"))


def _count_rows(position: Any) -> int:
    rows = position.get_num_embeds  # a property in 0.14, a method since
    return int(rows() if callable(rows) else rows)


def find_lookup(item_id: str) -> Lookup | None:
    """Return whose item ``has_cache_item`` is asked for, None when that cannot be told.

    vLLM passes the bare id, and no hook before it names the request where ``ensure_cache_available`` is not called.
    But without the request nobody knows how many rows it will gather, and wrong ones end the engine. So this looks for
    the local variable ``request`` of the calling scheduler (vLLM 0.15 to 0.32: _try_schedule_encoder_inputs, which
    vllm-ascend 0.23 leaves as it is).
    """
    request = _find_callers_request()
    features = [] if request is None else read_features(request)
    indices = [index for index, feature in enumerate(features) if feature.item_id == item_id]
    if not indices or len({features[index].rows for index in indices}) > 1:
        return None
    return Lookup(str(request.request_id), features[indices[0] :])


def _find_callers_request() -> Any:
    frame = sys._getframe(1)
    for _ in range(_CALLER_FRAMES):
        if hasattr(frame.f_locals.get("request"), "mm_features"):
            return frame.f_locals["request"]
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
