"""A tokenizer of bytes: every text is spelled in one way."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 264
"""With room to spare."""
EOS = 0


def byte_tokenizer() -> Any:
    """257 tokens, the first of which ends a text."""
    vocabulary = {"<eos>": EOS}
    vocabulary |= {symbol: 1 + i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
