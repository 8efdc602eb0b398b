"""What `LLM.collective_rpc` calls: the worker of this process, or one in each of several replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_paged.engine.engine import Engine


class Worker:
    """Stands for vLLM's worker to functions that are written for one.

    Args:
        model: wrapped.
    """

    rank = local_rank = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self.metrics: Any = None
        """What counts for a server, where this is a replica's worker."""

    @property
    def model(self) -> Any:
        """The transformers model itself: what is changed in it is what generates next."""
        return self._model

    @property
    def engine(self) -> Engine:
        return self._model.engine

    @property
    def device(self) -> Any:
        return self._model.device

    @property
    def model_runner(self) -> Worker:
        """vLLM's workers have their model at `model_runner.model`."""
        return self

    def get_model(self) -> Any:
        return self._model


def make_worker(model: Any, extension: type | str | None) -> Worker:
    """A worker, with the methods of `worker_extension_cls` (a class, or "package.module.Class") beside its own.

    Raises:
        ImportError, ValueError: no such class.
    """
    if extension is None:
        return Worker(model)
    if isinstance(extension, str):
        import importlib

        module, _, name = extension.rpartition(".")
        if not module:
            raise ValueError(f'worker_extension_cls must be a class or "package.module.Class", got {extension!r}')
        extension = getattr(importlib.import_module(module), name, None)
    if not isinstance(extension, type):
        raise ValueError(f"worker_extension_cls must be a class, got {extension!r}")
    return type("Worker", (Worker, extension), {})(model)


def call_worker(method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], worker: Any) -> Any:
    """A worker's method, or a function with the worker for its first argument."""
    if isinstance(method, str):
        return getattr(worker, method)(*args, **kwargs)
    return method(worker, *args, **kwargs)


def call_with_model(function: Callable[[Any], Any], worker: Any) -> Any:
    return function(worker.model)
