"""Examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from models.families import make_model
from models.tiny_tokenizer import make_tokenizer

from hf_paged.speculative.eagle import load_head

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(params=["tiny", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def small_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples load SmolLM2, which takes longer than all the rest of them: mostly a tiny model does."""
    if request.param == "SmolLM2":
        request.getfixturevalue("smollm2_dir")
    else:
        monkeypatch.setattr("hf_paged.bench.models.load_smollm2", lambda: (make_model("Llama"), make_tokenizer()))


def test_distill_eagle3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a second a head learns little, but it is saved, and drafts."""
    model = make_model("Llama", num_hidden_layers=6, tie_word_embeddings=False)
    monkeypatch.setattr("hf_paged.bench.models.load_smollm2", lambda: (model, make_tokenizer()))
    sizes = {"seconds": 1, "prompts": 3, "max-tokens": 10, "draft-vocab": 40, "out": tmp_path}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    monkeypatch.setattr("sys.argv", ["distill_eagle3.py", *options])
    runpy.run_path(str(EXAMPLES / "distill_eagle3.py"), run_name="__main__")
    assert load_head(tmp_path, torch.float32).draft_vocab_size == 40
    said = capsys.readouterr().out
    assert "loss" in said and said.count("acceptance length") == 2


def test_async_rl(small_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Two changes of the weights in the middle of rollouts, each counted once and seen in what they compute."""
    after = runpy.run_path(str(EXAMPLES / "async_rl.py"))
    assert after["engine"].weight_version == 2
    assert not after["engine"].has_unfinished()
    assert after["engine"].scheduler.num_active_pages == 0
    completions = [completion for _, completion in after["rollouts"]]
    aborted = [completion for completion in completions if completion.finish_reason == "abort"]
    assert len(completions) == 8
    assert len(aborted) >= 4, "they must be cut short"
    for completion, scores in zip(completions, after["scores"], strict=True):
        assert completion.weight_versions == sorted(completion.weight_versions)
        assert len(scores) == len(completion.token_ids)
        for token, entry, version, now in zip(
            completion.token_ids, completion.logprobs, completion.weight_versions, scores.tolist(), strict=True
        ):
            if version == 2:  # computed again from the beginning by the weights that score
                assert entry[token].logprob == pytest.approx(now, abs=1e-3)
    assert all(set(completion.weight_versions) == {0, 1, 2} for completion in aborted)
    assert "version 2 goes on" in capsys.readouterr().out
