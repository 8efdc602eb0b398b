"""Driving the engine by hand: requests that arrive while others run, one of them aborted.

python examples/own_loop.py
"""

import hf_paged
from hf_paged.bench.models import load_smollm2

model, tokenizer = load_smollm2()
engine = hf_paged.wrap(model, tokenizer=tokenizer).engine

sampling = hf_paged.SamplingParams(temperature=0.0, max_tokens=32)
late = ["In the mountains,", "A recipe for bread:", "Two plus two is"]
first = engine.add_request("Once upon a time", sampling)

steps = 0
while engine.has_unfinished():
    for output in engine.step():
        if output.finished:
            completion = output.outputs[0]
            print(f"step {steps:3} {output.request_id}: {completion.finish_reason}: {completion.text!r}")
    steps += 1
    if steps % 4 == 0 and late:
        engine.add_request(late.pop(0), sampling)
    if steps == 20:
        engine.abort(first)
