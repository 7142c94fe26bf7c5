"""What npu-smi prints, read back."""

import pytest

from epd import npu_smi
from fakes.npu_hosts import FakeHost


def read(fake):
    return npu_smi.chips(fake.table(), npu_smi.mapping(fake.mapping()))


@pytest.mark.parametrize(("hardware", "count", "hbm_mib"), [("a2", 8, 65536), ("a3", 16, 65536), ("a5", 8, 131072)])
def test_the_chips_of_each_kind_of_server(hardware, count, hbm_mib, tmp_path):
    chips = read(FakeHost(tmp_path, hardware))
    assert [chip.physical for chip in chips] == list(range(count))
    assert {chip.hbm_mib for chip in chips} == {hbm_mib}
    assert {chip.health for chip in chips} == {"OK"}
    assert chips[0].bus == "0000:c1:00.0"
    assert npu_smi.profile(chips) == hardware


def test_an_a3_module_has_two_chips(tmp_path):
    chips = read(FakeHost(tmp_path, "a3"))
    assert [(chip.npu, chip.chip) for chip in chips[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_physical_ids_come_from_the_mapping_where_the_table_lacks_them(tmp_path):
    text = FakeHost(tmp_path, "a2").table()
    shifted = {(npu, 0): npu + 8 for npu in range(8)}
    assert [chip.physical for chip in npu_smi.chips(text, shifted)] == list(range(8, 16))


def test_mapping_leaves_out_the_management_chip(tmp_path):
    assert npu_smi.mapping(FakeHost(tmp_path, "a3").mapping()) == {(i // 2, i % 2): i for i in range(16)}
    with_phy = "NPU ID  Chip ID  Chip Logic ID  Chip Phy-ID  Chip Name\n0 0 0 5 Ascend910\n0 2 - - Mcu\n"
    assert npu_smi.mapping(with_phy) == {(0, 0): 5}


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_processes_name_chip_and_pid(hardware, tmp_path):
    fake = FakeHost(tmp_path, hardware)
    assert npu_smi.processes(fake.table()) == []
    fake.processes[3, 0] = (4711, "VLLMEngineCor")
    assert npu_smi.processes(fake.table()) == [npu_smi.Process(3, 0, 4711, "VLLMEngineCor")]


def test_links_make_groups():
    text = "  NPU0 NPU1 NPU2 NPU3 CPU Affinity\nNPU0 X HCCS SYS SYS 0-23\nNPU1 HCCS X SYS SYS 0-23\n"
    text += "NPU2 SYS SYS X HCCS 24-47\nNPU3 SYS SYS HCCS X 24-47\n\nLegend:\n"
    links = npu_smi.links(text)
    assert links[0] == {1: "HCCS", 2: "SYS", 3: "SYS"}
    assert npu_smi.groups(links) == {0: 0, 1: 0, 2: 2, 3: 2}


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_the_chips_of_one_server_are_one_group(hardware, tmp_path):
    fake = FakeHost(tmp_path, hardware)
    groups = npu_smi.groups(npu_smi.links(fake.topology()))
    assert groups == dict.fromkeys(range(fake.count), 0)


@pytest.mark.parametrize(
    "text", ["", "command not found", "| NPU | Name |\n", "| 0 910B3 | OK | 1 / 2 |\n| 0 | x | y |\n"]
)
def test_what_cannot_be_read_is_nothing(text):
    assert npu_smi.chips(text, {}) == []
    assert npu_smi.mapping(text) == {}
    assert npu_smi.links(text) == {}
    assert npu_smi.processes(text) == []
    assert npu_smi.profile([]) == ""


def test_a_310p_is_none_of_our_profiles():
    chip = npu_smi.Chip(0, 0, 0, "310P3", "OK", "0000:01:00.0", 1, 44280)
    assert npu_smi.profile([chip]) == ""


def test_version():
    assert npu_smi.version("| npu-smi 25.5.0    Version: 25.5.0   |") == "25.5.0"
    assert npu_smi.version("") == ""
