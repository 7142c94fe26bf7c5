"""What vLLM calls against what the connector has, with vLLM's own classes."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.config import CacheConfig, ECTransferConfig, ParallelConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.multimodal.inputs import PlaceholderRange

from epd_connector import __version__, compat
from epd_connector.config import ConfigError
from epd_connector.connector import ECMooncakeStoreConnector
from epd_connector.metadata import StepMetadata

ROOT = Path(__file__).parents[2]
VLLM = tuple(int(part) for part in vllm.__version__.split(".")[:2])


def make_config(
    *,
    role: str = "ec_consumer",
    extra: dict[str, Any] | None = None,
    cache_gb: float = 4,
    prefix_caching: bool = True,
    **model: Any,
) -> Any:
    """vLLM's own config classes; the model's is plain, because the real one reads a model from disk."""
    model_config = {
        "model": "some/model",
        "revision": None,
        "dtype": "torch.bfloat16",
        "hf_overrides": {},
        "multimodal_config": MultiModalConfig(mm_processor_cache_gb=cache_gb),
        **model,
    }
    return SimpleNamespace(
        ec_transfer_config=ECTransferConfig(
            ec_connector="ECMooncakeStoreConnector",
            ec_connector_module_path="epd_connector.connector",
            ec_role=role,  # type: ignore[arg-type]
            ec_connector_extra_config={"master_server_address": "127.0.0.1:1", **(extra or {})},
        ),
        parallel_config=ParallelConfig(),
        cache_config=CacheConfig(enable_prefix_caching=prefix_caching),
        model_config=SimpleNamespace(**model_config),
    )


def test_every_abstract_method_is_there() -> None:
    assert not inspect.isabstract(ECMooncakeStoreConnector)


OVERRIDDEN = sorted(
    name for name in vars(ECMooncakeStoreConnector) if name in vars(ECConnectorBase) and not name.startswith("_")
)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_hooks_take_what_vllm_passes(name: str) -> None:
    ours, theirs = getattr(ECMooncakeStoreConnector, name), getattr(ECConnectorBase, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_hooks_that_the_design_rests_on_are_called_by_this_vllm() -> None:
    from vllm.v1.core.sched import scheduler
    from vllm.v1.worker import ec_connector_model_runner_mixin

    called = inspect.getsource(scheduler) + inspect.getsource(ec_connector_model_runner_mixin)
    for hook in (
        "has_cache_item" if VLLM >= (0, 15) else "has_caches",
        *(("ensure_cache_available", "shutdown") if VLLM >= (0, 23) else ()),
        "update_state_after_alloc",
        "build_connector_meta",
        "start_load_caches",
        "save_caches",
        "get_finished",
    ):
        assert f"connector.{hook}(" in called


def test_vllm_finds_the_class_by_its_module_path() -> None:
    assert ECConnectorFactory.get_connector_class(make_config().ec_transfer_config) is ECMooncakeStoreConnector


def test_scheduler_process_does_not_load_the_workers_side() -> None:
    code = (
        "import sys, test_contract\n"
        "from epd_connector.connector import ECMooncakeStoreConnector\n"
        "for role in ('ec_consumer', 'ec_producer'):\n"
        "    config = test_contract.make_config(role=role)\n"
        "    ECMooncakeStoreConnector(config, test_contract.ECConnectorRole.SCHEDULER)\n"
        "names = ('mooncake', 'epd_connector.worker', 'epd_connector.service', 'epd_connector.store.mooncake')\n"
        "print('loaded:', [name for name in names if name in sys.modules])"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "loaded: []" in ended.stdout, ended.stderr


@pytest.mark.parametrize("role", [ECConnectorRole.SCHEDULER, ECConnectorRole.WORKER])
def test_colliding_ids_are_refused(role: ECConnectorRole) -> None:
    config = make_config(cache_gb=0, prefix_caching=False)
    with pytest.raises(
        ConfigError, match=r"--mm-processor-cache-gb 0 with prefix caching off.*--enable-prefix-caching"
    ):
        ECMooncakeStoreConnector(config, role)


@pytest.mark.parametrize(("cache_gb", "prefix_caching"), [(0, True), (4, False)])
def test_hashed_ids_are_accepted(cache_gb: float, prefix_caching: bool) -> None:
    assert compat.find_faults(make_config(cache_gb=cache_gb, prefix_caching=prefix_caching)) == []


def test_faults_of_both_configurations_come_together() -> None:
    config = make_config(cache_gb=0, prefix_caching=False, extra={"slab_size_mb": 0})
    with pytest.raises(ConfigError) as caught:
        ECMooncakeStoreConnector(config, ECConnectorRole.SCHEDULER)
    assert len(caught.value.faults) == 2


def test_identity_is_shared_between_roles_and_differs_between_models() -> None:
    def digest(**changes: Any) -> str:
        config = make_config(**changes)
        return compat.describe_engine(config, str(changes.get("extra", ""))).identity.digest()

    assert digest(role="ec_consumer") == digest(role="ec_producer")
    pruned = MultiModalConfig(video_pruning_rate=0.5)
    scaled = MultiModalConfig(mm_processor_kwargs={"max_pixels": 100})
    changes: list[dict[str, Any]] = [
        {"model": "other"},
        {"revision": "main"},
        {"dtype": "torch.float16"},
        {"multimodal_config": pruned},
        {"multimodal_config": scaled},
        {"hf_overrides": {"a": 1}},
        {"extra": {"namespace": "tenant"}},
    ]
    assert len({digest(), *(digest(**change) for change in changes)}) == len(changes) + 1


def test_rows_and_end_come_from_the_placeholder() -> None:
    import torch

    mask = torch.tensor([False, True, True, False, True])
    request = SimpleNamespace(
        mm_features=[SimpleNamespace(identifier="a", mm_position=PlaceholderRange(offset=7, length=5, is_embed=mask))]
    )
    assert compat.read_features(request) == [compat.Feature("a", rows=3, end=12)]


def test_request_is_found_where_vllms_scheduler_asks() -> None:
    """Through vLLM's own method, with everything around it faked that it reads before it asks."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[compat.Lookup | None] = []

    class Asked:
        def has_cache_item(self, identifier: str) -> bool:
            found.append(compat.find_lookup(identifier))
            return False

        def has_caches(self, request: Any) -> list[bool]:  # vLLM 0.14
            return [self.has_cache_item(feature.identifier) for feature in request.mm_features]

    cache = SimpleNamespace(
        check_and_update_cache=lambda *_: False,
        can_allocate=lambda *_: True,
        get_cached_num_encoder_embeds=lambda *_: None,
    )
    scheduler = SimpleNamespace(
        ec_connector=Asked(),
        encoder_cache_manager=cache,
        is_encoder_decoder=False,
        scheduler_config=SimpleNamespace(disable_chunked_mm_input=False),
        use_eagle=False,
    )
    features = [
        SimpleNamespace(identifier=name, mm_position=PlaceholderRange(offset=10 * index, length=4 + index))
        for index, name in enumerate("ab")
    ]
    request = SimpleNamespace(request_id="r", mm_features=features, has_encoder_inputs=True)
    Scheduler._try_schedule_encoder_inputs(scheduler, request, 0, 100, 1000)  # type: ignore[arg-type]
    a, b = compat.Feature("a", 4, 4), compat.Feature("b", 5, 15)
    assert found == [compat.Lookup("r", [a, b]), compat.Lookup("r", [b])]


