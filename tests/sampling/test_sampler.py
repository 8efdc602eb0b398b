"""The sampler: adjustments against their formulas, errors that stay with their row, draws that do not see the batch."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from distributions import adjusted, chi_square_p, make_sequence, probabilities, warp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from hf_paged.engine.request import Hooks, Request, Sequence
from hf_paged.sampling.draw import NUCLEUS
from hf_paged.sampling.logprobs import TokenLogprobs, token_logprobs
from hf_paged.sampling.sampler import NonFiniteLogits, NothingToSample, Sampled, Sampler
from hf_paged.sampling_params import LOGPROBS_MODES, SamplingParams

CPU = torch.device("cpu")
VOCAB = 23
P = 1e-4


def sampler(vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, CPU)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def scores_of(sequence: Sequence, logits: Tensor, one: Sampler | None = None) -> Tensor:
    """The processed scores `[V]` of one sequence sampled alone."""
    hooks = sequence.request.hooks = Hooks(keep_scores=True)
    sequence.request.simple = False
    result = (one or sampler(len(logits))).sample(logits[None], [sequence])
    assert not result.errors
    return hooks.scores[-1]


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.8, "top_k": 6},
        {"top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_have_their_probabilities(options: dict[str, Any]) -> None:
    """One request's positions, and many seeds' first tokens, both through `sample`."""
    logits, count = random_logits(1)[0], 4000
    exact = probabilities(logits, **options)
    params = SamplingParams(**options)
    by_seed = [make_sequence(params, seed=seed) for seed in range(count)]
    request = Request("one", [0], SamplingParams(n=8, **options), seed=5)
    by_place = []
    for sequence, length in itertools.product(request.sequences, range(count // 8)):
        place = Sequence(request, sequence.index, [0] * (1 + length), 1, slot=0)
        by_place.append(place)
    for sequences in (by_seed, by_place):
        tokens = sampler().sample(logits.expand(count, -1), sequences).tokens
        assert chi_square_p(torch.bincount(torch.tensor(tokens), minlength=VOCAB), count * exact) > P


@st.composite
def params_of(draw: Any, vocab: int) -> SamplingParams:
    """Any mixture of what changes a draw."""
    token = st.integers(0, vocab - 1)
    options: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.0, 0.8, 1.0, 1.0, 2.0])),
        "top_k": draw(st.sampled_from([0, 0, -1, 1, 7, NUCLEUS, vocab, 5 * vocab])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.3])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.02, 0.5])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 0.7, 1.4])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.0, 0.9, -2.0])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.0, 0.6])),
        "logprobs": draw(st.sampled_from([None, None, 0, 3])),
        "logit_bias": draw(st.none() | st.dictionaries(token, st.floats(-2, 2), max_size=3)),
        "allowed_token_ids": draw(st.none() | st.lists(token, min_size=3, max_size=9)),
        "logits_processors": draw(st.sampled_from([None, None, [lambda generated, logits: logits * 0.9]])),
    }
    return SamplingParams(**options)


@dataclass
class Member:
    """A sequence of a batch and its logits, to be made anew for every batch."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    generated: list[int]
    logits_seed: int = 0

    def make(self, slot: int) -> Sequence:
        return make_sequence(self.params, prompt=self.prompt, generated=self.generated, seed=self.seed, slot=slot)


def members(vocab: int) -> st.SearchStrategy[Member]:
    tokens = st.lists(st.integers(0, vocab - 1), max_size=6)
    return st.builds(
        Member, params_of(vocab), st.integers(0, 2**64 - 1), tokens.filter(bool), tokens, st.integers(0, 50)
    )


