"""Apt sources in both formats, and packages of another suite without a trace of it left behind."""

import pytest

from epd import apt
from epd.apt import Source
from epd.errors import CommandError, StepError

ONE_LINE = """
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://mirror.example/debian bookworm main contrib # trailing
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian-security bookworm-security main
deb [ arch=amd64 ] http://other.example/tools ./
"""
DEB822 = """\
Types: deb deb-src
# a comment inside a stanza
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://src.example/debian
Suites: bookworm
Components: main
"""


def test_one_line_sources():
    assert apt.parse_one_line(ONE_LINE) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("http://mirror.example/debian-security", "bookworm-security", ("main",)),
        Source("http://other.example/tools", "./", ()),
    ]


def test_deb822_sources():
    assert apt.parse_deb822(DEB822) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("http://mirror.example/debian", "bookworm-updates", ("main", "contrib")),
    ]


def test_what_we_write_reads_back_as_the_same_source(tmp_path):
    source = Source("http://mirror.example/debian", "trixie", ("main",))
    assert apt.parse_deb822(source.deb822(tmp_path / "key.gpg")) == [source]


def test_host_sources_reads_all_files_and_no_disabled_ones(tmp_path):
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    (parts / "b.list").write_text("deb http://b.example/debian bookworm main\n")
    (parts / "c.sources").write_text(DEB822)
    (parts / "d.list.disabled").write_text("deb http://d.example/debian bookworm main\n")
    hosts = [source.uri.split("/")[2] for source in apt.host_sources(tmp_path)]
    assert hosts == ["a.example", "b.example", "mirror.example", "mirror.example"]


@pytest.mark.parametrize(
    "sources",
    [
        apt.parse_one_line(ONE_LINE),
        apt.parse_deb822(DEB822),
        [Source("http://sec.example/", "bookworm-security", ("main",)), *apt.parse_deb822(DEB822)],
        [Source("http://mirror.example/debian", "stable", ("main",))],
        [Source("http://third.example/x", "bookworm", ("tools",)), *apt.parse_deb822(DEB822)],
    ],
)
def test_mirror_is_that_of_the_main_archive(sources):
    assert apt.mirror(sources, "bookworm") == "http://mirror.example/debian"


def test_mirror_can_be_named_and_must_be_where_the_sources_have_none():
    assert apt.mirror([], "bookworm", "http://mine.example/debian") == "http://mine.example/debian"
    with pytest.raises(StepError, match="EPD_DEBIAN_MIRROR"):
        apt.mirror([Source("http://third.example/x", "bookworm", ("tools",))], "bookworm")


FAKE_APT = """\
for word; do case "$word" in Dir::Etc::sourcelist=*) cat "${word#*=}" >> "$SEEN";; esac; done
case " $* " in *" download "*) touch fake_1_amd64.deb;; esac
"""


def test_install_from_suite_uses_a_list_of_its_own_and_leaves_nothing(programs, tmp_path, monkeypatch):
    seen, keyring = tmp_path / "seen", tmp_path / "key.gpg"
    keyring.touch()
    monkeypatch.setenv("SEEN", str(seen))
    programs.add("apt-get", FAKE_APT)
    apt.install_from_suite(["fake"], Source("http://mirror.example/debian", "trixie", ("main",)), keyring)
    update, download, install = programs.calls
    assert " update" in update
    assert " download fake/trixie" in download
    for call in (update, download):
        assert "Dir::Etc::sourceparts=-" in call
        assert "Dir::State::lists=" in call
    assert "Dir::" not in install  # what it depends on comes from the host's own sources
    deb = install.split()[-1]
    assert deb.endswith("/fake_1_amd64.deb")
    assert f"Signed-By: {keyring}" in seen.read_text()
    assert not (tmp_path / deb).parent.exists()


def test_install_from_suite_needs_the_keyring(programs, tmp_path):
    with pytest.raises(StepError, match="debian-archive-keyring"):
        apt.install_from_suite(["fake"], Source("http://m.example", "trixie", ("main",)), tmp_path / "none.gpg")
    assert programs.calls == []


def test_a_failing_apt_is_an_error_with_a_fix(programs):
    programs.add("apt-get", "exit 100")
    with pytest.raises(CommandError, match=r"exit code 100[\s\S]*apt sources") as caught:
        apt.install(["docker.io"])
    assert caught.value.code == 100
