"""What operators did, told by the worker that they reach to the others, through a file that all of them watch."""

import json
import os
from pathlib import Path

from .errors import ConfigError

State = dict[str, dict[str, str]]
"""What each instance is doing, by stage and URL: ``serving``, ``drained`` or ``leaving``."""

_NAME = "instances.json"


def announcements_in(folder: str) -> Path:
    """Return the file in the workers' folder."""
    return Path(folder, _NAME)


def write_state(path: Path, state: State) -> None:
    """Put ``state`` in the place of what the file says; a reader sees the one or the other."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state))
    os.replace(new, path)


def read_state(path: Path) -> State:
    """Return what was written last, nothing when nothing was. Raises :class:`ConfigError`."""
    try:
        state: State = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    return state
