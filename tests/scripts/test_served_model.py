"""What the containers' user may read of a model folder."""

import os

import pytest

from epd import container_user, served_model
from epd.errors import StepError


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "my-model"
    (made / "extra").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "extra/vocab.json"):
        (made / name).write_text("{}")
        (made / name).chmod(0o644)
    for path in (made, made / "extra"):
        path.chmod(0o755)
    return made


def test_a_folder_that_all_may_read(folder, tmp_path):
    assert served_model.variables("my-model", tmp_path)["EPD_MODELS"] == str(folder)


@pytest.mark.parametrize(
    ("name", "mode"), [("model.safetensors", 0o640), ("extra", 0o750), ("extra/vocab.json", 0o600), (".", 0o711)]
)
def test_what_the_containers_may_not_read_is_named_with_the_way_to_open_it(folder, tmp_path, name, mode):
    (folder / name).chmod(mode)
    with pytest.raises(StepError, match="cannot be read by the containers") as caught:
        served_model.variables("my-model", tmp_path)
    assert str(folder / name).removesuffix("/.") in caught.value.found
    assert f"{mode:04o}" in caught.value.found
    assert caught.value.fix == f"chmod -R o+rX '{folder}'"


def test_hidden_files_and_links_that_lead_nowhere_do_not_count(folder):
    for name in (".git", "__pycache__"):
        (folder / name).mkdir(mode=0o700)
    (folder / "old.bin").symlink_to("no-such-file")
    assert list(container_user.find_unreadable(folder)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_files_of_the_containers_own_user_need_no_more(folder):
    path = folder / "model.safetensors"
    path.chmod(0o400)
    assert list(container_user.find_unreadable(folder)) == [path]
    os.chown(path, container_user.UID, 0)
    assert list(container_user.find_unreadable(folder)) == []
