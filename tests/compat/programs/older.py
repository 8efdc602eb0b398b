import sys

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.outputs import RequestOutput

MODEL = sys.argv[1]

llm = LLM(
    model=MODEL, tokenizer=MODEL, block_size=16, dtype="float32", speculative_model="[ngram]", num_speculative_tokens=3
)
tokenizer = llm.get_tokenizer()
ids = tokenizer.encode("The sea is wide and the sea is deep and the sea")
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
by_ids = llm.generate(prompt_token_ids=[ids, ids[:4]], sampling_params=greedy, use_tqdm=False)
by_dict = llm.generate([TokensPrompt(prompt_token_ids=ids), {"prompt_token_ids": ids[:4]}], greedy, use_tqdm=False)
each = llm.generate(
    ["The sea", "The sky"],
    [SamplingParams(n=2, max_tokens=3, seed=1), SamplingParams(n=2, best_of=4, max_tokens=5, seed=2)],
    use_tqdm=False,
)
assert all(isinstance(output, RequestOutput) for output in by_ids + by_dict + each)
