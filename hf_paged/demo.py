"""`hf-paged demo`: the engine at work on a small real model, in a minute or two on a CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hf_paged
from hf_paged.bench.models import load_smollm2
from hf_paged.observe.trace import StepTrace

SYSTEM = (
    "You are a helpful assistant in the library of a small harbour town. Answer in plain words and briefly. Say so "
    "when you do not know something. Never make up names, dates or numbers."
)

PASSAGE = (
    "The lighthouse at the end of the pier was built in 1871 by a family of shipwrights. For ninety years somebody "
    "climbed its hundred and twelve steps every evening, trimmed the wick, wound the clockwork that turned the lens, "
    "and wrote the weather into a book. The last keeper, a woman named Ada, kept bees behind the coal shed and could "
    "tell the ships apart by the sound of their engines. When the light was made electric she stayed on to paint the "
    "railings. The books are in the town's library now, forty-one of them, and school classes come to read what the "
    "weather was on the day their grandparents were born. "
)

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me three names for a small grey cat.",
    PASSAGE + "Who was Ada, and what did she keep behind the coal shed?",
    PASSAGE * 2 + "In one sentence: why do school classes come to the library?",
    "List the first five prime numbers.",
    "Translate 'good morning' into Spanish.",
    PASSAGE * 3 + "Suggest a title for this story.",
    "What should I pack for a day in the mountains?",
]

SAMPLES = 4


def chats() -> list[list[dict[str, str]]]:
    """The demo's prompts: chats of very different lengths under one system prompt."""
    system = {"role": "system", "content": SYSTEM}
    return [[system, {"role": "user", "content": question}] for question in QUESTIONS]


def run_demo(console: Console, out: Path, *, compare: bool = True, max_tokens: int = 96) -> None:
    """Streams one answer, answers all chats with four samples each, draws what happened and sums it up.

    Args:
        out: the PNG to write.
        compare: also time stock `generate` on the same work.
    """
    console.print("Loading SmolLM2-135M-Instruct (float32) ...")
    model, tokenizer = load_smollm2(torch.float32)
    hf_paged.wrap(model, tokenizer=tokenizer, page_size=16, max_num_seqs=24)  # few at once, so that some must wait
    model.engine  # noqa: B018 - made now, so that its making is not timed

    console.print(f"\n[bold]Streaming:[/bold] {QUESTIONS[2]}")
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=max_tokens)
    for piece in model.stream(chats()[2], greedy):
        console.print(piece, end="", soft_wrap=True, markup=False, highlight=False)
    console.print("\n")

    console.print(f"[bold]{len(QUESTIONS)} chats, {SAMPLES} samples each, all in one batch:[/bold]")
    sampling = hf_paged.SamplingParams(n=SAMPLES, temperature=0.7, top_p=0.95, seed=1, max_tokens=max_tokens)
    with StepTrace(model.engine) as trace:
        start = time.perf_counter()
        outputs = model.generate_many(chats(), sampling)
        seconds = time.perf_counter() - start
    for question, output in zip(QUESTIONS, outputs, strict=True):
        asked = question if len(question) < 70 else "... " + question[-64:]
        answer = " ".join(output.outputs[0].text.split())
        console.print(f"[cyan]{asked}[/cyan]\n  {answer[:150]}", highlight=False)
    trace.plot(out, title=f"{len(outputs)} chats x {SAMPLES} samples through one engine")
    summary = _summary(model, outputs, trace, seconds)
    if compare:
        console.print("\nThe same work through stock generate ...")
        _add_comparison(summary, model, tokenizer, outputs, max_tokens)
    console.print(summary)
    console.print(f"The picture of it: {out}")


def _summary(model: Any, outputs: list[hf_paged.RequestOutput], trace: StepTrace, seconds: float) -> Table:
    engine = model.engine
    page = engine.scheduler.page_size
    tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    # A contiguous cache holds every row as long as the longest, for every sample of every prompt.
    longest = max(len(o.prompt_token_ids) + max(len(c.token_ids) for c in o.outputs) for o in outputs)
    contiguous = -(-longest // page) * SAMPLES * len(outputs)
    hits = sum(output.num_cached_tokens or 0 for output in outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    table = Table(title="hf_paged", show_header=False)
    table.add_row("tokens generated", f"{tokens} in {seconds:.1f} s")
    table.add_row("tokens/s", f"{tokens / seconds:.1f}")
    table.add_row("steps", f"{len(trace.records)}")
    table.add_row(f"pages used at peak (of {page} tokens)", f"{trace.peak_pages}")
    table.add_row("pages a contiguous cache would have held", f"{contiguous} ({contiguous / trace.peak_pages:.1f}x)")
    table.add_row("prompt tokens found in the prefix cache", f"{hits} of {prompt_tokens}")
    return table


def _add_comparison(
    table: Table, model: Any, tokenizer: Any, outputs: list[hf_paged.RequestOutput], max_tokens: int
) -> None:
    """Stock `generate` on the same prompts, sorted by length in two batches, with the same sampling."""
    hf_paged.unwrap(model)
    prompts = sorted((output.prompt_token_ids for output in outputs), key=len)
    tokenizer.padding_side = "left"
    tokens, start = 0, time.perf_counter()
    for first in range(0, len(prompts), 5):
        padded = tokenizer.pad({"input_ids": prompts[first : first + 5]}, return_tensors="pt")
        found = model.generate(
            **padded, do_sample=True, temperature=0.7, top_p=0.95, top_k=0,
            num_return_sequences=SAMPLES, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = found[:, padded["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).cumsum(1) - (new == tokenizer.eos_token_id).long() > 0
        tokens += int((~ended).sum())
    seconds = time.perf_counter() - start
    table.add_row("stock generate, tokens/s", f"{tokens / seconds:.1f} ({tokens} tokens in {seconds:.1f} s)")
