"""Digests: written when images are pushed, obeyed when they are pulled. The real registry is in tests/smoke."""

import json

import pytest

from epd import image_lock, registry
from epd.errors import StepError

A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
TAGS = {"cpu": "r.example:5000/t/cpu:1", "proxy": "r.example:5000/t/proxy:1"}
PREFIX = "r.example:5000/t/"


def docker(programs, *, here="", push=A, pull=A):
    """An engine that has the images `here` (a shell pattern) and pushes and pulls what has these digests."""
    programs.add(
        "docker",
        f"""case "$*" in
  "image inspect"*{here or "no-such"}) echo id;;
  "image inspect"*) exit 1;;
  push*) echo "1: digest: {push} size: 1364";;
  pull*) echo "Digest: {pull}";;
esac""",
    )


def test_pushed_digests_are_written_without_the_registry_s_address_beside_those_of_other_images(programs, tmp_path):
    docker(programs)
    image_lock.write(tmp_path, {"a2:1": B, "cpu:1": B})
    registry.push(tmp_path, TAGS, PREFIX)
    assert image_lock.read(tmp_path) == {"a2:1": B, "cpu:1": A, "proxy:1": A}
    assert [call for call in programs.calls if " push " in call] == [f"docker push {tag}" for tag in TAGS.values()]


def test_a_locked_image_is_pulled_by_its_digest_from_whatever_mirror_and_keeps_a_tag(programs, tmp_path):
    docker(programs)
    image_lock.write(tmp_path, {"cpu:1": A})
    started = registry.pull(tmp_path, {"cpu": "mirror.example/x/cpu:1"}, "mirror.example/x/", anew=True)
    assert started == {"cpu": f"mirror.example/x/cpu@{A}"}
    assert f"docker pull mirror.example/x/cpu@{A}" in programs.calls
    assert f"docker image tag mirror.example/x/cpu@{A} mirror.example/x/cpu:1" in programs.calls


def test_an_image_without_a_line_is_pulled_by_its_tag_and_gets_one(programs, tmp_path):
    docker(programs, pull=B)
    assert registry.pull(tmp_path, TAGS, PREFIX, anew=True)["proxy"] == f"r.example:5000/t/proxy@{B}"
    assert image_lock.read(tmp_path) == {"cpu:1": B, "proxy:1": B}


def test_images_that_are_here_are_pulled_only_when_asked(programs, tmp_path):
    docker(programs, here="cpu:1")
    assert registry.pull(tmp_path, TAGS, PREFIX, anew=False)["cpu"] == TAGS["cpu"]
    assert [call for call in programs.calls if " pull " in call] == [f"docker pull {TAGS['proxy']}"]
    registry.pull(tmp_path, {"cpu": TAGS["cpu"]}, PREFIX, anew=True)
    assert [call for call in programs.calls if " pull " in call][1:] == [f"docker pull {TAGS['cpu']}"]


def test_an_image_of_the_right_name_and_another_digest_is_not_started(programs, tmp_path):
    docker(programs, here="cpu:1")
    image_lock.write(tmp_path, {"cpu:1": B})
    assert registry.pull(tmp_path, {"cpu": TAGS["cpu"]}, PREFIX, anew=False) == {"cpu": f"r.example:5000/t/cpu@{B}"}
    assert f"docker pull r.example:5000/t/cpu@{B}" in programs.calls


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("unauthorized: authentication required", "docker login r.example:5000"),
        ("http: server gave HTTP response to HTTPS client", '"insecure-registries": ["r.example:5000"]'),
        ("x509: certificate signed by unknown authority", "/etc/docker/certs.d/r.example:5000/ca.crt"),
        ("dial tcp: lookup r.example: no such host", "REGISTRY="),
    ],
)
def test_what_a_registry_refuses_comes_with_the_fix_that_fits(said, fix, programs, tmp_path):
    programs.add("docker", f'case "$1" in push|pull) echo "{said}"; exit 1;; *) exit 1;; esac')
    for act in (registry.push, lambda *words: registry.pull(*words, anew=True)):
        with pytest.raises(StepError) as caught:
            act(tmp_path, TAGS, PREFIX)
        assert said in caught.value.found
        assert fix in caught.value.fix
    assert not (tmp_path / image_lock.FILE).exists()


def test_a_digest_that_a_mirror_lacks_is_not_replaced_by_what_its_tag_has_now(programs, tmp_path):
    programs.add("docker", 'case "$1" in pull) echo "manifest unknown"; exit 1;; *) exit 1;; esac')
    image_lock.write(tmp_path, {"cpu:1": A})
    with pytest.raises(StepError, match=r"manifest unknown[\s\S]*images\.lock\.old"):
        registry.pull(tmp_path, {"cpu": TAGS["cpu"]}, PREFIX, anew=True)
    assert image_lock.read(tmp_path) == {"cpu:1": A}


def test_release_images_go_from_the_builder_to_the_registry_and_their_digests_to_the_lock(programs, tmp_path):
    metadata = {"cpu": {"containerimage.digest": A}, "proxy": {"containerimage.digest": B}}
    programs.add(
        "docker",
        f"""echo "RELEASE=$RELEASE $X" >&2
while [ "$1" != --metadata-file ]; do shift; done; echo '{json.dumps(metadata)}' > "$2\"""",
    )
    registry.publish(tmp_path, TAGS, PREFIX, {"X": "y"}, timeout_s=20)
    (call,) = programs.calls
    assert "bake -f docker/docker-bake.hcl --push --metadata-file" in call
    assert "--load" not in call
    assert call.endswith("cpu proxy")
    assert "RELEASE=1 y" in (tmp_path / "build" / "images.log").read_text()
    assert image_lock.read(tmp_path) == {"cpu:1": A, "proxy:1": B}
    programs.add("docker", "echo denied; exit 1")
    with pytest.raises(StepError, match="denied"):
        registry.publish(tmp_path, TAGS, PREFIX, {}, timeout_s=20)


def test_names_with_a_line_are_pinned_to_its_digest_below_any_registry(tmp_path):
    image_lock.write(tmp_path, {"cpu:1": A})
    names = {"EPD_IMAGE": TAGS["cpu"], "EPD_PROXY_IMAGE": TAGS["proxy"]}
    assert image_lock.pinned(tmp_path, names, PREFIX) == {
        "EPD_IMAGE": f"r.example:5000/t/cpu@{A}", "EPD_PROXY_IMAGE": TAGS["proxy"],
    }  # fmt: skip


@pytest.mark.parametrize("line", ["cpu:1", "cpu:1 sha256:12", f"cpu:1 {A} more"])
def test_a_damaged_lock_names_its_line(line, tmp_path):
    (tmp_path / image_lock.FILE).write_text(f"# a comment\n\n{line}\n")
    with pytest.raises(StepError, match="line 3"):
        image_lock.read(tmp_path)


def test_the_name_without_its_tag(tmp_path):
    assert image_lock.repository("r.example:5000/t/cpu:1") == "r.example:5000/t/cpu"
    assert image_lock.repository("cpu:1") == "cpu"
    image_lock.write(tmp_path, {"cpu:1": A})
    image_lock.write(tmp_path, {})
    assert not (tmp_path / image_lock.FILE).exists()
