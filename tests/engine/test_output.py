"""Text out of tokens, piece by piece, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hf_paged.engine.output import INCOMPLETE, MOST_PENDING, OutputProcessor, SequenceText
from hf_paged.engine.request import Request, Sequence
from hf_paged.outputs import CompletionOutput
from hf_paged.sampling.logprobs import TokenLogprobs
from hf_paged.sampling_params import RequestOutputKind, SamplingParams

SNIPPETS = [
    *(
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "日本語のテキスト",
        "汉字",
        "한국어",
        "é́̂",
        "n̈",
        "ß",
        "עברית",
        "हिन्दी",
        "𝔘𝔫𝔦",
        "\u200b",
        "\ufeff",
        "\ufffd",
    ),
    *("def f(x):\n    return x ** 2  # square\n", '{"a": [1, 2]}', "\t\t", "\r\n", "http://a.b/c?d=e", "1234567", " "),
    *("don't", " , ", "...", "<|im_start|>", "<|im_end|>", "The quick brown fox "),
]
texts = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=8)), max_size=8).map("".join)
"""Emoji with joiners and modifiers, scripts of many bytes, combining marks, code, special tokens' names, anything."""


@pytest.fixture(scope="module")
def byte_tokens(smollm2_tokenizer: Any) -> dict[int, int]:
    """byte -> the token that is this byte alone, for the bytes that have one."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = smollm2_tokenizer.get_vocab()
    return {byte: vocab[char] for byte, char in bytes_to_unicode().items() if char in vocab}


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def say(tokenizer: Any, text: str) -> tuple[list[int], str]:
    """A text as tokens, and as the tokenizer can say it: this one has no tokens for 21 of the bytes."""
    ids = encode(tokenizer, text)[: MOST_PENDING - 1]  # what waits longer than that has tests of its own
    return ids, tokenizer.decode(ids, skip_special_tokens=False)


def feed(text: SequenceText, ids: list[int], sizes: list[int]) -> list[str]:
    """Gives `ids` in chunks of `sizes` (around and around) and takes what may be shown after each, as the engine."""
    pieces, end, turn = [], 0, 0
    while end < len(ids) and text.stopped is None:
        end = min(len(ids), end + sizes[turn % len(sizes)])
        turn += 1
        text.update(ids[:end])
        pieces.append(text.take(last=False))
    if text.stopped is None:
        text.update(ids, last=True)
    pieces.append(text.take(last=True))
    return pieces


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The naive way, letter by letter: ends where a stop is complete, at the earliest and first listed of several."""
    for end in range(1, len(text) + 1):
        found = [(text.find(stop), place, stop) for place, stop in enumerate(stops) if stop in text[:end]]
        if found:
            at, _, stop = min(found)
            return text[:at], stop
    return text, None


chunk_sizes = st.one_of(st.just([1]), st.lists(st.integers(1, 5), min_size=1, max_size=6))


# ---- without stop strings --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=texts, sizes=chunk_sizes, skip=st.booleans())
def test_pieces_of_a_text(smollm2_tokenizer: Any, text: str, sizes: list[int], skip: bool) -> None:
    """What was shown in pieces is the text of all tokens."""
    ids, _ = say(smollm2_tokenizer, text)
    pieces = feed(SequenceText(smollm2_tokenizer, SamplingParams(skip_special_tokens=skip)), ids, sizes)
    assert "".join(pieces) == smollm2_tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", SNIPPETS)
def test_pieces_of_known_texts(smollm2_tokenizer: Any, text: str) -> None:
    """And that is the text that was encoded."""
    params = SamplingParams(skip_special_tokens=False)
    assert "".join(feed(SequenceText(smollm2_tokenizer, params), encode(smollm2_tokenizer, text), [1])) == text


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sizes=chunk_sizes, skip=st.booleans(), spaces=st.booleans())
def test_pieces_of_random_tokens(
    smollm2_tokenizer: Any, data: st.DataObject, sizes: list[int], skip: bool, spaces: bool
) -> None:
    """Tokens as a wild model samples them: broken characters, special tokens in between."""
    one = st.one_of(st.integers(0, len(smollm2_tokenizer) - 1), st.integers(0, 300))
    ids = data.draw(st.lists(one, max_size=40))
    params = SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    pieces = feed(SequenceText(smollm2_tokenizer, params), ids, sizes)
    options = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
    assert "".join(pieces) == smollm2_tokenizer.decode(ids, **options)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sizes=chunk_sizes)
