"""hf_paged: vLLM-class text generation inside a Hugging Face process."""

from hf_paged.config import EngineConfig
from hf_paged.inputs import TextPrompt, TokensPrompt
from hf_paged.llm import LLM, EngineArgs
from hf_paged.lora.request import LoRARequest
from hf_paged.model.introspect import UnsupportedModelError
from hf_paged.observe.perfetto import trace
from hf_paged.outputs import CompletionOutput, Logprob, RequestOutput
from hf_paged.quantization.load import load
from hf_paged.quantization.writers.quantize import quantize
from hf_paged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from hf_paged.structured_outputs import StructuredOutputsParams
from hf_paged.wrap import PagedGenerationMixin, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "EngineConfig",
    "LoRARequest",
    "Logprob",
    "PagedGenerationMixin",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "UnsupportedModelError",
    "load",
    "quantize",
    "trace",
    "unwrap",
    "wrap",
]
