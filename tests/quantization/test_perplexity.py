"""What a text's tokens cost a model, by hand and, of SmolLM2-135M, before and after quantisation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization.writers import tiny_llama
from torch import Tensor
from typer.testing import CliRunner

import hf_paged
from hf_paged.bench.models import load_smollm2
from hf_paged.bench.perplexity import perplexity
from hf_paged.cli import app
from hf_paged.quantization.writers.calibration import own_text

HELD_OUT = Path(__file__).parent / "held_out.txt"
"""From Jane Austen's Pride and Prejudice, which is in the public domain."""


def test_by_hand() -> None:
    model = tiny_llama()
    ids = torch.arange(3, 24)  # windows of 8, 8 and 5: 18 tokens are predicted
    with torch.no_grad():
        chances = [
            model(piece[None]).logits[0].softmax(-1)[place - 1, piece[place]]
            for piece in ids.split(8)
            for place in range(1, len(piece))
        ]
    assert len(chances) == 18
    expected = float(torch.stack(chances).log().mean().neg().exp())
    assert perplexity(model, ids, window=8) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="nothing to predict"):
        perplexity(model, ids[:1])


def test_command(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=len(smollm2_tokenizer))
    model.save_pretrained(tmp_path / "plain")
    smollm2_tokenizer.save_pretrained(tmp_path / "plain")
    hf_paged.quantize(model, "fp8", tmp_path / "fp8", tokenizer=smollm2_tokenizer)
    (tmp_path / "text").write_text("It rained. " * 30)
    command = [
        "bench",
        "perplexity",
        str(tmp_path / "plain"),
        str(tmp_path / "fp8"),
        "--device",
        "cpu",
        "--window",
        "32",
    ]
    result = CliRunner().invoke(app, [*command, "--text", str(tmp_path / "text"), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["models"]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=0.3)
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"]
    result = CliRunner().invoke(app, [*command, "--text", str(tmp_path / "none")])
    assert result.exit_code == 1 and "there is no text" in " ".join(result.output.split())


class Subject:
    """SmolLM2, its own words to calibrate on, and the held-out text."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_smollm2(torch.float32)
        self.calibration = own_text(self.model, self.tokenizer, 24, 256, 0, False)
        text = HELD_OUT.read_text(encoding="utf-8")
        self.ids: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"][0]
        self.full = perplexity(self.model, self.ids)


@pytest.fixture(scope="module")
def subject(smollm2_dir: str) -> Subject:
    return Subject()


@pytest.fixture(scope="module")
def ratio(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(to, method, options) -> the checkpoint's perplexity, as hf_paged loads it, by the model's own."""

    @functools.cache
    def measure(to: str, method: str | None = None, **options: Any) -> float:
        out = tmp_path_factory.mktemp("checkpoint") / "out"
        options = ({} if to.startswith("fp8") else {"group_size": 64}) | options
        hf_paged.quantize(
            subject.model,
            to,
            out,
            method=method,
            tokenizer=subject.tokenizer,
            calibration=subject.calibration,
            **options,
        )
        loaded = hf_paged.load(out, device="cpu", quantization=None)
        return perplexity(loaded, subject.ids) / subject.full

    return measure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bfloat16_and_fp8_cost_next_to_nothing(subject: Subject, ratio: Any) -> None:
    assert 0.97 < ratio("fp8") < 1.04
    assert 0.97 < ratio("fp8-block") < 1.06
    half = load_smollm2(torch.bfloat16)[0]
    assert 0.97 < perplexity(half, subject.ids) / subject.full < 1.03


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_awqs_scales_beat_round_to_nearest(ratio: Any) -> None:
    assert ratio("awq") < 1.2
    assert ratio("awq") < 0.95 * ratio("awq", "rtn")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_beats_round_to_nearest(desc_act: bool, ratio: Any) -> None:
    assert ratio("gptq", desc_act=desc_act) < 1.3
    assert ratio("gptq", desc_act=desc_act) < 0.95 * ratio("gptq", "rtn")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_asymmetric_gptq_in_compressed_tensors(ratio: Any) -> None:
    assert ratio("w4a16", symmetric=False) < 1.3
