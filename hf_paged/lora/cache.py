"""AdapterCache: adapters in the host's memory, by their ids."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hf_paged.lora.adapter import Adapter, TargetShape, read_adapter
from hf_paged.lora.request import LoRARequest

logger = logging.getLogger(__name__)


class AdapterCache:
    """Reads adapters when they are first asked for, and keeps the most recently used.

    Requests hold the adapter that they run with, so one that is dropped, removed or read anew under way stays in memory
    until the last of them is done. Any number of threads may call. A pickle is of an empty cache with the same limits,
    for a process without a device.

    Args:
        targets: the layers that can be adapted.
        max_adapters: how many are kept.
        max_rank, dtype: as in `read_adapter`.
        pin: keep them where a GPU can copy them from while the host goes on.
        share: does a reading where several processes are to have the same; see `lockstep.read_for_all`.
    """

    def __init__(
        self,
        targets: Mapping[str, TargetShape],
        *,
        max_adapters: int,
        max_rank: int,
        dtype: torch.dtype,
        pin: bool = False,
        share: Callable[[Callable[[], Adapter]], Adapter] | None = None,
    ) -> None:
        self._targets, self._max_adapters = targets, max_adapters
        self._max_rank, self._dtype, self._pin = max_rank, dtype, pin
        self._share = share
        self._lock = threading.Lock()
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()
        """The least recently used first."""

    def get(self, request: LoRARequest) -> Adapter:
        """The adapter, read if it is not here, or has to be read anew.

        Raises:
            FileNotFoundError, ValueError: see `read_adapter`; or the id stands for another adapter.
        """
        with self._lock:
            held = self._adapters.get(request.lora_int_id)
            if held is not None and not request.load_inplace:
                own = held.request
                if (own.lora_name, own.lora_path) != (request.lora_name, request.lora_path):
                    raise ValueError(
                        f"lora_int_id {request.lora_int_id} is adapter {own.lora_name!r} at {own.lora_path}: give "
                        f"{request.lora_name!r} another id, or load_inplace=True to put it in that one's place"
                    )
                self._adapters.move_to_end(request.lora_int_id)
                return held
            read = functools.partial(read_adapter, request, self._targets, max_rank=self._max_rank, dtype=self._dtype)
            adapter = read() if self._share is None else replace(self._share(read), request=request)
            if self._pin:
                adapter = adapter.pinned()
            self._adapters[request.lora_int_id] = adapter
            self._adapters.move_to_end(request.lora_int_id)
            if len(self._adapters) > self._max_adapters:
                _, dropped = self._adapters.popitem(last=False)
                logger.debug("adapter %r leaves the host's memory", dropped.request.lora_name)
            return adapter

    def remove(self, lora_int_id: int) -> bool:
        """Forgets an adapter. Returns whether there was one."""
        with self._lock:
            return self._adapters.pop(lora_int_id, None) is not None

    def ids(self) -> set[int]:
        """Of the adapters that are here."""
        with self._lock:
            return set(self._adapters)

    def __reduce__(self) -> tuple[Any, ...]:
        empty = functools.partial(
            AdapterCache, self._targets, max_adapters=self._max_adapters, max_rank=self._max_rank, dtype=self._dtype
        )
        return empty, ()
