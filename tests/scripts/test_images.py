"""When images are built anew, and what happens without a registry."""

import os
import time

import pytest

from epd import base_image, host, images, settings
from epd.errors import CommandError, StepError


@pytest.fixture
def root(tmp_path):
    for folder in ("connector/src", "proxy/src", "docker", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docker" / "versions.env").write_text("A=1\n")
    (tmp_path / "proxy" / "src" / "app.py").write_text("x = 1\n")
    (tmp_path / ".dockerignore").write_text("*\n")
    return tmp_path


def inputs(root, **environ):
    return images.inputs_hash(settings.load(root, environ))


def test_the_hash_follows_every_input_and_nothing_else(root):
    first = inputs(root)
    (root / "proxy" / "src" / "__pycache__").mkdir()
    (root / "proxy" / "src" / "__pycache__" / "app.pyc").write_text("cache")
    (root / "README.md").write_text("not in the build context")
    os.utime(root / "proxy" / "src" / "app.py", (1, 1))
    assert inputs(root) == first
    seen = {first}
    for change in (
        lambda: (root / "proxy" / "src" / "app.py").write_text("x = 2\n"),
        lambda: (root / "proxy" / "src" / "app.py").rename(root / "proxy" / "src" / "main.py"),
        lambda: (root / "proxy" / "src" / "main.py").chmod(0o755),
        lambda: (root / "docker" / "versions.env").write_text("A=2\n"),
        lambda: (root / "scripts" / "tiny_model.py").write_text("new file"),
    ):
        change()
        seen.add(inputs(root))
    assert len(seen) == 6


def test_the_hash_follows_what_the_build_is_told_but_no_secret(root):
    plain, base = inputs(root), inputs(root, EPD_BASE_IMAGE="b:1")
    index = inputs(root, TORCH_INDEX_URL="https://t.example/cpu")
    assert len({plain, base, index}) == 3
    assert inputs(root, TORCH_INDEX_URL="https://me:secret@t.example/cpu") == index
    assert inputs(root, PIP_INDEX_URL="https://p.example", REGISTRY="r/", EPD_PULL="1") == plain


def test_npus_have_an_image_of_their_own_and_one_for_the_pool(root):
    usual, openeuler = settings.load(root, {}), settings.load(root, {"EPD_ASCEND_OS": "openeuler"})
    assert images.served("cpu", openeuler) == images.served("cpu", usual) == ("cpu", "proxy")
    assert images.served("a3", usual) == ("a3", "proxy", "store")
    tags = {target: f"r/{target}:1" for target in images.served("a3", openeuler)}
    assert images.variables(tags) == {
        "EPD_IMAGE": "r/a3-openeuler:1",
        "EPD_PROXY_IMAGE": "r/proxy:1",
        "EPD_STORE_IMAGE": "r/store:1",
    }
    loaded = settings.load(root, {"EPD_ASCEND_SERVING": "cann", "EPD_ASCEND_REGISTRY": "mirror.example/ascend/"})
    told = images.bake_environment(loaded, {}, base="b:1", inputs="h")
    assert (told["EPD_ASCEND_SERVING"], told["EPD_ASCEND_REGISTRY"]) == ("cann", "mirror.example/ascend")
    assert inputs(root, EPD_ASCEND_SERVING="cann") != inputs(root)
    with pytest.raises(StepError, match="one of: vendor, cann"):
        settings.load(root, {"EPD_ASCEND_SERVING": "nvidia"})


def test_is_current_compares_the_label(programs):
    programs.add("docker", "echo abc")
    assert images.is_current("image:1", "abc")
    assert not images.is_current("image:1", "abd")
    programs.add("docker", "exit 1")
    assert not images.is_current("image:1", "")


def test_the_names_of_images_come_from_the_bake_file(programs, root):
    programs.add("docker", """echo '{"target": {"cpu": {"tags": ["r/cpu:1"]}, "proxy": {"tags": ["r/proxy:1"]}}}'""")
    assert images.tags(root, ("cpu", "proxy"), {}) == {"cpu": "r/cpu:1", "proxy": "r/proxy:1"}
    programs.add("docker", "echo 'parse error in line 3' >&2; exit 1")
    with pytest.raises(CommandError, match="parse error in line 3"):
        images.tags(root, ("cpu",), {})


def test_versions_and_env_file_win_over_the_caller_s_environment(programs, root, monkeypatch):
    for name in ("VLLM_VERSION", "REGISTRY", "BASE_IMAGE"):
        monkeypatch.setenv(name, "stray")
    (root / ".env").write_text(
        "REGISTRY=r.example/\nPIP_INDEX_URL=https://p.example\nTORCH_INDEX_URL=https://t.example\n"
    )
    names = "VLLM_VERSION|BASE_IMAGE|EPD_INPUTS|REGISTRY|PIP_INDEX_URL|TORCH_INDEX_URL"
    programs.add("docker", f"env | grep -E '^({names})='; exit 1")
    environment = images.bake_environment(settings.load(root, {}), {"VLLM_VERSION": "0.23.0"}, base="b:1", inputs="h")
    with pytest.raises(StepError) as caught:
        images.build(root, ("cpu",), environment, timeout_s=20)
    wanted = ["VLLM_VERSION=0.23.0", "BASE_IMAGE=b:1", "EPD_INPUTS=h", "REGISTRY=r.example/"]
    for line in (*wanted, "PIP_INDEX_URL=https://p.example", "TORCH_INDEX_URL=https://t.example"):
        assert line in caught.value.found.split()


def test_without_a_registry_set_the_names_have_no_prefix_whatever_the_shell_says(root):
    assert images.bake_variables(settings.load(root, {}), {"EPD_VERSION": "1"}) == {"EPD_VERSION": "1", "REGISTRY": ""}


def test_what_newer_images_replaced_is_removed_and_said(programs, capsys):
    programs.add("docker", "printf 'Deleted Images:\\ndeleted: sha256:ab\\n\\nTotal reclaimed space: 6.5GB\\n'")
    images.remove_replaced()
    assert programs.calls == ["docker image prune --force --filter label=org.ascend-epd.inputs"]
    assert "newer ones replaced (6.5GB)" in capsys.readouterr().out
    programs.add("docker", "echo 'Total reclaimed space: 0B'")
    images.remove_replaced()
    assert capsys.readouterr().out == ""


def test_a_failed_build_shows_its_last_lines_and_where_the_rest_is(programs, root):
    programs.add("docker", "seq 1 100; exit 7")
    with pytest.raises(StepError) as caught:
        images.build(root, ("cpu",), {}, timeout_s=20)
    assert "exit code 7" in caught.value.found
    assert caught.value.found.split()[-40:] == [str(n) for n in range(61, 101)]
    assert str(root / "build" / "images.log") in caught.value.fix
    assert (root / "build" / "images.log").read_text().startswith("1\n2\n")


def test_a_base_image_that_cannot_be_pulled_is_told_with_the_mirrors(programs, root):
    said = "ERROR: failed to solve: q.example/ascend/vllm-ascend:v1: failed to resolve source metadata for q.example/x"
    programs.add("docker", f"echo '{said}: dial tcp: i/o timeout'; exit 1")
    with pytest.raises(StepError, match="EPD_ASCEND_REGISTRY=<mirror>/ascend or EPD_BASE_IMAGE=<mirror>"):
        images.build(root, ("a2",), {}, timeout_s=20)


def test_without_a_registry_and_debootstrap_other_distributions_are_told_of_a_mirror(programs, root, monkeypatch):
    programs.add("docker", "echo 'dial tcp: i/o timeout' >&2; exit 1")
    openeuler = host.parse_os_release('ID="openEuler"\nPRETTY_NAME="openEuler 24.03 (LTS)"\n')
    monkeypatch.setattr(base_image.command, "have", lambda program: program != "debootstrap")
    with pytest.raises(StepError, match=r"openEuler 24.03[\s\S]*EPD_BASE_IMAGE=<mirror>"):
        base_image.obtain(settings.load(root, {}), "bookworm", openeuler, root=True)


def test_a_build_that_hangs_is_ended(programs, root):
    programs.add("docker", "exec sleep 30")
    began = time.monotonic()
    with pytest.raises(StepError, match="no end in time"):
        images.build(root, ("cpu",), {}, timeout_s=0.5)
    assert time.monotonic() - began < 10


def test_proxies_of_the_caller_reach_the_build(programs, root, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    programs.add("docker")
    images.build(root, ("cpu",), {}, timeout_s=20)
    assert "--set *.args.HTTPS_PROXY=http://proxy.example:3128" in programs.calls[-1]


def test_ca_bundle_is_the_first_that_exists(tmp_path):
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    assert images.ca_bundle(str(bundle), {"PIP_CERT": "/none"}) == str(bundle)
    assert images.ca_bundle("/none", {"PIP_CERT": str(bundle)}) == str(bundle)


def test_pull_gives_up_on_a_silent_registry(programs):
    programs.add("docker", "exec sleep 30")
    began = time.monotonic()
    assert "no answer within" in base_image.pull("debian:x", first_answer_s=0.5)
    assert time.monotonic() - began < 10


def test_pull_that_has_begun_may_take_longer_than_the_first_answer(programs):
    programs.add("docker", "echo x: Pulling from library/debian; sleep 1.5; echo done")
    assert base_image.pull("debian:x", first_answer_s=1) is None


def test_pull_says_why_it_failed(programs):
    programs.add("docker", "echo lookup registry.example: no such host; exit 1")
    assert base_image.pull("debian:x", first_answer_s=5) == "lookup registry.example: no such host"


DEBIAN = host.parse_os_release("ID=debian\nVERSION_CODENAME=bookworm")


@pytest.fixture
def chosen(tmp_path):
    (tmp_path / "compose").mkdir(exist_ok=True)
    (tmp_path / "compose" / "1e1pd.yaml").touch()
    return settings.load(tmp_path, {"EPD_DEBIAN_MIRROR": "http://mirror.example/debian"})


def test_without_a_registry_the_base_image_is_made_from_packages(programs, chosen, capsys):
    programs.add(
        "docker", 'case "$1" in image) exit 1;; pull) echo no such host; exit 1;; import) cat > /dev/null;; esac'
    )
    programs.add("debootstrap", 'for last; do :; done; mkdir -p "$5/etc/apt/sources.list.d" "$5/var/cache/apt"')
    name = base_image.obtain(chosen, "bookworm", DEBIAN, root=True)
    assert name == "ascend-epd-base:bookworm"
    out = capsys.readouterr().out
    assert "no registry can be reached: no such host" in out
    (made,) = [call for call in programs.calls if call.startswith("debootstrap")]
    assert made.endswith("http://mirror.example/debian")
    assert programs.calls[-1].endswith("ascend-epd-base:bookworm")


def test_a_base_image_that_is_there_is_used_without_asking_anyone(programs, chosen):
    programs.add("docker", 'case "$*" in *debian:bookworm-slim) echo id;; *) exit 1;; esac')
    assert base_image.obtain(chosen, "bookworm", DEBIAN, root=False) == "debian:bookworm-slim"


def test_debootstrap_that_fails_tells_what_it_said(programs, chosen):
    programs.add("docker", "exit 1")
    programs.add("debootstrap", "echo 'E: Failed getting release file'; exit 1")
    with pytest.raises(StepError, match="Failed getting release file"):
        base_image.obtain(chosen, "bookworm", DEBIAN, root=True)


def test_a_plain_user_is_told_how_to_go_on_without_a_registry(programs, chosen):
    programs.add("docker", "exit 1")
    with pytest.raises(StepError, match="EPD_BASE_IMAGE"):
        base_image.obtain(chosen, "bookworm", DEBIAN, root=False)
