"""load(): a checkpoint, quantised or not, becomes a wrapped model, without the packages that wrote it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hf_paged.config import EngineConfig
from hf_paged.distributed.groups import TensorParallel, join, num_ranks
from hf_paged.distributed.plan import ShardPlan
from hf_paged.distributed.shard import cut_model, install, plan_part
from hf_paged.quantization import bitsandbytes
from hf_paged.quantization.assemble import assemble, plan_loading, plan_plain
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
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
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
        tensor_parallel_size: processes that share the model's layers, as torchrun started them; each reads its part
            alone. All of them make this call, and every later one.
        pipeline_parallel_size: groups of such processes, each with some of the layers.

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
    options = dict(hf_overrides or {}) | ({"trust_remote_code": True} if trust_remote_code else {})
    parallel = None
    if num_ranks(tensor_parallel_size, pipeline_parallel_size) > 1:
        parallel = join(tensor_parallel_size, device, stages=pipeline_parallel_size)
    model = load_model(
        path_or_id, dtype, quantization, device, revision=revision, token=token, options=options, parallel=parallel
    )
    return wrap(model, engine_config, tokenizer=tokenizer)


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype | str | None = None,
    quantization: Any = "auto",
    device: torch.device | str | int | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    options: dict[str, Any] | None = None,
    parallel: TensorParallel | None = None,
) -> Any:
    """A model as `load` makes it, not wrapped; with `parallel` this rank's part of it. `options` are for
    transformers."""
    dtype, options = parse_dtype(dtype), options or {}
    if parallel is not None:
        device = parallel.device
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    wanted, as_config = _wanted(quantization)
    if Path(path_or_id).suffix == ".gguf":
        if wanted not in (None, "auto"):
            raise ValueError(f"a GGUF file is dequantised, and quantization={quantization!r} was asked for")
        model = _load_gguf(Path(path_or_id), dtype, options)
        return (model.to(device) if parallel is None else _part_of(model, parallel)).eval()
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
    if parallel is not None and bitsandbytes.METHOD in (method, wanted):
        raise ValueError("bitsandbytes' layers cannot be spread over several ranks: take another quantization")
    with torch.inference_mode(False), torch.no_grad():  # weights outlive the caller's mode
        if found is not None and method in FORMATS:
            dequantized = wanted is None
            model = _load_quantized(folder, *found, dtype, device, options, dequantized=dequantized, parallel=parallel)
        elif bitsandbytes.METHOD in (method, wanted):
            if method is None and as_config is None:
                as_config = bitsandbytes.nf4(dtype or _dtype_of(AutoConfig.from_pretrained(folder, **options)))
            model = load_plain(folder, dtype, **options, **bitsandbytes.loading_options(device, as_config))
            if wanted is None:
                bitsandbytes.dequantize(model)
        else:
            shards = None
            if parallel is None:
                model = load_plain(folder, dtype, **options)
            else:
                model, shards = _load_parts(folder, dtype, options, parallel)
            if wanted == "fp8":
                _quantize_linears(model, device)
            model.to(device)
            if parallel is not None and shards is not None:
                install(model, shards, parallel)
    return model.eval()


def _part_of(model: Any, parallel: TensorParallel) -> Any:
    """This rank's part of a model that was loaded whole."""
    shards = plan_part(model, parallel)
    cut_model(model, shards, parallel.rank)
    model.to(parallel.device)
    install(model, shards, parallel)
    return model


def _load_parts(
    folder: Path, dtype: torch.dtype | None, options: dict[str, Any], parallel: TensorParallel
) -> tuple[Any, ShardPlan]:
    """This rank's part of a model that is not quantised, and what is to be installed around it."""
    checkpoint = open_checkpoint(folder) if any(folder.glob("*.safetensors*")) else None
    config = AutoConfig.from_pretrained(folder, **options)
    model = _empty_model(config, found := dtype or _dtype_of(config), options)
    shards = plan_part(model, parallel)
    plan = plan_plain(model, checkpoint) if checkpoint is not None else None
    if checkpoint is not None and plan is not None:
        assemble(
            model, checkpoint, plan, None, found, parallel.device, dequantized=False, shards=shards, rank=parallel.rank
        )
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model, shards
    logger.info(
        "%s: its tensors must be converted, so that each rank reads all of them before it keeps its part", folder
    )
    model = load_plain(folder, dtype, **options)
    shards = plan_part(model, parallel)
    cut_model(model, shards, parallel.rank)
    return model, shards


def _empty_model(config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A model on the meta device."""
    with torch.device("meta"):
        trusted = bool(options.get("trust_remote_code"))
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)


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
    parallel: TensorParallel | None = None,
) -> Any:
    format = _format(folder, method, options)
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, **loading)
    dtype = dtype or _dtype_of(config)
    config.quantization_config = None if dequantized else options
    model = _empty_model(config, dtype, loading)
    shards = None if parallel is None else plan_part(model, parallel)
    checkpoint = rename(model, checkpoint)
    plan = plan_loading(model, checkpoint, format)
    if parallel is None or shards is None:
        assemble(model, checkpoint, plan, format, dtype, device, dequantized=dequantized)
    else:
        rank = parallel.rank
        assemble(model, checkpoint, plan, format, dtype, device, dequantized=dequantized, shards=shards, rank=rank)
        install(model, shards, parallel)
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


def _dtype_of(config: Any) -> torch.dtype:
    """What a checkpoint's config says of its weights."""
    return getattr(config, "dtype", None) or torch.get_default_dtype()


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return found
