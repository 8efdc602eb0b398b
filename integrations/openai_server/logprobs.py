"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_paged.outputs import Logprob

LOWEST = -9999.0
"""JSON has no minus infinity."""

Entry = dict[int, Logprob]


def _name(token: int, logprob: Logprob, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else logprob.decoded_token or ""


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)


def _likeliest(entry: Entry, count: int) -> list[tuple[int, Logprob]]:
    return [(token, found) for token, found in entry.items() if count < 0 or (found.rank or 0) <= count]


def chat_logprobs(
    entries: Sequence[Entry], token_ids: list[int], count: int, as_ids: bool
) -> dict[str, list[dict[str, Any]]]:
    """As chats have them, token by token, with the `count` likeliest."""

    def told(token: int, found: Logprob) -> dict[str, Any]:
        name = _name(token, found, as_ids)
        return {"token": name, "logprob": _value(found), "bytes": list(name.encode("utf-8", "replace"))}

    return {
        "content": [
            told(token, entry[token])
            | {"top_logprobs": [told(other, found) for other, found in _likeliest(entry, count)] if count else []}
            for entry, token in zip(entries, token_ids, strict=True)
        ]
    }


def completion_logprobs(
    entries: Sequence[Entry | None],
    token_ids: list[int],
    count: int,
    as_ids: bool,
    offset: int,
    decode: Callable[[list[int]], str],
) -> dict[str, list[Any]]:
    """As completions have them: lists side by side.

    Args:
        entries: None for a prompt's first token.
        offset: characters before the first token.
        decode: the text of a token that has no entry.
    """
    shape: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for entry, token in zip(entries, token_ids, strict=True):
        own = entry[token] if entry is not None else None
        name = _name(token, own or Logprob(0.0, decoded_token=decode([token])), as_ids)
        shape["text_offset"].append(offset)
        shape["token_logprobs"].append(None if own is None else _value(own))
        shape["tokens"].append(name)
        likeliest = None if entry is None else _likeliest(entry, count) or [(token, entry[token])]
        named = None if likeliest is None else {_name(t, found, as_ids): _value(found) for t, found in likeliest}
        shape["top_logprobs"].append(named)
        offset += len(name)
    return shape


def prompt_logprobs(entries: list[Entry | None] | None) -> list[dict[str, Any] | None] | None:
    """As vLLM has them: per prompt token a dict by token id."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _value(found), "rank": found.rank, "decoded_token": found.decoded_token}
            for token, found in entry.items()
        }
        for entry in entries
    ]
