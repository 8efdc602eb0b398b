"""transformers' generate(), argument by argument: a wrapped model does what its unwrapped twin does."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import pytest
import torch
import transformers
from models.families import VOCAB, left_pad, make_model, make_prompts
from models.tiny_tokenizer import make_tokenizer
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_paged

PROMPTS = make_prompts([5, 9, 17, 12])
BATCH = left_pad(PROMPTS)
WIDTH = BATCH["input_ids"].shape[1]


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model("Llama")


@pytest.fixture
def model(stock: Any) -> Any:
    return hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=128, max_num_seqs=32)


@pytest.fixture(scope="module")
def shared(stock: Any) -> Any:
    """A wrapped model that is not changed by the tests that use it."""
    return hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=128, max_num_seqs=32)


@pytest.fixture
def stock_lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The log's lines that say why a call went through transformers' own loop."""
    caplog.set_level(logging.WARNING, logger="hf_paged")
    return lambda: [r.getMessage() for r in caplog.records if "without paging" in r.getMessage()]


def steps_of(model: Any) -> int:
    """Tokens that the engine generated."""
    return model.engine.stats.generation_tokens


def free_tokens(stock: Any, count: int = 24) -> torch.Tensor:
    """What the batch says greedily with nothing to stop it, new tokens only."""
    return stock.generate(**BATCH, do_sample=False, max_new_tokens=count)[:, WIDTH:]


# ---- greedy, through the engine ----------------------------------------------------------------------------


class Ban(LogitsProcessor):
    """Forbids every token whose id has the parity of the last one's, and checks its arguments on the way."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.ndim == scores.ndim == 2
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            scores[row, int(ids[-1]) % 2 :: 2] = -torch.inf
        return scores


class WholeHistory(LogitsProcessor):
    """Depends on everything a processor can see, padding included."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shift = (input_ids.sum(-1) + input_ids.shape[1]) % VOCAB
        bias = torch.zeros_like(scores).scatter_(1, shift[:, None], 6.0)
        return scores + bias


