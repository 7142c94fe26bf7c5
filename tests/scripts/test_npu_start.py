"""All that `make deploy-1e1p1d` does on an NPU server before and after it has images, on servers that are folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.npu_hosts import FakeHost

ROOT = Path(__file__).resolve().parents[2]
START = """
import json, sys
from pathlib import Path
from epd import cli, context, host, images, inspection, planning, versions
from epd.machine import Machine

machine = Machine(Path(sys.argv[1]))
found = versions.load(context.ROOT / "docker" / "versions.env")
it = context.Context(found, host.distribution(), True, machine)
hardware = planning.choose_hardware("", machine)
planned = planning.make(it.settings, hardware, machine)
inspection.check_host(it, planned)
cli.write_dotenv(it, planned, images.tags(context.ROOT, images.served(hardware), it.bake))
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project, and a model where its recipe looks for it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("scripts", "compose", "docker", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    model = folder / "model-files" / "Qwen3-VL-30B-A3B-Instruct"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    text = {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "vocab_size": 151936, "max_position_embeddings": 262144,
    }  # fmt: skip
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "spatial_merge_size": 2}
    (model / "config.json").write_text(json.dumps({"text_config": text, "vision_config": vision}))
    return folder


def run(checkout, *words, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_", "HF_"))}
    return subprocess.run(words, cwd=checkout, env=clean | environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_a_recipe_becomes_a_stack_that_compose_understands(hardware, checkout, tmp_path):
    fake = FakeHost(tmp_path / "host", hardware)
    fake.image_labels = {"org.ascend-epd.hardware": "any"}
    fake.write_docker()
    fake.file("/dev/null")
    fake.file(f"{checkout}/model-files/Qwen3-VL-30B-A3B-Instruct/config.json")
    environ = {"MODEL_RECIPE": "qwen3-vl-30b-a3b", "TOPOLOGY": "1e1p1d", "EPD_HOST": "node-a"}
    done = run(checkout, sys.executable, "-c", START, str(fake.root), PYTHONPATH="scripts", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 FAIL" in done.stdout

    config = run(checkout, "docker", "compose", "config", "--format", "json")
    assert config.returncode == 0, config.stderr
    services = json.loads(config.stdout)["services"]
    kinds = {"encode-0": hardware, "prefill-0": hardware, "decode-0": hardware, "proxy": "proxy"}
    kinds |= {"mooncake-master": "store", "mooncake-store": "store"}
    assert {name: service["image"].partition(":")[0] for name, service in services.items()} == {
        name: f"ascend-epd-{kind}" for name, kind in kinds.items()
    }
    for name in ("encode-0", "prefill-0", "decode-0"):
        service = services[name]
        assert service["environment"]["EPD_TENSOR_PARALLEL_SIZE"] == "2"
        assert service["environment"]["HCCL_BUFFSIZE"] == "1024"
        assert service["environment"]["EPD_SERVED_MODEL_NAME"] == "Qwen3-VL-30B-A3B-Instruct"
        assert service.get("environment", {}).get("EPD_EXPERT_PARALLEL") == (None if name == "encode-0" else "1")
        assert len([device for device in service["devices"] if device["source"][-1].isdigit()]) == 2
        assert service["init"] is True
