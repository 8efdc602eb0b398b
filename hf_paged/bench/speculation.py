"""`hf-paged bench latency --speculative METHOD`: the same requests with and without drafts, by the same engine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

import hf_paged
from hf_paged.bench.engines import START_LENGTH, start_engine
from hf_paged.bench.models import Subject, load_smollm2, make_subject
from hf_paged.bench.throughput import machine
from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import StepResult
from hf_paged.engine.request import Sequence as Sample
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.pace import Pace

METHODS = ("forced", "ngram", "suffix")
SAMPLES = 8
"""Of each prompt of rollouts."""
NONSENSE = 17
"""A token id."""
WARM_TOKENS = 24

STORY = """
The harbour of Elm Bay lies where the river Tarn meets the sea. Every morning before the sun is up, Captain Mary Olsen
walks down the stone steps with a lantern in her hand and counts the boats. There are twelve of them, painted red and
white, and each has a name that somebody loved. Her own is called the Patient Heron. It was built by her grandfather
in the spring of 1931, when the old bridge was still made of wood and the mail came by horse. She knows every plank of
it. In winter she mends the nets by the stove, and the children of the village come to hear about the great storm,
when the water stood as high as the baker's window and the bell of the church rang by itself all night. Nobody was
lost that night, because the keeper of the lighthouse had seen the gulls fly inland at noon and had rung the warning
in time. He was given a silver cup, which stands on the shelf of the school to this day. In summer the visitors arrive
with their cameras and ask for the way to the beach. Captain Mary Olsen tells them to follow the smell of the pines
until the path turns to sand. Then she unties the Patient Heron, nods to the lighthouse, and sails out past the twelve
boats, past the old bridge, to where the river Tarn can no longer be told from the sea.
""".strip()
NAMES = ("Anna Lind", "Ruth Weber", "Clara Moss", "Ingrid Dahl", "Jane Carter", "Eva Novak", "Nora Blake", "Lucy Hart")
QUESTIONS = (
    "Explain in three sentences why the sky is blue.",
    "Write a short story about a fox and a clock.",
    "What is 17 times 23? Think step by step.",
    "List five uses of a paper clip, one per line.",
    "Write a Python function that reverses the words of a sentence.",
    "Who was Marie Curie, and what is she known for?",
    "A train leaves at 9:15 and travels for 2 hours and 50 minutes. When does it arrive?",
    "Describe the taste of an orange to somebody who has never had one.",
)


class ForcedAcceptance:
    """Drafts nonsense, and has it accepted with a given probability per token, whatever the model says: what a drafter
    of that quality would bring in time. The text means nothing.

    Args:
        acceptance: the probability that a drafted token is accepted.
    """

    name = "forced"

    def __init__(self, acceptance: float) -> None:
        self._acceptance, self._draw = acceptance, random.Random(0)

    def propose(self, sequences: list[Sample], room: list[int]) -> list[list[int]]:
        return [[NONSENSE] * most for most in room]

    def finish(self, sequence: Sample) -> None:
        pass

    def clear(self) -> None:
        pass

    def simulate(self, engine: Engine) -> None:
        """Has the engine's verifications find what is drawn here."""
        verify = engine._verify

        def forced(batch: Batch, result: StepResult) -> list[tuple[Sample, int, int]]:
            for place, row in enumerate(batch.decodes):
                for i in range(len(batch.drafts.get(row, ()))):
                    accepted = self._draw.random() < self._acceptance
                    result.tokens[place + i] = NONSENSE if accepted else NONSENSE + 1
            return verify(batch, result)

        engine._verify = forced  # type: ignore[method-assign]


