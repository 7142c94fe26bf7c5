"""Turn a role and its environment into the exact command that the container runs, print it, and become it.

    epd-serve ROLE [ARGUMENT…]           run ROLE; further arguments go to its command unchanged
    epd-serve --print ROLE [ARGUMENT…]   only print the command, environment first
    epd-serve health                     health check of the role that this container runs (exit code 0 or 1)

Roles: encode, prefill-decode, prefill, decode, monolith (one ordinary vLLM), mooncake-master, mooncake-store, proxy.

What a role is told comes from environment variables named EPD_…; docs/configuration.md lists them with units and
defaults. A value that cannot work is refused before anything starts, all faults in one message.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from epd_serve import health, pool, vllm
from epd_serve.roles import VLLM_ROLES
from epd_serve.settings import ConfigurationError, Settings, read_settings


def build_command(role: str, settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Return the whole command of a role; `arguments` and then EPD_EXTRA_ARGS come last, so that they win."""
    if role in VLLM_ROLES:
        command = vllm.command(role, settings)
    elif role == "mooncake-master":
        command = pool.master_command(settings)
    elif role == "mooncake-store":
        command = pool.store_command(settings)
    else:
        command = ["epd-proxy", "--host", settings.bind_host, "--port", str(settings.port)]
    return [*command, *arguments, *settings.extra_args]


def _probe(role: str, settings: Settings, environment: Mapping[str, str]) -> list[str]:
    from epd_serve import probe  # noqa: PLC0415 - the health check, which starts often, does without subprocess

    return probe.find_faults(role, settings, {**os.environ, **environment})


def show(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """Return the command as a person would type it, one option a line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    for word in command:
        if word.startswith("-") or word == command[0]:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def become(environment: Mapping[str, str], command: Sequence[str]) -> NoReturn:
    """Replace this process by the command, so that it gets the container's signals."""
    os.environ.update(environment)
    os.execvp(command[0], list(command))  # noqa: S606 - the purpose of this program


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit code unless the process becomes the role's command."""
    only_print = arguments[:1] == ["--print"]
    words = arguments[1:] if only_print else arguments
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    role, *rest = words
    if role == "health":
        healthy, sentence = health.check(health.STATE_DIR)
        print(sentence)
        return 0 if healthy else 1
    try:
        settings = read_settings(role, os.environ)
    except ConfigurationError as error:
        print(f"epd-serve: {error}", file=sys.stderr)
        return 2
    defaults = vllm.environment(role, settings) if role in VLLM_ROLES else {}
    # What is set in the container wins; an image cannot take away what its base sets, only empty it.
    environment = {name: os.environ.get(name) or value for name, value in defaults.items()}
    command = build_command(role, settings, rest)
    print(show(environment, command), flush=True)
    if only_print:
        return 0
    if role in VLLM_ROLES and settings.probe and (faults := _probe(role, settings, environment)):
        print("epd-serve: cannot start:", *(f"  - {fault}" for fault in faults), sep="\n", file=sys.stderr)
        return 2
    health.remember(role, health.url(role, settings), health.STATE_DIR)
    become(environment, command)
