"""A checkpoint's folder, which is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def check_new_folder(out: Path) -> None:
    """Raises FileExistsError where something would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there and not empty: name another folder, or remove it first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to. It becomes `out` at the end, and is gone after an exception.

    Raises:
        FileExistsError: there is something at `out`.
    """
    check_new_folder(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        check_new_folder(out)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Shards:
    """safetensors files, written as tensors come, so that no more than one of them is in memory.

    Args:
        folder: to write to.
        max_bytes: of tensors in a file; a larger tensor has one of its own.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []
        """The names of the tensors of every file so far."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor, and may write those before it."""
        tensor = tensor.detach().to("cpu").contiguous()
        if self._held and self._held_bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, and gives the files their names: model.safetensors, or numbered ones and an index."""
        self._write()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        where: dict[str, str] = {}
        for place, names in enumerate(self._files):
            final = f"model-{place + 1:05}-of-{count:05}.safetensors"
            self._part(place).rename(self._folder / final)
            where |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": where}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _part(self, place: int) -> Path:
        return self._folder / f"part-{place}.safetensors"

    def _write(self) -> None:
        save_file(self._held, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held, self._held_bytes = {}, 0
