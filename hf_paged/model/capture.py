"""What records and replays the launches of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

Attention = TypeVar("Attention")


@dataclass(frozen=True, slots=True)
class Captured(Generic[Attention]):
    """A captured step."""

    replay: Callable[[], None]
    attention: Attention


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Calls `work` once without computing anything. What it returns launches all of it again."""


class CudaRecorder:
    """Records CUDA graphs, all of them over one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        current.synchronize()
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # it may find a pool that nobody has any more, and giving that back waits for the device
        try:
            self._capture(graph, work, current)
        finally:
            if collects:
                gc.enable()
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], None], current: torch.cuda.Stream) -> None:
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Other threads (a data loader, say) may use the device meanwhile.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong is told already
                    self._end(graph)
                raise
            self._end(graph)
        current.wait_stream(self._stream)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # It raises before it tells the allocator, which would go on as if the capture did.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._index, self._memory)
                torch._C._cuda_releasePool(self._index, self._memory)
            raise


class CaptureFailed(RuntimeError):
    """The model does something in its forward that cannot be captured."""
