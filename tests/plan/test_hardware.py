"""GPUs by the names that people and torch give them, or by numbers."""

import re
from pathlib import Path

import pytest

from tokenweight.plan import GPUS, Hardware, find_gpu


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "H100 SXM 80GB"), ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"), ("h100-sxm5", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"), ("H100pcie", "H100 PCIe 80GB"), ("H100 nvl", "H100 NVL 94GB"),
        ("nvidia h200", "H200 SXM 141GB"), ("b200", "B200 180GB"), ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("a100", "A100 80GB"), ("A100-40", "A100 40GB"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"), ("a100_40gb", "A100 40GB"), ("L40s", "L40S 48GB"), ("L4", "L4 24GB"),
        ("NVIDIA A10", "A10 24GB"), ("NVIDIA RTX A6000", "RTX A6000 48GB"), ("3090", "RTX 3090 24GB"),
        ("rtx4090", "RTX 4090 24GB"), ("NVIDIA GeForce RTX 5090", "RTX 5090 32GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"), ("AMD Instinct MI250X", "MI250X GCD 64GB"),
        ("AMD Instinct MI300X", "MI300X 192GB"), ("mi325x", "MI325X 256GB"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_by_any_name(written, name):
    assert find_gpu(written).name == name


@pytest.mark.parametrize("name", ["H1000", "A10G", "L40", "RTX 3090 Ti", "sxm", "80", "nvidia", "A100 24GB"])
def test_another_gpu_is_not_taken_for_one_of_the_table(name):
    with pytest.raises(ValueError, match=rf"gpu {name}: .*xpected one of H100, H200, .*gpu_memory and gpu_tflops"):
        find_gpu(name)


def test_every_gpu_says_where_its_numbers_were_read_and_half_of_a_sparse_peak_is_taken():
    for gpu in GPUS:
        assert re.search(r"(data sheet|white paper), 20\d\d", gpu.source)
        assert f"{gpu.memory:g}GB" in gpu.name
        assert find_gpu(gpu.name) == gpu
        if sparse := re.search(r"\(([\d,]+) with sparsity\)", gpu.source):
            assert gpu.tflops == float(sparse[1].replace(",", "")) / 2


def test_the_table_of_the_page_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text().partition("## GPUs")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    named = [f"{gpu.name}{'' if gpu.bfloat16 else ' (float16)'}" for gpu in GPUS]
    expected = [[name, f"{gpu.memory:g}", f"{gpu.tflops:,g}", gpu.source] for name, gpu in zip(named, GPUS)]
    assert rows[1:] == expected


def test_speed_is_a_share_of_a_peak_or_what_was_measured():
    assert Hardware().flops_per_s(100.0) is None
    assert Hardware("A100", num_gpus=8, mfu=0.5).flops_per_s(100.0) == 8 * 312e12 / 2
    assert Hardware("H100").flops_per_s(100.0) == 0.4 * 989.4e12
    assert Hardware(gpu_tflops=100.0, num_gpus=2).flops_per_s(1.0) == 0.4 * 200e12
    assert Hardware("h100", num_gpus=8, tokens_per_s=7.0).flops_per_s(100.0) == 700


def test_a_tenth_of_the_memory_is_left_free():
    assert Hardware().fits(1.0) is None
    for hardware in (Hardware("a100-40"), Hardware(gpu_memory=40.0), Hardware("h100", gpu_memory=40.0)):
        assert (hardware.fits(36.3e9), hardware.fits(36.4e9)) == (True, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_gpus": 0}, "num_gpus 0: expected at least 1"),
        ({"gpu_memory": 0.0}, "gpu_memory 0: expected a number above 0"),
        ({"gpu_tflops": -1.0}, "gpu_tflops -1: expected"),
        ({"gpu": "H100", "price": float("nan")}, "price nan: expected a number above 0"),
        ({"price": 2.0}, "price 2: needs a speed"),
        ({"mfu": 0.5}, "mfu 0.5: expected a fraction of the peak of a gpu"),
        ({"gpu": "H100", "mfu": 1.5}, "mfu 1.5: expected"),
        ({"gpu": "H100", "mfu": 0.5, "tokens_per_s": 7.0}, "mfu 0.5: expected"),
    ],
)
def test_numbers_that_say_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Hardware(**given)
