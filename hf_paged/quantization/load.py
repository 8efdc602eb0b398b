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
from hf_paged.quantization.assemble import assemble, plan_loading
from hf_paged.quantization.checkpoint import open_checkpoint, read_json
from hf_paged.quantization.formats.awq import Awq
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.formats.compressed_tensors import compressed_tensors
from hf_paged.quantization.formats.fp8 import Fp8
from hf_paged.quantization.formats.gptq import Gptq
from hf_paged.quantization.fp8 import FP8Linear, quantize_rows
from hf_paged.wrap import wrap

logger = logging.getLogger(__name__)

FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": Awq,
    "gptq": Gptq,
    "compressed-tensors": compressed_tensors,
    "fp8": Fp8,
}
"""By `quant_method`."""


def load(
    path_or_id: str | Path,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = "auto",
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
    `FP8Linear`s, which have no gradient of their own, but pass it on; what `save_pretrained` writes of these nobody
    reads. Checkpoints of bitsandbytes and other quantizers are for `AutoModelForCausalLM.from_pretrained`, whose models
    `wrap` takes as they are.

    Args:
        path_or_id: a folder with config.json and safetensors, the name of such a repository on the hub, or a GGUF file,
            which is dequantised.
        dtype: of activations and of weights that are not quantised. None: what the checkpoint's config says.
        quantization: "auto" keeps what the checkpoint is. None loads ordinary weights, dequantised where they are not.
            "awq", "gptq", "compressed-tensors" and "fp8" say what it must be; "fp8" also quantises the linear layers of
            one that is not quantised, with a scale per output, all but the last, which makes the logits.
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
        UnsupportedModelError: the model cannot be paged.
    """
    engine_config = (config or EngineConfig()).with_changes(**overrides)
    dtype = _dtype(dtype)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if quantization not in (None, "auto", *FORMATS):
        raise ValueError(f'quantization must be None, "auto" or one of {", ".join(FORMATS)}, got {quantization!r}')
    options = dict(hf_overrides or {}) | ({"trust_remote_code": True} if trust_remote_code else {})
    if Path(path_or_id).suffix == ".gguf":
        if quantization not in (None, "auto"):
            raise ValueError(f"a GGUF file is dequantised, and quantization={quantization!r} was asked for")
        model = _load_gguf(Path(path_or_id), dtype, options).to(device)
        return wrap(model.eval(), engine_config, tokenizer=tokenizer)
    folder = _folder(path_or_id, revision, token)
    found = _quantization_config(folder)
    on_the_fly = quantization == "fp8" and found is None
    if quantization not in (None, "auto") and not on_the_fly and (found is None or found[0] != quantization):
        what = f"quantised with {found[0]}" if found else "not quantised"
        raise ValueError(f"{folder} is {what}, and quantization={quantization!r} was asked for")
    with torch.inference_mode(False), torch.no_grad():  # weights outlive the caller's mode
        if found is None:
            model = _load_plain(folder, dtype, options)
            if on_the_fly:
                _quantize_linears(model, device)
            model.to(device)
        else:
            model = _load_quantized(folder, *found, dtype, device, options, dequantized=quantization is None)
    return wrap(model.eval(), engine_config, tokenizer=tokenizer)


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


def _load_plain(folder: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
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
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    format = _format(folder, method, options)
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, **loading)
    dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    config.quantization_config = None if dequantized else options
    with torch.device("meta"):
        trusted = bool(loading.get("trust_remote_code"))
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
    plan = plan_loading(model, checkpoint, format)
    assemble(model, checkpoint, plan, format, dtype, device, dequantized=dequantized)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    logger.info("%s: %d quantised linear layers", folder, len(plan.layers))
    return model


def _folder(path_or_id: str | Path, revision: str | None, token: str | bool | None) -> Path:
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


def _quantization_config(folder: Path) -> tuple[str, dict[str, Any]] | None:
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
    if method not in FORMATS:
        raise ValueError(
            f"{folder} is quantised with {method!r}, and read here are {', '.join(FORMATS)}: load it with "
            "AutoModelForCausalLM.from_pretrained and give the model to hf_paged.wrap"
        )
    try:
        return FORMATS[method](options)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return found
