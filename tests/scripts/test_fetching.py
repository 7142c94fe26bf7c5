"""`make fetch-model` against hubs on loopback that break off, redirect, lie, or want a token."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from epd import fetching
from epd import hub as hubs
from epd.errors import StepError

MODEL = "org/a-model"
WEIGHTS = bytes(range(256)) * 40_000  # 10 MB
FILES = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "sub folder/tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same weights",
    ".gitattributes": b"hidden",
}


class FakeHub:
    """Both hubs' APIs over the files above; `faults` makes it misbehave, `requests` says what it was asked."""

    def __init__(self):
        self.faults = {}
        self.requests = []
        self.paths = {name: {} for name in FILES}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        url = urlsplit(handler.path)
        self.requests.append((handler.path, dict(handler.headers)))
        if self.faults.get("status"):
            self.send(handler, self.faults["status"], b"")
        elif url.path == f"/api/models/{MODEL}/tree/main":
            self.send(handler, 200, json.dumps(self.huggingface()).encode())
        elif url.path == f"/api/v1/models/{MODEL}/repo/files":
            self.send(handler, 200, json.dumps({"Data": {"Files": self.modelscope()}}).encode())
        elif url.path == f"/api/v1/models/{MODEL}/repo":
            self.file(handler, parse_qs(url.query)["FilePath"][0])
        elif url.path.startswith(f"/{MODEL}/resolve/main/"):
            name = unquote(url.path.partition("/resolve/main/")[2])
            if name.endswith(".safetensors") and "cdn" in self.faults:
                handler.send_response(302)
                handler.send_header("Location", f"{self.faults['cdn']}/cdn/{name}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
            else:
                self.file(handler, name)
        elif url.path.startswith("/cdn/"):
            self.file(handler, url.path.removeprefix("/cdn/"))
        else:
            self.send(handler, 404, b"")

    def file(self, handler, name):
        body, start = FILES[name], 0
        if "Range" in handler.headers and not self.faults.get("no_ranges"):
            start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
        part = body[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(part)))
        handler.end_headers()
        cut = self.faults.get("cut_at", 0)
        if cut and len(body) > cut > start and self.faults.get("cuts", 1) > 0:
            self.faults["cuts"] = self.faults.get("cuts", 1) - 1
            handler.wfile.write(part[: cut - start])
            handler.close_connection = True
        else:
            handler.wfile.write(part)

    @staticmethod
    def send(handler, status, body):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def sha256(self, name):
        return self.faults.get("sha256") or hashlib.sha256(FILES[name]).hexdigest()

    def huggingface(self):
        entries = [{"type": "directory", "path": "sub folder", "size": 0}]
        for name, body in FILES.items():
            lfs = {"lfs": {"oid": self.sha256(name)}} if name.endswith((".safetensors", ".bin")) else {}
            entries.append({"type": "file", "path": name, "size": len(body), **lfs})
        return entries + self.faults.get("extra", [])

    def modelscope(self):
        return [
            {"Type": "blob", "Path": name, "Size": len(body), "Sha256": self.sha256(name)}
            for name, body in FILES.items()
        ]


@pytest.fixture
def hub(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeHub()
    yield fake
    fake.close()


def fetch(fake, folder, name="huggingface", token=""):
    source = hubs.hub(name, fake.url, token)
    fetching.download(source, source.list_files(MODEL, ""), folder, pause_s=0.01)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".fetched.json"
    }


WANTED = {name: body for name, body in FILES.items() if name not in ("pytorch_model.bin", ".gitattributes")}


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_what_is_needed_to_serve_arrives_and_anyone_may_read_it(name, hub, tmp_path):
    fetch(hub, tmp_path / "model", name)
    assert content(tmp_path / "model") == WANTED
    for path in (tmp_path / "model").rglob("*"):
        assert path.name == ".fetched.json" or path.stat().st_mode & 0o044 == 0o044, path
    assert (tmp_path / "model" / "sub folder").stat().st_mode & 0o055 == 0o055


def test_a_second_time_nothing_is_downloaded_and_a_changed_file_is(hub, tmp_path):
    fetch(hub, tmp_path)
    hub.requests.clear()
    fetch(hub, tmp_path)
    assert len(hub.requests) == 1  # the list
    (tmp_path / "model.safetensors").write_bytes(b"x" * len(WEIGHTS))
    fetch(hub, tmp_path)
    assert content(tmp_path) == WANTED


