"""Starting and waiting, against a made-up docker; the port check and the banner against real sockets."""

import base64
import io
import json
import re
import shlex
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from epd import banner, stack
from epd.errors import CommandError, StepError


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def it(tmp_path, free_port):
    environment = {"COMPOSE_PROJECT_NAME": "p", "COMPOSE_FILE": "compose/x.yaml", "EPD_PROXY_PORT": str(free_port)}
    return stack.Stack(tmp_path, environment)


def docker(programs, inspections, *, up="exit 0", service="encode-0"):
    """Add a docker whose n-th `inspect` tells the n-th state of the container of a stack's only service."""
    states = programs.folder / "states"
    states.mkdir()
    for number, state in enumerate(inspections, start=1):
        document = {"Id": "c1", "State": state, "Config": {"Labels": {"com.docker.compose.service": service}}}
        (states / str(number)).write_text(json.dumps([document | {"RestartCount": state.get("restarts", 0)}]))
    programs.add(
        "docker",
        f"""cd {states}
case "$*" in
  *"config --services") echo {service};;
  *" up "*) {up};;
  ps*) echo c1;;
  logs*) echo "loading weights"; echo "the real reason" >&2;;
  inspect*) n=$(( $(cat n 2>/dev/null || echo 0) + 1 )); test -e $n && echo $n > n; cat $(cat n);;
esac""",
    )


def state(status="running", health=None, code=0, started_at="t1", restarts=0):
    found = {"Status": status, "ExitCode": code, "StartedAt": started_at, "restarts": restarts}
    return found | ({"Health": {"Status": health, "Log": []}} if health else {})


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(stack, "_POLL_S", 0.05)


def test_up_waits_until_all_are_healthy(programs, it, capsys):
    docker(programs, [state("exited", code=137), state("created"), state(health="starting"), state(health="healthy")])
    stack.up(it, timeout_s=20)
    phases = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert phases == ["created", "loading", "healthy"]


def test_up_reports_a_crash_with_its_log(programs, it, capsys):
    docker(programs, [state("created"), state("exited", code=3, started_at="t2")])
    with pytest.raises(StepError, match=r"encode-0 is exited: it ended with exit code 3"):
        stack.up(it, timeout_s=20)
    assert "the real reason" in capsys.readouterr().out


def test_up_ends_after_its_time(programs, it):
    docker(programs, [state(health="starting")])
    with pytest.raises(StepError, match=r"all ready within 1 s[\s\S]*EPD_UP_TIMEOUT_S"):
        stack.up(it, timeout_s=1)


def test_up_reports_what_compose_says(programs, it):
    docker(programs, [state("created")], up="echo 'no such image: x:1'; exit 14")
    with pytest.raises(CommandError, match=r"exit code 14[\s\S]*no such image: x:1"):
        stack.up(it, timeout_s=20)


def test_a_port_in_use_is_named_before_anything_starts(programs, it, free_port):
    docker(programs, [state("created")], service="proxy")
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        with pytest.raises(StepError, match=f"port {free_port} [\\s\\S]*EPD_PROXY_PORT="):
            stack.up(it, timeout_s=20)
    assert not any(" up " in call for call in programs.calls)


@pytest.mark.parametrize("network", ["bridge", "host"])
def test_a_port_that_our_own_proxy_has_is_fine(it, free_port, network):
    proxy = {
        "State": {"Status": "running"},
        "Config": {"Labels": {"com.docker.compose.service": "proxy"}, "Env": [f"EPD_PORT={free_port}"]},
        "HostConfig": {"NetworkMode": "host"},
    }
    if network == "bridge":
        proxy["Config"]["Env"] = ["EPD_PORT=8000"]
        proxy["HostConfig"] = {"NetworkMode": "p_default", "PortBindings": {"8000/tcp": [{"HostPort": str(free_port)}]}}
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", free_port))
        ours.listen()
        stack.check_port(it, [proxy])
        for other in ({"State": {"Status": "exited"}}, {"Config": {**proxy["Config"], "Labels": {}}}):
            with pytest.raises(StepError, match="cannot be used for the proxy"):
                stack.check_port(it, [proxy | other])


def test_a_host_without_the_proxy_needs_no_port_for_it(programs, it, free_port):
    docker(programs, [state("created"), state(health="healthy")])
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        stack.up(it, timeout_s=20)


@pytest.mark.parametrize(
    ("bind", "host"),
    [("", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]"), ("[::1]", "[::1]"), ("192.0.2.7", "192.0.2.7")],
)
def test_the_address_is_the_one_that_the_proxy_is_bound_to(tmp_path, bind, host):
    found = stack.Stack(tmp_path, {"EPD_PROXY_PORT": "8001", "EPD_PROXY_BIND": bind})
    assert found.address == f"http://{host}:8001"
    tls = stack.Stack(tmp_path, {**found.environment, "EPD_PROXY_TLS_CERT": "/etc/tls.crt"})
    assert tls.address == f"https://{host}:8001"


def test_an_address_of_another_machine_is_told_from_a_port_in_use(it):
    elsewhere = stack.Stack(it.root, {**it.environment, "EPD_PROXY_BIND": "192.0.2.7"})  # of TEST-NET-1, nobody's
    with pytest.raises(StepError, match=r"EPD_PROXY_BIND is not an address of this machine[\s\S]*192\.0\.2\.7"):
        stack.check_port(elsewhere, [])


def test_fetch_tells_a_refusal_from_silence(it):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if self.path == "/ready" else 200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "tiny"}]}')

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert stack.fetch(f"{address}/ready")[0] == 503
    assert banner.model_name(address) == "tiny"
    server.shutdown()
    server.server_close()
    assert stack.fetch(f"{address}/ready")[0] == 0
    assert banner.model_name(address) == ""


def test_the_banner_s_commands_are_what_a_shell_and_a_server_understand():
    text = banner.render("http://127.0.0.1:8000", "it's tiny", "1e1pd")
    commands = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("curl")]
    bodies = [json.loads(words[words.index("-d") + 1]) for words in commands]
    assert "make smoke     live tests, on a stack of their own" in text
    assert [body["model"] for body in bodies] == ["it's tiny", "it's tiny"]
    image_url = bodies[1]["messages"][0]["content"][0]["image_url"]["url"]
    data = base64.b64decode(re.fullmatch(r"data:image/png;base64,(.+)", image_url)[1], validate=True)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert (picture.size, picture.mode) == ((56, 56), "RGB")
        assert picture.getpixel((3, 3)) == (0xD0, 0x20, 0x20)
        assert picture.getpixel((3, 50)) == (0x20, 0x20, 0xD0)
