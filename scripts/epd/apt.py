"""The host's own apt sources: where its packages come from, and single packages of a newer suite from the same place.

Nothing here names a mirror. A machine in a closed network has one that it can reach in its sources, and only that.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from epd import command
from epd.errors import StepError

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_INSTALL_TIMEOUT_S = 1800.0
_NO_QUESTIONS = {"DEBIAN_FRONTEND": "noninteractive"}
_NETWORK_FIX = "check the network and the apt sources of this machine (`apt-get update` must work), then run it again"
_MIRROR_FIX = f"{_NETWORK_FIX}; or name another Debian mirror: EPD_DEBIAN_MIRROR=<address> make up"


@dataclass(frozen=True)
class Source:
    """One package source, whichever of apt's two formats it was written in."""

    uri: str
    suite: str
    components: tuple[str, ...]

    def deb822(self, keyring: Path) -> str:
        """Write it as a stanza whose packages must be signed with `keyring`."""
        return (
            f"Types: deb\nURIs: {self.uri}\nSuites: {self.suite}\n"
            f"Components: {' '.join(self.components)}\nSigned-By: {keyring}\n"
        )


def parse_one_line(text: str) -> list[Source]:
    """Read a `sources.list` in the one-line format (sources.list(5)); `deb-src` and comments are left out."""
    sources = []
    for raw in text.splitlines():
        words = raw.split("#", 1)[0].split()
        if not words or words[0] != "deb":
            continue
        words = words[1:]
        if words and words[0].startswith("["):
            end = next((i for i, word in enumerate(words) if word.endswith("]")), len(words) - 1)
            words = words[end + 1 :]
        if len(words) >= 2:
            sources.append(Source(words[0], words[1], tuple(words[2:])))
    return sources


def parse_deb822(text: str) -> list[Source]:
    """Read a `.sources` file (deb822 stanzas); stanzas that are disabled or have no `deb` type are left out."""
    sources = []
    for fields in _stanzas(text):
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                sources.append(Source(uri, suite, tuple(fields.get("components", "").split())))
    return sources


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each deb822 stanza; a line that begins with a blank goes on with the field above it."""
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            fields[name] = f"{fields.get(name, '')} {line.strip()}"
        else:
            key, _, value = line.partition(":")
            name = key.strip().lower()
            fields[name] = value.strip()


def host_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Return every enabled binary package source of this machine, in apt's own order."""
    sources: list[Source] = []
    main = etc / "sources.list"
    if main.is_file():
        sources += parse_one_line(main.read_text())
    for path in sorted((etc / "sources.list.d").glob("*")):
        if path.suffix == ".list":
            sources += parse_one_line(path.read_text())
        elif path.suffix == ".sources":
            sources += parse_deb822(path.read_text())
    return sources


def archive(sources: list[Source], codename: str) -> Source | None:
    """Return the source of the main archive of `codename`, not its updates or security suite; None if there is none.

    Debian's archive may also be named by its role (`stable`), so a suite without a dash that has `main` serves as well.
    """
    usable = [s for s in sources if "main" in s.components and not s.suite.endswith("/")]
    exact = [s for s in usable if s.suite == codename]
    by_role = [s for s in usable if s.suite in ("stable", "oldstable", "testing")]
    return next(iter(exact + by_role), None)


def mirror(sources: list[Source], codename: str, override: str = "") -> str:
    """Return the address of the Debian archive this machine uses; `override` (EPD_DEBIAN_MIRROR) wins.

    Raises:
        StepError: the sources name no main archive of `codename`.
    """
    if override:
        return override
    found = archive(sources, codename)
    if found is None:
        listed = ", ".join(sorted({f"{s.uri} {s.suite}" for s in sources})) or "none"
        raise StepError(
            "cannot tell which Debian mirror this machine uses",
            expected=f"a source of {codename!r} with the component main in /etc/apt",
            found=listed,
            fix="name one: EPD_DEBIAN_MIRROR=<address of a Debian archive> make up",
        )
    return found.uri


def install(packages: list[str]) -> None:
    """Install packages of the host's own sources, without those that are merely recommended.

    Raises:
        CommandError: apt-get failed; its output is on the terminal.
    """
    command.show("apt-get", "-q", "update", fix=_NETWORK_FIX, timeout_s=_INSTALL_TIMEOUT_S)
    argv = ["apt-get", "-qy", "install", "--no-install-recommends", *packages]
    command.show(*argv, fix=_NETWORK_FIX, timeout_s=_INSTALL_TIMEOUT_S, env=_NO_QUESTIONS)


def download(packages: list[str], folder: Path, options: Sequence[str] = (), *, fix: str = _NETWORK_FIX) -> list[str]:
    """Download the .deb files of packages into a folder, installing nothing; return the paths of all that are there.

    Raises:
        CommandError: apt-get failed.
    """
    command.show("apt-get", "-q", *options, "update", fix=fix, timeout_s=_INSTALL_TIMEOUT_S)
    # apt-get download writes to the current folder, hence env -C.
    argv = ["env", "-C", str(folder), "apt-get", "-q", *options, "download"]
    for package in packages:
        command.show(*argv, package, fix=fix, timeout_s=_INSTALL_TIMEOUT_S)
    return [str(path) for path in sorted(folder.glob("*.deb"))]


def install_from_suite(packages: list[str], source: Source, keyring: Path = DEBIAN_KEYRING) -> None:
    """Install single packages of another suite, and leave no trace of that suite in the machine's sources.

    The package lists live in a temporary folder, their signature is checked with `keyring`. What the packages depend
    on is resolved from the host's own suite, so nothing else of the newer one can come along.

    Raises:
        StepError: the keyring is missing.
        CommandError: apt-get failed, which includes a wrong signature and a dependency the host cannot meet.
    """
    if not keyring.is_file():
        raise StepError(
            f"cannot check the signatures of Debian {source.suite}",
            expected=f"the keyring {keyring}",
            found="no such file",
            fix="apt-get install debian-archive-keyring",
        )
    with _separate_state(source, keyring) as (folder, options):
        files = download([f"{package}/{source.suite}" for package in packages], folder, options, fix=_MIRROR_FIX)
        argv = ["apt-get", "-qy", "install", "--no-install-recommends", *files]
        command.show(*argv, fix=_MIRROR_FIX, timeout_s=_INSTALL_TIMEOUT_S, env=_NO_QUESTIONS)


@contextmanager
def _separate_state(source: Source, keyring: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder for downloads and the options that make apt keep all its state in there."""
    folder = Path(tempfile.mkdtemp(prefix="epd-apt-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)  # apt downloads as its own user, _apt
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        sources = folder / "suite.sources"
        sources.write_text(source.deb822(keyring))
        settings = {
            "Dir::Etc::sourcelist": str(sources),
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": str(folder / "lists"),
            "Dir::Cache": str(folder / "cache"),
            # Root-owned folder: without this apt warns that _apt cannot write there, and downloads as root anyway.
            "APT::Sandbox::User": "root",
        }
        yield folder, [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