def test_all_items_at_once_are_answered_one_by_one(connector: ECMooncakeStoreConnector) -> None:
    """vLLM 0.14 asks for a whole request; what is below the computed tokens is not looked up."""
    features = [
        SimpleNamespace(identifier=name, mm_position=PlaceholderRange(offset=10 * index, length=4))
        for index, name in enumerate("ab")
    ]
    request = SimpleNamespace(request_id="r", mm_features=features, num_computed_tokens=10)
    assert connector.has_caches(request) == [False, False]
    assert events(connector) == {"epd_ec_misses|link_down": 1}


def test_request_that_uses_an_id_for_two_sizes_is_not_looked_up() -> None:
    features = [
        SimpleNamespace(identifier="a", mm_position=PlaceholderRange(offset=0, length=length)) for length in (4, 5)
    ]
    request = SimpleNamespace(request_id="r", mm_features=features)  # noqa: F841 - found in this frame
    assert compat.find_lookup("a") is None
    assert compat.find_lookup("b") is None


def events(connector: ECMooncakeStoreConnector) -> dict[str, float]:
    """Everything that was counted, but for how long hooks took."""
    return {key: sum_ for key, sum_ in connector._metrics.snapshot().items() if "_hook_" not in key}


@pytest.fixture
def connector() -> ECMooncakeStoreConnector:
    return ECMooncakeStoreConnector(make_config(), ECConnectorRole.SCHEDULER)


def test_no_exception_reaches_the_engine(connector: ECMooncakeStoreConnector) -> None:
    """Each hook is handed an object that has nothing vLLM's would have."""
    broken: Any = object()
    assert connector.ensure_cache_available(broken, 0) is True
    assert connector.has_cache_item(broken) is False
    connector.update_state_after_alloc(broken, 0)
    assert connector.build_connector_meta(broken) == StepMetadata()
    connector.bind_connector_metadata(StepMetadata(1, (("a", broken),)))  # type: ignore[attr-defined]
    connector.start_load_caches({})
    connector.save_caches({}, "a")
    assert connector.get_finished(set()) == (None, None)
    connector.shutdown()
    connector.shutdown()


def test_items_below_the_computed_tokens_are_not_asked_for(connector: ECMooncakeStoreConnector) -> None:
    request = SimpleNamespace(
        request_id="r",
        mm_features=[SimpleNamespace(identifier="a", mm_position=PlaceholderRange(offset=0, length=5))],
    )
    assert connector.ensure_cache_available(request, 5)
    assert events(connector) == {}
    assert connector.ensure_cache_available(request, 4)
    assert events(connector) == {"epd_ec_misses|link_down": 1}


def test_version_is_that_of_the_distribution() -> None:
    lines = dict(line.split("=", 1) for line in (ROOT / "docker/versions.env").read_text().splitlines() if "=" in line)
    assert __version__ == lines["EPD_VERSION"]
    assert f'version = "{__version__}"' in (ROOT / "connector/pyproject.toml").read_text()
