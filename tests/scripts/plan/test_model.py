"""Sizes from config.json, against the published sizes of the models they are for."""

import json

import pytest

from epd.errors import StepError
from epd.plan import model
from fakes.models import PUBLISHED_GB, QWEN3_VL_8B, QWEN25_VL_7B


@pytest.mark.parametrize(("config", "published_gb"), PUBLISHED_GB.values(), ids=PUBLISHED_GB)
def test_weights_are_within_two_percent_of_the_published_files(config, published_gb):
    size = model.from_config("m", config)
    assert size.weights_bytes / 1e9 == pytest.approx(published_gb, rel=0.02)
    assert not size.exact


def test_keys_values_and_embeddings():
    size = model.from_config("m", QWEN25_VL_7B)
    assert size.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert size.kv_bytes_per_card(2) == size.kv_bytes_per_token // 2
    assert size.kv_bytes_per_card(8) == size.kv_bytes_per_token // 4
    assert size.embedding_bytes_per_token == 3584 * 2
    assert size.picture_tokens == 1024 * 1024 // 28**2


def test_deepstack_layers_are_part_of_an_embedding():
    assert model.from_config("m", QWEN3_VL_8B).embedding_bytes_per_token == 4096 * 4 * 2


def test_a_folder_with_weights_is_exact(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_VL_7B))
    for name, size in (("model-1.safetensors", 1000), ("model-2.safetensors", 234)):
        (tmp_path / name).write_bytes(b"\0" * size)
    found = model.read_folder(tmp_path)
    assert (found.weights_bytes, found.exact, found.name) == (1234, True, tmp_path.name)
    assert found.weights_mib(1) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"vision_config": {}}', '{"hidden_size": 1}'])
def test_a_config_without_the_shapes_is_refused_with_a_way_out(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StepError) as caught:
        model.read_folder(tmp_path)
    assert caught.value.fix