class EndAfter(StoppingCriteria):
    """Row by row: stops on a token id divisible by `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % self.number == 0


def allowed_by_row(row: int, ids: torch.Tensor) -> list[int]:
    """Row r may only say ids that leave r when divided by 4."""
    return list(range(4 + row, VOCAB, 4))


GREEDY: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 7},
    "max_length": {"max_length": WIDTH + 6},
    "max_length of one more": {"max_length": WIDTH + 1},
    "min_new_tokens": {"max_new_tokens": 24, "min_new_tokens": 10, "eos": 3},
    "min_length": {"max_new_tokens": 24, "min_length": WIDTH + 9, "eos": 3},
    "one eos id": {"max_new_tokens": 24, "eos": 1},
    "several eos ids": {"max_new_tokens": 24, "eos": 3},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(3, 80)] + [[90, 91]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 90))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 90))},
    "sequence_bias": {"sequence_bias": [[[i], 9.0] for i in range(10, 40)] + [[[12, 13], -20.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 7, "max_new_tokens": 6},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5), "eos": 1},
    "renormalize_logits": {"renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed_by_row},
    "logits_processor": {"logits_processor": LogitsProcessorList([Ban()])},
    "logits_processor that looks far": {"logits_processor": LogitsProcessorList([WholeHistory(), Ban()])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([EndAfter(5)]), "eos": 1},
    "several at once": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "logits_processor": LogitsProcessorList([WholeHistory()]),
        "eos": 2,
        "min_new_tokens": 3,
    },
    "pad_token_id": {"pad_token_id": 9, "eos": 3},
}


@pytest.mark.parametrize("name", list(GREEDY))
def test_greedy(name: str, stock: Any, shared: Any, stock_lines: Any) -> None:
    options = {"do_sample": False, "max_new_tokens": 16} | GREEDY[name]
    if "max_length" in options:
        del options["max_new_tokens"]
    if "eos" in options:  # ids that the rows come to, each at its own time
        free = free_tokens(stock)
        ids = [int(free[row, 4 + 3 * row]) for row in range(options.pop("eos"))]
        options["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    expected = stock.generate(**BATCH, **options)
    before = steps_of(shared)
    found = shared.generate(**BATCH, **options)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert steps_of(shared) > before, "it did not go through the engine"
    assert not stock_lines()


@pytest.mark.parametrize(
    "name", ["min_new_tokens", "min_length", "one eos id", "several eos ids", "stopping_criteria", "pad_token_id"]
)
def test_the_ends_are_in_different_places(name: str, stock: Any) -> None:
    """Else the tests of the same name above would prove little."""
    options = {"max_new_tokens": 24} | GREEDY[name]
    free = free_tokens(stock)
    options["eos_token_id"] = [int(free[row, 4 + 3 * row]) for row in range(options.pop("eos"))]
    out = stock.generate(**BATCH, do_sample=False, **options)[:, WIDTH:]
    pad = options.get("pad_token_id", 0)
    assert len({int((row == pad).sum()) for row in out}) > 1


def test_changes_matter(stock: Any) -> None:
    """Every option of the table but the lengths changes what the stock model says."""
    plain = free_tokens(stock, 16)
    same = {"max_new_tokens", "max_length", "max_length of one more", "renormalize_logits", "remove_invalid_values"}
    same.add("forced_bos_token_id")  # it acts on prompts of one token
    for name, given in GREEDY.items():
        if name in same or "eos" in given:
            continue
        options = {"do_sample": False, "max_new_tokens": 16} | given
        assert not torch.equal(stock.generate(**BATCH, **options)[:, WIDTH:], plain), name


def test_stop_strings(stock: Any, shared: Any, stock_lines: Any) -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.decode(free_tokens(stock)[1])
    stop = text[9:12]  # from the middle of tokens to the middle of others, as likely as not
    eos = int(free_tokens(stock)[0, 20])
    options = {"do_sample": False, "max_new_tokens": 24, "stop_strings": [stop], "tokenizer": tokenizer}
    for extra in ({"eos_token_id": eos}, {}):
        expected = stock.generate(**BATCH, **options, **extra)
        assert torch.equal(shared.generate(**BATCH, **options, **extra), expected)
    one = {"input_ids": torch.tensor([PROMPTS[1]])}
    expected = stock.generate(**one, **options)
    assert expected.shape[1] < len(PROMPTS[1]) + 24, "it must stop"
    before = len(stock_lines())
    assert torch.equal(shared.generate(**one, **options), expected)
    assert len(stock_lines()) == before, "a single row needs no lock step"


def test_a_criterion_for_one_row_without_eos(stock: Any, shared: Any) -> None:
    ids = torch.tensor([PROMPTS[2]])
    options = {"do_sample": False, "max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([EndAfter(4)])}
    expected = stock.generate(ids, **options)
    assert expected.shape[1] < ids.shape[1] + 24
    before = steps_of(shared)
    assert torch.equal(shared.generate(ids, **options), expected)
    assert steps_of(shared) > before


def test_a_criterion_that_answers_for_the_whole_batch(stock: Any, shared: Any) -> None:
    """The old style of criterion returns one bool."""

    class Long(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
            return input_ids.shape[1] >= 20

    ids = torch.tensor([PROMPTS[2]])
    options = {"do_sample": False, "max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([Long()])}
    assert torch.equal(shared.generate(ids, **options), stock.generate(ids, **options))


def test_criteria_see_scores(stock: Any, shared: Any) -> None:
    seen: dict[str, list[Any]] = {"stock": [], "paged": []}

    def watch(name: str) -> StoppingCriteriaList:
        class Watch(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                assert isinstance(scores, tuple)
                seen[name].append((input_ids.clone(), torch.stack(scores)))
                return torch.zeros(len(input_ids), dtype=torch.bool)

        return StoppingCriteriaList([Watch()])

    ids = torch.tensor([PROMPTS[0]])
    options = {"do_sample": False, "max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    stock.generate(ids, stopping_criteria=watch("stock"), **options)
    shared.generate(ids, stopping_criteria=watch("paged"), **options)
    assert len(seen["stock"]) == len(seen["paged"]) == 4
    for (ids_a, scores_a), (ids_b, scores_b) in zip(seen["stock"], seen["paged"], strict=True):
        assert torch.equal(ids_a, ids_b)
        torch.testing.assert_close(scores_a, scores_b, atol=1e-4, rtol=1e-4)


def test_max_time_stops_before_the_end(shared: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    out = shared.generate(ids, do_sample=False, max_new_tokens=200, max_time=0.0)
    assert out.shape[1] == ids.shape[1] + 1


# ---- calling conventions -----------------------------------------------------------------------------------


def test_positional_and_default_arguments(stock: Any, shared: Any) -> None:
    ids = torch.tensor([PROMPTS[1]])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for args in ((ids,), (ids, config)):
        assert torch.equal(shared.generate(*args), stock.generate(*args))


def test_generation_config_object(stock: Any, shared: Any) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False, repetition_penalty=1.5, pad_token_id=0)
    expected = stock.generate(**BATCH, generation_config=config, min_new_tokens=2)
    assert torch.equal(shared.generate(**BATCH, generation_config=config, min_new_tokens=2), expected)


def test_the_models_own_generation_config(stock: Any, model: Any) -> None:
    twin = copy.deepcopy(stock)
    for each in (twin, model):
        each.generation_config.max_new_tokens = 5
        each.generation_config.repetition_penalty = 1.4
    assert torch.equal(model.generate(**BATCH), twin.generate(**BATCH))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_short_prompts(length: int, stock: Any, shared: Any) -> None:
    ids = torch.tensor(make_prompts([length]))
    assert torch.equal(
        shared.generate(ids, do_sample=False, max_new_tokens=9), stock.generate(ids, do_sample=False, max_new_tokens=9)
    )


def test_forced_bos_acts_on_prompts_of_one_token(stock: Any, shared: Any) -> None:
    ids = torch.tensor([[9], [5]])
    options = {"do_sample": False, "max_new_tokens": 5, "forced_bos_token_id": 33}
    expected = stock.generate(ids, **options)
    assert expected[:, 1].tolist() == [33, 33]
    assert torch.equal(shared.generate(ids, **options), expected)


def test_without_inputs_it_begins_with_bos(stock: Any, shared: Any) -> None:
    expected = stock.generate(do_sample=False, max_new_tokens=9)
    assert expected[0, 0] == 1
    before = steps_of(shared)
    assert torch.equal(shared.generate(do_sample=False, max_new_tokens=9), expected)
    assert steps_of(shared) > before


def test_without_a_mask(stock: Any, shared: Any) -> None:
    """transformers guesses the mask from pad tokens; the engine goes by what it guessed."""
    stock, ids = copy.deepcopy(stock), BATCH["input_ids"]
    assert torch.equal(
        shared.generate(ids, do_sample=False, max_new_tokens=8), stock.generate(ids, do_sample=False, max_new_tokens=8)
    )


def test_inference_and_grad_modes(stock: Any, shared: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    expected = stock.generate(ids, do_sample=False, max_new_tokens=4)
    with torch.inference_mode():
        assert torch.equal(shared.generate(ids, do_sample=False, max_new_tokens=4), expected)
    with torch.enable_grad():
        assert torch.equal(shared.generate(ids, do_sample=False, max_new_tokens=4), expected)


def test_a_bad_argument_raises_as_it_always_did(stock: Any, shared: Any) -> None:
    for each in (stock, shared):
        with pytest.raises(ValueError, match="nonsense"):
            each.generate(**BATCH, nonsense=3, max_new_tokens=2)


# ---- outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processed", [False, True])
def test_scores_and_logits(processed: bool, stock: Any, shared: Any) -> None:
    free = free_tokens(stock)
    eos = [int(free[0, 4]), int(free[1, 9])]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": eos}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    if processed:
        options |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    expected, found = stock.generate(**BATCH, **options), shared.generate(**BATCH, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        theirs, ours = expected[name], found[name]
        assert isinstance(ours, tuple)
        assert [x.shape for x in ours] == [x.shape for x in theirs]
        assert {x.dtype for x in ours} == {x.dtype for x in theirs}
        going = torch.ones(len(PROMPTS), dtype=torch.bool)
        for step in range(len(theirs)):
            torch.testing.assert_close(ours[step][going], theirs[step][going], atol=2e-4, rtol=1e-4)
            going &= ~torch.isin(expected.sequences[:, WIDTH + step], torch.tensor(eos))
    if processed:
        assert not torch.allclose(found.scores[3], found.logits[3])


def test_sampled_scores_show_the_warpers(stock: Any, shared: Any) -> None:
    """Scores are what the token was drawn from: after temperature, top-k and top-p, as transformers has them."""
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 1, "temperature": 0.7, "top_k": 12, "top_p": 0.8}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    expected, found = stock.generate(**BATCH, **options), shared.generate(**BATCH, **options)
    torch.testing.assert_close(found.scores[0], expected.scores[0], atol=2e-4, rtol=1e-4)
    assert torch.isinf(found.scores[0]).any()


def test_scores_of_a_repetition_penalty_on_padded_sampled_rows(stock: Any, shared: Any) -> None:
    """The penalty is told each row's padding, and every row must get its own."""
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 1, "repetition_penalty": 2.0, "top_k": 0}
    options |= {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    expected, found = stock.generate(**BATCH, **options), shared.generate(**BATCH, **options)
    torch.testing.assert_close(found.scores[0], expected.scores[0], atol=2e-4, rtol=1e-4)


def test_compute_transition_scores(stock: Any, shared: Any) -> None:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    values = []
    for each in (stock, shared):
        out = each.generate(**BATCH, **options)
        values.append(each.compute_transition_scores(out.sequences, out.scores, normalize_logits=True))
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)