@pytest.mark.parametrize("vocab", [VOCAB, NUCLEUS + 300])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_row_is_the_same_alone_and_in_a_crowd(vocab: int, data: st.DataObject) -> None:
    """The token and its log-probabilities, at whatever place, beside whatever other rows."""
    me = data.draw(members(vocab))
    others = data.draw(st.lists(members(vocab), max_size=5))
    place = data.draw(st.integers(0, len(others)))
    batch = [*others[:place], me, *others[place:]]
    slots = data.draw(st.permutations(range(len(batch))))

    def sampled(rows: list[Member]) -> Sampled:
        logits = torch.cat([random_logits(1, vocab, row.logits_seed) for row in rows])
        return sampler(vocab).sample(logits, [row.make(slot) for row, slot in zip(rows, slots, strict=False)])

    alone, together = sampled([me]), sampled(batch)
    assert not alone.errors
    assert together.tokens[place] == alone.tokens[0]
    one, other = alone.logprobs[0], together.logprobs[place]
    if one is None or other is None:
        assert one is other is None
    else:
        assert (one.token_ids, one.rank) == (other.token_ids, other.rank)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_draws_differ_by_seed_index_and_position() -> None:
    """And by nothing else: the prompt and what was generated before play no part."""
    logits = torch.zeros(1, 1000)
    params = SamplingParams(n=3)

    def token(seed: int, index: int, generated: list[int], prompt: list[int]) -> int:
        request = Request("r", prompt, params, seed=seed)
        sequence = Sequence(request, index, prompt + generated, len(prompt), slot=0)
        return sampler(1000).sample(logits, [sequence]).tokens[0]

    tokens = [token(*key, [0]) for key in itertools.product(range(3), range(3), ([], [1], [1, 1]))]
    assert len(set(tokens)) > 20
    assert token(1, 2, [3, 4], [5, 6, 7]) == token(1, 2, [8, 9], [0])


def test_greedy_rows_among_random_ones() -> None:
    logits = random_logits(64)
    params = [SamplingParams(temperature=0.0) if row % 3 else SamplingParams() for row in range(64)]
    tokens = sampler().sample(logits, [make_sequence(p, seed=row) for row, p in enumerate(params)]).tokens
    best = logits.argmax(-1).tolist()
    assert all(tokens[row] == best[row] for row in range(64) if row % 3)
    assert any(tokens[row] != best[row] for row in range(0, 64, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_left_alone(dtype: torch.dtype) -> None:
    logits = random_logits(3).to(dtype)
    logits[2] = torch.nan
    before = logits.clone()
    params = [
        SamplingParams(logit_bias={1: 5.0}, presence_penalty=1.0, logprobs=1),
        SamplingParams(allowed_token_ids=[3]),
        SamplingParams(),
    ]
    for rows in ([0, 1], [0, 1, 2], [2]):
        sampler().sample(logits[rows[0] : rows[-1] + 1], [make_sequence(params[row], slot=row) for row in rows])
    assert torch.equal(logits[:2], before[:2])
    assert logits[2].isnan().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-20])
def test_low_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(20)
    tokens = sampler().sample(logits, [make_sequence(SamplingParams(temperature=temperature))] * 20).tokens
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("temperature", [1e-38, 1e-60])
def test_lowest_temperature_is_greedy(temperature: float, options: dict[str, Any]) -> None:
    logits = random_logits(20)
    params = SamplingParams(temperature=temperature, **options)
    assert sampler().sample(logits, [make_sequence(params)] * 20).tokens == logits.argmax(-1).tolist()


# ---- rows that cannot be sampled -------------------------------------------------------------------------------------

