import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

MODEL, ADAPTER, OTHER = sys.argv[1:]

prompts = ["The capital of France is", "The sea is", "The sky is"]
sampling_params = SamplingParams(temperature=0, max_tokens=8)

llm = LLM(model=MODEL, enable_lora=True, max_loras=2, max_lora_rank=16, max_cpu_loras=4, max_model_len=256)
plain = llm.generate(prompts, sampling_params)
adapted = llm.generate(prompts, sampling_params, lora_request=LoRARequest("sql_adapter", 1, ADAPTER))
mixed = llm.generate(
    prompts,
    sampling_params,
    lora_request=[LoRARequest("sql_adapter", 1, ADAPTER), None, LoRARequest("other", 2, lora_path=OTHER)],
)
chat = llm.chat(
    [{"role": "user", "content": "Hello"}], sampling_params, lora_request=LoRARequest("sql_adapter", 1, ADAPTER)
)
known = llm.llm_engine.list_loras()
removed = llm.llm_engine.remove_lora(1)
