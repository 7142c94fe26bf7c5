"""The instances file to a topology."""

import json
import tomllib
from pathlib import Path
from typing import Any

from .config import Topology
from .errors import ConfigError

_STAGES = ("encode", "prefill_decode", "prefill", "decode")


def read_instances(path: Path) -> Topology:
    """Return what the file says: a list of base URLs for each stage, in TOML, or in JSON where its name ends so.

    Raises :class:`ConfigError` for a file that cannot be read, or says what cannot be.
    """
    try:
        text = path.read_text("utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    if not isinstance(document, dict):
        raise ConfigError([f"{path}: expected an object with the stages' names"])
    stages, faults = _read_stages(document)
    faults += Topology(**stages).faults()
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    return Topology(**stages)


def _read_stages(document: dict[str, Any]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    stages: dict[str, tuple[str, ...]] = {}
    faults = []
    for name, urls in document.items():
        stage = name.replace("-", "_")
        if stage not in _STAGES:
            faults.append(f"{name}: expected one of {', '.join(_STAGES)}")
        elif not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            faults.append(f'{name}: expected a list of URLs, ["http://host:port"], found {urls!r}')
        else:
            stages[stage] = tuple(url.rstrip("/") for url in urls)
    return stages, faults
