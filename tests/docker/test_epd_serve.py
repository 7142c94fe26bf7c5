"""The role entrypoint: what runs, what is refused, what the health check says."""

import json
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme

from epd_serve import commandline, health, probe, vllm
from epd_serve.roles import VLLM_ROLES
from epd_serve.settings import ConfigurationError, read_settings

LAUNCHER = Path(__file__).resolve().parents[2] / "docker" / "serve" / "epd-serve"


@pytest.fixture
def model(tmp_path):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    return str(tmp_path / "my-model")


def command(role, environ=(), arguments=()):
    settings = read_settings(role, dict(environ))
    return commandline.build_command(role, settings, arguments)


def option(words, name):
    return words[words.index(name) + 1]


@pytest.mark.parametrize("role", VLLM_ROLES)
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


def test_embeddings_can_be_kept_in_a_shared_directory(model, tmp_path):
    environ = {"EPD_MODEL": model, "EPD_EC_STORE": "shared_dir", "EPD_STORE_SIZE_MB": "64"}
    with pytest.raises(ConfigurationError, match="EPD_EC_SHARED_DIR='/ec': no directory there"):
        command("encode", environ)
    extra = json.loads(
        option(command("encode", environ | {"EPD_EC_SHARED_DIR": str(tmp_path)}), "--ec-transfer-config")
    )["ec_connector_extra_config"]
    assert extra["store"] == "shared_dir"
    assert extra["shared_dir_path"] == str(tmp_path)
    assert extra["shared_dir_size_mb"] == 64
    assert "master_server_address" not in extra
    assert "EPD_EC_SHARED_DIR" not in str(command("decode", environ))  # a role without embeddings does not need it


@pytest.mark.parametrize(("value", "copies"), [("", False), ("0", False), ("1", True)])
def test_a_cpus_instances_can_copy_embeddings_as_an_npus_do(value, copies, model):
    words = command("encode", {"EPD_MODEL": model, "EPD_EC_COPY_IN_HOOKS": value})
    extra = json.loads(option(words, "--ec-transfer-config"))["ec_connector_extra_config"]
    assert extra["copy_in_hooks"] is copies


