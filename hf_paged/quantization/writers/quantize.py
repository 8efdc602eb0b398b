"""quantize(): a model becomes a quantised checkpoint. The model itself stays as it is."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_paged.quantization.load import find_folder, load_plain, parse_dtype, quantization_config
from hf_paged.quantization.writers.calibration import Calibration, check_tokens, cut_texts, own_text, read_texts
from hf_paged.quantization.writers.folder import Shards, check_new_folder, new_folder
from hf_paged.quantization.writers.layers import quantized_tensors
from hf_paged.quantization.writers.recipe import Recipe, make_recipe
from hf_paged.quantization.writers.subject import Subject, make_subject

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000


def quantize(
    model: Any,
    to: str,
    out: str | Path,
    *,
    tokenizer: Any = None,
    method: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    desc_act: bool = False,
    calibration: Calibration = None,
    samples: int = 128,
    sequence_length: int = 512,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    seed: int = 0,
    progress: bool | None = None,
) -> Path:
    """Writes a quantised checkpoint of a causal LM: the linear layers of its decoder layers, not its head.

    The model is computed layer by layer: beside it there are one decoder layer in float32, hidden states of the
    calibration samples (float32, on the CPU), and the tensors of one file.

    Args:
        model: a folder or the name of a repository on the hub, or a transformers model, which is left as it is.
        to: "awq" (AWQ in its GEMM packing), "gptq" (its first version), "w4a16" (compressed-tensors, pack-quantized),
            "fp8" (compressed-tensors: a scale per output, activations quantised per token by whoever computes) or
            "fp8-block" (128 x 128, as DeepSeek's).
        out: the folder to make. It is there at the end, whole, or not at all.
        tokenizer: of a model that is not a path; written to `out` too. Without one, `calibration` must be token ids or
            None.
        method: how four-bit codes are chosen: "awq" searches for scales of inputs, "gptq" makes later inputs mend the
            errors of earlier ones, "rtn" rounds to nearest and needs no calibration. None: "awq" for awq, else "gptq".
        group_size: inputs that share a scale: a multiple of 8 that divides every layer's inputs, or -1 for all of an
            output. None: 128.
        symmetric: zero is code 8 everywhere. None: not for awq, and so for gptq and w4a16.
        desc_act: GPTQ's act-order: with "gptq" groups are scattered, with "w4a16" they stay as they are.
        calibration: a text file (.jsonl: an object with "text" per line), texts, or token ids `[samples, length]`.
            None: the model's own words at temperature 1, generated with hf_paged.
            "rtn" has no use for it.
        samples, sequence_length: how much of it; tokens per sample.
        dtype: of what is not quantised, and of scales (float16 where it is float32). None: the model's.
        device: for a model given by path: where it is loaded to, and computed. None: the current GPU where there is
            one. A model that is given is computed where it is.
        max_shard_bytes: of a safetensors file.
        seed: of the model's own words.
        progress: a progress bar; None shows one on a terminal.

    Returns:
        `out`.

    Raises:
        ValueError: options that do not go together or do not fit the model, or a calibration text that is too short;
            before anything is computed wherever it can be known.
        TypeError: `model` is no transformers model.
        FileNotFoundError: no such model or calibration text.
        FileExistsError: `out` is there and not empty.
        UnsupportedModelError: hf_paged cannot run the model.
    """
    recipe = make_recipe(to, method, group_size, symmetric, desc_act)
    out_dtype = parse_dtype(dtype)
    if samples < 1 or sequence_length < 2 or max_shard_bytes < 1:
        raise ValueError(
            "samples and max_shard_bytes must be positive and sequence_length at least 2, got "
            f"{samples}, {max_shard_bytes} and {sequence_length}"
        )
    check_new_folder(out := Path(out))
    texts = None
    if recipe.calibrated and calibration is not None and not isinstance(calibration, Tensor):
        texts = read_texts(calibration)
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(model, str | Path):
            model, tokenizer = _load(model, tokenizer, device)
        subject = make_subject(model, recipe.format())
        if texts is not None and tokenizer is None:
            raise ValueError("a calibration text needs the model's tokenizer: give one as tokenizer=")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if recipe.calibrated and limit is not None and sequence_length > limit and not isinstance(calibration, Tensor):
            raise ValueError(f"the model has {limit} positions, less than sequence_length={sequence_length}")
        tokens = None
        if recipe.calibrated:
            if isinstance(calibration, Tensor):
                tokens = check_tokens(calibration, model.get_input_embeddings().num_embeddings)
            elif texts is not None:
                tokens = cut_texts(texts, tokenizer, samples, sequence_length)
            else:
                tokens = own_text(model, tokenizer, samples, sequence_length, seed, progress)
        with new_folder(out) as folder:
            shards = Shards(folder, max_shard_bytes)
            for name, tensor in quantized_tensors(subject, recipe, out_dtype or model.dtype, tokens, progress):
                shards.add(name, tensor)
            shards.close()
            _write_config(subject, recipe, out_dtype or model.dtype, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    logger.info("%s: %d linear layers in %s", out, sum(map(len, subject.linears.values())), to)
    return out


def _load(path_or_id: str | Path, tokenizer: Any, device: torch.device | str | int | None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    folder = find_folder(path_or_id)
    if found := quantization_config(folder):
        raise ValueError(f"{folder} is quantised already, with {found[0]}: start from what it was made of")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            logger.warning("%s has no tokenizer that can be read, so none is written (%s)", folder, error)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return load_plain(folder, None).eval().to(where), tokenizer


def _write_config(subject: Subject, recipe: Recipe, dtype: torch.dtype, folder: Path) -> None:
    model = subject.model
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = recipe.quantization_config(subject.ignored())
    config.save_pretrained(folder)
    # Not by its own save_pretrained, which refuses what some published models have.
    generation = json.dumps(model.generation_config.to_diff_dict(), indent=2)
    (folder / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
