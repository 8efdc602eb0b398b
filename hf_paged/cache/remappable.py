"""GPU memory that can be given back and taken again at the same addresses.

CUDA's virtual memory management keeps a range of addresses apart from the memory behind it. While an engine sleeps its
pool has addresses and no memory, and what was captured over these addresses (CUDA graphs) is right again as soon as
memory is mapped there. The driver is called through ctypes, so there is nothing to compile.
(https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html)
"""

from __future__ import annotations

import ctypes
import functools
import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 30
"""Memory is taken in pieces of this size: one of the pool's size may not be there when many small ones are."""
_PINNED, _ON_DEVICE, _READ_AND_WRITE, _OUT_OF_MEMORY = 1, 1, 3, 2


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int))


class RemappableMemory:
    """One range of a device's addresses. Memory is behind it from the beginning.

    Args:
        num_bytes: at least; a multiple of the device's granularity (2 MiB) is taken.

    Raises:
        torch.OutOfMemoryError: so much is not free.
        RemappingError: the driver cannot do this.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._properties = _Properties(_PINNED, 0, _ON_DEVICE, self._device.index, None)
        self._handles: list[tuple[int, int, int]] = []
        """(handle, address, bytes) of what is mapped."""
        self._address = 0
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()  # makes the context, if nothing has yet
            granularity = ctypes.c_size_t()
            _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
            self._granularity = granularity.value
            self.num_bytes = self._round(num_bytes)
            address = ctypes.c_uint64()
            _call(
                "cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(self.num_bytes), ctypes.c_size_t(0),
                ctypes.c_uint64(0), ctypes.c_uint64(0),
            )  # fmt: skip
        self._address = address.value
        self.map()

    @property
    def mapped_bytes(self) -> int:
        return sum(size for _, _, size in self._handles)

    def map(self) -> None:
        """Takes memory for the whole range, with anything in it; does nothing where it is there.

        Raises:
            torch.OutOfMemoryError: so much is not free; then none is taken.
        """
        mapped = {address for _, address, _ in self._handles}
        missing = [b for b in range(0, self.num_bytes, CHUNK_BYTES) if self._address + b not in mapped]
        if not missing:
            return
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()  # what torch keeps for itself would be missing here
            try:
                for begin in missing:
                    self._map_chunk(self._address + begin, min(CHUNK_BYTES, self.num_bytes - begin))
            except BaseException:
                self.unmap()
                raise

    def unmap(self) -> None:
        """Gives the memory back. Nothing may be using it."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            while self._handles:
                handle, address, size = self._handles[-1]
                with suppress(RemappingError):  # an interrupt may have come between the two, the last time
                    _call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))
                    _call("cuMemRelease", ctypes.c_uint64(handle))
                self._handles.pop()

    def tensor(self, begin: int, num_bytes: int) -> Tensor:
        """A part of it as uint8 `[num_bytes]`, with a storage of its own: to a compiler, two tensors of one storage
        that are written to are not two. The range lives as long as any of its parts does."""
        return torch.as_tensor(_Array(self, begin, num_bytes), device=self._device)

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end anything may be gone already
            self.unmap()
            if self._address:
                _call("cuMemAddressFree", ctypes.c_uint64(self._address), ctypes.c_size_t(self.num_bytes))

    def _round(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def _map_chunk(self, address: int, size: int) -> None:
        handle = ctypes.c_uint64()
        _call(
            "cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )  # fmt: skip
        try:
            _call(
                "cuMemMap", ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.c_size_t(0), handle,
                ctypes.c_uint64(0),
            )  # fmt: skip
        except BaseException:
            _call("cuMemRelease", handle)
            raise
        self._handles.append((handle.value, address, size))
        access = _Access(_ON_DEVICE, self._device.index, _READ_AND_WRITE)
        _call(
            "cuMemSetAccess", ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1)
        )


class RemappingError(RuntimeError):
    """The driver cannot map memory, or says that something is wrong with it."""


class _Array:
    """Part of a range as an array of bytes, which torch can look at without a copy."""

    def __init__(self, memory: RemappableMemory, begin: int, num_bytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (memory._address + begin, False),
            "strides": None,
            "version": 3,
        }


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RemappingError(f"no CUDA driver can be called ({error})") from error


def _call(name: str, *arguments: Any) -> None:
    function = getattr(_driver(), name, None)
    if function is None:
        raise RemappingError(f"the CUDA driver has no {name}")
    code = function(*arguments)
    if code == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory: {name}")
    if code:
        raise RemappingError(f"{name} failed with CUDA's error {code}")