def test_return_dict_alone(stock: Any, shared: Any) -> None:
    out = shared.generate(**BATCH, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(out, transformers.generation.GenerateDecoderOnlyOutput)
    assert out.scores is None
    assert out.logits is None
    assert torch.equal(out.sequences, stock.generate(**BATCH, do_sample=False, max_new_tokens=4))


# ---- streamers ---------------------------------------------------------------------------------------------


class Recorder(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.calls: list[tuple[int, ...]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(tuple(value.shape))
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_prompt_and_tokens_one_by_one(stock: Any, shared: Any) -> None:
    ids = torch.tensor([PROMPTS[1]])
    eos = int(stock.generate(ids, do_sample=False, max_new_tokens=20)[0, -6])
    recorders = Recorder(), Recorder()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": eos}
    expected = stock.generate(ids, streamer=recorders[0], **options)
    before = steps_of(shared)
    found = shared.generate(ids, streamer=recorders[1], **options)
    assert torch.equal(found, expected)
    assert steps_of(shared) > before
    assert recorders[1].tokens == recorders[0].tokens == found[0].tolist()
    assert recorders[1].calls == recorders[0].calls
    assert recorders[1].ended == recorders[0].ended == 1


def test_text_iterator_streamer(stock: Any, shared: Any) -> None:
    tokenizer = make_tokenizer()
    ids = torch.tensor([PROMPTS[1]])
    texts = []
    for each in (stock, shared):
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"do_sample": False, "max_new_tokens": 20, "streamer": streamer}
        thread = threading.Thread(target=each.generate, args=(ids,), kwargs=options)
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert len(texts[0]) > 10


def test_a_streamer_that_raises_leaves_nothing_behind(shared: Any) -> None:
    class Broken(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.calls) == 4:
                raise OSError("the client went away")

    ids = torch.tensor([PROMPTS[1]])
    with pytest.raises(OSError, match="went away"):
        shared.generate(ids, do_sample=False, max_new_tokens=20, streamer=Broken())
    assert not shared.engine.has_unfinished()
    assert shared.engine.scheduler.num_active_pages == 0


# ---- sampling ----------------------------------------------------------------------------------------------


def test_num_return_sequences_prefills_once(model: Any) -> None:
    options = {"do_sample": True, "max_new_tokens": 10, "num_return_sequences": 5, "top_k": 0}
    torch.manual_seed(0)
    out = model.generate(**BATCH, **options)
    assert out.shape == (4 * 5, WIDTH + 10)
    for row, prompt in enumerate(PROMPTS):
        for sample in range(5):
            ids = out[row * 5 + sample, :WIDTH].tolist()
            assert ids == [0] * (WIDTH - len(prompt)) + prompt
        assert len({tuple(ids.tolist()) for ids in out[row * 5 : row * 5 + 5]}) == 5
    assert model.engine.stats.prompt_tokens == sum(map(len, PROMPTS))


def test_num_return_sequences_of_a_greedy_call_is_refused_as_ever(stock: Any, shared: Any) -> None:
    for each in (stock, shared):
        with pytest.raises(ValueError, match="num_return_sequences"):
            each.generate(**BATCH, do_sample=False, num_return_sequences=2, max_new_tokens=2)


def test_prefix_allowed_tokens_fn_is_told_the_same_rows(stock: Any, shared: Any) -> None:
    told: dict[str, set[tuple[int, tuple[int, ...]]]] = {"stock": set(), "paged": set()}

    def ask(name: str) -> Any:
        def allowed(row: int, ids: torch.Tensor) -> list[int]:
            told[name].add((row, tuple(ids.tolist())))
            return [5, 6, 7]

        return allowed

    options = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": 3}
    stock.generate(**BATCH, prefix_allowed_tokens_fn=ask("stock"), **options)
    shared.generate(**BATCH, prefix_allowed_tokens_fn=ask("paged"), **options)
    assert told["paged"] == told["stock"]


def test_manual_seed_repeats_and_varies(shared: Any) -> None:
    options = {"do_sample": True, "max_new_tokens": 12, "top_k": 0}

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return shared.generate(**BATCH, **options)

    first = run(1)
    second_call = shared.generate(**BATCH, **options)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert not torch.equal(second_call, first), "the generator must move on"


def test_rows_with_the_same_prompt_differ(shared: Any) -> None:
    ids = torch.tensor([PROMPTS[1]] * 4)
    out = shared.generate(ids, do_sample=True, max_new_tokens=12, top_k=0)
    assert len({tuple(row.tolist()) for row in out}) == 4


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 2.0, "top_k": 0},
    "default top_k": {"temperature": 3.0},
    "top_k": {"top_k": 5, "temperature": 4.0},
    "top_p": {"top_p": 0.7, "top_k": 0, "temperature": 3.0},
    "min_p": {"min_p": 0.2, "top_k": 0, "temperature": 4.0},
    "typical_p": {"typical_p": 0.6, "top_k": 0, "temperature": 3.0},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 3.0, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_samples_follow_the_distribution(name: str, stock: Any, shared: Any) -> None:
    """Chi-square of 2000 first tokens against the softmax of the scores that transformers draws from."""
    draws, ids = 2000, torch.tensor([PROMPTS[3]])
    options = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": draws} | DISTRIBUTIONS[name]
    one = {**options, "num_return_sequences": 1, "return_dict_in_generate": True, "output_scores": True}
    weights = torch.softmax(stock.generate(ids, **one).scores[0][0].double(), -1)
    torch.manual_seed(7)
    tokens = shared.generate(ids, **options)[:, -1]
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert counts[weights == 0].sum() == 0, "a token that was filtered out"
    expected = weights * draws
    large = expected >= 5
    bins = [(float(c), float(e)) for c, e in zip(counts[large], expected[large], strict=True)]
    rest = float(expected[~large].sum())
    if rest >= 5:
        bins.append((float(counts[~large].sum()), rest))
    assert len(bins) >= 3, "too narrow a distribution to test anything"
    chi = sum((c - e) ** 2 / e for c, e in bins)
    freedom = len(bins) - 1
    # Wilson-Hilferty: chi-square's 0.99999 quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi < limit


# ---- the stock path ----------------------------------------------------------------------------------------


def holes() -> dict[str, Any]:
    mask = BATCH["attention_mask"].clone()
    mask[2, 5:8] = 0
    return {**BATCH, "attention_mask": mask}


def right_padded() -> dict[str, Any]:
    ids = BATCH["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[0, -3:], mask[0, -3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


STOCK: dict[str, Any] = {
    "a mask with holes": holes,
    "right padding": right_padded,
    "beam search": lambda: {**BATCH, "num_beams": 3},
    "use_cache=False": lambda: {**BATCH, "use_cache": False},
    "static cache": lambda: {**BATCH, "cache_implementation": "static"},
    "hidden states": lambda: {**BATCH, "output_hidden_states": True, "return_dict_in_generate": True},
    "inputs_embeds": lambda: {"inputs_embeds": torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))},
    "guidance_scale": lambda: {**BATCH, "guidance_scale": 1.5},
}


