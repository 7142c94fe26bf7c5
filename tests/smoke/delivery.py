"""What the tests of push, pull, bundle and load need: a registry, images that start at once, copies of the project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from epd import apt, bundle, command, images, settings, versions
from smoke.stack import ROOT, free_port

PROJECT = "ascend-epd-delivery-test"
VERSION = versions.load(ROOT / "docker" / "versions.env")["EPD_VERSION"]
_STAND_IN = """\
FROM {proxy}
COPY --chmod=755 stand_in.py /usr/local/bin/epd-serve
ENV STAND_IN_VERSION="{version}"
LABEL org.ascend-epd.inputs="{inputs}"
ENTRYPOINT ["tini", "-g", "--", "epd-serve"]
"""
_PROXY = """\
FROM {proxy}
LABEL org.ascend-epd.inputs="{inputs}"
"""
_CALLERS_OWN = ("REGISTRY", "MODEL", "TOPOLOGY", "BUNDLE", "PIP_INDEX_URL", "TORCH_INDEX_URL")
_LIMIT_S = 300


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run Debian's docker-registry on a loopback port; yield its address. It is unpacked, not installed."""
    program = shutil.which("docker-registry")
    if program is None:
        (archive,) = apt.download(["docker-registry"], folder, ["-o", "APT::Sandbox::User=root"])
        subprocess.run(["dpkg-deb", "-x", archive, str(folder / "unpacked")], check=True)
        program = str(folder / "unpacked" / "usr" / "bin" / "docker-registry")
    address = f"127.0.0.1:{free_port()}"
    config = folder / "config.yml"
    storage = {"filesystem": {"rootdirectory": str(folder / "storage")}}
    config.write_text(json.dumps({"version": 0.1, "storage": storage, "http": {"addr": address}}))
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        _wait(f"http://{address}/v2/", process, folder / "registry.log")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"docker-registry does not answer:\n{log.read_text()}")


@dataclass(frozen=True)
class Checkout:
    """A copy of the project as another host would have it, with a port and a registry of its own."""

    folder: Path
    prefix: str
    """Prefix of the images' names."""
    port: int

    def make(self, *words: str, network: bool = True) -> str:
        """Run make there and return what it printed; without `network`, in a namespace that has loopback alone."""
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EPD_", "COMPOSE_", "MAKE"))
            and name not in ("REGISTRY", "MODEL", "TOPOLOGY", "BUNDLE")
        }
        argv = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words, f"EPD_PROXY_PORT={self.port}"]
        argv += [f"COMPOSE_PROJECT_NAME={PROJECT}", "EPD_HARDWARE=cpu", "EPD_NO_INSTALL=1"]
        if not network:
            argv = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *argv]
        done = subprocess.run(
            argv, cwd=self.folder, env=environ, capture_output=True, text=True, check=False, timeout=_LIMIT_S
        )
        if done.returncode != 0:
            raise RuntimeError(f"make {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def tags(self) -> dict[str, str]:
        """Return the names of the two images."""
        return {name: f"{self.prefix}ascend-epd-{name}:{VERSION}" for name in ("cpu", "proxy")}

    def ask(self) -> str:
        """Return what the stack answers to a text."""
        body = {"model": "stand-in", "messages": [{"role": "user", "content": "Which one are you?"}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    def started_images(self) -> set[str]:
        """Return the names of the images that the containers were started from."""
        ids = docker("ps", "-q", "--filter", f"label=com.docker.compose.project={PROJECT}").split()
        return set(docker("inspect", "--format", "{{.Config.Image}}", *ids).split())


def checkout(folder: Path, prefix: str) -> Checkout:
    """Copy what runs of this project to a folder."""
    for name in bundle.PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    return Checkout(folder, prefix, free_port())


def build_stand_ins(of: Checkout, version: str) -> None:
    """Give the engine images that `make push` takes for its own, and that answer `version`."""
    inputs = images.inputs_hash(settings.load(of.folder, {}))
    proxy = os.environ.get("EPD_PROXY_IMAGE", f"ascend-epd-proxy:{VERSION}")
    for tag, text in ((of.tags()["cpu"], _STAND_IN), (of.tags()["proxy"], _PROXY)):
        dockerfile = text.format(proxy=proxy, inputs=inputs, version=version)
        argv = ["docker", "build", "--quiet", "--tag", tag, "--file", "-", str(ROOT / "tests" / "fakes")]
        subprocess.run(
            argv, input=dockerfile, env={**os.environ, "DOCKER_BUILDKIT": "1"}, text=True, check=True, timeout=_LIMIT_S
        )


def docker(*words: str) -> str:
    """Run a docker command and return what it printed."""
    return command.read("docker", *words, fix="see the test", timeout_s=_LIMIT_S)


def remove_images(prefix: str) -> None:
    """Take the names that begin with a prefix, tags and digests, off all images: those without another name go.

    By name and never by id, as an image may have names that are not ours to take.
    """
    while names := _names(prefix):  # an image's last tag takes its digests along, so one by one
        docker("image", "rm", names[0])


def _names(prefix: str) -> list[str]:
    ids = set(docker("image", "ls", "--all", "--quiet").split())
    found = json.loads(docker("image", "inspect", *ids)) if ids else []
    names = [name for image in found for name in [*(image["RepoTags"] or []), *(image["RepoDigests"] or [])]]
    return [name for name in names if name.startswith(prefix)]


def count_pulls(since: float) -> int:
    """Return how many images the engine has pulled since then, by its own record of events."""
    words = ["--since", f"{since:.0f}", "--until", f"{time.time() + 1:.0f}", "--format", "{{.ID}}"]
    return len(docker("events", "--filter", "type=image", "--filter", "event=pull", *words).split())