def test_pieces_of_random_bytes(
    smollm2_tokenizer: Any, byte_tokens: dict[int, int], data: st.DataObject, sizes: list[int]
) -> None:
    """Bytes one by one: whole characters, halves of them, and continuations without a beginning."""
    high = sorted(byte for byte in byte_tokens if byte >= 0x80)
    whole = st.sampled_from([*"éß日本👍", "語"]).map(lambda c: [b for b in c.encode() if b in byte_tokens])
    noise = st.lists(st.sampled_from([*high, 0x41, 0x20]), max_size=4)
    parts = data.draw(st.lists(st.one_of(whole, noise), max_size=20))
    ids = [byte_tokens[byte] for part in parts for byte in part]
    assume(len(ids) < MOST_PENDING)
    pieces = feed(SequenceText(smollm2_tokenizer, SamplingParams()), ids, sizes)
    assert "".join(pieces) == smollm2_tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_no_piece_shows_half_a_character(smollm2_tokenizer: Any, text: str) -> None:
    """One token at a time, what is shown is always a beginning of the whole."""
    ids, text = say(smollm2_tokenizer, text)
    assume(INCOMPLETE not in text)
    shown, so_far = SequenceText(smollm2_tokenizer, SamplingParams(skip_special_tokens=False)), ""
    for end in range(1, len(ids) + 1):
        shown.update(ids[:end])
        so_far += shown.take(last=False)
        assert text.startswith(so_far)
    assert so_far == text  # the last token ends a character, so nothing is left for the end


def test_text_is_shown_as_soon_as_it_is_whole(smollm2_tokenizer: Any) -> None:
    """Nothing is held back without need: every ASCII token is shown in its step."""
    ids = encode(smollm2_tokenizer, "Once upon a time, there was a fox.")
    text = SequenceText(smollm2_tokenizer, SamplingParams())
    for end in range(1, len(ids) + 1):
        text.update(ids[:end])
        assert text.take(last=False) == smollm2_tokenizer.decode([ids[end - 1]])


def test_decoding_does_not_grow_with_the_text(smollm2_tokenizer: Any) -> None:
    """A thousand tokens are decoded a few at a time."""
    longest = 0

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return smollm2_tokenizer.decode(ids, **options)

    ids = encode(smollm2_tokenizer, "The quick brown fox 日本語 👩‍👩‍👧‍👦. " * 50)
    pieces = feed(SequenceText(Counting(), SamplingParams()), ids, [1])
    assert "".join(pieces) == smollm2_tokenizer.decode(ids)
    assert longest < 20


def test_endless_noise_is_shown_in_time(smollm2_tokenizer: Any, byte_tokens: dict[int, int]) -> None:
    """Bytes that never become a character are not held back for ever."""
    ids = [byte_tokens[0x80]] * (2 * MOST_PENDING)
    text = SequenceText(smollm2_tokenizer, SamplingParams())
    for end in range(1, len(ids) + 1):
        text.update(ids[:end])
    assert len(text.text) >= MOST_PENDING
    assert "".join(feed(SequenceText(smollm2_tokenizer, SamplingParams()), ids, [1])) == smollm2_tokenizer.decode(ids)


@pytest.mark.parametrize("noise", [MOST_PENDING - 2, MOST_PENDING - 1])
def test_a_character_across_the_most_that_is_held_back(
    smollm2_tokenizer: Any, byte_tokens: dict[int, int], noise: int
) -> None:
    """After noise just as long as is waited for comes a character of three bytes, and then words."""
    ids = [byte_tokens[0x80]] * noise + [byte_tokens[byte] for byte in "語".encode()]
    ids += encode(smollm2_tokenizer, " and so on")
    text = "".join(feed(SequenceText(smollm2_tokenizer, SamplingParams()), ids, [1]))
    assert text == smollm2_tokenizer.decode(ids)


def test_chunks_that_always_end_inside_a_character(smollm2_tokenizer: Any, byte_tokens: dict[int, int]) -> None:
    """Three tokens a step (a lucky drafter's) and three per character, out of step by one: text must get through."""
    ids = [byte_tokens[byte] for byte in "語".encode()] * 40
    text, shown, end = SequenceText(smollm2_tokenizer, SamplingParams()), "", 1
    while end < len(ids):
        text.update(ids[:end])
        shown += text.take(last=False)
        assert len(shown) >= end // 3 - 1, "sound text is held back"
        end += 3
    text.update(ids, last=True)
    assert shown + text.take(last=True) == "語" * 40