def test_vllms_own_connector_can_be_chosen(model, tmp_path):
    environ = {"EPD_MODEL": model, "EPD_EC_STORE": "example"}
    with pytest.raises(ConfigurationError, match="EPD_EC_SHARED_DIR='/ec': no directory there"):
        command("encode", environ)
    words = command("encode", environ | {"EPD_EC_SHARED_DIR": str(tmp_path)})
    assert json.loads(option(words, "--ec-transfer-config")) == {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_producer",
        "ec_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }


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
    with pytest.raises(ConfigurationError) as caught:
        read_settings("encode", environ)
    message = str(caught.value)
    for part in ("EPD_HARDWARE='z9'", "EPD_PORT='http'", "EPD_ADVERTISE_HOST", "'/nowhere'", "EPD_EXTRA_ARGS"):
        assert part in message
    assert message.count("expected") >= 4


NPU = {"EPD_MODEL": "Qwen/Qwen2.5-VL-7B-Instruct", "EPD_HARDWARE": "a2", "EPD_ADVERTISE_HOST": "10.0.0.7"}


def environment(role, environ):
    return vllm.environment(role, read_settings(role, environ))


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_an_encoder_on_an_npu_keeps_no_kv_cache_and_loads_the_whole_model(hardware):
    words = command("encode", NPU | {"EPD_HARDWARE": hardware, "EPD_MAX_NUM_SEQS": "16"})
    assert option(words, "--gpu-memory-utilization") == "0.01"
    assert option(words, "--max-num-seqs") == "128"
    assert words.count("--max-num-seqs") == 1
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(words)
    assert "--mm-encoder-only" not in words


def test_on_an_npu_vllm_ascend_brings_the_layerwise_connector_and_both_sizes_are_told():
    environ = NPU | {"EPD_TENSOR_PARALLEL_SIZE": "2", "EPD_PEER_TENSOR_PARALLEL_SIZE": "4", "EPD_EXPERT_PARALLEL": "1"}
    environ |= {"EPD_PEER_DATA_PARALLEL_SIZE": "2"}
    sizes = {}
    for role in ("prefill", "decode"):
        words = command(role, environ)
        assert option(words, "--tensor-parallel-size") == "2"
        assert "--data-parallel-size" not in words
        assert "--enable-expert-parallel" in words
        config = json.loads(option(words, "--kv-transfer-config"))
        assert "kv_connector_module_path" not in config
        sizes[role] = config["kv_connector_extra_config"]
    own, peer = {"dp_size": 1, "tp_size": 2}, {"dp_size": 2, "tp_size": 4}
    assert sizes["prefill"] == {"prefill": own, "decode": peer}
    assert sizes["decode"] == {"prefill": peer, "decode": own}


def test_on_an_npu_the_address_reaches_hccl_and_a_name_is_refused():
    found = environment("decode", NPU | {"EPD_INTERFACE": "enp3s0"})
    assert (found["VLLM_HOST_IP"], found["HCCL_IF_IP"]) == ("10.0.0.7", "10.0.0.7")
    assert found["HCCL_SOCKET_IFNAME"] == "enp3s0"
    assert found["OMP_NUM_THREADS"] == "10"
    assert environment("encode", NPU)["OMP_NUM_THREADS"] == "1"
    with pytest.raises(ConfigurationError, match="expected an IP address"):
        read_settings("encode", NPU | {"EPD_ADVERTISE_HOST": "encode-0"})


def test_ports_and_addresses_of_a_host_network_are_all_told():
    environ = {"EPD_MOONCAKE_HOST": "10.0.0.7", "EPD_MOONCAKE_RPC_PORT": "8501", "EPD_MOONCAKE_METADATA_PORT": "8502"}
    environ |= {"EPD_MOONCAKE_METRICS_PORT": "8503", "EPD_STORE_PORT": "8511", "EPD_STORE_HTTP_PORT": "8512"}
    master, store = command("mooncake-master", environ), command("mooncake-store", environ)
    assert {"--rpc_port=8501", "--http_metadata_server_port=8502", "--metrics_port=8503"} <= set(master)
    assert {"--port=8511", "--http_port=8512", "--master_server_address=10.0.0.7:8501"} <= set(store)
    extra = json.loads(option(command("encode", NPU | environ), "--ec-transfer-config"))["ec_connector_extra_config"]
    assert extra["master_server_address"] == "10.0.0.7:8501"
    words = command("encode", {**environ, "EPD_MODEL": "hub/id"})
    extra = json.loads(option(words, "--ec-transfer-config"))["ec_connector_extra_config"]
    assert extra["metadata_server"] == "http://10.0.0.7:8502/metadata"


def test_on_an_npu_all_clients_of_the_pool_find_each_other_by_handshake():
    """The connector shares vllm-ascend's transfer engine, which knows no metadata server."""
    environ = NPU | {"EPD_MOONCAKE_HOST": "10.0.0.7"}
    extra = json.loads(option(command("encode", environ), "--ec-transfer-config"))["ec_connector_extra_config"]
    assert extra["metadata_server"] == "P2PHANDSHAKE"
    assert "--metadata_server=P2PHANDSHAKE" in command("mooncake-store", environ)


@pytest.mark.parametrize(
    ("role", "environ", "url"),
    [
        ("encode", {"EPD_PORT": "8100"}, "http://127.0.0.1:8100/health"),
        ("encode", {"EPD_BIND_HOST": "10.0.0.7"}, "http://10.0.0.7:8000/health"),
        ("proxy", {"EPD_BIND_HOST": "fd00::7"}, "http://[fd00::7]:8000/health"),
        ("proxy", {"EPD_PROXY_TLS_CERT": "/run/secrets/tls.crt"}, "https://127.0.0.1:8000/health"),
        ("encode", {"EPD_PROXY_TLS_CERT": "/run/secrets/tls.crt"}, "http://127.0.0.1:8000/health"),
        ("mooncake-master", {"EPD_MOONCAKE_METRICS_PORT": "8503"}, "http://127.0.0.1:8503/health"),
        ("mooncake-store", {"EPD_BIND_HOST": "10.0.0.7"}, "http://127.0.0.1:9300/health"),
    ],
)
def test_health_is_asked_where_the_role_listens(role, environ, url, model):
    settings = read_settings(role, {"EPD_MODEL": model} | environ)
    assert health.url(role, settings) == url


def run(*words, **environ):
    return subprocess.run([LAUNCHER, *words], capture_output=True, text=True, env=environ, check=False)


def test_print_shows_environment_and_command_and_runs_nothing(model):
    done = run("--print", "encode", EPD_MODEL=model, OMP_NUM_THREADS="4")
    assert done.returncode == 0
    assert done.stdout.startswith("OMP_NUM_THREADS=4 \\\n")
    assert "vllm.entrypoints.openai.api_server \\\n    --model" in done.stdout


def test_a_variable_that_the_image_empties_has_the_role_s_default():
    """The vendor's image sets OMP_NUM_THREADS for all roles; ours can only empty it."""
    environ = {"EPD_MODEL": "org/model", "EPD_HARDWARE": "a2", "EPD_ADVERTISE_HOST": "10.0.0.7"}
    assert "OMP_NUM_THREADS=10 " in run("--print", "prefill", OMP_NUM_THREADS="", **environ).stdout
    assert "OMP_NUM_THREADS=4 " in run("--print", "prefill", OMP_NUM_THREADS="4", **environ).stdout


@pytest.fixture
def image_python(tmp_path):
    """A `python` that counts two cards, and cannot import what `broken` names; it says what became of vLLM."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()

    def make(broken="nothing"):
        program.write_text(
            "#!/bin/sh\n"
            f'case "$*" in *{broken}*) echo "ImportError: libhccl.so: not found" >&2; exit 1;;\n'
            '*device_count*) echo "a warning"; echo 2;; *import*) ;; *) echo "started vllm";; esac\n'
        )
        program.chmod(0o755)
        return {"PATH": f"{program.parent}:/usr/bin:/bin", "TMPDIR": str(tmp_path)}

    return make


def test_on_an_npu_cards_and_libraries_are_looked_at_before_vllm_starts(image_python):
    image = image_python()
    a5 = NPU | {"EPD_HARDWARE": "a5"}  # which asks for no /etc/hccn.conf
    good = run("prefill", **image, EPD_TENSOR_PARALLEL_SIZE="2", **a5)
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "started vllm")
    wrong = run("prefill", **image, EPD_TENSOR_PARALLEL_SIZE="4", **NPU)
    assert wrong.returncode == 2
    assert "this container sees 2 cards; expected 4 (tensor-parallel 4 x data-parallel 1)" in wrong.stderr
    assert "started vllm" not in wrong.stdout
    skipped = run("prefill", **image, EPD_TENSOR_PARALLEL_SIZE="4", EPD_SKIP_PROBE="1", **NPU)
    assert "started vllm" in skipped.stdout


@pytest.mark.parametrize(
    ("broken", "role", "message"),
    [
        ("mooncake.engine", "decode", "mooncake.engine cannot be imported: ImportError: libhccl.so: not found"),
        ("torch_npu", "encode", "the cards cannot be counted: ImportError: libhccl.so: not found"),
    ],
)
def test_a_library_that_is_missing_is_named_with_where_it_comes_from(broken, role, message, image_python):
    done = run(role, **image_python(broken), EPD_TENSOR_PARALLEL_SIZE="2", **NPU)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Fix:" in done.stderr
    if role == "decode":
        assert "mooncake" not in run("encode", **image_python(broken), EPD_TENSOR_PARALLEL_SIZE="2", **NPU).stderr


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
@pytest.mark.parametrize("role", ["encode", "prefill", "decode"])
def test_without_addresses_of_the_cards_nothing_starts_that_transfers(role, hardware, image_python, tmp_path):
    settings = read_settings(role, NPU | {"EPD_HARDWARE": hardware, "EPD_TENSOR_PARALLEL_SIZE": "2"})
    conf, image = tmp_path / "hccn.conf", image_python()
    for text, well in (("", False), ("address_0=10.1.0.1\n", True)):
        conf.write_text(text)
        faults = probe.find_faults(role, settings, image, hccn_conf=conf)
        refused = not well and role != "encode" and hardware != "a5"
        assert [fault.split(" has")[0] for fault in faults] == [str(conf)] * refused
    conf.unlink()
    assert bool(probe.find_faults(role, settings, image, hccn_conf=conf)) == (role != "encode" and hardware != "a5")


def test_without_npus_nothing_is_probed(image_python):
    done = run("encode", **image_python("device_count"), EPD_MODEL="org/model")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "started vllm")


def test_an_unknown_role_is_refused_with_the_list():
    done = run("encoder")
    assert done.returncode == 2
    assert "role 'encoder': expected one of encode, prefill-decode" in done.stderr


@pytest.fixture
def served():
    """The URL of a server whose /health answers with the status in `answer`, that, and the server."""
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
    yield f"http://127.0.0.1:{server.server_port}/health", answer, server
    server.shutdown()
    server.server_close()


def test_health_of_a_proxy_with_tls(served, tmp_path: Path):
    url, _, server = served
    ca = trustme.CA()
    ca.issue_cert("clients-call-it-so.test").configure_cert(context := ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    health.remember("proxy", url.replace("http:", "https:"), tmp_path)
    assert health.check(tmp_path)[0] is False  # it speaks plain HTTP yet
    server.socket = context.wrap_socket(server.socket, server_side=True)
    assert health.check(tmp_path) == (True, "proxy: ready")


def test_hosts_of_media_go_to_vllm_and_redirects_do_not_lead_around_them(model):
    settings = read_settings("encode", {"EPD_MODEL": model, "EPD_ALLOWED_MEDIA_DOMAINS": "a.test b.test"})
    words = vllm.command("encode", settings)
    at = words.index("--allowed-media-domains")
    assert words[at + 1 : at + 4] == ["a.test", "b.test", "--no-enable-prefix-caching"]
    assert vllm.environment("encode", settings)["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    plain = read_settings("encode", {"EPD_MODEL": model})
    assert "--allowed-media-domains" not in vllm.command("encode", plain)
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS" not in vllm.environment("encode", plain)


def test_health_tells_loading_from_ready_from_dead(tmp_path: Path, served):
    url, answer, _ = served
    assert health.check(tmp_path)[0] is False  # nothing was started

    health.remember("encode", url, tmp_path)
    answer["status"] = 503
    healthy, sentence = health.check(tmp_path)
    assert (healthy, "loading for" in sentence) == (False, True)

    answer["status"] = 200
    assert health.check(tmp_path) == (True, "encode: ready")

    answer["status"] = 503
    healthy, sentence = health.check(tmp_path)
    assert (healthy, "dead: it was ready" in sentence) == (False, True)

    health.remember("encode", url, tmp_path)  # the container restarts
    assert "loading" in health.check(tmp_path)[1]


def test_libraries_that_an_image_wants_preloaded_are_preloaded_in_vllm(tmp_path, monkeypatch, model):
    folder = tmp_path / "preload"
    monkeypatch.setattr(vllm, "PRELOAD", folder)
    settings = read_settings("encode", {"EPD_MODEL": model})
    assert "LD_PRELOAD" not in vllm.environment("encode", settings)
    folder.mkdir()
    for name in ("libtwo.so", "libone.so.4"):
        (folder / name).touch()
    assert vllm.environment("encode", settings)["LD_PRELOAD"] == f"{folder}/libone.so.4:{folder}/libtwo.so"