BAD_ROWS = {
    "nan": torch.full((VOCAB,), torch.nan),
    "one nan": torch.cat([torch.zeros(VOCAB - 1), torch.tensor([torch.nan])]),
    "inf": torch.cat([torch.zeros(VOCAB - 1), torch.tensor([torch.inf])]),
    "all forbidden": torch.full((VOCAB,), -torch.inf),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 4},
        {"top_p": 0.9, "min_p": 0.1},
        {"logprobs": 2, "presence_penalty": 1.0},
        {"logprobs": -1, "temperature": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_bad_logits_fail_their_row_only(bad: Tensor, options: dict[str, Any], mode: str) -> None:
    params = SamplingParams(**options, logprobs_mode=mode)
    logits = random_logits(4)
    good = sampler().sample(logits, [make_sequence(params, seed=i, slot=i) for i in range(4)])
    logits[2] = bad
    sequences = [make_sequence(params, seed=i, slot=i, name=f"number {i}") for i in range(4)]
    got = sampler().sample(logits, sequences)
    assert list(got.errors) == [2]
    assert isinstance(got.errors[2], NonFiniteLogits)
    assert "number 2" in str(got.errors[2])
    for row in (0, 1, 3):
        assert got.tokens[row] == good.tokens[row]
        assert got.logprobs[row] == good.logprobs[row]


def test_nothing_allowed_is_an_error_of_the_row() -> None:
    """Adjustments that leave no token: each of them fine by itself."""
    params = SamplingParams(allowed_token_ids=[3, 4], temperature=0.0)
    sequences = [make_sequence(params), make_sequence(params, bad_words=[[3], [4]], slot=1)]
    result = sampler().sample(random_logits(2), sequences)
    assert list(result.errors) == [1]
    assert "every token is forbidden" in str(result.errors[1])


def fill_and_raise(generated: list[int], logits: Tensor) -> Tensor:
    logits.fill_(-torch.inf)
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda generated, logits: 1 / 0, ZeroDivisionError),
        (lambda generated, logits: logits[:-1], ValueError),
        (lambda generated, logits: None, ValueError),
        (lambda generated, logits: logits.fill_(torch.nan), NothingToSample),
        (fill_and_raise, KeyError),
        (lambda: None, TypeError),
    ],
)
def test_a_failing_processor_fails_its_row_only(bad: Any, error: type[Exception]) -> None:
    logits = random_logits(3)
    good, failing = SamplingParams(logprobs=1), SamplingParams(logprobs=1, logits_processors=[bad])
    expected = sampler().sample(logits, [make_sequence(good, seed=i, slot=i) for i in range(3)])
    mixed = [make_sequence(failing if i == 1 else good, seed=i, slot=i) for i in range(3)]
    got = sampler().sample(logits, mixed)
    assert list(got.errors) == [1]
    assert type(got.errors[1]) is error
    assert [got.tokens[0], got.tokens[2]] == [expected.tokens[0], expected.tokens[2]]
    assert [got.logprobs[0], got.logprobs[2]] == [expected.logprobs[0], expected.logprobs[2]]


def test_a_failing_processor_of_generate_is_its_own_error() -> None:
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("mine")

    sequences = [make_sequence(SamplingParams(), hooks=Hooks(processors=[fail])), make_sequence(SamplingParams())]
    result = sampler().sample(random_logits(2), sequences)
    assert list(result.errors) == [0]
    assert isinstance(result.errors[0], KeyError)


# ---- adjustments -----------------------------------------------------------------------------------------------------

some_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    prompt=some_tokens.filter(bool),
    generated=some_tokens,
    bias=st.none() | st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-20, 20, width=32), max_size=4),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    presence=st.sampled_from([0.0, -1.5, 0.8]),
    frequency=st.sampled_from([0.0, -0.4, 1.1]),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=6),
    min_tokens=st.integers(0, 5),
    stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
    allowed=st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB),
    seed=st.integers(0, 100),
)
def test_adjustments_follow_their_formulas(
    prompt: list[int],
    generated: list[int],
    bias: dict[int, float] | None,
    repetition: float,
    presence: float,
    frequency: float,
    words: list[list[int]],
    min_tokens: int,
    stops: frozenset[int],
    allowed: list[int] | None,
    seed: int,
) -> None:
    """Any mixture of logit_bias, penalties, bad_words, min_tokens and allowed_token_ids, in the documented order."""
    params = SamplingParams(
        temperature=0.0,
        logit_bias=bias,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        min_tokens=min_tokens,
        allowed_token_ids=allowed,
    )
    prompt, generated = [token % 4 for token in prompt], [token % 4 for token in generated]  # so that words do occur
    sequence = make_sequence(params, prompt=prompt, generated=generated, stop_token_ids=stops, bad_words=words)
    logits = random_logits(1, seed=seed)[0]
    expected = adjusted(logits, sequence)
    if not torch.isfinite(expected).any():
        return
    torch.testing.assert_close(scores_of(sequence, logits), expected, rtol=1e-6, atol=1e-5)


