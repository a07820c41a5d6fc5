"""MFU compares with the datasheet of a card that is known."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.train.peaks import datasheet_tflops, peak


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA H800", 989, 67),
        ("NVIDIA H20", 148, 44),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA RTX 6000 Ada Generation", 364, 91.1),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("Tesla V100-PCIE-16GB", None, 14),
        ("Tesla T4", None, 8.1),
        ("NVIDIA H1000", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_cards_by_the_names_that_torch_gives(name, bf16, fp32) -> None:
    assert datasheet_tflops(name, torch.bfloat16) == bf16
    assert datasheet_tflops(name, torch.float32) == fp32
    assert datasheet_tflops(name, torch.float16) is None


def test_what_the_user_says_wins_and_the_rest_is_measured(monkeypatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert peak(cpu, torch.float32, given=3.0) == (3.0, "--peak-tflops")
    measured = peak(cpu, torch.float32)
    assert measured.tflops > 0 and "measured" in measured.source
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak(cuda, torch.bfloat16) == (989, "the datasheet of NVIDIA H100 80GB HBM3")
