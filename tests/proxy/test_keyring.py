"""Files of keys: what is read, what is refused, and that no key is told."""

from pathlib import Path

import pytest

from epd_proxy.errors import ConfigError
from epd_proxy.keyring import Keyring, read_keys

KEYS = ("a-key-that-is-long-enough", "another-key-that-is-long")


def test_keys_with_and_without_names(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{KEYS[0]}\n  team-a   {KEYS[1]}  \n")
    ring = Keyring(read_keys(path))
    assert [ring.find(key) for key in KEYS] == ["line-3", "team-a"]
    wrong = ("", KEYS[0][:-1], KEYS[0] + "x", KEYS[0].upper(), "team-a", "\ud800")
    assert [ring.find(key) for key in wrong] == [None] * 6
    ring.exchange(())
    assert ring.find(KEYS[0]) is None
    assert not any(key in repr(ring) + repr(read_keys(path)) for key in KEYS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a key a line, found none"),
        ("# only a comment", "found none"),
        ("short", "16 characters or more"),
        (f"{KEYS[0]}\nname {KEYS[0]}", "line 2: this key is given twice"),
        (f"a b {KEYS[0]}", "line 1: expected KEY or NAME KEY, found 3 words"),
    ],
)
def test_a_file_that_opens_the_door_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert words in str(caught.value)
    assert not any(key in str(caught.value) for key in KEYS)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            read_keys(path)
