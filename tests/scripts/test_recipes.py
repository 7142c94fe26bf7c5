"""Recipes: what they stand for, that the plan accepts them, that models/README.md says what it computes."""

import re
from pathlib import Path

import pytest

from epd import dotenv, recipes, settings
from epd.errors import StepError
from epd.plan import model, placing, topology
from epd.plan.hosts import Card, Host
from fakes.models import PUBLISHED_GB

ROOT = Path(__file__).resolve().parents[2]
NAMES = recipes.names(ROOT)


def test_every_recipe_sets_the_same_variables_all_known_so_that_one_replaces_another():
    assert set(PUBLISHED_GB) == set(NAMES)
    expected = {*recipes.variables(ROOT), "MODEL_ID"}
    for name in NAMES:
        assert set(dotenv.read(ROOT / "models" / f"{name}.env").own) == expected, name
    assert expected - {"MODEL_ID"} <= settings.stack_variables(ROOT) | settings.PLAN_VARIABLES


@pytest.fixture
def root(tmp_path):
    (tmp_path / "compose").symlink_to(ROOT / "compose")
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


def fetched(root, recipe):
    folder = recipes.folder(root, recipes.model_id(root, recipe), {}, {})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_recipe_stands_for_its_variables_and_what_is_set_beside_wins(root):
    folder = fetched(root, "qwen3-vl-30b-a3b")
    (root / ".env").write_text("EPD_DECODE_TP=4\n")
    found = settings.load(root, {"MODEL_RECIPE": "qwen3-vl-30b-a3b", "EPD_PREFILL_TP": "4"}).planning
    assert found["EPD_MODELS"] == str(folder)
    assert found["EPD_SERVED_MODEL_NAME"] == "Qwen3-VL-30B-A3B-Instruct"
    assert (found["EPD_ENCODE_TP"], found["EPD_PREFILL_TP"], found["EPD_DECODE_TP"]) == ("2", "4", "4")
    assert (found["EPD_EXPERT_PARALLEL"], found["HCCL_BUFFSIZE"]) == ("1", "1024")


def test_a_recipe_and_the_place_of_models_can_stand_in_env(root):
    (root / ".env").write_text("MODEL_RECIPE=qwen3-vl-8b\nEPD_MODEL_FILES=elsewhere\n")
    (root / "elsewhere" / "Qwen3-VL-8B-Instruct").mkdir(parents=True)
    (root / "elsewhere" / "Qwen3-VL-8B-Instruct" / "config.json").write_text("{}")
    found = settings.load(root, {}).planning
    assert found["EPD_MODELS"] == str(root / "elsewhere" / "Qwen3-VL-8B-Instruct")
    assert found["EPD_STORE_SIZE_MB"] == "16384"


def test_another_recipe_replaces_it_and_none_takes_it_back(root):
    for recipe in ("qwen3-vl-30b-a3b", "qwen3-vl-8b"):
        fetched(root, recipe)
    chosen = settings.load(root, {"MODEL_RECIPE": "qwen3-vl-30b-a3b"}).chosen
    dotenv.write(root / ".env", [dotenv.Entry(name, value, "chosen") for name, value in chosen.items()])
    second = settings.load(root, {"MODEL_RECIPE": "qwen3-vl-8b"}).chosen
    assert (second["EPD_ENCODE_TP"], second.get("HCCL_BUFFSIZE")) == ("1", None)
    assert second["EPD_SERVED_MODEL_NAME"] == "Qwen3-VL-8B-Instruct"
    assert settings.load(root, {}).chosen["EPD_ENCODE_TP"] == "2"  # without a word nothing changes
    none = settings.load(root, {"MODEL_RECIPE": "none"}).chosen
    assert not set(none) & {*recipes.variables(ROOT), "EPD_MODEL", "EPD_MODELS"}


def test_a_recipe_whose_model_is_not_here_says_how_to_get_it(root):
    with pytest.raises(StepError, match="make fetch-model MODEL_RECIPE=qwen3-vl-8b"):
        settings.load(root, {"MODEL_RECIPE": "qwen3-vl-8b"})
    with pytest.raises(StepError, match=r"no such recipe[\s\S]*qwen3-vl-8b"):
        settings.load(root, {"MODEL_RECIPE": "gpt"})
    assert (
        settings.load(root, {"MODEL_RECIPE": "qwen3-vl-8b", "MODEL": "org/model"}).planning["EPD_MODEL"] == "org/model"
    )


def plan(recipe, name):
    """Return the plan of a recipe on servers of A3: sixteen cards of 64 GB each."""
    values = dict(dotenv.read(ROOT / "models" / f"{recipe}.env").own)
    size = model.from_config(recipe, PUBLISHED_GB[recipe][0])
    cards = tuple(Card(i, i // 2, 65536, 3400) for i in range(16))
    hosts = [Host(f"node-{i}", "a3", f"10.0.0.{i + 1}", "eth0", 2 << 20, cards=cards) for i in range(3)]
    asked = topology.parse(name, topology.read_parallel(values), expert_parallel=values["EPD_EXPERT_PARALLEL"] == "1")
    limits = placing.Limits(*(int(values[f"EPD_{key}"]) for key in ("MAX_MODEL_LEN", "MAX_NUM_SEQS", "STORE_SIZE_MB")))
    return size, asked, placing.make(asked, hosts, size, limits)


@pytest.mark.parametrize("recipe", NAMES)
@pytest.mark.parametrize("name", ["1e1pd", "1e1p1d"])
def test_the_plan_accepts_each_recipe(recipe, name):
    _, _, made = plan(recipe, name)
    assert any("KV cache for about" in note for note in made.notes)


@pytest.mark.parametrize("recipe", NAMES)
def test_estimates_are_near_the_published_sizes_and_in_the_table(recipe):
    size, asked, made = plan(recipe, "1e1pd")
    assert size.weights_bytes / 1e9 == pytest.approx(PUBLISHED_GB[recipe][1], rel=0.02)
    span = asked.of("prefill-decode")
    tokens = re.search(r"KV cache for about (\d+) tokens", "\n".join(made.notes))[1]
    row = next(line for line in (ROOT / "models" / "README.md").read_text().splitlines() if f"`{recipe}`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == recipes.model_id(ROOT, recipe)
    assert cells[2:] == [str(span.cards), str(size.weights_mib(span.tensor)), tokens]