def ids_of(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.sequences


@pytest.mark.parametrize("name", list(STOCK))
def test_what_stays_with_the_stock_loop(name: str, stock: Any, model: Any, stock_lines: Any) -> None:
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = copy.deepcopy(stock).generate(**STOCK[name](), **options)
    for _ in range(2):
        found = model.generate(**STOCK[name](), **options)
        assert torch.equal(ids_of(found), ids_of(expected))
    assert steps_of(model) == 0
    assert len(stock_lines()) == 1, stock_lines()


def test_output_attentions_stays_with_the_stock_loop(stock: Any, stock_lines: Any) -> None:
    twin = copy.deepcopy(stock)
    twin.set_attn_implementation("eager")
    model = hf_paged.wrap(copy.deepcopy(twin), num_pages=64)
    options = {"do_sample": False, "max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True}
    expected, found = twin.generate(**BATCH, **options), model.generate(**BATCH, **options)
    assert len(found.attentions) == len(expected.attentions) == 3
    torch.testing.assert_close(found.attentions[1][0], expected.attentions[1][0])
    assert len(stock_lines()) == 1


def test_output_attentions_without_a_dict_changes_nothing(stock: Any, shared: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    options = {"do_sample": False, "max_new_tokens": 3, "output_hidden_states": True}
    assert torch.equal(shared.generate(ids, **options), stock.generate(ids, **options))


def test_ones_own_cache_is_filled(stock: Any, model: Any, stock_lines: Any) -> None:
    ids = torch.tensor([PROMPTS[2]])
    caches = transformers.DynamicCache(), transformers.DynamicCache()
    options = {"do_sample": False, "max_new_tokens": 5}
    expected = stock.generate(ids, past_key_values=caches[0], **options)
    assert torch.equal(model.generate(ids, past_key_values=caches[1], **options), expected)
    assert caches[1].get_seq_length() == caches[0].get_seq_length() > 0
    # And a second turn goes on from it.
    longer = torch.cat([expected, torch.tensor([[11, 12, 13]])], 1)
    expected = stock.generate(longer, past_key_values=caches[0], **options)
    assert torch.equal(model.generate(longer, past_key_values=caches[1], **options), expected)
    assert len(stock_lines()) == 1


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_generation(stock: Any, model: Any, stock_lines: Any, how: str) -> None:
    """Over pages, and as many rows at once as there are: stock takes one."""
    assistant = make_model("Llama", seed=3, num_hidden_layers=1)
    how_to = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, **how_to}
    for batch in ({"input_ids": torch.tensor([PROMPTS[2]])}, BATCH):
        expected = stock.generate(**batch, do_sample=False, max_new_tokens=8)
        assert torch.equal(model.generate(**batch, **options).sequences, expected)
    assert not stock_lines()


def test_a_wrapped_assistant(stock: Any) -> None:
    """The candidate generator calls the assistant's generate() with a cache and scores of its own."""
    ids = torch.tensor([PROMPTS[2]])
    assistant = hf_paged.wrap(make_model("Llama", seed=3, num_hidden_layers=1), num_pages=64)
    found = copy.deepcopy(stock).generate(ids, do_sample=False, max_new_tokens=8, assistant_model=assistant)
    assert torch.equal(found, stock.generate(ids, do_sample=False, max_new_tokens=8))


def test_return_dict_gives_a_cache_as_stock_does(stock: Any, shared: Any) -> None:
    """transformers puts the cache into the dict, for a next call. Without one, that call must still be right."""
    ids = torch.tensor([PROMPTS[2]])
    options = {"do_sample": False, "max_new_tokens": 5}
    first = shared.generate(ids, return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    expected = stock.generate(longer, **options)
    again = shared.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, expected)


def test_too_long_for_the_pool_or_the_model_goes_the_stock_way(stock: Any, stock_lines: Any) -> None:
    """What alone cannot fit in the pool still generates, as it did before wrapping."""
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=2)
    ids = torch.tensor([PROMPTS[2]])
    expected = stock.generate(ids, do_sample=False, max_new_tokens=8)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=8), expected)
    assert len(stock_lines()) == 1


