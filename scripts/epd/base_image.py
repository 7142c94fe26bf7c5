"""The image that ours are built on: Debian's own where a registry answers, else one made from Debian packages."""

from __future__ import annotations

import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from epd import apt, command, needs
from epd.display import Display, Row
from epd.errors import StepError
from epd.host import Distribution
from epd.settings import Settings

_PULL_TIMEOUT_S = 900.0
_DEBOOTSTRAP_TIMEOUT_S = 1800.0
_PACKAGES = "ca-certificates,python3"
_OFFLINE_FIX = (
    "let this machine reach a registry, or name an image of Debian that it has or that a mirror has: "
    "EPD_BASE_IMAGE=<mirror>/library/debian:bookworm-slim make up"
)


def obtain(settings: Settings, suite: str, distribution: Distribution, *, root: bool) -> str:
    """Return the name of a base image that the engine has: given, there already, pulled, or made here.

    Raises:
        StepError: there is none and none can be made.
    """
    if settings.base_image:
        _require(settings.base_image)
        return settings.base_image
    official, own = f"debian:{suite}-slim", f"ascend-epd-base:{suite}"
    for name in (official, own):
        if is_there(name):
            print(f"Base image: {name} (already here)", flush=True)
            return name
    print(f"Base image: pulling {official} …", flush=True)
    reason = pull(official, first_answer_s=settings.registry_timeout_s)
    if reason is None:
        return official
    print(f"  no registry can be reached: {reason}\n  making {own} from Debian packages instead", flush=True)
    _make(own, suite, settings, distribution, root=root)
    return own


def pull(
    name: str,
    *,
    first_answer_s: float,
    total_s: float = _PULL_TIMEOUT_S,
    on_line: Callable[[str], None] = lambda _: None,
) -> str | None:
    """Pull an image; return None, or why it could not be pulled. `on_line` gets each line that the client prints.

    A registry that is cut off by a firewall lets the client wait for minutes, hence a limit for its first answer.
    """
    process = subprocess.Popen(
        ["docker", "pull", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=command.environment(),
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_collect, args=(process, lines), daemon=True).start()
    limit_s, began_s, last = first_answer_s, time.monotonic(), ""
    try:
        while (line := lines.get(timeout=max(0.0, began_s + limit_s - time.monotonic()))) is not None:
            last, limit_s = line or last, total_s
            on_line(line)
    except queue.Empty:
        process.kill()
        process.wait()
        return f"no answer within {limit_s:.0f} s" + (f" after {last!r}" if last else "")
    return None if process.wait() == 0 else last or f"docker pull ended with exit code {process.returncode}"


def _collect(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None  # noqa: S101 (it was opened as a pipe; tells mypy so)
    for line in process.stdout:
        lines.put(line.strip())
    lines.put(None)


def _require(name: str) -> None:
    if is_there(name):
        return
    reason = pull(name, first_answer_s=_PULL_TIMEOUT_S)
    if reason is not None:
        raise StepError(
            "EPD_BASE_IMAGE cannot be used",
            expected=f"an image {name} here or in a registry",
            found=reason,
            fix="correct the name, or leave EPD_BASE_IMAGE out",
        )


def is_there(name: str) -> bool:
    """Whether the engine has an image of this name."""
    return command.probe("docker", "image", "inspect", "--format", "{{.Id}}", name).ok


def _make(name: str, suite: str, settings: Settings, distribution: Distribution, *, root: bool) -> None:
    """Make a minimal Debian with debootstrap and import it as an image."""
    if not root:
        raise StepError(
            "cannot make a base image", expected="to run as root (debootstrap)", found="a plain user", fix=_OFFLINE_FIX
        )
    if not distribution.family and not command.have("debootstrap"):
        raise StepError(
            "cannot make a base image",
            expected="debootstrap, which is installed by itself on Debian and Ubuntu",
            found=distribution.pretty_name,
            fix=_OFFLINE_FIX,
        )
    missing = [] if command.have("debootstrap") else [needs.Need("debootstrap", "makes the base image", "debootstrap")]
    if distribution.family == "ubuntu" and not apt.DEBIAN_KEYRING.is_file():
        missing.append(needs.Need("Debian's keyring", "checks its packages", "debian-archive-keyring"))
    needs.provide(missing, distribution, root=root, no_install=settings.no_install, mirror=settings.debian_mirror)
    folder = Path(tempfile.mkdtemp(prefix="epd-base-", dir="/var/tmp"))
    try:
        began_s = time.monotonic()
        _debootstrap(folder / "root", suite, settings, distribution)
        _import(folder / "root", name)
        print(f"  made {name} in {time.monotonic() - began_s:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _debootstrap(target: Path, suite: str, settings: Settings, distribution: Distribution) -> None:
    """Install a minimal Debian into `target`, and give it the package sources this machine has for that suite."""
    sources = apt.host_sources() if distribution.family == "debian" else []
    # Ubuntu's sources name no Debian mirror; debootstrap has one of its own.
    mirror = settings.debian_mirror
    if distribution.family == "debian":
        mirror = apt.mirror(sources, distribution.codename, settings.debian_mirror)
    argv = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", f"--keyring={apt.DEBIAN_KEYRING}"]
    argv += [suite, str(target), *([mirror] if mirror else [])]
    display, printed = Display(), deque[str](maxlen=15)

    def on_line(line: str) -> None:
        printed.append(line)
        display.show([Row("debootstrap", "building", line.removeprefix("I: "), finished=False)])

    code = command.follow(*argv, on_line=on_line, timeout_s=_DEBOOTSTRAP_TIMEOUT_S)
    display.show([])
    if code != 0:
        inner = target / "debootstrap" / "debootstrap.log"
        detail = inner.read_text(errors="replace").splitlines()[-15:] if inner.is_file() else []
        tail = [*printed, *detail]
        raise StepError(
            "debootstrap failed",
            expected=f"a minimal Debian {suite} from {mirror or 'the default mirror of debootstrap'}",
            found="\n    ".join(["its output ends with", *tail]),
            fix=f"check that `apt-get update` works; {_OFFLINE_FIX}",
        )
    security = [s for s in sources if s.suite in (f"{suite}-security", f"{suite}-updates") and "main" in s.components]
    if security:
        stanzas = [apt.Source(s.uri, s.suite, ("main",)).deb822(apt.DEBIAN_KEYRING) for s in security]
        (target / "etc/apt/sources.list.d/security.sources").write_text("\n".join(stanzas))


def _import(tree: Path, name: str) -> None:
    for cache in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(tree / cache, ignore_errors=True)
        (tree / cache / "partial").mkdir(parents=True)
    tar = subprocess.Popen(["tar", "-C", str(tree), "--numeric-owner", "-c", "."], stdout=subprocess.PIPE)
    try:
        done = subprocess.run(
            ["docker", "import", "--change", 'CMD ["bash"]', "-", name],
            stdin=tar.stdout,
            check=False,
            capture_output=True,
            text=True,
            timeout=_PULL_TIMEOUT_S,
            env=command.environment(),
        )
    finally:
        tar.kill()
        tar.wait()
    if done.returncode != 0:
        raise StepError(
            "cannot import the base image",
            expected=f"`docker import` to make {name}",
            found=done.stderr.strip(),
            fix="see that the disk of the Docker engine has room (`docker system df`)",
        )
