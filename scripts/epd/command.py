"""Running programs: the only place where the host scripts start a process and wait for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from epd.errors import CommandError, StepError

_NOT_FOUND = 127
READ_TIMEOUT_S = 60.0
"""How long a program may take that only looks something up. A hung Docker engine must not hang `make`."""


@dataclass(frozen=True)
class Result:
    """What a program left behind: its exit code (None: it did not end in time) and what it printed."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """Whether the program ended with exit code zero."""
        return self.code == 0


def have(program: str) -> bool:
    """Whether `program` is on the PATH (root's system folders included, which a plain user's PATH may lack)."""
    return shutil.which(program, path=search_path()) is not None


def search_path(environ: Mapping[str, str] | None = None) -> str:
    """Return the PATH with the system folders behind it: dockerd and debootstrap live in /usr/sbin."""
    path = (os.environ if environ is None else environ).get("PATH", os.defpath)
    missing = [folder for folder in ("/usr/local/sbin", "/usr/sbin", "/sbin") if folder not in path.split(os.pathsep)]
    return os.pathsep.join([path, *missing])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment our programs run in: the caller's, the whole PATH, untranslated messages."""
    return {**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8", **(extra or {})}


def probe(
    *argv: str, timeout_s: float = READ_TIMEOUT_S, env: Mapping[str, str] | None = None, stdin: str = ""
) -> Result:
    """Run a program quietly and return what it said, whether it succeeded or not."""
    try:
        done = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            input=stdin,
            timeout=timeout_s,
            env=environment(env),
        )
    except FileNotFoundError:
        return Result(_NOT_FOUND, "", f"{argv[0]}: not found on PATH")
    except subprocess.TimeoutExpired as expired:
        return Result(None, _text(expired.stdout), _text(expired.stderr))
    return Result(done.returncode, done.stdout, done.stderr)


def read(*argv: str, fix: str, timeout_s: float = READ_TIMEOUT_S, env: Mapping[str, str] | None = None) -> str:
    """Run a program quietly and return its standard output.

    Raises:
        CommandError: it failed or did not end within `timeout_s`; `fix` says what a person can do.
    """
    result = probe(*argv, timeout_s=timeout_s, env=env)
    if not result.ok:
        raise CommandError(argv, code=result.code, output=result.stdout + result.stderr, fix=fix)
    return result.stdout


def show(*argv: str, fix: str, timeout_s: float, env: Mapping[str, str] | None = None) -> None:
    """Run a program whose output the person at the terminal sees.

    Raises:
        CommandError: it failed or did not end within `timeout_s`.
    """
    try:
        code: int | None = subprocess.run(argv, check=False, timeout=timeout_s, env=environment(env)).returncode
    except FileNotFoundError:
        code = _NOT_FOUND
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        raise CommandError(argv, code=code, output="(see above)", fix=fix)


def attach(*argv: str, fix: str, env: Mapping[str, str] | None = None) -> int:
    """Run a program on the terminal for as long as it takes; return its exit code, which is its own to explain.

    Raises:
        StepError: there is no such program; `fix` says how to get it.
    """
    try:
        return subprocess.run(argv, check=False, env=environment(env)).returncode
    except FileNotFoundError as error:
        raise StepError(
            f"{argv[0]} is missing", expected=f"a program {argv[0]} on the PATH", found="none", fix=fix
        ) from error


def follow(
    *argv: str,
    on_line: Callable[[str], None],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> int | None:
    """Run a program and hand on each line it prints as it comes; return its exit code, None if it did not end in time.

    The program is ended when we are interrupted, so that nothing goes on behind the back of whoever pressed Ctrl-C.
    """
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment(env),
    )
    late = threading.Event()

    def end_it() -> None:
        late.set()
        process.terminate()

    alarm = threading.Timer(timeout_s, end_it)
    alarm.start()
    try:
        for line in process.stdout or ():
            on_line(line.rstrip("\n"))
        code = process.wait()
    finally:
        alarm.cancel()
        if process.poll() is None:
            process.terminate()
    return None if late.is_set() else code


def _text(output: bytes | str | None) -> str:
    """Return what a program that was cut off had printed; subprocess hands out bytes there even in text mode."""
    if isinstance(output, bytes):
        return output.decode(errors="replace")
    return output or ""
