"""Hosts for the doctor to look at."""

import pytest

from fakes.doctor import Case


@pytest.fixture
def case(tmp_path):
    def make(hardware="a2"):
        return Case(tmp_path, hardware)

    return make