def test_bad_words_and_min_tokens_as_transformers() -> None:
    """The same tokens forbidden as by transformers' own processors."""
    words, stops = [[1], [2, 3], [2, 3, 4], [0, 0]], frozenset({5, 6})
    for tail in ([2], [2, 3], [0], [9], [2, 3, 2, 3]):
        sequence = make_sequence(
            SamplingParams(temperature=0.0, min_tokens=3),
            prompt=[7, 8],
            generated=tail,
            stop_token_ids=stops,
            bad_words=words,
        )
        ids, scores = torch.tensor([sequence.tokens]), random_logits(1)
        expected = NoBadWordsLogitsProcessor(words)(ids, scores)
        expected = MinNewTokensLengthLogitsProcessor(2, 3, sorted(stops))(ids, expected)[0]
        assert torch.equal(scores_of(sequence, scores[0]), expected)


@dataclass
class Life:
    """A sequence through its steps: in a slot, waiting with its tokens kept, or at its end."""

    sequence: Sequence
    steps: list[Tensor] = field(default_factory=list)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_penalties_through_steps_and_slots(data: st.DataObject) -> None:
    """Sequences arrive, run, are preempted, come back in other slots, end: counts are always those of their tokens."""
    one, slots = sampler(), 4
    running: dict[int, Sequence] = {}
    waiting: list[Sequence] = []
    token = st.integers(0, 5)
    for step in range(data.draw(st.integers(2, 10))):
        for slot in range(slots):
            event = data.draw(st.sampled_from(["run", "run", "pause", "leave", "preempt", "arrive", "arrive"]))
            sequence = running.get(slot)
            if event == "arrive" and sequence is None:
                if waiting and data.draw(st.booleans()):
                    sequence = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                else:
                    params = SamplingParams(
                        temperature=0.0,
                        repetition_penalty=data.draw(st.sampled_from([1.0, 1.5])),
                        presence_penalty=0.7,
                        frequency_penalty=0.3,
                    )
                    prompt = data.draw(st.lists(token, min_size=1, max_size=3))
                    sequence = make_sequence(params, prompt=prompt, hooks=Hooks(keep_scores=True))
                sequence.slot = slot
                running[slot] = sequence
            elif event in ("leave", "preempt") and sequence is not None:
                del running[slot]
                sequence.slot = -1
                if event == "preempt":
                    waiting.append(sequence)
        # Not all that run are sampled: a prompt may need several steps. Order is the scheduler's affair.
        batch = data.draw(st.permutations(list(running.values())))
        batch = batch[: data.draw(st.integers(0, len(batch)))]
        if not batch:
            continue
        logits = random_logits(len(batch), seed=step)
        result = one.sample(logits, batch)
        assert not result.errors
        for row, sequence in enumerate(batch):
            hooks = sequence.request.hooks
            assert hooks is not None
            torch.testing.assert_close(hooks.scores[-1], adjusted(logits[row], sequence), rtol=1e-6, atol=1e-5)
            for new in data.draw(st.lists(token, min_size=1, max_size=2)):
                sequence.tokens.append(new)


def test_penalties_of_samples_that_fork() -> None:
    """In the step in which n samples part, only the first has a slot; all are penalised for the prompt."""
    params = SamplingParams(n=3, temperature=0.0, repetition_penalty=3.0)
    request = Request("r", [4, 4, 9], params)
    request.sequences[0].slot = 6
    logits = torch.zeros(VOCAB)
    logits[[4, 9, 11]] = torch.tensor([4.0, 3.5, 2.0])
    one = sampler()
    assert one.sample(logits.expand(3, -1), request.sequences).tokens == [11, 11, 11]
    for slot, sequence in zip((6, 2, 3), request.sequences, strict=True):
        sequence.slot = slot
    for sequence, token in zip(request.sequences, (11, 11, 1), strict=True):
        sequence.tokens.append(token)
    # Penalised are 4 to 1.33, 9 to 1.17, and 11 to 0.67 where it was generated.
    assert one.sample(logits.expand(3, -1), request.sequences).tokens == [4, 4, 11]


# ---- processors ------------------------------------------------------------------------------------------------------


