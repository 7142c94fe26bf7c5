"""Getting a model's files from a hub: with progress, going on where it broke off, each file checked."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from epd import checksums, dotenv, recipes
from epd import hub as hubs
from epd.context import ROOT, Context
from epd.display import Display, Row
from epd.errors import StepError
from epd.hub import Hub, HubFile

_CHUNK_BYTES = 1 << 20
_TRIES = 6
"""Of one file, in a row without a byte; each goes on where the last one broke off."""
_PAUSE_S = 2.0
_RECORD = ".fetched.json"
"""In the model's folder: size and time of each file that was checked, so that it is not read again."""
_GB = 1e9


def fetch(_: Context, __: list[str]) -> int:
    """Fetch the model that MODEL or MODEL_RECIPE names, unless it is here already."""
    own = dotenv.read(ROOT / ".env").own

    def told(name: str) -> str:
        return recipes.lookup(os.environ, own, name)

    # MODEL of the command line alone: that of `.env` is what is served, which may well be a folder.
    model = os.environ.get("MODEL", "").strip() or recipes.model_id(ROOT, recipes.named(os.environ, own))
    name = told("HUB") or "huggingface"
    endpoint = told("HF_ENDPOINT" if name == "huggingface" else "MODELSCOPE_ENDPOINT")
    source = hubs.hub(name, endpoint, told("HF_TOKEN") if name == "huggingface" else "")
    folder = recipes.folder(ROOT, model, os.environ, own)
    files = source.list_files(model, told("REVISION"))
    total = sum(file.size_bytes for file in files)
    print(f"{model}: {len(files)} files, {total / _GB:.1f} GB, from {source.endpoint} to {folder}", flush=True)
    download(source, files, folder)
    recipe = recipes.named(os.environ, own)
    word = f"MODEL_RECIPE={recipe}" if recipe else f"MODEL={os.path.relpath(folder, ROOT)}"
    print(f"\nNext:\n\n  make up {word}")
    return 0


def download(source: Hub, files: list[HubFile], folder: Path, *, pause_s: float = _PAUSE_S) -> None:
    """Bring a folder to hold these files, readable by the containers' user.

    Raises:
        StepError: the disk has no room, a download breaks off for good, or a file is not what the hub says it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder)
    missing = [file for file in files if not _is_here(folder, file, record)]
    _check_space(folder, missing)
    progress = _Progress(sum(file.size_bytes for file in files), sum(file.size_bytes for file in missing))
    for file in missing:
        part = _part(folder, file)
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(source, file, part, progress, pause_s)
        _check(file, part)
        path = folder / file.path
        part.replace(path)
        path.chmod(0o644)
        record[file.path] = _trace(path)
        (folder / _RECORD).write_text(json.dumps(record, indent=1))
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(0o755)  # whatever the umask: containers run as another user
    progress.end()


def _part(folder: Path, file: HubFile) -> Path:
    path = folder / file.path
    return path.with_name(f".{path.name}.part")


def _download(source: Hub, file: HubFile, part: Path, progress: _Progress, pause_s: float) -> None:
    failures = 0
    while (have := part.stat().st_size if part.exists() else 0) < file.size_bytes or not part.exists():
        try:
            _go_on(source, file, part, have, progress)
            if file.size_bytes == 0:
                return
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 0
            failures = 1 if part.exists() and part.stat().st_size > have else failures + 1
            if failures >= _TRIES or code in (401, 403, 404):
                raise StepError(
                    f"{file.path} cannot be fetched",
                    expected=f"{file.size_bytes} bytes from {source.endpoint}",
                    found=f"{have} bytes, then: {error}",
                    fix="the same command goes on where it broke off; or ask another: HUB=modelscope, HF_ENDPOINT=…",
                ) from error
            progress.note(f"{file.path}: {error}; going on")
            time.sleep(pause_s * failures)


def _go_on(source: Hub, file: HubFile, part: Path, have: int, progress: _Progress) -> None:
    """Take what is missing of a file; one that answers with the whole of it begins anew."""
    request = source.request(file.url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=hubs.TIMEOUT_S) as answer:  # noqa: S310 - an address of hub.py
        goes_on = have > 0 and answer.status == 206
        with part.open("ab" if goes_on else "wb") as out:
            progress.start(file, have if goes_on else 0)
            while block := answer.read(_CHUNK_BYTES):
                out.write(block)
                progress.add(len(block))
    if part.stat().st_size < file.size_bytes:
        raise OSError("the connection ended early")


def _check(file: HubFile, part: Path) -> None:
    size = part.stat().st_size
    digest = ""
    if size == file.size_bytes and file.sha256:
        digest = checksums.sha256(part)
    if size == file.size_bytes and digest == file.sha256:
        return
    part.unlink()
    raise StepError(
        f"{file.path} is not what the hub says it is",
        expected=f"{file.size_bytes} bytes, sha256 {file.sha256 or 'not told'}",
        found=f"{size} bytes, sha256 {digest or 'not computed'}",
        fix="it was removed: try again; if it comes again so, the hub or a proxy on the way hands out another file",
    )


def _check_space(folder: Path, missing: list[HubFile]) -> None:
    parts = [_part(folder, file) for file in missing]
    need = sum(file.size_bytes for file in missing) - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StepError(
            "not enough room for the model",
            expected=f"{need / _GB:.1f} GB more in {folder}",
            found=f"{free / _GB:.1f} GB free",
            fix="make room, or name another folder: EPD_MODEL_FILES=/data/models",
        )


def _read_record(folder: Path) -> dict[str, list[int]]:
    try:
        found = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_here(folder: Path, file: HubFile, record: Mapping[str, list[int]]) -> bool:
    path = folder / file.path
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    return record.get(file.path) == _trace(path)


def _trace(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


class _Progress:
    """One line: which file, how much of all, how fast."""

    def __init__(self, total_bytes: int, missing_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._display = Display()
        self._clock = clock
        self._total = max(total_bytes, 1)
        self._before = total_bytes - missing_bytes
        self._done: dict[str, int] = {}
        self._name = ""
        self._began_s, self._taken, self._shown_s = clock(), 0, 0.0

    def start(self, file: HubFile, have: int) -> None:
        """Begin, or go on with, a file."""
        self._name = file.path
        self._done[file.path] = have

    def add(self, count: int) -> None:
        """Take note of bytes that came."""
        self._done[self._name] += count
        self._taken += count
        if self._clock() - self._shown_s >= 0.5:
            self._shown_s = self._clock()
            self._display.show([self._row(finished=False)])

    def note(self, text: str) -> None:
        """Say something that stays."""
        self._display.note(f"  {text}")

    def end(self) -> None:
        """Show the end."""
        self._name = "all files"
        self._display.show([self._row(finished=True)])

    def _row(self, *, finished: bool) -> Row:
        have = self._before + sum(self._done.values())
        rate = self._taken / max(self._clock() - self._began_s, 1e-6)
        detail = f"{have / _GB:.2f} of {self._total / _GB:.2f} GB, {rate / 1e6:.1f} MB/s"
        if not finished and rate:
            detail += f", {(self._total - have) / rate / 60:.0f} min left; {self._name}"
        return Row("model", "fetched" if finished else "fetching", detail, finished)
