import sys

from vllm import LLM
from vllm.sampling_params import BeamSearchParams, RequestOutputKind

MODEL = sys.argv[1]

llm = LLM(MODEL, tensor_parallel_size=1, max_num_seqs=8, max_num_batched_tokens=512, seed=7, trust_remote_code=False)
params = llm.get_default_sampling_params()
params.max_tokens = 6
conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": [{"type": "text", "text": "Write an essay about the sea."}]},
]
one = llm.chat(conversation, params, use_tqdm=False)
two = llm.chat([conversation, conversation[1:]], sampling_params=params, use_tqdm=False)
continued = llm.chat(
    [*conversation, {"role": "assistant", "content": "The sea is"}],
    params,
    use_tqdm=False,
    add_generation_prompt=False,
    continue_final_message=True,
)
beams = llm.beam_search([{"prompt": "Hello, my name is"}], BeamSearchParams(beam_width=3, max_tokens=5))
llm.sleep(level=1)
llm.wake_up(tags=["weights"])
llm.wake_up()
assert llm.reset_prefix_cache()
names = llm.collective_rpc(lambda worker: type(worker.model_runner.model).__name__)
parameters = llm.apply_model(lambda model: sum(p.numel() for p in model.parameters()))
final = params.clone()
final.output_kind = RequestOutputKind.FINAL_ONLY
ids = llm.enqueue(["The sea", "The sky"], final)
waited = llm.wait_for_completion(use_tqdm=False)
