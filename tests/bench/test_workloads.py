"""Every workload is the same every time, and nano is nano-vllm's."""

from __future__ import annotations

import random

import pytest

from hf_paged.bench.workloads import WORKLOADS, Workload, make_workload


def test_nano_draws_as_nano_vllm_does() -> None:
    work = make_workload("nano", 151936)
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    assert work.prompts == prompts
    assert work.lengths == [[random.randint(100, 1024)] for _ in range(256)]
    assert (work.tokens_in, work.tokens_out, work.temperature) == (142_827, 133_966, 0.6)


@pytest.mark.parametrize(
    ("name", "prompts", "samples", "tokens_in", "tokens_out", "temperature"),
    [
        ("mixed", 64, 1, 8_471, 7_765, 0.0),
        ("samples", 1, 16, 512, 1_024, 1.0),
        ("rollout", 32, 16, 32 * 512, 253_205, 1.0),
        ("rollout-long", 32, 16, 32 * 2048, 126_732, 1.0),
        ("single", 1, 1, 128, 256, 0.0),
    ],
)
def test_totals(name: str, prompts: int, samples: int, tokens_in: int, tokens_out: int, temperature: float) -> None:
    work = make_workload(name, 49152)
    assert work == make_workload(name, 49152)
    assert (len(work.prompts), work.n, work.tokens_in) == (prompts, samples, tokens_in)
    assert (work.tokens_out, work.temperature) == (tokens_out, temperature)


def test_mixed_is_within_its_bounds() -> None:
    work = make_workload("mixed", 1000)
    assert all(16 <= len(prompt) <= 256 for prompt in work.prompts)
    assert all(16 <= length <= 256 for [length] in work.lengths)
    assert max(map(max, work.prompts)) < 1000


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_scale(name: str) -> None:
    work = make_workload(name, 20_000, 3)
    assert len(work.prompts) == len(work.lengths) == 3
    assert all(len(lengths) == work.n for lengths in work.lengths)


def test_fewer_prompts_of_a_rollout_are_its_first_lengths() -> None:
    assert make_workload("rollout", 1000, 2).lengths == make_workload("rollout", 1000).lengths[:2]


def test_samples_of_one_length_are_one_request() -> None:
    work = Workload("two", [[1, 2], [3]], [[5, 5, 5], [4, 6, 4]], temperature=1.0)
    assert work.requests() == [([1, 2], 3, 5), ([3], 1, 4), ([3], 1, 6), ([3], 1, 4)]
    assert work.tokens_out == 29