class Spy:
    """A processor that notes what it is given and returns logits in which only one token is left."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.seen: list[tuple[Any, ...]] = []

    def only(self, logits: Tensor) -> Tensor:
        out = torch.full_like(logits, -torch.inf)
        out[..., self.keep] = 0.0
        return out

    def two(self, generated: list[int], logits: Tensor) -> Tensor:
        self.seen.append((list(generated), logits.clone()))
        return self.only(logits)

    def three(self, prompt: list[int], generated: list[int], logits: Tensor) -> Tensor:
        self.seen.append((list(prompt), list(generated), logits.clone()))
        return self.only(logits)

    def optional(self, generated: list[int], logits: Tensor, extra: Any = None, *more: Any, **named: Any) -> Tensor:
        assert extra is None and not more and not named
        return self.two(generated, logits)

    def any_number(self, *given_: Any) -> Tensor:
        generated, logits = given_
        return self.two(generated, logits)


class HuggingFaceSpy(Spy, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append((input_ids.tolist(), scores.clone()))
        return self.only(scores)


def test_processors_get_what_they_are_promised() -> None:
    logits = random_logits(1)[0]
    spies = Spy(3), Spy(4), Spy(5), HuggingFaceSpy(6), Spy(8), Spy(10)
    processors = [spies[0].two, spies[1].three, spies[2].optional, spies[3], functools.partial(spies[4].three, [1])]
    processors.append(spies[5].any_number)
    for spy, processor in zip(spies, processors, strict=True):
        params = SamplingParams(temperature=0.0, logits_processors=[processor])
        sequence = make_sequence(params, prompt=[7, 8], generated=[9])
        assert sampler().sample(logits[None], [sequence]).tokens == [spy.keep]
    assert spies[0].seen[0][0] == [9]
    assert spies[1].seen[0][:2] == ([7, 8], [9])
    assert spies[2].seen[0][0] == [9]
    assert spies[3].seen[0][0] == [[7, 8, 9]]
    assert spies[4].seen[0][:2] == ([1], [9])
    for spy in spies:
        assert torch.equal(spy.seen[0][-1].view(-1), logits)
    assert spies[3].seen[0][-1].shape == (1, VOCAB)


def test_processors_run_in_order_after_the_adjustments() -> None:
    """Each sees what the one before returned; the first sees bias and forbidden tokens; filters come after all."""
    logits = random_logits(1)[0]
    seen: list[Tensor] = []

    def note(generated: list[int], row: Tensor) -> Tensor:
        seen.append(row.clone())
        return row

    def add(generated: list[int], row: Tensor) -> Tensor:
        row[5] += 100.0  # in place, and returned
        return row

    params = SamplingParams(
        top_k=1, logit_bias={2: 50.0}, allowed_token_ids=[2, 5], logits_processors=[note, add, note]
    )
    sequence = make_sequence(params, hooks=Hooks(processors=[lambda ids, scores: scores * 2.0], keep_scores=True))
    assert sampler().sample(logits[None], [sequence]).tokens == [5]
    expected = adjusted(logits, sequence)
    torch.testing.assert_close(seen[0], expected)
    expected[5] += 100.0
    torch.testing.assert_close(seen[1], expected)
    hooks = sequence.request.hooks
    assert hooks is not None
    torch.testing.assert_close(hooks.scores[0], warp(2 * expected, top_k=1))


def test_processors_of_generate_see_the_padding() -> None:
    seen: list[Any] = []

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((ids.tolist(), scores.shape))
        return scores

    hooks = Hooks(processors=[note], padding=[0, 0], keep_logits=True, keep_scores=True)
    sequence = make_sequence(SamplingParams(temperature=0.0), prompt=[7], generated=[8], hooks=hooks)
    hooks.logits, hooks.scores = [torch.zeros(VOCAB)], [torch.zeros(VOCAB)]
    logits = random_logits(1)
    for _ in range(2):  # a step computed twice leaves one entry
        sampler().sample(logits, [sequence])
    assert seen[0] == ([[0, 0, 7, 8]], (1, VOCAB))
    assert len(hooks.logits) == len(hooks.scores) == 2
    assert torch.equal(hooks.logits[1], logits[0])


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.77]),
    min_p=st.sampled_from([0.0, 0.13]),
    seed=st.integers(0, 100),
)
def test_kept_scores_are_transformers_scores(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """What `generate(output_scores=True)` would have returned, and a token out of it."""
    logits = random_logits(1, seed=seed, scale=0.7)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    hooks = Hooks(keep_scores=True, keep_logits=True)
    sequence = make_sequence(params, seed=seed, hooks=hooks)
    result = sampler().sample(logits[None], [sequence])
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = warp(logits, **filters) if temperature else logits
    assert torch.equal(hooks.scores[0], expected)
    assert torch.equal(hooks.logits[0], logits)
    assert torch.isfinite(expected[result.tokens[0]])


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def check_logprobs(entry: TokenLogprobs | None, token: int, count: int, scores: Tensor) -> None:
    """One entry against the softmax of `scores [V]`."""
    assert entry is not None
    exact = torch.log_softmax(scores.double(), -1)
    wanted = len(scores) if count < 0 else min(count, len(scores))
    assert entry.token_ids[0] == token
    assert len(entry.token_ids) == len(entry.logprobs) == 1 + wanted
    for listed, value in zip(entry.token_ids, entry.logprobs, strict=True):
        assert value == pytest.approx(float(exact[listed]), abs=1e-5)
    assert entry.logprobs[1:] == sorted(entry.logprobs[1:], reverse=True)
    assert len(set(entry.token_ids[1:])) == wanted
    assert entry.rank == 1 + int((scores > scores[token]).sum())
    if wanted:
        assert min(entry.logprobs[1:]) >= float(exact.sort(descending=True).values[wanted - 1]) - 1e-5


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(params_of(VOCAB), st.sampled_from([None, 0, 1, 5, VOCAB, 100, -1]), st.sampled_from(LOGPROBS_MODES)),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 100),
)
def test_logprobs(rows: list[tuple[SamplingParams, int | None, str]], seed: int) -> None:
    """Raw: of the model's logits, whatever was done to them. Scaled: of these at the row's temperature. Processed: of
    what was drawn from. Side by side."""
    logits = random_logits(len(rows), seed=seed, scale=0.7)
    sequences = [
        make_sequence(params.clone(logprobs=count, logprobs_mode=mode), prompt=[1, 2], generated=[3], seed=i, slot=i)
        for i, (params, count, mode) in enumerate(rows)
    ]
    result = sampler().sample(logits, sequences)
    assert not result.errors
    for i, (params, count, mode) in enumerate(rows):
        if count is None:
            assert result.logprobs[i] is None
            continue
        scores = logits[i]
        if mode == "scaled_logprobs" and not params.greedy:
            scores = scores / params.temperature
        if mode == "processed_logprobs":
            scores = adjusted(scores, sequences[i])
            if params.logits_processors:
                scores = scores * 0.9
            if not params.greedy:
                filters = {"top_k": max(params.top_k, 0), "top_p": params.top_p, "min_p": params.min_p}
                scores = warp(scores, temperature=params.temperature, **filters)
        check_logprobs(result.logprobs[i], result.tokens[i], count, scores)


def test_token_logprobs_of_ties() -> None:
    """The likeliest of several equals has rank 1, and so have the others."""
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    for token, rank in ((0, 1), (1, 1), (3, 1), (2, 4)):
        (entry,) = token_logprobs(logits, [token], [2])
        assert (entry.token_ids[0], entry.rank) == (token, rank)
        assert entry.logprobs[1] == entry.logprobs[2] == pytest.approx(float(torch.log_softmax(logits[0], -1)[0]))


def test_token_logprobs_count_a_long_improbable_tail() -> None:
    """Each of the tail's tokens is less than half a unit in the last place of the likeliest one's probability; together
    they are 0.1 to 0.4 percent."""
    for vocab in (49_152, 151_936):
        logits = torch.full((1, vocab), -14.5)
        logits[0, 5] = 3.0
        (entry,) = token_logprobs(logits, [5], [2])
        truth = torch.log_softmax(logits.double(), -1)[0, entry.token_ids].tolist()
        assert entry.logprobs == pytest.approx(truth, rel=0, abs=4e-6)


def test_logprobs_of_each_row_are_its_own() -> None:
    """Rows that ask for different counts, among rows that ask for none."""
    logits = random_logits(6)
    counts = [2, None, -1, 0, None, 30]
    sequences = [make_sequence(SamplingParams(logprobs=c, temperature=0.0), slot=i) for i, c in enumerate(counts)]
    result = sampler().sample(logits, sequences)
    for i, count in enumerate(counts):
        if count is None:
            assert result.logprobs[i] is None
        else:
            check_logprobs(result.logprobs[i], int(np.argmax(logits[i].numpy())), count, logits[i])
