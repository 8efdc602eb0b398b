"""EngineConfig: every knob of the engine in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_paged.sampling_params import LOGPROBS_MODES
from hf_paged.speculative.config import SpeculativeConfig, speculation_of

_CHOICES: dict[str, tuple[Any, ...]] = {
    "enable_prefix_caching": (True, False),
    "enable_lora": (True, False),
    "exact": (True, False),
    "kv_cache_dtype": ("auto", "fp8", "fp8_e4m3"),
    "calculate_kv_scales": (True, False),
    "attention_backend": ("auto", "triton", "flashinfer", "torch"),
    "compile": ("layers", "off", None),
    "cuda_graphs": (True, False),
    "fuse_linear": (True, False, None),
    "async_scheduling": (True, False, None),
    "logprobs_mode": LOGPROBS_MODES,
}
"""What fields with a few possible values may say."""


_COUNTS = (
    "page_size",
    "num_pages",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "max_loras",
    "max_lora_rank",
    "max_cpu_loras",
)


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built. The defaults suit most uses.

    Raises:
        ValueError: a value makes no sense; the message names the field.
    """

    page_size: int | None = None
    """Tokens per page of the KV cache, a power of two. None: 32 on a CPU, 16 elsewhere."""
    num_pages: int | None = None
    """Pages in the pool. None: from `kv_cache_memory_bytes`."""
    kv_cache_memory_bytes: int | None = None
    """Memory for the pool. None: from what is free (on a CPU a quarter of the available memory, at most 4 GiB)."""
    gpu_memory_utilization: float = 0.92
    """Share of the GPU's memory that the process may use, weights included, when the pool is sized from what is
    free."""
    max_num_seqs: int | None = None
    """Sequences that run at once. None: 256, on a GPU of 70 GiB or more 512; `max_num_batched_tokens` if that is
    less."""
    max_num_batched_tokens: int | None = None
    """Tokens computed per step, prefill and decode together. None: 2048 on a CPU, 8192 on a GPU, 16384 on one of 70
    GiB or more; `max_num_seqs` if that is more."""
    max_model_len: int | None = None
    """Longest prompt plus output. None: the model's own limit."""
    enable_prefix_caching: bool = True
    """Keep full pages for later requests that begin with the same tokens."""
    kv_cache_dtype: str = "auto"
    """Dtype of stored keys and values: "auto" is the model's own, "fp8" (or "fp8_e4m3") halves their memory. On a GPU
    it needs compute capability 8.9."""
    calculate_kv_scales: bool = False
    """With keys and values in FP8: divide them by scales that are measured on the first prompts, a power of two for the
    keys and one for the values of each layer, and stay as they are from then on. False: scales are the checkpoint's
    where it has any, else 1."""
    attention_backend: str = "auto"
    """"triton", "flashinfer" or "torch"; "auto" is Triton on a GPU, plain torch elsewhere."""
    compile: str | None = None
    """"layers" compiles the decoder layers, one by one, for our own forwards; "off" runs them as they are. None:
    "layers" on a GPU."""
    cuda_graphs: bool = True
    """On a GPU, run steps that only decode as CUDA graphs."""
    fuse_linear: bool | None = None
    """Compute linear layers with the same input (queries, keys and values, say) as one product, over one storage that
    their parameters then share. None: on a GPU."""
    async_scheduling: bool | None = None
    """Schedule and launch the next step while the device computes this one. None: on a GPU."""
    exact: bool = False
    """Make a token's numbers the same bits whatever else is in the batch: alone or in a crowd, in a chunk of prefill or
    a decode, from cached pages or not. Then a trainer on the same weights can have the very log-probabilities that were
    sampled from (`hf_paged.integrations.trl.attach(trainer, exact=True)`). Slower; needs a GPU and Triton."""
    enable_lora: bool = False
    """Serve adapters by request (`LoRARequest`), with room for them beside every linear layer."""
    max_loras: int = 1
    """Different adapters in a step, and so in the device's memory; requests with others wait."""
    max_lora_rank: int = 16
    """The highest rank of an adapter."""
    max_cpu_loras: int | None = None
    """Adapters kept in the host's memory. None: `max_loras`."""
    logprobs_mode: str = "raw_logprobs"
    """Log-probabilities of the model itself ("raw_logprobs"), after penalties, temperature, top-k...
    ("processed_logprobs"), or after temperature alone ("scaled_logprobs"). A request's own
    `SamplingParams.logprobs_mode` goes before."""

    seed: int | None = None
    """Where requests without a seed get theirs from. None: torch's global generator."""

    speculative_config: Mapping[str, Any] | None = None
    """How tokens are drafted: `{"method": "ngram" | "suffix" | "draft_model" | "eagle3", "num_speculative_tokens": 5,
    ...}`. None: not at all."""
    speculative_model: Any = None
    """Older spelling: the draft model, loaded or by path, or "[ngram]"."""
    num_speculative_tokens: int | None = None
    """Older spelling: goes with `speculative_model`."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if (value is not None or name in ("max_loras", "max_lora_rank")) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        if self.page_size is not None and self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {self.page_size}")
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence can advance in every step"
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras ({self.max_loras})")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"seed must be an integer or None, got {self.seed!r}")
        self._check_choices()
        self._check_exact()
        if self.calculate_kv_scales and self.kv_cache_dtype == "auto":
            raise ValueError("calculate_kv_scales=True is for keys and values in FP8: add kv_cache_dtype='fp8'")
        speculation_of(self.speculative_config, self.speculative_model, self.num_speculative_tokens)
        if isinstance(self.gpu_memory_utilization, bool) or not isinstance(self.gpu_memory_utilization, int | float):
            raise ValueError(f"gpu_memory_utilization must be a number, got {self.gpu_memory_utilization!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                told = ", ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
                raise ValueError(f"{name} must be one of {told}; got {value!r}")

    def _check_exact(self) -> None:
        """Exact mode has kernels of its own: asking for others as well makes no sense."""
        others = (
            ("attention_backend", ("auto", "triton")),
            ("compile", (None, "off")),
            ("fuse_linear", (None, False)),
            ("kv_cache_dtype", ("auto",)),
            ("enable_lora", (False,)),
        )
        for name, possible in others:
            value = getattr(self, name)
            if self.exact and value not in possible:
                raise ValueError(f"exact=True cannot be had with {name}={value!r}: leave {name} out, or exact")

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """What the three options about drafting say."""
        return speculation_of(self.speculative_config, self.speculative_model, self.num_speculative_tokens)

    def with_changes(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed.

        Raises:
            TypeError: a name that is no field; the message suggests the nearest one.
        """
        import difflib

        for name in changes:
            if name not in self.__dataclass_fields__:
                near = difflib.get_close_matches(name, self.__dataclass_fields__, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(self.__dataclass_fields__)}."
                raise TypeError(f"EngineConfig has no option {name!r}.{hint}")
        return replace(self, **changes)
