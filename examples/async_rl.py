"""Asynchronous reinforcement learning in one process: the policy is trained in the middle of its rollouts.

Rollouts run, stop for a step of training, go on with the new weights, and are cut short; what is unfinished goes into
the next round. Every token says which version of the weights computed it, and with which probability: what a loss that
corrects for old tokens needs.

python examples/async_rl.py
"""

import torch

import hf_paged
from hf_paged.bench.models import load_smollm2

PROMPTS = ["The best animal is", "Write a haiku about rain.", "Two plus two is", "My favourite colour is"]
TEMPERATURE = 0.8

model, tokenizer = load_smollm2()
engine = hf_paged.wrap(model, tokenizer=tokenizer, num_pages=64).engine
optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
sampling = hf_paged.SamplingParams(
    n=2,
    temperature=TEMPERATURE,
    seed=1,
    max_tokens=32,
    logprobs=0,
    logprobs_mode="scaled_logprobs",  # at the rollouts' temperature, as the loss computes them
    output_kind=hf_paged.RequestOutputKind.FINAL_ONLY,
)


def train(text: str) -> None:
    """One step towards a text, in place of a loss over rollouts."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


unfinished = {engine.add_request(prompt, sampling) for prompt in PROMPTS}
for _ in range(7):
    engine.step()

# No step is computed in a pause; requests keep their pages. From another thread this works as well.
engine.pause()
train("The best animal is the octopus, because it has three hearts.")
engine.resume()  # sees that the weights have changed
print(f"version {engine.weight_version} of the weights, {len(unfinished)} requests go on from where they were")
for _ in range(6):
    engine.step()

# The same without a pause, and keys and values of the old weights are not kept.
train("My favourite colour is the blue of an octopus's blood.")
engine.weights_updated(kv="recompute")
for _ in range(3):
    engine.step()

# Time is up: what there is comes back as it is.
engine.abort(unfinished)
outputs = engine.step()
rollouts = [(output.prompt_token_ids, completion) for output in outputs for completion in output.outputs]

# How likely are these tokens now?
scores = model.score(
    [prompt for prompt, _ in rollouts], [completion.token_ids for _, completion in rollouts], temperature=TEMPERATURE
)
for (_, completion), now in zip(rollouts, scores, strict=True):
    steps = zip(completion.logprobs, completion.token_ids, strict=True)
    ratio = torch.exp(now - torch.tensor([entry[token].logprob for entry, token in steps]))
    versions = torch.tensor(completion.weight_versions)
    by_version = {int(v): round(ratio[versions == v].mean().item(), 3) for v in versions.unique()}
    print(f"{completion.finish_reason:6} {completion.text!r}: mean importance ratio by version {by_version}")

# The next round begins where these stopped.
again = [prompt + completion.token_ids for prompt, completion in rollouts if completion.finish_reason == "abort"]
for output in model.generate_many(again, hf_paged.SamplingParams(temperature=TEMPERATURE, seed=2, max_tokens=5)):
    print(f"version {output.outputs[0].weight_versions[0]} goes on: {output.outputs[0].text!r}")