def test_special_tokens(smollm2_tokenizer: Any) -> None:
    ids = encode(smollm2_tokenizer, "a<|im_end|>b")
    for skip, expected in ((True, "ab"), (False, "a<|im_end|>b")):
        params = SamplingParams(skip_special_tokens=skip)
        assert "".join(feed(SequenceText(smollm2_tokenizer, params), ids, [1])) == expected


# ---- stop strings ----------------------------------------------------------------------------------------------------


@st.composite
def stops_in(draw: Any, text: str) -> list[str]:
    """One to three strings, most of them out of the text and across tokens."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, max(0, len(text) - 1)))
        found.append(text[begin : begin + draw(st.integers(1, 12))] or "x")
    if draw(st.booleans()):
        found.append(draw(st.sampled_from(["\n\n", "fox ", "aa", "語", "not there", found[0] + "!"])))
    return found


@settings(max_examples=400, deadline=None)
@given(data=st.data(), sizes=chunk_sizes, include=st.booleans())
def test_text_ends_at_the_earliest_stop(
    smollm2_tokenizer: Any, data: st.DataObject, sizes: list[int], include: bool
) -> None:
    """Joined pieces are the text cut at a stop's first occurrence, beginning no later than the first complete one.

    Which of several that overlap it is depends on what tokens and chunks complete together.
    """
    ids, text = say(smollm2_tokenizer, data.draw(texts))
    stops = data.draw(stops_in(text))
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, skip_special_tokens=False)
    shown = SequenceText(smollm2_tokenizer, params)
    pieces = feed(shown, ids, sizes)
    places = {stop: text.find(stop) for stop in stops if stop in text}
    if not places:
        assert (shown.stopped, "".join(pieces)) == (None, text)
        return
    assert shown.stopped in places
    at, first = places[shown.stopped], min(places, key=lambda stop: places[stop] + len(stop))
    assert at <= places[first]
    assert "".join(pieces) == shown.text == text[:at] + shown.stopped * include


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sizes=chunk_sizes, include=st.booleans())
def test_text_ends_at_the_only_stop(
    smollm2_tokenizer: Any, data: st.DataObject, sizes: list[int], include: bool
) -> None:
    """With one stop string there is nothing to choose: the text is cut at its first occurrence, however it is fed."""
    ids, text = say(smollm2_tokenizer, data.draw(texts))
    stop = data.draw(stops_in(text))[-1]
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, skip_special_tokens=False)
    pieces = feed(SequenceText(smollm2_tokenizer, params), ids, sizes)
    before, found, _ = text.partition(stop)
    assert "".join(pieces) == before + found * include


@settings(max_examples=150, deadline=None)
@given(
    letters=st.text("ab", min_size=1, max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)
)
@example(letters="aaab", stops=["aab"])
@example(letters="abababb", stops=["ababb", "abb"])
def test_stops_that_begin_many_times(
    smollm2_tokenizer: Any, byte_tokens: dict[int, int], letters: str, stops: list[str]
) -> None:
    """Letter by letter, with beginnings of stop strings that come to nothing: these are shown late, but shown."""
    ids = [byte_tokens[ord(letter)] for letter in letters]
    params = SamplingParams(stop=stops)
    shown = SequenceText(smollm2_tokenizer, params)
    pieces = feed(shown, ids, [1])
    expected, stop = cut(letters, stops)
    assert ("".join(pieces), shown.stopped) == (expected, stop)
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert expected.startswith(so_far)


def test_only_what_could_be_a_stop_is_held_back(smollm2_tokenizer: Any, byte_tokens: dict[int, int]) -> None:
    text = SequenceText(smollm2_tokenizer, SamplingParams(stop=["xyz"]))
    shown = []
    for end, _ in enumerate("abxyxyab", start=1):
        text.update([byte_tokens[ord(letter)] for letter in "abxyxyab"[:end]])
        shown.append(text.take(last=False))
    assert shown == ["a", "b", "", "", "xy", "", "xya", "b"]


def test_what_was_held_back_is_shown_at_the_end(smollm2_tokenizer: Any, byte_tokens: dict[int, int]) -> None:
    """The text ends, for length say, with the beginning of a stop string, or with half a character."""
    for tail, text in ((b"xy", "xy"), ("語".encode()[:2], INCOMPLETE)):
        ids = [byte_tokens[byte] for byte in b"ab" + tail]
        pieces = feed(SequenceText(smollm2_tokenizer, SamplingParams(stop=["xyz"])), ids, [1])
        assert "".join(pieces) == "ab" + text


# ---- min_tokens ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    letters=st.text("abc", min_size=1, max_size=20),
    stop=st.text("abc", min_size=1, max_size=1),
    least=st.integers(0, 20),
)
def test_stops_of_one_token_before_min_tokens(
    smollm2_tokenizer: Any, byte_tokens: dict[int, int], letters: str, stop: str, least: int
) -> None:
    """What the first `min_tokens` tokens say ends nothing; the first stop after them does."""
    ids = [byte_tokens[ord(letter)] for letter in letters]
    params = SamplingParams(stop=stop, min_tokens=least, max_tokens=100)
    pieces = feed(SequenceText(smollm2_tokenizer, params), ids, [1])
    at = letters.find(stop, least)
    assert "".join(pieces) == (letters if at < 0 else letters[:at])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_that_ends_after_min_tokens(smollm2_tokenizer: Any, byte_tokens: dict[int, int], include: bool) -> None:
    """A stop that the first token allowed to end the text completes (vLLM: only its end has to be new)."""
    ids = [byte_tokens[ord(letter)] for letter in "aabbcc"]
    params = SamplingParams(stop="bbc", min_tokens=4, include_stop_str_in_output=include)
    text = SequenceText(smollm2_tokenizer, params)
    pieces = feed(text, ids, [1])
    assert text.stopped == "bbc"
    assert "".join(pieces) == ("aabbc" if include else "aa")


def test_min_tokens_with_several_tokens_at_once(smollm2_tokenizer: Any, byte_tokens: dict[int, int]) -> None:
    ids = [byte_tokens[ord(letter)] for letter in "abcdbe"]
    params = SamplingParams(stop="b", min_tokens=3)
    pieces = feed(SequenceText(smollm2_tokenizer, params), ids, [6])
    assert "".join(pieces) == "abcd"


# ---- the processor ---------------------------------------------------------------------------------------------------


def finish(sequence: Sequence, end: tuple[str, int | str | None]) -> None:
    """What engine and scheduler do with a sequence that ended."""
    sequence.finish_reason, sequence.stop_reason = end
    sequence.request.num_unfinished = sum(other.finish_reason is None for other in sequence.request.sequences)


def run(
    tokenizer: Any, ids: list[int], params: SamplingParams, *, stop_token_ids: frozenset[int] = frozenset()
) -> tuple[list[CompletionOutput], Sequence]:
    """What a reader gets step by step when one sequence generates `ids`, as far as it gets."""
    processor = OutputProcessor(tokenizer)
    request = Request(
        "r", [1, 2], params, stop_token_ids=stop_token_ids | frozenset(params.stop_token_ids or ()), prompt="p"
    )
    (sequence,) = request.sequences
    outputs = []
    for token in ids:
        sequence.tokens.append(token)
        end = processor.end_of(sequence)
        if end is not None:
            finish(sequence, end)
        output = processor.output(request)
        if output is not None:
            assert output.finished == (end is not None)
            assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "p", [1, 2])
            outputs.extend(output.outputs)
        if end is not None:
            break
    return outputs, sequence


@settings(max_examples=150, deadline=None)
@given(data=st.data(), include=st.booleans(), least=st.integers(0, 3), most=st.integers(3, 60))
def test_deltas_add_up(smollm2_tokenizer: Any, data: st.DataObject, include: bool, least: int, most: int) -> None:
    """Deltas joined are the last cumulative output, which is the only output of those who ask for the end."""
    ids, text = say(smollm2_tokenizer, data.draw(texts))
    assume(ids)
    options: dict[str, Any] = {
        "stop": data.draw(st.none() | stops_in(text)),
        "include_stop_str_in_output": include,
        "min_tokens": least,
        "max_tokens": min(most, max(least, len(ids))),
        "stop_token_ids": data.draw(st.none() | st.lists(st.sampled_from(ids), max_size=2)),
    }
    assume(options["max_tokens"] <= len(ids))  # so that it does end
    read = {
        kind: run(smollm2_tokenizer, ids, SamplingParams(output_kind=kind, **options)) for kind in RequestOutputKind
    }
    cumulative, last = read[RequestOutputKind.CUMULATIVE]
    deltas, _ = read[RequestOutputKind.DELTA]
    (final,) = read[RequestOutputKind.FINAL_ONLY][0]
    whole = cumulative[-1]
    assert whole.finish_reason in ("stop", "length")
    assert (final.text, final.token_ids) == (whole.text, whole.token_ids) == (whole.text, last.generated)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == last.generated
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (whole.finish_reason, whole.stop_reason)
    for early in cumulative:
        assert whole.token_ids[: len(early.token_ids)] == early.token_ids


def test_stop_tokens_and_their_reasons(smollm2_tokenizer: Any) -> None:
    """The request's own id is named, the model's is not; neither is part of the text; both are in the token ids."""
    ids = encode(smollm2_tokenizer, "one two three four")
    assert len(ids) == 4
    model, own = frozenset({ids[2]}), [ids[2]]
    for params, eos, reason in (
        (SamplingParams(), model, None),
        (SamplingParams(stop_token_ids=own), frozenset(), own[0]),
    ):
        outputs, _ = run(smollm2_tokenizer, ids, params, stop_token_ids=eos)
        last = outputs[-1]
        assert (last.text, last.token_ids) == ("one two", ids[:3])
        assert (last.finish_reason, last.stop_reason) == ("stop", reason)
    outputs, _ = run(smollm2_tokenizer, ids, SamplingParams(include_stop_str_in_output=True, stop_token_ids=own))
    assert outputs[-1].text == "one two three"


@pytest.mark.parametrize(("least", "length"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6)])
def test_min_tokens_and_stop_tokens(smollm2_tokenizer: Any, least: int, length: int) -> None:
    """Tokens 2 and 4 are stops: the first that comes after `min_tokens` tokens ends the sequence, or the length."""
    ids = encode(smollm2_tokenizer, "one two one two one one")
    params = SamplingParams(min_tokens=least, max_tokens=6, stop_token_ids=[ids[1]])
    outputs, sequence = run(smollm2_tokenizer, ids, params)
    assert sequence.num_generated == length
    assert outputs[-1].finish_reason == ("length" if length == 6 else "stop")


def test_length_and_stop_at_once(smollm2_tokenizer: Any) -> None:
    """A last token that is also a stop, or completes one, stops."""
    ids = encode(smollm2_tokenizer, "one two three")
    for params in (SamplingParams(max_tokens=3, stop="three"), SamplingParams(max_tokens=3, stop_token_ids=[ids[2]])):
        outputs, _ = run(smollm2_tokenizer, ids, params)
        assert outputs[-1].finish_reason == "stop"
    outputs, _ = run(smollm2_tokenizer, ids, SamplingParams(max_tokens=2))
    assert (outputs[-1].finish_reason, outputs[-1].token_ids) == ("length", ids[:2])


def test_stop_reason_is_the_string(smollm2_tokenizer: Any) -> None:
    ids = encode(smollm2_tokenizer, "one two three")
    outputs, _ = run(smollm2_tokenizer, ids, SamplingParams(stop=["none", "wo"]))
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "wo")
    assert (outputs[-1].text, outputs[-1].token_ids) == ("one t", ids[:2])


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_without_text(smollm2_tokenizer: Any, kind: RequestOutputKind) -> None:
    """No tokenizer, or no wish for text: token ids only."""
    ids = encode(smollm2_tokenizer, "one two three")
    for tokenizer, detokenize in ((None, True), (smollm2_tokenizer, False)):
        params = SamplingParams(max_tokens=3, detokenize=detokenize, output_kind=kind)
        outputs, _ = run(tokenizer, ids, params)
        assert {output.text for output in outputs} == {""}
        assert outputs[-1].token_ids == (ids[2:] if kind is RequestOutputKind.DELTA else ids)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_logprobs_of_an_output(smollm2_tokenizer: Any, kind: RequestOutputKind) -> None:
    """The sampled token is always there, with its own rank, the likeliest with theirs, and each with its text."""
    params = SamplingParams(max_tokens=2, logprobs=2, output_kind=kind)
    request = Request("r", [1], params)
    (sequence,) = request.sequences
    processor, outputs = OutputProcessor(smollm2_tokenizer), []
    entries = [
        TokenLogprobs([500, 500, 501], [-0.5, -0.5, -1.0], 1),
        TokenLogprobs([502, 500, 501], [-3.0, -0.25, -1.0], 7),
    ]
    for entry in entries:
        sequence.tokens.append(entry.token_ids[0])
        sequence.logprobs.append(entry)
        if end := processor.end_of(sequence):
            finish(sequence, end)
        if output := processor.output(request):
            outputs.extend(output.outputs)
    last = outputs[-1]
    assert last.cumulative_logprob == -3.5
    assert last.logprobs is not None
    assert len(last.logprobs) == (1 if kind is RequestOutputKind.DELTA else 2)
    found = last.logprobs[-1]
    assert {token: (entry.logprob, entry.rank) for token, entry in found.items()} == {
        502: (-3.0, 7),
        500: (-0.25, 1),
        501: (-1.0, 2),
    }
    assert found[502].decoded_token == smollm2_tokenizer.decode([502])
