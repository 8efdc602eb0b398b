"""Programs written for vLLM: only the import changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs say nothing of memory, and a pool of gigabytes is slow to make."""
    monkeypatch.setattr("hf_paged.cache.storage.CPU_POOL_BYTES", 8 << 20, raising=True)


@pytest.fixture(autouse=True)
def arguments(tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", tiny_checkpoint])


def run(name: str) -> dict[str, Any]:
    source = (PROGRAMS / name).read_text(encoding="utf-8").replace("vllm", "hf_paged")
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, str(PROGRAMS / name), "exec"), space)
    return space


def test_offline_inference(capsys: pytest.CaptureFixture[str]) -> None:
    first = run("offline.py")["RESULT"]
    assert [prompt for prompt, _, _ in first][2] == "The capital of France is"
    assert all(1 <= len(ids) <= 8 for _, _, ids in first)
    assert "Generated text:" in capsys.readouterr().out
    assert run("offline.py")["RESULT"] == first, "the default seed makes a program repeatable"


def test_chat_beams_sleep_and_rpc() -> None:
    space = run("chat.py")
    text = space["one"][0].prompt
    assert text.endswith("<|im_start|>assistant\n") and "Write an essay about the sea." in text
    assert len(space["two"]) == 2
    assert space["continued"][0].prompt.endswith("The sea is")
    sequences = space["beams"][0].sequences
    prompt = space["llm"].get_tokenizer().encode("Hello, my name is")
    assert len(sequences) == 3 and all(s.tokens[: len(prompt)] == prompt for s in sequences)
    assert sequences[0].text.startswith("Hello, my name is")
    scores = space["llm"].model.score([prompt] * 3, [s.tokens[len(prompt) :] for s in sequences])
    assert [s.cum_logprob for s in sequences] == pytest.approx([float(score.sum()) for score in scores], abs=1e-3)
    assert space["names"] == ["LlamaForCausalLM"]
    assert [output.request_id for output in space["waited"]] == space["ids"]


def test_older_spellings() -> None:
    space = run("older.py")
    tokens = [output.outputs[0].token_ids for output in space["by_ids"]]
    assert tokens == [output.outputs[0].token_ids for output in space["by_dict"]]
    assert all(len(entry) >= 2 for entry in space["by_ids"][0].outputs[0].logprobs)
    assert [len(output.outputs) for output in space["each"]] == [2, 2]
    llm, best = space["llm"], space["each"][1]
    again = llm.generate(["The sky"], space["SamplingParams"](n=4, max_tokens=5, seed=2, logprobs=0), use_tqdm=False)[0]
    ranked = sorted(again.outputs, key=lambda sample: -sample.cumulative_logprob)
    assert [sample.token_ids for sample in best.outputs] == [sample.token_ids for sample in ranked[:2]]
    assert [sample.index for sample in best.outputs] == [0, 1] and best.outputs[0].logprobs is None


def test_adapters(tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from lora.adapters import save_adapter
    from transformers import AutoModelForCausalLM

    folders = []
    for seed, name in enumerate(("one", "other")):
        base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        folders.append(str(save_adapter(tmp_path / name, base, seed, r=8, target_modules="all-linear")))
    monkeypatch.setattr("sys.argv", ["program", tiny_checkpoint, *folders])
    space = run("lora.py")
    plain, adapted, mixed = ([o.outputs[0].token_ids for o in space[name]] for name in ("plain", "adapted", "mixed"))
    assert mixed[:2] == [adapted[0], plain[1]] and mixed[2] not in (adapted[2], plain[2])
    assert [o.lora_request and o.lora_request.lora_name for o in space["mixed"]] == ["sql_adapter", None, "other"]
    assert space["chat"][0].lora_request.lora_int_id == 1
    assert space["known"] == {1, 2} and space["removed"]
