"""`.env`: our block comes and goes, the user's lines never change."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd import dotenv
from epd.dotenv import Entry
from epd.errors import StepError

ENTRIES = [Entry("COMPOSE_FILE", "compose/1e1pd.yaml", "topology"), Entry("EPD_PROXY_PORT", "8000", "port")]
OWN_LINES = st.lists(
    st.one_of(
        st.just(""),
        st.from_regex(r"# [a-z ]{0,20}", fullmatch=True),
        st.from_regex(r"MY_[A-Z]{1,5}=[a-z0-9 ]{0,9}", fullmatch=True),
    ),
    max_size=8,
)


def test_a_new_file(tmp_path):
    path = tmp_path / ".env"
    assert dotenv.write(path, ENTRIES)
    assert dotenv.read(path).managed == {"COMPOSE_FILE": "compose/1e1pd.yaml", "EPD_PROXY_PORT": "8000"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_second_write_changes_nothing(tmp_path):
    path = tmp_path / ".env"
    dotenv.write(path, ENTRIES)
    before = path.stat().st_mtime_ns
    assert not dotenv.write(path, ENTRIES)
    assert path.stat().st_mtime_ns == before


@given(OWN_LINES)
def test_the_user_s_lines_survive_any_number_of_writes(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("env") / ".env"
    text = "\n".join(lines)
    path.write_text(text)
    dotenv.write(path, ENTRIES)
    dotenv.write(path, ENTRIES[:1])
    found = dotenv.read(path)
    assert found.outside == text.strip("\n")
    assert found.managed == {"COMPOSE_FILE": "compose/1e1pd.yaml"}
    dotenv.remove_block(path)
    left = path.read_text() if path.exists() else ""
    assert left.strip("\n") == text.strip("\n")


def test_what_the_user_sets_is_not_in_our_block(tmp_path):
    path = tmp_path / ".env"
    path.write_text("export EPD_PROXY_PORT = '9000' # mine\n")
    dotenv.write(path, ENTRIES)
    found = dotenv.read(path)
    assert found.own == {"EPD_PROXY_PORT": "9000"}
    assert "EPD_PROXY_PORT" not in found.managed
    assert path.read_text().startswith("export EPD_PROXY_PORT = '9000' # mine\n")


def test_the_mode_of_the_file_is_kept(tmp_path):
    path = tmp_path / ".env"
    path.write_text("SECRET=x\n")
    path.chmod(0o600)
    dotenv.write(path, ENTRIES)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_block_without_an_end_is_refused_rather_than_guessed(tmp_path):
    path = tmp_path / ".env"
    path.write_text(f"{dotenv.BEGIN}\nA=1\nMY_LINE=2\n")
    with pytest.raises(StepError, match="does not end"):
        dotenv.write(path, ENTRIES)
    assert "MY_LINE=2" in path.read_text()


@pytest.mark.parametrize("value", ["/a folder/with $dollar #hash", "plain", 'double"quote'])
def test_values_read_back_as_they_were_in_the_shell_and_here(tmp_path, value):
    path = tmp_path / ".env"
    dotenv.write(path, [Entry("EPD_MODELS", value, "folder")])
    assert dotenv.read(path).managed["EPD_MODELS"] == value
    shell = subprocess.run(
        ["sh", "-c", '. "$1"; printf %s "$EPD_MODELS"', "sh", str(path)], capture_output=True, text=True, check=True
    )
    assert shell.stdout == value


def test_a_value_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(StepError, match="single quote"):
        dotenv.write(tmp_path / ".env", [Entry("EPD_MODELS", "/it's", "folder")])
