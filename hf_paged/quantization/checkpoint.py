"""A checkpoint's folder: which tensors lie in which safetensors file, known before any of them is read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_paged.distributed.plan import Cut

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file."""

    name: str
    """There; whoever holds the entry may know it by another one."""
    file: Path
    dtype: torch.dtype | None
    """None: one that torch, or this list, does not know."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must look like."""

    shapes: tuple[tuple[int, ...], ...]
    """Any of these."""
    dtypes: frozenset[torch.dtype] = FLOATS
    required: bool = True

    def check(self, entry: Entry) -> None:
        """Raises ValueError with file, tensor, expected and found."""
        if entry.shape not in self.shapes:
            expected = " or ".join(str(list(shape)) for shape in self.shapes)
            raise ValueError(
                f"{entry.file}: the tensor {entry.name} must have the shape {expected} by the configuration, and has "
                f"{list(entry.shape)}"
            )
        if entry.dtype not in self.dtypes:
            expected = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
            raise ValueError(
                f"{entry.file}: the tensor {entry.name} must be of dtype {expected}, and is "
                f"{str(entry.dtype).removeprefix('torch.') if entry.dtype else 'of one that is not known here'}"
            )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder's safetensors files.

    Files are open only while something is read from them, so that no more of them than that stays in memory.
    """

    folder: Path
    entries: Mapping[str, Entry]

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Tensors by name, in their own dtypes, in memory of their own."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.entries[name].file].append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with _open(file) as tensors:
                # Copied even on a CPU, where the tensors may be views of the file: somebody may save over it.
                stored = {name: self.entries[name].name for name in wanted}
                found |= {name: tensors.get_tensor(own).to(device, copy=True) for name, own in stored.items()}
        return found

    def read_part(self, name: str, cut: Cut, device: torch.device) -> Tensor:
        """A part of a tensor, in memory of its own; the rest of it is not read."""
        with _open(self.entries[name].file) as tensors:
            whole = tensors.get_slice(name)
            parts = [whole[(slice(None),) * cut.dim + (slice(*ends),)] for ends in cut.ranges]
            return torch.cat([part.to(device, copy=True) for part in parts], cut.dim)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a folder's files: model.safetensors.index.json and its shards, or *.safetensors.

    Raises:
        FileNotFoundError: none are there, or one that the index names is missing.
        ValueError: a file is truncated or corrupt, or lacks a tensor that the index says it has.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where: dict[str, str] = _read_index(index)
        files = [folder / name for name in sorted(set(where.values()))]
    else:
        single = folder / "model.safetensors"
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors: quantised checkpoints are read from that format alone")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, which {index.name} names: download the checkpoint again")
    entries = {entry.name: entry for file in files for entry in _read_header(file)}
    if index.exists():
        for name, file_name in where.items():
            if name not in entries:
                raise ValueError(f"{folder / file_name}: the tensor {name} is missing, which {index.name} places there")
    return Checkpoint(folder, entries)


def read_json(file: Path) -> dict[str, Any]:
    """An object in a file.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download the checkpoint again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold an object, and holds a {type(values).__name__}")
    return values


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map, which says where tensors are")
    return weight_map


def _read_header(file: Path) -> list[Entry]:
    with _open(file) as tensors:
        found = []
        for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
            part = tensors.get_slice(name)
            found.append(Entry(name, file, DTYPES.get(part.get_dtype()), tuple(part.get_shape())))
        return found


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): download it again") from error
