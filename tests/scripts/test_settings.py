"""What a person can set: where it comes from, what wins, what is refused."""

import re
from pathlib import Path

import pytest

from epd import dotenv, settings
from epd.errors import StepError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "compose" / "hardware").mkdir(parents=True)
    for name in ("1e1pd", "1e1p1d", "observability"):
        (tmp_path / "compose" / f"{name}.yaml").write_text("services: {}\n")
    (tmp_path / "compose" / "services.yaml").write_text(
        'a: "${EPD_PROXY_PORT:-8000} ${EPD_MODEL:-x} ${EPD_MODELS:-models} ${EPD_MAX_MODEL_LEN:-2048}'
        ' ${EPD_SERVED_MODEL_NAME:-} ${HF_HUB_OFFLINE:-1} ${EPD_MEMORY_LIMIT:-6g} ${EPD_PROXY_BIND:-}"\nHF_TOKEN:\n'
    )
    (tmp_path / "compose" / "hardware" / "cpu.yaml").write_text("services: {}\n")
    return tmp_path


def written(root, planned=None, **environ):
    """Do as `make up` does, and return the block it writes."""
    found = settings.load(root, environ)
    file = f"compose/{found.topology}.yaml"
    entries = settings.entries(
        found,
        compose_file=file,
        planned=planned or {"EPD_HARDWARE": "cpu"},
        images={"EPD_IMAGE": "i:1", "EPD_PROXY_IMAGE": "p:1"},
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


def test_every_setting_of_make_is_read_from_env_too_and_the_environment_wins(root):
    lines = {
        "EPD_NO_INSTALL": "1", "EPD_PULL": "1", "TOPOLOGY": "1e1p1d", "REGISTRY": "r.example/", "MODEL": "org/model",
        "PIP_INDEX_URL": "https://p.example", "TORCH_INDEX_URL": "https://t.example", "SSL_CERT_FILE": "/ca.pem",
    }  # fmt: skip
    (root / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    found = settings.load(root, {})
    assert (found.no_install, found.pull, found.topology, found.registry) == (True, True, "1e1p1d", "r.example/")
    assert (found.pip_index_url, found.torch_index_url) == ("https://p.example", "https://t.example")
    assert (found.ca_bundle, found.planning["EPD_MODEL"]) == ("/ca.pem", "org/model")
    other = settings.load(root, {"EPD_NO_INSTALL": "0", "TOPOLOGY": "1e1pd", "REGISTRY": "s.example/", "MODEL": "tiny"})
    assert (other.no_install, other.topology, other.registry) == (False, "1e1pd", "s.example/")
    assert "EPD_MODEL" not in other.planning
    assert written(root) == written(root, MODEL="org/model")


def test_pulled_images_stay_the_choice_and_are_pulled_anew_only_when_asked(root):
    first = written(root, EPD_PULL="1", REGISTRY="r.example/")
    assert (first["EPD_PULL"], first["REGISTRY"]) == ("1", "r.example/")
    assert written(root) == first
    assert [settings.load(root, {}).pull, settings.load(root, {}).pull_anew] == [True, False]
    assert settings.load(root, {"EPD_PULL": "1"}).pull_anew
    assert not settings.load(root, {"EPD_PULL": "0"}).pull


def test_a_password_in_the_address_of_an_index_is_not_written(root):
    assert written(root, TORCH_INDEX_URL="https://t.example/cpu")["TORCH_INDEX_URL"] == "https://t.example/cpu"
    assert "TORCH_INDEX_URL" not in written(root, TORCH_INDEX_URL="https://me:secret@t.example/cpu")


def test_an_empty_value_on_the_command_line_goes_back_to_the_default(root):
    before = written(root)
    written(root, EPD_MAX_MODEL_LEN="4096", TOPOLOGY="1e1p1d", EPD_PROXY_PORT="9000", MODEL="org/model")
    assert written(root, EPD_MAX_MODEL_LEN="", TOPOLOGY="", EPD_PROXY_PORT="", MODEL="") == before


def test_an_empty_value_against_a_line_of_the_user_is_refused(root):
    (root / ".env").write_text("EPD_MAX_MODEL_LEN=4096\n")
    with pytest.raises(StepError, match=r"EPD_MAX_MODEL_LEN is set twice[\s\S]*its default"):
        written(root, EPD_MAX_MODEL_LEN="")


def test_an_empty_line_of_the_user_is_the_default(root):
    before = written(root)
    written(root, EPD_PROXY_PORT="9000", EPD_MAX_MODEL_LEN="4096")
    (root / ".env").write_text("EPD_PROXY_PORT=\nEPD_MAX_MODEL_LEN=\n" + (root / ".env").read_text())
    assert written(root) == before


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


def test_what_is_said_outright_wins_over_what_the_model_implies(root):
    first = written(root, MODEL="org/model", EPD_SERVED_MODEL_NAME="mine", HF_HUB_OFFLINE="1")
    assert (first["EPD_MODEL"], first["EPD_SERVED_MODEL_NAME"], first["HF_HUB_OFFLINE"]) == ("org/model", "mine", "1")
    assert written(root) == first
    assert written(root, MODEL="org/model") == first
    other = written(root, MODEL="org/other")
    assert (other["EPD_SERVED_MODEL_NAME"], other["HF_HUB_OFFLINE"]) == ("org/other", "0")
    assert not {"EPD_SERVED_MODEL_NAME", "HF_HUB_OFFLINE"} & written(root, MODEL="tiny").keys()


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
        ({"EPD_MEMORY_LIMIT": "24"}, "write the unit"),
        ({"EPD_MAX_MODEL_LEN": "8k"}, "a whole number"),
        ({"EPD_PROXY_BIND": "localhost"}, "EPD_PROXY_BIND"),
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
    assert settings.load(root, {"EPD_HARDWARE": "A2"}).hardware == "a2"
    with pytest.raises(StepError, match=r"expected: one of: a2, cpu\n.*EPD_HARDWARE=a3\n.*fix:"):
        settings.load(root, {"EPD_HARDWARE": "a3"})


def test_a_name_that_nothing_reads_is_told_with_the_one_that_was_meant(root):
    (root / ".env").write_text("EPD_MAX_MODEL_LENGTH=4096\nMY_OWN=1\nEPD_PROXY_PORT=9000\nEPD_QQQ=1\n")
    first, second, third = settings.describe_unknown(root, {"EPD_PROXI_PORT": "1", "EPD_UP_TIMEOUT_S": "900"})
    assert first == "EPD_MAX_MODEL_LENGTH (in .env) is not a setting; did you mean EPD_MAX_MODEL_LEN?"
    assert "EPD_PROXI_PORT (in the environment)" in second
    assert "did you mean EPD_PROXY_PORT?" in second
    assert "EPD_QQQ" in third
    assert "docs/configuration.md" in third


def test_every_name_in_the_documents_of_make_and_stack_is_known():
    text = (ROOT / "docs" / "configuration.md").read_text().partition("## Roles")[0]
    names = set(re.findall(r"`(EPD_[A-Z0-9_]+)`", text))
    assert "EPD_PROXY_PORT" in names
    assert [s for s in settings.describe_unknown(ROOT, dict.fromkeys(names, "1")) if "environment" in s] == []


def test_what_is_remembered_joins_the_block_and_the_rest_of_the_file_stays(root):
    block = "# >>> ascend-epd\nEPD_PROXY_PORT=9000\nREGISTRY=old/\n# <<< ascend-epd\n"
    (root / ".env").write_text(f"HF_TOKEN=mine\n{block}")
    settings.remember(root, {"EPD_PULL": "1", "REGISTRY": ""}, comment="why")
    file = dotenv.read(root / ".env")
    assert (file.own, file.managed) == ({"HF_TOKEN": "mine"}, {"EPD_PROXY_PORT": "9000", "EPD_PULL": "1"})
    loaded = settings.load(root, {})
    assert (loaded.pull, loaded.pull_anew, loaded.registry) == (True, False, "")
