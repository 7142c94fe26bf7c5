"""`MODEL_RECIPE=`: a file of `models/` that stands for a model and the variables that go with it, as if typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from epd import dotenv
from epd.errors import StepError

NAME = "MODEL_RECIPE"
_MODEL_ID = "MODEL_ID"
_NONE = "none"


def expand(root: Path, environ: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with what a recipe stands for; what is set beside it, there or in `.env` (`own`), wins.

    `MODEL_RECIPE=none` takes back what recipes set: each of their variables is empty, which is its default.

    Raises:
        StepError: there is no such recipe, or its model is not here.
    """
    wanted = named(environ, own)
    if not wanted:
        return dict(environ)
    found = dict.fromkeys(variables(root), "") | {"MODEL": ""} if wanted == _NONE else _read(root, wanted)
    model = found.pop(_MODEL_ID, "")
    if model and not lookup(environ, own, "MODEL"):
        found["MODEL"] = str(_fetched(model, wanted, folder(root, model, environ, own)))
    return {**{name: value for name, value in found.items() if name not in own}, **environ}


def named(environ: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Return the recipe that is asked for, on the command line or in `.env`; empty when none is."""
    return lookup(environ, own, NAME)


def lookup(environ: Mapping[str, str], own: Mapping[str, str], name: str) -> str:
    """Return a value of the command line, else of a person's own lines in `.env`."""
    return environ[name].strip() if name in environ else own.get(name, "")


def variables(root: Path) -> list[str]:
    """Return the names of the variables that recipes set."""
    return sorted({name for recipe in names(root) for name in _read(root, recipe)} - {_MODEL_ID})


def names(root: Path) -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in (root / "models").glob("*.env"))


def model_id(root: Path, recipe: str) -> str:
    """Return the id that hubs know a recipe's model by.

    Raises:
        StepError: none is named, or there is no such recipe.
    """
    if not recipe:
        raise StepError(
            "no model to fetch",
            expected="MODEL=<owner>/<name>, or MODEL_RECIPE=<name>",
            found="neither",
            fix=f"make fetch-model MODEL_RECIPE={(names(root) or ['…'])[0]}",
        )
    return _read(root, recipe)[_MODEL_ID]


def folder(root: Path, model: str, environ: Mapping[str, str], own: Mapping[str, str]) -> Path:
    """Return where a model's files are kept: below EPD_MODEL_FILES, or `model-files/` here."""
    base = lookup(environ, own, "EPD_MODEL_FILES") or "model-files"
    return root / Path(base).expanduser() / model.rpartition("/")[2]


def _read(root: Path, recipe: str) -> dict[str, str]:
    path = root / "models" / f"{recipe}.env"
    if recipe not in names(root):
        raise StepError(
            "no such recipe",
            expected=f"one of: {', '.join([*names(root), _NONE])}",
            found=f"{NAME}={recipe}",
            fix="correct it",
        )
    return dict(dotenv.read(path).own)


def _fetched(model: str, recipe: str, found: Path) -> Path:
    if not (found / "config.json").is_file():
        raise StepError(
            f"the model of the recipe {recipe} is not here",
            expected=f"{model} in {found}",
            found="no config.json there",
            fix=f"make fetch-model {NAME}={recipe}; or name the folder where it is: MODEL=<folder>",
        )
    return found