def run_speculation(
    method: str,
    model_name: str | None = None,
    batches: Sequence[int] = (1, 64, 256),
    context: int = 900,
    *,
    tokens: int = 200,
    repeats: int = 2,
    num_speculative_tokens: int = 5,
    acceptance: float = 0.7,
    dtype: str | None = None,
    device: str | None = None,
    options: dict[str, Any] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times the same requests without and with drafts.

    With SmolLM2, "ngram" edits a long text, and "suffix" samples at temperature 1, SAMPLES of each prompt, for the
    second time: with other seeds than the first. Everything else is greedy, of prompts of random tokens.

    Args:
        method: one of METHODS; with "forced", drafted tokens are accepted with the probability `acceptance`.
        batches: sequences at once.
        context: tokens of a random prompt.
        tokens: to generate per sequence, at most.
        repeats: the best one counts, of each way.
        model_name, dtype, device, options, log: as for `run_latency`.

    Returns:
        everything measured, as plain data; `as_table` shows it.

    Raises:
        ValueError: a method that is not known.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    subject = make_subject(model_name, dtype, device)
    work = _Work(subject, method, context, max(batches))
    config = SpeculativeConfig("suffix" if method == "suffix" else "ngram", num_speculative_tokens)
    rows = []
    try:
        log("starting ...")
        start_engine(subject.model, options or {}, work.prompts[0][:START_LENGTH], work.temperature)
        race = _Race(subject.model, config)
        if method == "forced":
            forced = ForcedAcceptance(acceptance)
            race.engine.speculator._drafters[config] = forced
            forced.simulate(race.engine)
        for batch in batches:
            log(f"{batch} sequences ...")
            rows.append({"batch": batch, **race.run(work, batch, tokens, repeats)})
            if method == "forced":
                rows[-1]["same"] = None  # it says nonsense
            log(f"... {rows[-1]['plain_s']:.3f} s without, {rows[-1]['speculating_s']:.3f} s with drafts")
    finally:
        hf_paged.unwrap(subject.model)
    return {
        "model": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "method": method,
        "acceptance": acceptance if method == "forced" else None,
        "num_speculative_tokens": num_speculative_tokens,
        "tokens": tokens,
        "options": options or {},
        "machine": machine(),
        "rows": rows,
    }


class _Work:
    """Prompts, and how they are sampled."""

    def __init__(self, subject: Subject, method: str, context: int, count: int) -> None:
        self.samples, self.temperature = 1, 0.0
        if subject.name == "smollm2" and method != "forced":
            tokenizer = load_smollm2(subject.dtype)[1]
            if method == "suffix":
                self.samples, self.temperature = SAMPLES, 1.0
                texts = list(QUESTIONS)
            else:
                ask = "Repeat the following text word for word, but replace the name Mary Olsen with {}.\n\n{}"
                texts = [ask.format(name, STORY) for name in NAMES]
            chats = [[{"role": "user", "content": text}] for text in texts]
            found = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
            prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in found]
            self.prompts = [prompts[i % len(prompts)] for i in range(-(-count // self.samples))]
            return
        draw, vocab = random.Random(0), subject.config.vocab_size
        self.prompts = [[draw.randrange(vocab) for _ in range(context)] for _ in range(count)]


class _Race:
    """One engine, asked for the same twice."""

    def __init__(self, model: Any, config: SpeculativeConfig) -> None:
        self.model, self.engine, self._config = model, model.engine, config

    def run(self, work: _Work, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
        prompts = work.prompts[: -(-batch // work.samples)]
        self.engine.speculator.pace = Pace(self.engine.speculator.max_rows // 16)  # nothing learnt from other rows
        ways: tuple[SpeculativeConfig | None, ...] = (None, self._config)
        for way in ways:  # what compiles or is captured at the first step of its kind
            self._time(work, prompts, way, WARM_TOKENS, seed=1)
        self.engine.speculator.clear()
        if self._config.method == "suffix":
            self._time(work, prompts, self._config, tokens, seed=1)
        seconds: dict[SpeculativeConfig | None, list[float]] = {way: [] for way in ways}
        said: dict[SpeculativeConfig | None, list[list[int]]] = {}
        drafting: list[float] = []
        for repeat in range(repeats):
            for way in ways:
                self.engine.speculator.stats.clear()
                with _DraftClock(self.engine) as clock:
                    took, said[way] = self._time(work, prompts, way, tokens, seed=2 + repeat)
                seconds[way].append(took)
                drafting += clock.seconds
        stats = self.engine.speculator.stats.get(self._config.method)
        same = sum(a == b for a, b in zip(said[None], said[self._config], strict=True))
        plain, speculating = min(seconds[None]), min(seconds[self._config])
        return {
            "plain_s": plain,
            "speculating_s": speculating,
            "ratio": plain / speculating,
            "tokens": sum(map(len, said[None])),
            "acceptance_rate": stats.acceptance_rate if stats else None,
            "acceptance_length": stats.acceptance_length if stats else None,
            "draft_ms": statistics.median(drafting) * 1e3 if drafting else None,
            "same": same / len(said[None]),
            "all_plain_s": seconds[None],
            "all_speculating_s": seconds[self._config],
        }

    def _time(
        self, work: _Work, prompts: list[list[int]], way: SpeculativeConfig | None, tokens: int, seed: int
    ) -> tuple[float, list[list[int]]]:
        engine = self.engine
        engine.reset_prefix_cache()
        engine.intake.speculation = way
        params = [
            hf_paged.SamplingParams(
                n=work.samples, temperature=work.temperature, max_tokens=tokens, seed=seed * 1000 + i, detokenize=False,
                ignore_eos=work.samples == 1,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        start = time.perf_counter()
        outputs = self.model.generate_many(prompts, params, progress=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start, [c.token_ids for output in outputs for c in output.outputs]


class _DraftClock:
    """What drafting costs the host, per step that drafts."""

    def __init__(self, engine: Engine) -> None:
        self._speculator, self.seconds = engine.speculator, []

    seconds: list[float]

    def __enter__(self) -> _DraftClock:
        propose = self._speculator.propose

        def timed(running: list[Sample]) -> dict[Sample, list[int]]:
            start = time.perf_counter()
            drafts = propose(running)
            self.seconds.append(time.perf_counter() - start)
            return drafts

        self._speculator.propose = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._speculator.propose  # the class's own is seen again


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    how = result["method"] + (f" acceptance of {result['acceptance']}" if result["acceptance"] is not None else "")
    table = Table(
        title=f"{result['model']}, {result['dtype']}: {how}, up to {result['num_speculative_tokens']} tokens drafted",
        caption="acceptance length: tokens per verification; same: sequences with the same tokens both ways",
    )
    for column in (
        "sequences",
        "without, s",
        "with, s",
        "ratio",
        "accepted",
        "acceptance length",
        "drafting, ms",
        "same",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        accepted, length, drafting = row["acceptance_rate"], row["acceptance_length"], row["draft_ms"]
        table.add_row(
            str(row["batch"]),
            f"{row['plain_s']:.3f}",
            f"{row['speculating_s']:.3f}",
            f"{row['ratio']:.2f}x",
            "-" if accepted is None else f"{accepted:.0%}",
            "-" if length is None else f"{length:.2f}",
            "-" if drafting is None else f"{drafting:.3f}",
            "-" if row["same"] is None else f"{row['same']:.0%}",
        )
    return table
