"""Fixtures of the connector's tests, which need vLLM and Mooncake: run them in the CPU image."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "connector" / "src"))

# Or vllm-ascend registers the NPU platform, which cannot be imported without an NPU.
os.environ.setdefault("VLLM_PLUGINS", "")

from mooncake_pool import MooncakePool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[MooncakePool]:
    """A pool of 64 MB of the test's own, which it may kill."""
    pool = MooncakePool(tmp_path)
    try:
        pool.start()
        yield pool
    finally:
        pool.stop()
