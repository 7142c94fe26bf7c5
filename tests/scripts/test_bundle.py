"""The folder for hosts without a network: complete, checked, of the right kind. The real engine is in tests/smoke."""

import subprocess
from pathlib import Path

import pytest

from epd import bundle, checksums
from epd.errors import StepError

MANIFEST = bundle.Manifest("0.1.0", "cpu", "r.example/", "amd64", {"r.example/cpu:1": "hash"}, "")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "project"
    (folder / "scripts" / "epd" / "__pycache__").mkdir(parents=True)
    (folder / "scripts" / "epd" / "cli.py").write_text("x = 1\n")
    (folder / "scripts" / "epd" / "__pycache__" / "cli.pyc").write_text("cache")
    (folder / "Makefile").write_text("help:\n")
    (folder / ".env").write_text("HF_TOKEN=secret\n")
    return folder


@pytest.fixture
def engine(programs):
    """An engine with one image of 1 KiB; what it saves and loads is written down."""

    def make(arch="amd64", label="hash", size=1024):
        programs.add(
            "docker",
            f"""case "$*" in
  version*) echo {arch};;
  "image inspect"*Size*) echo {size};;
  "image inspect"*) echo {label};;
  "image save"*) echo layers > "$4";;
esac""",
        )
        return programs

    return make


def write(root, tmp_path, model=None):
    folder = tmp_path / "out" / "ascend-epd"
    bundle.write(root, folder, MANIFEST, model)
    return folder


def test_a_bundle_has_project_images_and_sums_and_no_secret(root, engine, tmp_path):
    engine()
    folder = write(root, tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"Makefile", "scripts/epd/cli.py", "bundle/images.tar", "bundle/manifest.json", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True)
    assert bundle.read(folder) == MANIFEST
    assert bundle.load(folder, MANIFEST) is None
    assert not list(folder.parent.glob("*.partial"))


def test_a_model_goes_along(root, engine, tmp_path):
    engine()
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    folder = tmp_path / "b"
    manifest = bundle.Manifest(**{**vars(MANIFEST), "model": "my-model"})
    bundle.write(root, folder, manifest, model)
    found = bundle.load(folder, bundle.read(folder))
    assert found is not None
    assert (found / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda folder: (folder / "bundle" / "images.tar").write_text("layer5\n"), "images.tar has another sum"),
        (lambda folder: (folder / "scripts" / "epd" / "cli.py").unlink(), "cli.py is missing"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "no such file"),
    ],
)
def test_what_was_damaged_on_the_way_is_named_and_nothing_is_loaded(damage, found, root, engine, tmp_path):
    programs = engine()
    folder = write(root, tmp_path)
    damage(folder)
    with pytest.raises(StepError) as caught:
        bundle.read(folder)
    assert found in caught.value.found
    assert not any(" load " in call for call in programs.calls)


def test_another_architecture_is_refused(root, engine, tmp_path):
    engine()
    folder = write(root, tmp_path)
    engine(arch="arm64")
    with pytest.raises(StepError, match="make the bundle on a arm64 machine"):
        bundle.read(folder)


def test_an_engine_that_has_other_images_afterwards_is_told(root, engine, tmp_path):
    engine()
    folder = write(root, tmp_path)
    engine(label="another")
    with pytest.raises(StepError, match="does not have the bundle's images"):
        bundle.load(folder, MANIFEST)


def test_a_bundle_replaces_an_older_one_and_nothing_else(root, engine, tmp_path):
    engine()
    folder = write(root, tmp_path)
    (root / "Makefile").write_text("all:\n")
    assert (write(root, tmp_path) / "Makefile").read_text() == "all:\n"
    (folder / checksums.FILE).unlink()
    with pytest.raises(StepError, match="a folder of something else"):
        write(root, tmp_path)
    assert (folder / "Makefile").is_file()


def test_too_little_space_is_told_with_the_sum_before_anything_is_saved(root, engine, tmp_path):
    programs = engine(size=1 << 60)
    with pytest.raises(StepError, match=r"images 1073741824\.0 \+ model 0\.0 = 1073741824\.0 GiB"):
        write(root, tmp_path)
    assert not any(" save " in call for call in programs.calls)
    assert not list((tmp_path / "out").iterdir())


def test_all_that_a_start_reads_is_in_a_bundle():
    """A folder of the project that is new is either named here or in the bundle."""
    root = Path(__file__).resolve().parents[2]
    tops = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    found = {line.partition("/")[0] for line in tops.stdout.splitlines()}
    not_needed = {"tests", "pyproject.toml", ".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "images.lock"}
    assert found - not_needed <= set(bundle.PROJECT)
