"""From one host to another: through a registry by digest, and as a folder without a network.

Engine, registry, scripts, compose files and proxy are real; the images start at once and answer their version
(tests/fakes/stand_in.py). Both "hosts" are folders of this machine and share its engine, from which the images are
removed in between; that the engine itself pulls nothing without a network is read from its own record of events.
"""

import time
import urllib.request
from pathlib import Path

import pytest

from epd import image_lock
from smoke import delivery

MANIFEST_TYPES = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with delivery.registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
def clean():
    """Remove the containers and the images that a test made, however it ended."""
    prefixes = []
    yield prefixes.append
    project = f"label=com.docker.compose.project={delivery.PROJECT}"
    for kind, words in (("container", ["rm", "--force", "--volumes"]), ("network", ["rm"]), ("volume", ["rm"])):
        found = delivery.docker(kind, "ls", "--quiet", *["--all"] * (kind == "container"), "--filter", project).split()
        if found:
            delivery.docker(kind, *words, *found)
    for prefix in prefixes:
        delivery.remove_images(prefix)


def test_what_was_pushed_is_started_by_digest_elsewhere_whatever_its_tag_is_by_then(registry, clean, tmp_path):
    prefix = f"{registry}/epd/test/"
    clean(prefix)
    builder = delivery.checkout(tmp_path / "builder", prefix)
    delivery.build_stand_ins(builder, "first")
    builder.make("push", f"REGISTRY={prefix}")
    locked = image_lock.read(builder.folder)
    assert set(locked) == {f"ascend-epd-cpu:{delivery.VERSION}", f"ascend-epd-proxy:{delivery.VERSION}"}
    for name, digest in locked.items():
        url = f"http://{registry}/v2/epd/test/{image_lock.repository(name)}/manifests/{digest}"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": MANIFEST_TYPES})) as answer:
            assert answer.headers["Docker-Content-Digest"] == digest

    delivery.build_stand_ins(builder, "second")
    delivery.docker("push", "--quiet", builder.tags()["cpu"])
    delivery.remove_images(prefix)
    host = delivery.checkout(tmp_path / "host", prefix)
    (host.folder / image_lock.FILE).write_text((builder.folder / image_lock.FILE).read_text())
    began_s = time.time()
    host.make("pull", f"REGISTRY={prefix.rstrip('/')}")
    assert delivery.count_pulls(began_s) == len(locked)
    wanted = {f"{prefix}{image_lock.repository(name)}@{digest}" for name, digest in locked.items()}
    assert host.started_images() == wanted
    assert host.ask() == "first"
    assert "already here" in host.make("up")  # what `make pull` chose stays chosen
    assert host.started_images() == wanted

    (host.folder / image_lock.FILE).unlink()
    host.make("pull")
    assert host.ask() == "second"
    assert image_lock.read(host.folder) != locked


def test_a_bundle_starts_on_a_host_without_a_network(clean, tmp_path):
    prefix = "127.0.0.1:9/no-one-listens-here/"  # an engine that asked for an image would fail
    clean(prefix)
    builder = delivery.checkout(tmp_path / "builder", prefix)
    delivery.build_stand_ins(builder, "from the bundle")
    folder = tmp_path / "disk" / "epd"
    builder.make("bundle", f"REGISTRY={prefix}", f"BUNDLE={folder}")
    delivery.remove_images(prefix)
    host = delivery.Checkout(folder, prefix, builder.port)
    with pytest.raises(RuntimeError, match="cannot pull 127"):
        host.make("up", "EPD_PULL=1", f"REGISTRY={prefix}", network=False)

    began_s = time.time()
    host.make("load", network=False)
    host.make("up", network=False)
    assert delivery.count_pulls(began_s) == 0
    assert host.started_images() == set(host.tags().values())
    assert host.ask() == "from the bundle"

    (Path(folder) / "bundle" / "images.tar").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match=r"images\.tar has another sum"):
        host.make("load", network=False)
