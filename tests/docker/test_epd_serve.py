"""The role entrypoint: what runs, what is refused, what the health check says."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import epd_serve


@pytest.fixture
def model(tmp_path):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    return str(tmp_path / "my-model")


def command(role, environ=(), arguments=()):
    settings = epd_serve.read_settings(role, dict(environ))
    return epd_serve.build_command(role, settings, arguments)


def option(words, name):
    return words[words.index(name) + 1]


@pytest.mark.parametrize("role", epd_serve.VLLM_ROLES)
def test_every_vllm_role_serves_the_model_and_keeps_request_ids(role, model):
    words = command(role, {"EPD_MODEL": model, "EPD_MAX_MODEL_LEN": "2048"})
    assert words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(words, "--model") == model
    assert option(words, "--served-model-name") == "my-model"
    assert option(words, "--max-model-len") == "2048"
    assert "--enable-request-id-headers" in words


@pytest.mark.parametrize(
    ("role", "ec_role", "kv_role"),
    [
        ("encode", "ec_producer", None),
        ("prefill-decode", "ec_consumer", None),
        ("prefill", "ec_consumer", "kv_producer"),
        ("decode", None, "kv_consumer"),
        ("monolith", None, None),
    ],
)
def test_a_role_decides_which_caches_are_handed_over(role, ec_role, kv_role, model):
    words = command(role, {"EPD_MODEL": model, "EPD_ADVERTISE_HOST": "host-7"})
    ec = json.loads(option(words, "--ec-transfer-config")) if "--ec-transfer-config" in words else {}
    kv = json.loads(option(words, "--kv-transfer-config")) if "--kv-transfer-config" in words else {}
    assert ec.get("ec_role") == ec_role
    assert kv.get("kv_role") == kv_role
    assert ec.get("ec_connector_extra_config", {}).get("local_hostname", "host-7") == "host-7"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_restarted_instance_is_another_engine_to_its_peers(role, model):
    """Prefill keeps a decode instance's addresses by engine id: a fixed one outlives the instance it belonged to."""
    assert "engine_id" not in option(command(role, {"EPD_MODEL": model}), "--kv-transfer-config")


def test_a_hub_id_needs_no_folder():
    words = command("monolith", {"EPD_MODEL": "Qwen/Qwen2.5-VL-7B-Instruct"})
    assert option(words, "--served-model-name") == "Qwen2.5-VL-7B-Instruct"


def test_extra_arguments_come_last_so_that_they_win(model):
    environ = {"EPD_MODEL": model, "EPD_EXTRA_ARGS": "--dtype 'float16'"}
    assert command("encode", environ, ["--seed", "1"])[-4:] == ["--seed", "1", "--dtype", "float16"]


def test_the_store_owns_as_much_memory_as_asked():
    assert "--global_segment_size=2048MB" in command("mooncake-store", {"EPD_STORE_SIZE_MB": "2048"})


def test_all_faults_are_told_at_once():
    environ = {
        "EPD_HARDWARE": "z9",
        "EPD_PORT": "http",
        "EPD_ADVERTISE_HOST": "0.0.0.0",
        "EPD_MODEL": "/nowhere",
        "EPD_EXTRA_ARGS": "'",
    }
    with pytest.raises(epd_serve.ConfigurationError) as caught:
        epd_serve.read_settings("encode", environ)
    message = str(caught.value)
    for part in ("EPD_HARDWARE='z9'", "EPD_PORT='http'", "EPD_ADVERTISE_HOST", "'/nowhere'", "EPD_EXTRA_ARGS"):
        assert part in message
    assert message.count("expected") >= 4


def run(*words, **environ):
    return subprocess.run(
        [sys.executable, epd_serve.__file__, *words], capture_output=True, text=True, env=environ, check=False
    )


def test_print_shows_environment_and_command_and_runs_nothing(model):
    done = run("--print", "encode", EPD_MODEL=model, OMP_NUM_THREADS="4")
    assert done.returncode == 0
    assert done.stdout.startswith("OMP_NUM_THREADS=4 \\\n")
    assert "vllm.entrypoints.openai.api_server \\\n    --model" in done.stdout


def test_an_unknown_role_is_refused_with_the_list():
    done = run("encoder")
    assert done.returncode == 2
    assert "role 'encoder': expected one of encode, prefill-decode" in done.stderr


@pytest.fixture
def served():
    """A server whose /health answers with the status in `answer`."""
    answer = {"status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/health", answer
    server.shutdown()
    server.server_close()


def test_health_tells_loading_from_ready_from_dead(tmp_path: Path, served):
    url, answer = served
    assert epd_serve.check_health(tmp_path)[0] is False  # nothing was started

    epd_serve.remember("encode", url, tmp_path)
    answer["status"] = 503
    healthy, sentence = epd_serve.check_health(tmp_path)
    assert (healthy, "loading for" in sentence) == (False, True)

    answer["status"] = 200
    assert epd_serve.check_health(tmp_path) == (True, "encode: ready")

    answer["status"] = 503
    healthy, sentence = epd_serve.check_health(tmp_path)
    assert (healthy, "dead: it was ready" in sentence) == (False, True)

    epd_serve.remember("encode", url, tmp_path)  # the container restarts
    assert "loading" in epd_serve.check_health(tmp_path)[1]
