import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd_connector.config import ConfigError
from epd_connector.slab import PAGE_SIZE_BYTES, Allocator, OwnedDirectory, Slab, name_directory

PAGE = PAGE_SIZE_BYTES


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE)), max_size=60))
def test_regions_never_overlap_and_all_memory_comes_back(actions: list[tuple[bool, int]]) -> None:
    allocator = Allocator(16 * PAGE)
    held: dict[int, int] = {}
    for is_release, size in actions:
        if is_release and held:
            offset = min(held)
            del held[offset]
            allocator.release(offset)
        elif (offset_or_none := allocator.allocate(size)) is not None:
            assert offset_or_none % PAGE == 0
            assert offset_or_none + size <= 16 * PAGE
            for other, other_size in held.items():
                assert offset_or_none + size <= other or other + other_size <= offset_or_none
            held[offset_or_none] = size
    for offset in held:
        allocator.release(offset)
    assert allocator.used_bytes == 0
    assert allocator.allocate(16 * PAGE) == 0


def test_region_is_not_reused_before_all_ranks_finished_the_step() -> None:
    finished = 4
    allocator = Allocator(PAGE, lambda: finished)
    assert allocator.allocate(PAGE) == 0
    allocator.release(0, after_step=5)
    assert allocator.allocate(PAGE, timeout_s=0.02) is None
    finished = 5
    assert allocator.allocate(PAGE) == 0


def test_slowest_rank_counts(tmp_path: Path) -> None:
    slab = Slab.create(tmp_path / "slab", PAGE)
    other = Slab(tmp_path / "slab")
    slab.mark_step(0, 7)
    other.mark_step(1, 3)
    assert slab.find_finished_step(2) == 3
    assert slab.find_finished_step(1) == 7
    slab.data[:4] = b"same"
    assert bytes(other.data[:4]) == b"same"


def test_slab_that_does_not_fit_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"do not fit into .* MB free.*shm_size.*lower slab_size_mb"):
        Slab.create(tmp_path / "slab", 1 << 60)


def test_directory_is_private_and_removed(tmp_path: Path) -> None:
    path = name_directory(str(tmp_path), "engine", 0)
    directory = OwnedDirectory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    directory.close()
    assert list(tmp_path.iterdir()) == []


def test_live_engines_directory_is_refused_and_kept(tmp_path: Path) -> None:
    path = name_directory(str(tmp_path), "engine", 0)
    directory = OwnedDirectory(path)
    with pytest.raises(ConfigError, match=r"engine_id: .* in use by another engine"):
        OwnedDirectory(path)
    assert (path / "lock").exists()
    OwnedDirectory(name_directory(str(tmp_path), "engine", 1)).close()
    assert (path / "lock").exists()
    directory.close()


def test_directory_of_a_killed_engine_is_taken_over(tmp_path: Path) -> None:
    path = name_directory(str(tmp_path), "engine", 0)
    code = (
        "import os; from pathlib import Path; from epd_connector.slab import OwnedDirectory\n"
        f"OwnedDirectory(Path({str(path)!r}))\n"
        "os.kill(os.getpid(), 9)"
    )
    source = str(Path(sys.modules["epd_connector"].__file__ or "").parents[1])
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, check=False)
    assert ended.returncode == -9
    assert path.exists()
    OwnedDirectory(path).close()
    assert not path.exists()


def test_wrong_release_is_an_error_and_not_a_leak() -> None:
    allocator = Allocator(4 * PAGE)
    offset = allocator.allocate(PAGE)
    assert offset == 0
    with pytest.raises(ValueError, match="no region in use starts at 256"):
        allocator.release(256)
    allocator.release(0)
    with pytest.raises(ValueError, match="starts at 0"):
        allocator.release(0)
