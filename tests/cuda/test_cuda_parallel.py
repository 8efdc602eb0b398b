"""Two GPUs: ranks that share layers, and stages with some each, by NCCL and in CUDA graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hf_paged

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
import jobs
from test_parallel import run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs"),
]


def test_two_gpus_say_what_one_does(tmp_path: Path) -> None:
    expected = jobs.of_gpus(hf_paged.wrap(jobs.gpu_model(), num_pages=400))
    for rank in run("gpus", 2, tmp_path):
        assert rank["stages"] == expected
        assert rank["ranks"] == expected


def test_a_model_on_another_gpu_than_the_current_one() -> None:
    expected = jobs.of_gpus(hf_paged.wrap(jobs.gpu_model(), num_pages=400))
    assert torch.cuda.current_device() == 0
    assert jobs.of_gpus(hf_paged.wrap(jobs.gpu_model().to("cuda:1"), num_pages=400)) == expected
