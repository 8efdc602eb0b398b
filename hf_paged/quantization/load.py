"""load(): a checkpoint, quantised or not, becomes a wrapped model, without the packages that wrote it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_paged.config import EngineConfig
from hf_paged.quantization import bitsandbytes
from hf_paged.quantization.assemble import assemble, plan_loading
from hf_paged.quantization.checkpoint import open_checkpoint, read_json
from hf_paged.quantization.experts import rename
from hf_paged.quantization.formats.awq import Awq
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.formats.compressed_tensors import compressed_tensors
from hf_paged.quantization.formats.fp8 import Fp8
from hf_paged.quantization.formats.gptq import Gptq
from hf_paged.quantization.fp8 import FP8Linear, quantize_rows
from hf_paged.quantization.kv_scales import attach_kv_scales
from hf_paged.wrap import wrap

logger = logging.getLogger(__name__)

FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": Awq,
    "gptq": Gptq,
    "compressed-tensors": compressed_tensors,
    "fp8": Fp8,
}
"""By `quant_method`."""

METHODS = (*FORMATS, bitsandbytes.METHOD)

ON_THE_FLY = ("fp8", bitsandbytes.METHOD)
"""What a checkpoint that is not quantised can become."""


def load(
    path_or_id: str | Path,
    dtype: torch.dtype | str | None = None,
    quantization: Any = "auto",
    device: torch.device | str | int | None = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """Loads a causal LM from a checkpoint and wraps it.

    Quantised checkpoints are read here, not by transformers: AWQ (GEMM), GPTQ and compressed-tensors (pack-quantized),
    all of four bits, and FP8 as DeepSeek or compressed-tensors write it. Their linear layers become `W4Linear`s and
    `FP8Linear`s, which have no gradient of their own, but pass it on, to PEFT's adapters for one; `save_pretrained`
    refuses such a model. Those of bitsandbytes go through transformers and keep its layers. Checkpoints of other
    quantizers are for `AutoModelForCausalLM.from_pretrained`, whose models `wrap` takes as they are.

    Args:
        path_or_id: a folder with config.json and safetensors, the name of such a repository on the hub, or a GGUF file,
            which is dequantised.
        dtype: of activations and of weights that are not quantised. None: what the checkpoint's config says.
        quantization: "auto" keeps what the checkpoint is. None loads ordinary weights, dequantised where they are not.
            "awq", "gptq", "compressed-tensors", "fp8" and "bitsandbytes" say what it must be. The last two also
            quantise the linear layers of one that is not quantised, all but the last, which makes the logits: "fp8"
            with a scale per output, "bitsandbytes" to NF4 with double quantisation, or as a
            `transformers.BitsAndBytesConfig` in its place says.
        device: None: the current GPU where there is one, else the CPU.
        config, tokenizer, overrides: as for `wrap`.
        revision, token: of a repository on the hub: a branch, tag or commit, and what opens it.
        trust_remote_code: run model code that comes with the checkpoint.
        hf_overrides: fields of the model's configuration to change.

    Returns:
        the model, in eval mode.

    Raises:
        FileNotFoundError: no such checkpoint, or one of its files is missing.
        ValueError: a quantization that is not supported or not the checkpoint's; tensors that are missing, corrupt or
            of another shape.
        ImportError: bitsandbytes is needed, and not installed.
        UnsupportedModelError: the model cannot be paged.
    """
    engine_config = (config or EngineConfig()).with_changes(**overrides)
    dtype = parse_dtype(dtype)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    wanted, as_config = _wanted(quantization)
    options = dict(hf_overrides or {}) | ({"trust_remote_code": True} if trust_remote_code else {})
    if Path(path_or_id).suffix == ".gguf":
        if wanted not in (None, "auto"):
            raise ValueError(f"a GGUF file is dequantised, and quantization={quantization!r} was asked for")
        model = _load_gguf(Path(path_or_id), dtype, options).to(device)
        return wrap(model.eval(), engine_config, tokenizer=tokenizer)
    folder = find_folder(path_or_id, revision, token)
    found = quantization_config(folder)
    method = found[0] if found else None
    if method not in (None, *METHODS):
        raise ValueError(
            f"{folder} is quantised with {method!r}, and read here are {', '.join(METHODS)}: load it with "
            "AutoModelForCausalLM.from_pretrained and give the model to hf_paged.wrap"
        )
    possible = (method,) if method is not None else ON_THE_FLY
    if wanted not in (None, "auto", *possible) or (method is not None and as_config is not None):
        what = "not quantised" if method is None else f"quantised with {method}"
        raise ValueError(f"{folder} is {what}, and quantization={quantization!r} was asked for")
    with torch.inference_mode(False), torch.no_grad():  # weights outlive the caller's mode
        if found is not None and method in FORMATS:
            model = _load_quantized(folder, *found, dtype, device, options, dequantized=wanted is None)
        elif bitsandbytes.METHOD in (method, wanted):
            if method is None and as_config is None:
                as_config = bitsandbytes.nf4(dtype or _dtype_of(_config(folder, options)))
            model = load_plain(folder, dtype, **options, **bitsandbytes.loading_options(device, as_config))
            if wanted is None:
                bitsandbytes.dequantize(model)
        else:
            model = load_plain(folder, dtype, **options)
            if wanted == "fp8":
                _quantize_linears(model, device)
            model.to(device)
    return wrap(model.eval(), engine_config, tokenizer=tokenizer)


def _wanted(quantization: Any) -> tuple[str | None, Any]:
    """(what `load` was asked for, a `BitsAndBytesConfig` if it was by one).

    Raises:
        ValueError: there is no such quantization.
    """
    from transformers import BitsAndBytesConfig

    if isinstance(quantization, BitsAndBytesConfig):
        return bitsandbytes.METHOD, quantization
    if quantization is not None and quantization not in ("auto", *METHODS):
        raise ValueError(
            f'quantization must be None, "auto", one of {", ".join(METHODS)}, or a BitsAndBytesConfig; '
            f"got {quantization!r}"
        )
    return quantization, None


def _load_gguf(file: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"reading a GGUF needs {package}: pip install 'hf_paged[demo]'")
    loading: Any = AutoModelForCausalLM.from_pretrained
    model = loading(file.parent, gguf_file=file.name, dtype=dtype or torch.get_default_dtype(), **options)
    if getattr(model, "is_quantized", False):  # its weights are not any more
        model.hf_quantizer.remove_quantization_config(model)
    return model


def load_plain(folder: Path, dtype: torch.dtype | None, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if any(folder.glob("*.safetensors*")):
        open_checkpoint(folder)  # says which file is truncated
    loading: Any = AutoModelForCausalLM.from_pretrained
    model, report = loading(folder, dtype=dtype or "auto", output_loading_info=True, **options)
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} lacks tensors of {type(model).__name__}: {', '.join(sorted(report['missing_keys']))}"
        )
    return model


def _quantize_linears(model: Any, device: torch.device) -> None:
    """Puts layers in FP8, on the device, in the places of a model's linear layers, one after the other."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            weight, scales = quantize_rows(module.weight.detach().to(device))
            bias = None if module.bias is None else module.bias.detach().to(device)
            model.set_submodule(name, FP8Linear(weight, scales, bias=bias))
    model.config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def _load_quantized(
    folder: Path,
    method: str,
    options: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
    loading: dict[str, Any],
    *,
    dequantized: bool,
) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    format = _format(folder, method, options)
    checkpoint = open_checkpoint(folder)
    config = _config(folder, loading)
    dtype = dtype or _dtype_of(config)
    config.quantization_config = None if dequantized else options
    with torch.device("meta"):
        trusted = bool(loading.get("trust_remote_code"))
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
    checkpoint = rename(model, checkpoint)
    plan = plan_loading(model, checkpoint, format)
    assemble(model, checkpoint, plan, format, dtype, device, dequantized=dequantized)
    attach_kv_scales(model, checkpoint, options)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    logger.info("%s: %d quantised linear layers", folder, len(plan.layers))
    return model


def find_folder(path_or_id: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        try:
            folder = Path(snapshot_download(str(path_or_id), allow_patterns=patterns, revision=revision, token=token))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no checkpoint at {str(path_or_id)!r}: neither a folder nor a repository that can be had ({error})"
            ) from error
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing: a checkpoint is a folder with it and its weights"
        )
    return folder


def quantization_config(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """(method, options) of a checkpoint, None where it is not quantised.

    They are in config.json, and in quantize_config.json where an early GPTQ wrote them.
    """
    options = read_json(folder / "config.json").get("quantization_config")
    if options:
        if not isinstance(options, dict):
            raise ValueError(f"{folder / 'config.json'}: quantization_config must be an object, and is {options!r}")
        return str(options.get("quant_method", "gptq")).lower(), options
    early = folder / "quantize_config.json"
    if early.exists():
        options = read_json(early)
        return str(options.get("quant_method", "gptq")).lower(), options
    return None


def _format(folder: Path, method: str, options: dict[str, Any]) -> Format:
    try:
        return FORMATS[method](options)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def _config(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **options)


def _dtype_of(config: Any) -> torch.dtype:
    """What a checkpoint's config says of its weights."""
    return getattr(config, "dtype", None) or torch.get_default_dtype()


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return found