def test_other_position_ids_are_not_ignored(stock: Any, model: Any) -> None:
    ids = torch.tensor([PROMPTS[2]])
    positions = torch.arange(ids.shape[1])[None] * 2
    options = {"do_sample": False, "max_new_tokens": 6}
    try:
        expected = stock.generate(ids, position_ids=positions, **options)
    except Exception as error:
        with pytest.raises(type(error)):
            model.generate(ids, position_ids=positions, **options)
        return
    assert torch.equal(model.generate(ids, position_ids=positions, **options), expected)


def test_a_processor_error_reaches_the_caller(shared: Any, stock: Any) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > WIDTH + 3:
                raise RuntimeError("no more")
            return scores

    with pytest.raises(RuntimeError, match="no more"):
        shared.generate(**BATCH, do_sample=False, max_new_tokens=9, logits_processor=LogitsProcessorList([Broken()]))
    assert not shared.engine.has_unfinished()
    assert shared.engine.scheduler.num_active_pages == 0
    options = {"do_sample": False, "max_new_tokens": 9}
    assert torch.equal(shared.generate(**BATCH, **options), stock.generate(**BATCH, **options))


def test_a_criterion_error_reaches_the_caller(shared: Any) -> None:
    class Broken(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("no more")

    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 2}
    with pytest.raises(RuntimeError, match="no more"):
        shared.generate(**BATCH, stopping_criteria=StoppingCriteriaList([Broken()]), **options)
    assert not shared.engine.has_unfinished()
    assert shared.engine.scheduler.num_active_pages == 0
