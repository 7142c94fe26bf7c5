"""What the two model hubs have of a model: a list of files, and where each is. The API of each is in one function."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from epd.errors import StepError

TIMEOUT_S = 60.0
"""Of a connection that says nothing."""
ENDPOINTS = {"huggingface": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}
_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
"""The same weights in other forms, not needed where there are *.safetensors."""


@dataclass(frozen=True)
class HubFile:
    """One file of a model."""

    path: str
    """Below the model's folder, with slashes."""
    size_bytes: int
    sha256: str
    """Empty where the hub does not tell: Hugging Face does for large files alone."""
    url: str


@dataclass(frozen=True)
class Hub:
    """Where models come from."""

    name: str
    """`huggingface` or `modelscope`."""
    endpoint: str
    token: str = ""
    """Sent to the endpoint alone, never to where that redirects."""

    def request(self, url: str) -> urllib.request.Request:
        """Return a request for a URL of this hub."""
        request = urllib.request.Request(url, headers={"User-Agent": "ascend-epd"})  # noqa: S310 - see hub()
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        return request

    def list_files(self, model: str, revision: str) -> list[HubFile]:
        """Return the files of a model that are needed to serve it.

        Raises:
            StepError: there is no such model, it is not open to us, or the hub does not answer as it should.
        """
        if not _ID.match(model):
            raise StepError(
                "MODEL is not the id of a model",
                expected="<owner>/<name>, e.g. Qwen/Qwen3-VL-8B-Instruct",
                found=f"MODEL={model}",
                fix="take the id from the hub's page of the model",
            )
        files = [file for file in _LISTS[self.name](self, model, revision) if _is_plain(file.path)]
        if any(file.path.endswith(".safetensors") for file in files):
            files = [file for file in files if not file.path.endswith(_OTHER_WEIGHTS)]
        if not any(file.path == "config.json" for file in files):
            raise StepError(
                f"{model} is not a model that vLLM can serve",
                expected="a config.json among its files",
                found=", ".join(file.path for file in files[:5]) or "no files",
                fix="name another one",
            )
        return files


def hub(name: str, endpoint: str = "", token: str = "") -> Hub:
    """Return a hub by name; `endpoint` is a mirror of it.

    Raises:
        StepError: there is none of that name, or the endpoint is no http address.
    """
    if name not in ENDPOINTS:
        raise StepError(
            "HUB is not usable",
            expected=" or ".join(ENDPOINTS),
            found=f"HUB={name}",
            fix="HUB=modelscope, or leave it out",
        )
    endpoint = (endpoint or ENDPOINTS[name]).rstrip("/")
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
        raise StepError(
            "the hub's endpoint is not usable",
            expected="an address that begins with https://",
            found=endpoint,
            fix=f"e.g. {ENDPOINTS[name]}",
        )
    return Hub(name, endpoint, token)


def _is_plain(path: str) -> bool:
    """Whether a path stays below the model's folder; a hub has no business with others, nor with hidden files."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and not any(part.startswith(".") for part in parts)


def _huggingface(hub: Hub, model: str, revision: str) -> list[HubFile]:
    """Return the files by the hub's tree API; `revision` is a branch, tag or commit, `main` if empty."""
    at = urllib.parse.quote(revision or "main", safe="")
    entries = _json(hub, f"{hub.endpoint}/api/models/{model}/tree/{at}?recursive=true", model)
    if not isinstance(entries, list):
        raise _strange(hub, entries)
    return [
        HubFile(
            path=entry["path"],
            size_bytes=int(entry["size"]),
            sha256=_sha256((entry.get("lfs") or {}).get("oid")),
            url=f"{hub.endpoint}/{model}/resolve/{at}/{urllib.parse.quote(entry['path'])}",
        )
        for entry in entries
        if entry.get("type") == "file"
    ]


def _modelscope(hub: Hub, model: str, revision: str) -> list[HubFile]:
    """Return the files by the hub's repository API; `revision` is `master` if empty."""
    at = urllib.parse.quote(revision or "master", safe="")
    base = f"{hub.endpoint}/api/v1/models/{model}/repo"
    answer = _json(hub, f"{base}/files?Revision={at}&Recursive=true", model)
    entries = (answer.get("Data") or {}).get("Files") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise _strange(hub, answer)
    return [
        HubFile(
            path=entry["Path"],
            size_bytes=int(entry["Size"]),
            sha256=_sha256(entry.get("Sha256")),
            url=f"{base}?Revision={at}&FilePath={urllib.parse.quote(entry['Path'], safe='')}",
        )
        for entry in entries
        if entry.get("Type") == "blob"
    ]


_LISTS: Mapping[str, Callable[[Hub, str, str], list[HubFile]]] = {
    "huggingface": _huggingface,
    "modelscope": _modelscope,
}


def _sha256(value: object) -> str:
    return value if isinstance(value, str) and _SHA256.match(value) else ""


def _json(hub: Hub, url: str, model: str) -> Any:
    try:
        with urllib.request.urlopen(hub.request(url), timeout=TIMEOUT_S) as answer:  # noqa: S310 - see hub()
            return json.load(answer)
    except urllib.error.HTTPError as error:
        known = error.code in (401, 403, 404)
        raise StepError(
            f"{hub.endpoint} does not give the files of {model}",
            expected="a list of files",
            found=f"{error.code} {error.reason}",
            fix="check the id; for a model that is not open to all set HF_TOKEN" if known else "try again later",
        ) from error
    except (OSError, ValueError) as error:
        raise StepError(
            f"{hub.endpoint} cannot be asked for the files of {model}",
            expected="an answer in JSON",
            found=str(error),
            fix="check the network and its proxy (https_proxy); HUB=modelscope, or HF_ENDPOINT=<mirror>",
        ) from error


def _strange(hub: Hub, answer: object) -> StepError:
    found = json.dumps(answer)[:200]
    return StepError(
        f"{hub.endpoint} answers with something else", expected="a list of files", found=found, fix="try HUB=…"
    )