def test_a_download_goes_on_where_it_broke_off(hub, tmp_path, capsys):
    hub.faults = {"cut_at": 6_000_000}
    fetch(hub, tmp_path)
    assert content(tmp_path) == WANTED
    ranges = [headers["Range"] for path, headers in hub.requests if "Range" in headers]
    assert len(ranges) == 1
    assert 0 < int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 6_000_000
    assert "going on" in capsys.readouterr().out


def test_the_next_command_goes_on_too_and_a_server_without_ranges_begins_anew(hub, tmp_path):
    hub.faults = {"cut_at": 6_000_000, "cuts": 100}
    (tmp_path / ".model.safetensors.part").write_bytes(WEIGHTS[:6_000_001])  # beyond the cut
    hub.faults["no_ranges"] = True
    hub.faults["cuts"] = 1
    fetch(hub, tmp_path)
    assert content(tmp_path) == WANTED
    assert any("Range" in headers for _, headers in hub.requests)


def test_a_download_that_never_gets_on_ends_with_what_to_do_and_keeps_what_came(hub, tmp_path):
    hub.faults = {"cut_at": 6_000_000, "cuts": 10_000, "no_ranges": True}
    with pytest.raises(StepError, match=r"model.safetensors cannot be fetched[\s\S]*goes on where it broke off"):
        fetch(hub, tmp_path)
    assert (tmp_path / ".model.safetensors.part").stat().st_size == 6_000_000
    assert not (tmp_path / "model.safetensors").exists()


def test_a_file_that_is_another_is_removed_and_refused(hub, tmp_path):
    hub.faults = {"sha256": "0" * 64}
    with pytest.raises(StepError, match=r"model.safetensors is not what the hub says it is"):
        fetch(hub, tmp_path)
    assert not list(tmp_path.glob("*model.safetensors*"))


def test_the_token_is_for_the_hub_alone(hub, tmp_path):
    other = FakeHub()
    try:
        hub.faults = {"cdn": other.url}
        fetch(hub, tmp_path, token="secret")
        assert all(headers["Authorization"] == "Bearer secret" for _, headers in hub.requests)
        assert other.requests
        assert not any("secret" in str(headers) for _, headers in other.requests)
    finally:
        other.close()
    assert content(tmp_path) == WANTED


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", ".ssh/key", "a/../../b"])
def test_a_path_out_of_the_folder_is_left_out(path, hub, tmp_path):
    hub.faults = {"extra": [{"type": "file", "path": path, "size": 3}]}
    files = hubs.hub("huggingface", hub.url).list_files(MODEL, "")
    assert path not in {file.path for file in files}


@pytest.mark.parametrize(("status", "fix"), [(401, "HF_TOKEN"), (404, "check the id"), (500, "try again later")])
def test_a_hub_that_refuses_is_told_with_the_remedy(status, fix, hub):
    hub.faults = {"status": status}
    with pytest.raises(StepError) as caught:
        hubs.hub("huggingface", hub.url).list_files(MODEL, "")
    assert str(status) in caught.value.found
    assert fix in caught.value.fix


def test_a_disk_without_room_is_told_before_anything_is_downloaded(hub, tmp_path):
    huge = hubs.HubFile("model.safetensors", 1 << 60, "", f"{hub.url}/x")
    with pytest.raises(StepError, match=r"not enough room[\s\S]*EPD_MODEL_FILES"):
        fetching.download(hubs.hub("huggingface", hub.url), [huge], tmp_path)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hubs.hub("docker"), "HUB is not usable"),
        (lambda: hubs.hub("huggingface", "file:///etc"), "endpoint is not usable"),
        (lambda: hubs.hub("huggingface", "http://127.0.0.1:1").list_files("../x", ""), "not the id of a model"),
        (lambda: hubs.hub("huggingface", "http://127.0.0.1:1").list_files(MODEL, ""), "cannot be asked"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(StepError, match=message):
        call()


def test_the_command_says_what_to_do_next(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EPD_MODEL_FILES", str(tmp_path))
    monkeypatch.setenv("MODEL", MODEL)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HUB", raising=False)
    monkeypatch.delenv("MODEL_RECIPE", raising=False)
    monkeypatch.setattr(fetching, "ROOT", tmp_path)  # no .env of this checkout
    assert fetching.fetch(None, []) == 0
    said = capsys.readouterr().out
    assert "org/a-model: 4 files, 0.0 GB" in said
    assert "make up MODEL=" in said
    assert content(tmp_path / "a-model") == WANTED
