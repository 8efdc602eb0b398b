"""`LLM(...)`: offline inference in the shape that vLLM's users know."""

from hf_paged.llm.arguments import EngineArgs
from hf_paged.llm.beam_search import BeamSearchOutput, BeamSearchSequence
from hf_paged.llm.llm import LLM

__all__ = ["LLM", "BeamSearchOutput", "BeamSearchSequence", "EngineArgs"]
