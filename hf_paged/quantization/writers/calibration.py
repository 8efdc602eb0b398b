"""The text on which activations are watched: the caller's, or what the model itself says."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_paged.sampling_params import SamplingParams
from hf_paged.text_file import read_text
from hf_paged.wrap import unwrap, wrap

logger = logging.getLogger(__name__)

Calibration = str | Path | Sequence[str] | Tensor | None


def read_texts(calibration: Calibration) -> list[str]:
    """The texts of a file, or those given.

    Args:
        calibration: the path of a file, or texts. Of a .jsonl every line is an object with "text"; other files are one
            text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, a line of a .jsonl has no text, or there is no text at all.
    """
    assert calibration is not None and not isinstance(calibration, Tensor)
    if not isinstance(calibration, str | Path):
        texts, where = list(calibration), "calibration"
    else:
        file, where = Path(calibration), str(calibration)
        content = read_text(file, "calibration text")
        texts = [content] if file.suffix != ".jsonl" else _read_lines(file, content)
    if not any(texts):
        raise ValueError(f"{where} holds no text")
    return texts


def _read_lines(file: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                texts.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}, line {number}: an object with "text" is wanted, as {{"text": "..."}}'
                ) from error
    return texts


def cut_texts(texts: Sequence[str], tokenizer: Any, samples: int, length: int) -> Tensor:
    """Pieces of texts laid end to end, spread evenly over them: int64 `[up to samples, length]`.

    Raises:
        ValueError: the texts are shorter than one piece.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    ids = [token for text in encoded for token in [*text, *end]][: -len(end) or None]
    pieces = len(ids) // length
    if pieces == 0:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, less than one sample of {length}: give more text or a "
            "smaller sequence_length"
        )
    if pieces < samples:
        logger.warning("the calibration text is enough for %d samples of %d tokens, not %d", pieces, length, samples)
    every = torch.tensor(ids[: pieces * length]).view(pieces, length)
    return every[torch.linspace(0, pieces - 1, min(samples, pieces)).round().long()]


def check_tokens(tokens: Tensor, vocabulary: int) -> Tensor:
    """Token ids of the caller's, int64 `[samples, length]`.

    Raises:
        ValueError: they are something else, or beyond the vocabulary.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(
            f"calibration tokens must be integers [samples, length], got {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"calibration tokens must be from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )
    return tokens.long()


def own_text(model: Any, tokenizer: Any, samples: int, length: int, seed: int, progress: bool | None) -> Tensor:
    """What the model says at temperature 1 when it is given nothing but the start of a text: int64 `[samples, length]`.

    Raises:
        ValueError: neither model nor tokenizer says how a text starts.
        UnsupportedModelError: the model cannot be paged.
    """
    known = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    start = next((token for token in (*known, *named) if isinstance(token, int)), None)
    if start is None:
        raise ValueError(
            "the model cannot make its own calibration text: it has no bos_token_id and no eos_token_id to start one "
            "with. Give a text as calibration"
        )
    sampling = SamplingParams(n=samples, temperature=1.0, max_tokens=length - 1, ignore_eos=True, seed=seed)
    try:
        (output,) = wrap(model, tokenizer=tokenizer).generate_many([[start]], sampling, progress=progress)
    finally:
        unwrap(model)
    if output.error is not None:
        raise output.error
    return torch.tensor([[start, *completion.token_ids] for completion in output.outputs])
