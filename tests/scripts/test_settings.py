"""What a person can set: where it comes from, what wins, what is refused."""

import pytest

from epd import dotenv, settings
from epd.errors import StepError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "compose" / "hardware").mkdir(parents=True)
    for name in ("1e1pd", "1e1p1d", "observability"):
        (tmp_path / "compose" / f"{name}.yaml").write_text("services: {}\n")
    (tmp_path / "compose" / "services.yaml").write_text(
        'a: "${EPD_PROXY_PORT:-8000} ${EPD_MODEL:-x} ${EPD_MODELS:-models} ${EPD_MAX_MODEL_LEN:-2048}'
        ' ${EPD_SERVED_MODEL_NAME:-} ${HF_HUB_OFFLINE:-1} ${COMPOSE_PROFILES}"\nHF_TOKEN:\n'
    )
    (tmp_path / "compose" / "hardware" / "cpu.yaml").write_text("services: {}\n")
    return tmp_path


def written(root, planned=None, **environ):
    """Do as `make up` does, and return the block it writes."""
    found = settings.load(root, environ)
    file = f"compose/{found.topology}.yaml"
    entries = settings.entries(
        found, compose_file=file, planned=planned or {"EPD_HARDWARE": "cpu"}, image="i:1", proxy_image="p:1"
    )
    settings.check_set_once(found, entries, environ)
    dotenv.write(root / ".env", entries)
    return dict(dotenv.read(root / ".env").managed)


def test_defaults(root):
    assert written(root) == {
        "COMPOSE_PROJECT_NAME": "ascend-epd",
        "COMPOSE_FILE": "compose/1e1pd.yaml",
        "EPD_HARDWARE": "cpu",
        "EPD_IMAGE": "i:1",
        "EPD_PROXY_IMAGE": "p:1",
        "EPD_PROXY_PORT": "8000",
    }


def test_what_was_chosen_stays_for_the_next_time(root):
    first = written(root, EPD_PROXY_PORT="9000", TOPOLOGY="1e1p1d", EPD_MAX_MODEL_LEN="4096", HF_TOKEN="secret")
    assert first["EPD_PROXY_PORT"] == "9000"
    assert first["COMPOSE_FILE"] == "compose/1e1p1d.yaml"
    assert first["EPD_MAX_MODEL_LEN"] == "4096"
    assert "HF_TOKEN" not in first
    assert written(root) == first


def test_a_line_of_the_user_wins_and_is_left_out_of_our_block(root):
    (root / ".env").write_text("EPD_PROXY_PORT=7000\n")
    assert settings.load(root, {}).proxy_port == 7000
    assert "EPD_PROXY_PORT" not in written(root)


def test_two_different_values_are_refused(root):
    (root / ".env").write_text("EPD_PROXY_PORT=7000\nCOMPOSE_FILE=compose/1e1pd.yaml:compose/observability.yaml\n")
    with pytest.raises(StepError, match=r"set twice[\s\S]*9000[\s\S]*7000"):
        written(root, EPD_PROXY_PORT="9000")
    with pytest.raises(StepError, match=r"COMPOSE_FILE is set twice"):
        written(root, TOPOLOGY="1e1p1d")
    written(root, EPD_PROXY_PORT="7000", TOPOLOGY="1e1pd")


def test_a_model_folder(root):
    folder = root / "my-model"
    folder.mkdir()
    with pytest.raises(StepError, match=r"config\.json"):
        written(root, MODEL="my-model")
    (folder / "config.json").write_text("{}")
    found = written(root, MODEL="my-model")
    assert (found["EPD_MODEL"], found["EPD_MODELS"]) == ("/models", str(folder))
    assert found["EPD_SERVED_MODEL_NAME"] == "my-model"
    assert written(root) == found
    assert "EPD_MODELS" not in written(root, MODEL="tiny")


def test_a_model_folder_of_links_that_a_mount_would_break(root, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    (blobs / "abc").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "abc")
    with pytest.raises(StepError, match="cp -rL"):
        written(root, MODEL=str(folder))


def test_a_hub_id_replaces_a_folder_and_allows_downloads(root):
    folder = root / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    written(root, MODEL="m")
    found = written(root, MODEL="Qwen/Qwen2.5-VL-3B-Instruct")
    assert found["EPD_MODEL"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert found["HF_HUB_OFFLINE"] == "0"
    assert "EPD_MODELS" not in found


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"EPD_PROXY_PORT": "0"}, "EPD_PROXY_PORT"),
        ({"EPD_PROXY_PORT": "http"}, "from 1 to 65535"),
        ({"EPD_UP_TIMEOUT_S": "nan"}, "EPD_UP_TIMEOUT_S"),
        ({"EPD_PULL": "maybe"}, "1 or 0"),
        ({"TOPOLOGY": "0e2pd"}, "<n>e<n>pd"),
        ({"TOPOLOGY": "observability"}, "no such topology"),
        ({"COMPOSE_PROJECT_NAME": "Big Name"}, "COMPOSE_PROJECT_NAME"),
        ({"MODEL": "/no/such/folder"}, "an existing folder"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(root, environ, message):
    with pytest.raises(StepError, match=message) as caught:
        settings.load(root, environ)
    assert caught.value.fix


def test_profiles_are_the_files_there_are(root):
    assert settings.profiles(root) == ("cpu",)
    (root / "compose" / "hardware" / "a2.yaml").write_text("services: {}\n")
    assert settings.profiles(root) == ("a2", "cpu")
