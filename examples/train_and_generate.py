"""A training loop that generates from the weights it trains: no copy, no sync, nothing stale.

python examples/train_and_generate.py
"""

import torch

import hf_paged
from hf_paged.bench.models import load_smollm2

model, tokenizer = load_smollm2()
hf_paged.wrap(model, tokenizer=tokenizer)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

prompt = "My favourite animal is"
target = tokenizer(prompt + " the octopus, because it has three hearts.", return_tensors="pt")["input_ids"]
greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=12)

model.train()
for step in range(4):
    text = model.generate_many([prompt], greedy)[0].outputs[0].text
    loss = model(input_ids=target, labels=target).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.2f}, before it: {text!r}")
