"""load(): a checkpoint, quantised or not, becomes a wrapped model, without the packages that wrote it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hf_paged.config import EngineConfig
from hf_paged.distributed.groups import TensorParallel, join
from hf_paged.distributed.plan import ShardPlan, make_plan
from hf_paged.distributed.shard import cut_model, install
from hf_paged.quantization.assemble import assemble, plan_loading, plan_plain
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
    tensor_parallel_size: int = 1,
    **overrides: Any,
) -> Any:
    """Loads a causal LM from a checkpoint and wraps it.

    Quantised checkpoints are read here, not by transformers: AWQ (GEMM), GPTQ and compressed-tensors (pack-quantized),
    all of four bits, and FP8 as DeepSeek or compressed-tensors write it. Their linear layers become `W4Linear`s and
    `FP8Linear`s, which have no gradient of their own, but pass it on; what `save_pretrained` writes of these nobody
    reads. Checkpoints of bitsandbytes and other quantizers are for `AutoModelForCausalLM.from_pretrained`, whose models
    `wrap` takes as they are.

    Args:
        path_or_id: a folder with config.json and safetensors, or the name of such a repository on the hub.
        dtype: of activations and of weights that are not quantised. None: what the checkpoint's config says.
        quantization: "auto" keeps what the checkpoint is. None loads ordinary weights, dequantised where they are not.
            "awq", "gptq", "compressed-tensors" and "fp8" say what it must be; "fp8" also quantises the linear layers of
            one that is not quantised, with a scale per output, all but the last, which makes the logits.
        device: None: the current GPU where there is one, else the CPU.
        config, tokenizer, overrides: as for `wrap`.
        tensor_parallel_size: processes that share the model, as torchrun started them; each reads its part alone. All
            of them make this call, and every later one.

    Returns:
        the model, in eval mode.

    Raises:
        FileNotFoundError: no such checkpoint, or one of its files is missing.
        ValueError: a quantization that is not supported or not the checkpoint's; tensors that are missing, corrupt or
            of another shape.
        UnsupportedModelError: the model cannot be paged.
    """
    engine_config = (config or EngineConfig()).with_changes(**overrides)
    parallel = None if tensor_parallel_size == 1 else join(tensor_parallel_size, device)
    model = load_model(path_or_id, dtype, quantization, device, parallel=parallel)
    return wrap(model, engine_config, tokenizer=tokenizer)


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = "auto",
    device: torch.device | str | int | None = None,
    *,
    parallel: TensorParallel | None = None,
) -> Any:
    """A model as `load` makes it, not wrapped; with `parallel` this rank's part of it."""
    dtype = _dtype(dtype)
    if parallel is not None:
        device = parallel.device
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if quantization not in (None, "auto", *FORMATS):
        raise ValueError(f'quantization must be None, "auto" or one of {", ".join(FORMATS)}, got {quantization!r}')
    folder = _folder(path_or_id)
    found = _quantization_config(folder)
    on_the_fly = quantization == "fp8" and found is None
    if quantization not in (None, "auto") and not on_the_fly and (found is None or found[0] != quantization):
        what = f"quantised with {found[0]}" if found else "not quantised"
        raise ValueError(f"{folder} is {what}, and quantization={quantization!r} was asked for")
    with torch.inference_mode(False), torch.no_grad():  # weights outlive the caller's mode
        if found is None:
            shards = None
            if parallel is None:
                model = _load_plain(folder, dtype)
            else:
                model, shards = _load_parts(folder, dtype, parallel)
            if on_the_fly:
                _quantize_linears(model, device)
            model.to(device)
            if parallel is not None and shards is not None:
                install(model, shards, parallel)
        else:
            model = _load_quantized(folder, *found, dtype, device, dequantized=quantization is None, parallel=parallel)
    return model.eval()


def _load_parts(folder: Path, dtype: torch.dtype | None, parallel: TensorParallel) -> tuple[Any, ShardPlan]:
    """This rank's part of a model that is not quantised, and what is to be installed around it."""
    checkpoint = open_checkpoint(folder) if any(folder.glob("*.safetensors*")) else None
    model, dtype = _empty_model(folder, dtype)
    shards = make_plan(model, parallel.rank, parallel.size)
    plan = plan_plain(model, checkpoint) if checkpoint is not None else None
    if checkpoint is not None and plan is not None:
        assemble(
            model, checkpoint, plan, None, dtype, parallel.device, dequantized=False, shards=shards, rank=parallel.rank
        )
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model, shards
    logger.info(
        "%s: its tensors must be converted, so that each rank reads all of them before it keeps its part", folder
    )
    model = _load_plain(folder, dtype)
    cut_model(model, shards, parallel.rank)
    return model, shards


def _empty_model(folder: Path, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
    """A checkpoint's model on the meta device, and its dtype."""
    config = AutoConfig.from_pretrained(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype), dtype


def _load_plain(folder: Path, dtype: torch.dtype | None) -> Any:
    if any(folder.glob("*.safetensors*")):
        open_checkpoint(folder)  # says which file is truncated
    loading: Any = AutoModelForCausalLM.from_pretrained
    model, report = loading(folder, dtype=dtype or "auto", output_loading_info=True)
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
    *,
    dequantized: bool,
    parallel: TensorParallel | None = None,
) -> Any:
    format = _format(folder, method, options)
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    config.quantization_config = None if dequantized else options
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plan = plan_loading(model, checkpoint, format)
    if parallel is None:
        assemble(model, checkpoint, plan, format, dtype, device, dequantized=dequantized)
    else:
        shards, rank = make_plan(model, parallel.rank, parallel.size), parallel.rank
        assemble(
            model, checkpoint, plan, format, dtype, device, dequantized=dequantized, shards=shards, rank=rank
        )  # fmt: skip
        install(model, shards, parallel)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    logger.info("%s: %d quantised linear layers", folder, len(plan.layers))
    return model


def _folder(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        try:
            folder = Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
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
