"""From settings to a cluster's files: what is handed on, what is left out and said, what is taken away again."""

from pathlib import Path

import pytest
import yaml

from epd import clustering, settings
from epd.errors import StepError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"EPD_IMAGE": "epd-a2:1", "EPD_PROXY_IMAGE": "epd-proxy:1", "EPD_STORE_IMAGE": "epd-store:1"}


@pytest.fixture
def root(tmp_path):
    for name in ("compose", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = tmp_path / "model-files" / "Qwen3-VL-30B-A3B-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    return tmp_path


def describe(root, hardware="a2", **environ):
    return clustering.describe(settings.load(root, environ), hardware, IMAGES)


def test_settings_reach_the_pods_and_files_of_this_host_do_not(root):
    found = describe(
        root,
        MODEL_RECIPE="qwen3-vl-30b-a3b",
        TOPOLOGY="1e1p1d",
        EPD_DECODE_EXTRA_ARGS="--seed 7",
        EPD_PROXY_MAX_RETRIES="3",
        EPD_PROXY_PORT="9000",
        EPD_PROXY_API_KEYS_FILE="/etc/keys",
        EPD_MEMORY_LIMIT="200g",
    )
    assert found.vllm_environment == {"HCCL_BUFFSIZE": "1024"}
    assert found.extra_args == {"decode": "--seed 7"}
    assert found.proxy_environment == {"EPD_PROXY_MAX_RETRIES": "3"}
    assert (found.model, found.model_folder) == ("/models", "Qwen3-VL-30B-A3B-Instruct")
    assert (found.memory_bytes, found.topology.of("encode").tensor) == (200 << 30, 2)
    assert found.topology.expert_parallel


def test_a_hub_id_and_the_tiny_model_need_no_volume(root):
    hub = describe(root, MODEL="org/model", EPD_NPU_RESOURCE="npu.example/card")
    assert (hub.model, hub.model_folder, hub.npu_resource) == ("org/model", "", "npu.example/card")
    tiny = describe(root, hardware="cpu")
    assert (tiny.model, tiny.model_folder, tiny.npu_resource) == ("/opt/ascend-epd/tiny-model", "", "")
    with pytest.raises(StepError, match="no model to serve on NPUs"):
        describe(root)


def test_a_model_s_folder_may_be_on_the_cluster_s_volume_alone(root):
    for environ in ({}, {"MODEL_RECIPE": "qwen3-vl-8b"}):
        told = clustering.on_a_volume({"MODEL": "/data/Qwen3-VL-8B-Instruct", "TOPOLOGY": "1e1pd", **environ})
        found = describe(root, **told)
        assert (found.model, found.model_folder) == ("/models", "Qwen3-VL-8B-Instruct")
        assert found.served_model_name == "Qwen3-VL-8B-Instruct"
    for model in (str(root), "org/model"):
        assert clustering.on_a_volume({"MODEL": model}) == {"MODEL": model}


def test_what_is_set_and_not_in_the_objects_is_named(root):
    environ = {
        "MODEL": "org/model", "TOPOLOGY": "1e1pd", "HF_TOKEN": "t", "VLLM_API_KEY": "k",
        "HF_ENDPOINT": "https://m.example",
        "EPD_SHM_SIZE": "32g", "EPD_CARDS": "0-3", "EPD_PROXY_TLS_CERT": "/etc/tls.crt", "EPD_PROXY_MAX_QUEUED": "9",
        "EPD_ENCODE_EXTRA_ARGS": "--seed 7", "EPD_DECODE_EXTRA_ARGS": "--seed 8",
    }  # fmt: skip
    loaded = settings.load(root, environ)
    cluster = clustering.describe(loaded, "a2", IMAGES)
    assert cluster.vllm_environment == {"HF_ENDPOINT": "https://m.example"}
    assert clustering.left_out(loaded, cluster) == [
        "EPD_DECODE_EXTRA_ARGS", "EPD_PROXY_TLS_CERT", "EPD_SHM_SIZE", "VLLM_API_KEY",
    ]  # fmt: skip
    usual = settings.load(root, {"MODEL_RECIPE": "qwen3-vl-30b-a3b"})
    assert clustering.left_out(usual, clustering.describe(usual, "a2", IMAGES)) == []
    with pytest.raises(StepError, match="pods share no folder"):
        describe(root, MODEL="org/model", EPD_EC_STORE="shared_dir")


def test_files_of_an_earlier_plan_go(root):
    folder = root / "deploy"
    clustering.write_files(folder, describe(root, MODEL="org/model", TOPOLOGY="1e1p1d"))
    assert (folder / "decode.yaml").exists()
    clustering.write_files(folder, describe(root, MODEL="org/model", TOPOLOGY="1e1pd"))
    assert not (folder / "decode.yaml").exists()
    resources = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert sorted([*resources, "kustomization.yaml"]) == sorted(path.name for path in folder.iterdir())
