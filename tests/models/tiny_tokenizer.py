"""A tokenizer for the tiny models: printable ASCII, and merged pairs up to the vocabulary's size."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .families import VOCAB

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """`VOCAB` tokens: pad 0, bos 1, eos 2, then characters, then pairs of letters."""
    tokens = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    pairs = [(a, b) for a in "etaoin" for b in "abcdefghijklm"][: VOCAB - len(tokens)]
    tokens += [a + b for a, b in pairs]
    assert len(tokens) == VOCAB
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
