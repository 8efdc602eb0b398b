"""A small real model, end to end: the demo's work, against stock generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import hf_paged
from hf_paged.bench.models import load_smollm2
from hf_paged.demo import chats, run_demo


@pytest.fixture(scope="module")
def loaded(smollm2_dir: str) -> Any:
    return load_smollm2(torch.float32)


@pytest.fixture
def model(loaded: Any) -> Any:
    model, tokenizer = loaded
    yield hf_paged.wrap(model, tokenizer=tokenizer, page_size=16)
    hf_paged.unwrap(model)


def test_greedy_answers_equal_stock_generate(loaded: Any) -> None:
    model, tokenizer = loaded
    expected = []
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats()[:4]]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected.append(model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :].tolist())
    hf_paged.wrap(model, tokenizer=tokenizer)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=24)
    outputs = model.generate_many(chats()[:4], greedy)
    hf_paged.unwrap(model)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert outputs[0].outputs[0].text == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert outputs[0].outputs[0].finish_reason == "stop"


def test_the_stream_is_the_text(model: Any) -> None:
    sampling = hf_paged.SamplingParams(temperature=0.0, max_tokens=24)
    pieces = list(model.stream(chats()[1], sampling))
    assert len(pieces) > 3
    assert "".join(pieces) == model.generate_many([chats()[1]], sampling)[0].outputs[0].text


def test_prompts_that_begin_alike_share_pages(model: Any) -> None:
    """All of the demo's chats have one system prompt, and arrive together: it is computed once."""
    model.engine.reset_prefix_cache()
    outputs = model.generate_many(chats()[:4], hf_paged.SamplingParams(max_tokens=2))
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[0] == 0
    assert all(tokens >= 32 for tokens in cached[1:])


def test_the_tokenizer_is_found_in_the_gguf(loaded: Any) -> None:
    model, _ = loaded
    hf_paged.wrap(model)
    text = (
        model.generate_many(["The sea is"], hf_paged.SamplingParams(temperature=0.0, max_tokens=4))[0].outputs[0].text
    )
    hf_paged.unwrap(model)
    assert text.strip()


@pytest.mark.slow
def test_the_demo_runs(smollm2_dir: str, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    run_demo(console, tmp_path / "demo.png", max_tokens=16)
    said = console.export_text()
    assert "stock generate, tokens/s" in said
    assert "pages a contiguous cache would have held" in said
    assert (tmp_path / "demo.png").stat().st_size > 10_000
