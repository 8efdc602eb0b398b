"""What a form forces, where texts, tokenizers and interrupts are unkind."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch
from sampling.bytewise import EOS, VOCAB, byte_model, byte_tokenizer

import hf_paged
from hf_paged import SamplingParams
from hf_paged.engine.request import Sequence
from hf_paged.sampling import structured
from hf_paged.sampling_params import StructuredOutputsParams

xgrammar = pytest.importorskip("xgrammar")


@pytest.fixture(scope="module")
def model() -> Any:
    wrapped = hf_paged.wrap(byte_model(), tokenizer=byte_tokenizer(), page_size=16, num_pages=128, max_num_seqs=16)
    wrapped.engine.speculator.max_rows = 128  # batches of all sizes jump
    return wrapped


def sampling(**form: Any) -> SamplingParams:
    return SamplingParams(seed=1, max_tokens=80, structured_outputs=StructuredOutputsParams(**form))


def state_of(tokenizer: Any, **form: Any) -> tuple[structured.FormState, Sequence]:
    compiled = structured.FormCompiler(tokenizer, VOCAB).compile(StructuredOutputsParams(**form), [EOS])
    request = hf_paged.engine.request.Request("r", [5], SamplingParams(), form=compiled)
    return structured.FormState(compiled), request.sequences[0]


def text_of(tokens: list[int]) -> str:
    return byte_tokenizer().decode(tokens)


@pytest.mark.parametrize(
    "choice", [["élan vital", "état"], ["été", "ère"], ["😀 to 😁", "😂"], ["ab😀", "ab😁"]], ids=str
)
def test_choices_that_begin_within_a_character(model: Any, choice: list[str]) -> None:
    """What is certain then ends within one, or begins there."""
    outputs = model.generate_many(["The sea", "The sky", "The hill"], sampling(choice=choice).clone(n=4))
    texts = [sample.text for output in outputs for sample in output.outputs]
    assert set(texts) <= set(choice) and len(set(texts)) > 1
    assert model.engine.speculator.stats["forced"].acceptance_rate == 1


def test_whole_characters_before_a_choice_within_one_are_forced() -> None:
    state, sequence = state_of(byte_tokenizer(), choice=["the ß or é", "the ß or è"])
    assert text_of(state.forced(sequence)) == "the ß or"  # the last token depends on what follows


def test_words_that_the_model_has_no_token_for() -> None:
    """Added to the tokenizer, while the model was left as it was."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(20)])
    assert len(tokenizer) > VOCAB
    state, sequence = state_of(tokenizer, choice=["say <extra_19> twice"])
    assert state.forced(sequence) == []
    state, sequence = state_of(tokenizer, choice=["say it twice"])
    assert text_of(state.forced(sequence)) == "say it twic"


def test_of_a_long_text_only_the_beginning_is_cut_into_tokens() -> None:
    """Else every step would cost as much as the whole text."""
    state, sequence = state_of(byte_tokenizer(), choice=["over and over, " * 2000])
    assert 64 < len(state.forced(sequence)) < structured.MOST_FORCED


def test_an_interrupt_between_the_matcher_and_what_is_known_of_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a token is accepted: for a mask, for what is forced, or for a draft's rows."""
    form = sampling(regex="(red|blue) and then [0-9]{2}, (or|not)")
    (expected,) = model.generate_many(["The sea"], form)
    accept, engine = xgrammar.GrammarMatcher.accept_token, model.engine
    for when in range(1, 30):
        calls = 0

        def interrupted(matcher: Any, token: int, *args: Any, when: int = when) -> bool:
            nonlocal calls
            calls += 1
            accepted: bool = accept(matcher, token, *args)
            if calls == when:
                raise KeyboardInterrupt
            return accepted

        with monkeypatch.context() as patch:
            patch.setattr(xgrammar.GrammarMatcher, "accept_token", interrupted)
            engine.add_request("The sea", form)
            outputs: list[Any] = []
            while engine.has_unfinished():
                with contextlib.suppress(KeyboardInterrupt):
                    outputs += engine.step()
        assert calls > when
        assert outputs[-1].outputs[0].token_ids == expected.outputs[0].token_ids, when


def test_two_engines_do_not_fill_masks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """xgrammar's threads end the process if two callers start them."""
    inside, most = 0, 0

    class Counts:
        def batch_fill_next_token_bitmask(self, *_: Any) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    monkeypatch.setattr(structured, "_threads", Counts)
    mask = torch.zeros(structured.MANY, -(-VOCAB // 32), dtype=torch.int32)

    def fill() -> None:
        sequences = [state_of(byte_tokenizer(), regex="[a-z]+")[1] for _ in range(structured.MANY)]
        structured.fill_forms(mask, sequences, range(structured.MANY), {})

    threads = [threading.Thread(target=fill) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
