"""What ranks do in `test_parallel.py` and others; run by `ranks.py`, one process per rank."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

import torch  # noqa: E402
import transformers  # noqa: E402
from families import make_model, make_prompts  # noqa: E402

import hf_paged  # noqa: E402
from hf_paged import SamplingParams  # noqa: E402
from hf_paged.distributed.groups import TensorParallel, join  # noqa: E402
from hf_paged.distributed.shard import shard  # noqa: E402

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, one key head": {"num_key_value_heads": 1},
    "Llama, tied, odd vocabulary, biases": {
        "tie_word_embeddings": True, "vocab_size": 161, "attention_bias": True, "mlp_bias": True,
    },
    "Qwen3": {},
    "Gemma2": {},
    "Gemma3": {},
    "Phi3": {},
    "Mixtral": {},
    "Qwen3Moe": {},
    "DeepseekV3": {},
}  # fmt: skip
OPTIONS = {"num_pages": 64, "page_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 8}
PROMPTS = make_prompts([5, 23, 70, 11])
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=8, ignore_eos=True, seed=7, n=2)
UNSEEDED = SamplingParams(temperature=1.2, max_tokens=8, ignore_eos=True, n=3)


def family_model(name: str) -> Any:
    return make_model(name.partition(",")[0], **FAMILIES[name])


def generate(model: Any) -> dict[str, Any]:
    """Tokens, greedy and sampled, and log-probabilities."""
    greedy = model.generate_many(PROMPTS, GREEDY)
    sampled = model.generate_many(PROMPTS, SAMPLED)
    assert model.engine.scheduler.num_active_pages == 0
    return {
        "greedy": [output.outputs[0].token_ids for output in greedy],
        "sampled": [[one.token_ids for one in output.outputs] for output in sampled],
        "logprobs": [
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in greedy
        ],
    }


def families(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    found = {}
    for name in FAMILIES:
        model = hf_paged.wrap(shard(family_model(name), parallel), **OPTIONS)
        found[name] = generate(model)
        hf_paged.unwrap(model)
    return found


# ---- what an engine can do -----------------------------------------------------------------------------------------


def ban_even(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor of a caller's own."""
    return scores.index_fill(-1, torch.arange(0, scores.shape[-1], 2), -torch.inf)


class Broken(Exception):
    pass


def fail(*_: Any) -> torch.Tensor:
    raise Broken


def features(model: Any) -> dict[str, Any]:
    """One of everything; what comes out."""
    found: dict[str, Any] = generate(model)
    long = make_prompts([60] * 6, seed=3)
    greedy = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    found["preempted"] = tokens(model.generate_many(long, SamplingParams(**greedy)))
    assert model.engine.scheduler.stats.num_preemptions, "the pool is small enough"
    prefix = [long[0][:40] + prompt[:5] for prompt in long]
    found["prefix"] = tokens(model.generate_many(prefix, SamplingParams(**greedy)))
    assert model.engine.scheduler.stats.prefix_hits
    short = greedy | {"max_tokens": 6}
    various = [
        SamplingParams(**short, repetition_penalty=1.3, presence_penalty=0.2),
        SamplingParams(**short, logits_processors=[ban_even]),
        SamplingParams(**short, logits_processors=[fail]),
        SamplingParams(**short, prompt_logprobs=1),
    ]
    outputs = model.generate_many(PROMPTS, various)
    found["various"] = [output.outputs[0].token_ids for output in outputs if output.error is None]
    found["failed"] = [type(output.error).__name__ for output in outputs]
    found["scores"] = [scores.tolist() for scores in model.score(PROMPTS[:2], [[5, 6, 7], [8, 9]])]
    ids = torch.tensor(make_prompts([12, 12]))
    found["generate"] = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    found["criteria"] = model.generate(ids, max_new_tokens=6, eos_token_id=3, max_time=600.0, do_sample=False).tolist()
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    kept = model.generate(ids, max_new_tokens=4, min_new_tokens=2, eos_token_id=3, do_sample=False, **asked)
    found["kept"] = [row[row.isfinite()].tolist() for step in (*kept.logits, *kept.scores) for row in step]
    unseeded = model.generate_many(PROMPTS, SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True, n=2))
    assert all(len(one.token_ids) == 6 for output in unseeded for one in output.outputs)
    engine = model.engine
    engine.add_request(PROMPTS[0], SamplingParams(**greedy), request_id="first")
    engine.add_request(PROMPTS[1], SamplingParams(**greedy), request_id="second")
    engine.step()
    engine.step()
    engine.abort("first")
    last = {output.request_id: output for output in finish(engine) if output.finished}
    assert last["first"].outputs[0].finish_reason == "abort"
    found["after an abort"] = last["second"].outputs[0].token_ids
    engine.add_request(PROMPTS[2], SamplingParams(**greedy), request_id="paused")
    engine.step()
    engine.pause()
    engine.resume()
    found["after a pause"] = finish(engine)[-1].outputs[0].token_ids
    engine.sleep()
    engine.warm_up()
    found["after sleep"] = tokens(model.generate_many(PROMPTS, SamplingParams(**greedy)))
    assert engine.scheduler.num_active_pages == 0
    return found


def finish(engine: Any) -> list[Any]:
    """The outputs of all steps that are left."""
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


def staged_families(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    """By stages alone, or by both."""
    found = {}
    total = torch.distributed.get_world_size()
    for tp in {1, total // 2}:
        place = join(tp, "cpu", timeout_s=60, stages=total // tp)
        for name in FAMILIES:
            model = make_staged(name)
            if len(model.model.layers) < place.pipeline.size:
                continue
            hf_paged.wrap(shard(model, place), **OPTIONS)
            found[name, tp] = generate(model) | {"weights": model.engine.executor._num_weights}
            hf_paged.unwrap(model)
    return found


def make_staged(name: str) -> Any:
    return make_model(name.partition(",")[0], **FAMILIES[name] | {"num_hidden_layers": 4})


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


FEW_PAGES = OPTIONS | {"num_pages": 40, "max_num_batched_tokens": 64}
DRAFTING = FEW_PAGES | {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}


def every_feature(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    model = hf_paged.wrap(shard(family_model("Llama"), parallel), **FEW_PAGES)
    found = {"plain": features(model)}
    found["drafting"] = features(hf_paged.wrap(model, **DRAFTING))
    return found


def build_part(parallel: TensorParallel) -> Any:
    """For ranks that `launch.start` begins."""
    return hf_paged.wrap(shard(family_model("Llama"), parallel), **FEW_PAGES)


def build_nothing(parallel: TensorParallel) -> Any:
    if parallel.rank:
        raise Broken("no model today")
    return build_part(parallel)


def die_at_once(parallel: TensorParallel) -> Any:
    if parallel.rank:
        os._exit(3)
    return build_part(parallel)


def one_family(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    return generate(hf_paged.wrap(shard(family_model("Llama"), parallel), **OPTIONS))


# ---- replicas ------------------------------------------------------------------------------------------------------


def spread(parallel: TensorParallel, out: Path, folder: str) -> dict[str, Any]:
    """One list of prompts over as many replicas of two ranks, or of one, as there are."""
    found: dict[str, Any] = {}
    world = torch.distributed.get_world_size()
    for size in {1, world // 2}:
        model = hf_paged.load(folder, device="cpu", tensor_parallel_size=size, **OPTIONS | {"seed": 3})
        for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED), ("unseeded", UNSEEDED)):
            outputs = model.generate_many(PROMPTS, sampling, spread=True)
            found[f"{name} {size}"] = [[one.token_ids for one in output.outputs] for output in outputs]
            assert [output.prompt_token_ids for output in outputs] == PROMPTS
        found[f"own {size}"] = model.engine.stats.generation_tokens
        assert model.engine.scheduler.num_active_pages == 0
    other = PROMPTS[:2] if torch.distributed.get_rank() == 1 else PROMPTS
    found["divergence"] = attempt(lambda: model.generate_many(other, GREEDY, spread=True))
    if torch.distributed.get_rank() == 1:
        at_step(model, 2, fail)
    found["exception"] = attempt(lambda: model.generate_many(PROMPTS, GREEDY, spread=True))
    found["after"] = tokens(model.generate_many(PROMPTS, GREEDY, spread=True))
    options = {"num_pages": 64, "block_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 8, "device": "cpu"}
    llm = hf_paged.LLM(folder, data_parallel_size=world, seed=3, **options)
    found["llm"] = tokens(llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], GREEDY, use_tqdm=False))
    found["sizes"] = attempt(lambda: hf_paged.LLM(folder, data_parallel_size=world + 1, **options))
    if torch.distributed.get_rank() == 1:
        at_step(llm.model, 2, lambda: os._exit(9))
    Path(out, f"{torch.distributed.get_rank()}.pickle").write_bytes(pickle.dumps(found))
    found["death"] = attempt(lambda: llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    Path(out, f"{torch.distributed.get_rank()}.pickle").write_bytes(pickle.dumps(found))
    os._exit(0)  # a group with a dead member cannot be taken down


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def attempt(work: Callable[[], Any]) -> tuple[str, str, float]:
    """(kind of error, what it says, how long it took)."""
    start = time.monotonic()
    try:
        work()
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def hear_interrupts() -> None:
    """A shell that starts a job in the background has it ignore Ctrl-C, and so its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def at_step(model: Any, number: int, work: Callable[[], Any]) -> None:
    """Has something done once, when the engine has landed so many steps more."""
    observers, when = model.engine.observers, model.engine.stats.steps + number

    def observe(record: Any) -> None:
        if model.engine.stats.steps >= when:
            observers.remove(observe)
            work()

    observers.append(observe)


def place_of(kind: str, timeout_s: float) -> TensorParallel:
    """One of two, which share layers or have some each."""
    return join(2, "cpu", timeout_s) if kind == "ranks" else join(1, "cpu", timeout_s, stages=2)


def faults(_: TensorParallel, out: Path, kind: str) -> dict[str, Any]:
    parallel = place_of(kind, 60)
    rank = parallel.link.rank
    model = hf_paged.wrap(shard(family_model("Llama"), parallel), **OPTIONS)
    found: dict[str, Any] = {}

    def run() -> list[list[int]]:
        return tokens(model.generate_many(PROMPTS, GREEDY))

    def report(name: str, *result: Any) -> None:
        found[name] = result
        Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))

    report("before", run())
    report("fine", model.engine.executor.lost())
    plain = {"exact": False, "speculative_config": None, "max_model_len": None}
    eagle = {"method": "eagle3", "model": "nowhere"}
    refused = [{"exact": True}, {"speculative_config": eagle}, {"max_model_len": 9999}]
    engines = [lambda options=options: hf_paged.wrap(model, **plain | options).engine for options in refused]
    report("refused", *map(attempt, engines))
    hf_paged.wrap(model, **plain)
    pages = [30 + 10 * rank, 64]
    report("pages", *[hf_paged.wrap(model, num_pages=count).engine.scheduler.num_pages for count in pages])
    hear_interrupts()
    at_step(model, 3, interrupt)
    report("interrupt", attempt(run), model.engine.scheduler.num_active_pages, run())
    if rank:
        at_step(model, 2, fail)
    report("exception", attempt(run), model.engine.scheduler.num_active_pages, run())
    prompts = [PROMPTS[rank]]
    report("divergence", attempt(lambda: model.generate_many(prompts, GREEDY)), attempt(run))

    model = hf_paged.wrap(shard(family_model("Llama"), place_of(kind, 2)), **OPTIONS)
    if rank:
        at_step(model, 2, lambda: time.sleep(5))
    report("hang", attempt(run))

    model = hf_paged.wrap(shard(family_model("Llama"), place_of(kind, 20)), **OPTIONS)
    if rank:
        model.engine  # noqa: B018
        model.model.layers[-1].register_forward_hook(lambda *_: os._exit(9))
    report("death", attempt(run), attempt(run))
    report("lost", model.engine.executor.lost())
    os._exit(0)  # a group with a dead member cannot be taken down


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def of_checkpoint(folder: Path, quantization: str | None, size: int, stages: int = 1) -> dict[str, Any]:
    """What a checkpoint's model says, on so many ranks, and how many bytes of it one holds."""
    model = hf_paged.load(
        folder, quantization=quantization, device="cpu", tensor_parallel_size=size, pipeline_parallel_size=stages,
        fuse_linear=True, **OPTIONS,
    )  # fmt: skip
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    found = generate(model)
    hf_paged.unwrap(model)
    return found | {"bytes": sum(held.values())}


CHECKPOINTS: dict[str, tuple[str, str | None]] = {
    "plain": ("plain", "auto"),
    "tied": ("tied", "auto"),
    "experts in pieces": ("mixtral", "auto"),
    "fp8 on the fly": ("plain", "fp8"),
    "gptq": ("gptq", "auto"),
    "gptq, dequantised": ("gptq", None),
    "awq, one group": ("awq, one group", "auto"),
    "compressed, a scale per output": ("compressed fp8, a scale per output", "auto"),
    "fp8 in small blocks": ("fp8 in blocks of 16", "auto"),
}
"""(folder, quantization) by name."""


def checkpoints(parallel: TensorParallel, out: Path, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: of_checkpoint(Path(folder, where), quantization, parallel.size)
        for name, (where, quantization) in CHECKPOINTS.items()
    }
    for name, (where, quantization) in CHECKPOINTS.items():
        found[f"staged {name}"] = of_checkpoint(Path(folder, where), quantization, 1, parallel.size)
    for name in ("gptq, act-order", "fp8 in blocks of 48"):
        found[name] = attempt(lambda name=name: hf_paged.load(Path(folder, name), tensor_parallel_size=parallel.size))
    found["three ranks"] = attempt(lambda: hf_paged.load(Path(folder, "plain"), tensor_parallel_size=3))
    own = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "plain"), tp_plan="auto")
    found["transformers' own"] = generate(hf_paged.wrap(own, **OPTIONS))
    return found


# ---- layers compiled and fused -------------------------------------------------------------------------------------


def compiled(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    model = hf_paged.wrap(shard(family_model("Llama"), parallel), compile="layers", fuse_linear=True, **OPTIONS)
    found = generate(model)
    executor = model.engine.executor
    assert executor._runner.compiled is not None, "compiling failed"
    assert executor._fused is not None and len(executor._fused._products) == 2 * 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.generate_many(PROMPTS[:1], SamplingParams(temperature=0.0, max_tokens=1))
    calls = {event.key: event.count for event in profile.key_averages()}
    layers = model.config.num_hidden_layers
    assert calls["hf_paged::all_reduce_add"] == 2 * layers, "the residual stream is added within the sums"
    return found


# ---- on GPUs -------------------------------------------------------------------------------------------------------


def gpu_model() -> Any:
    """float32, in which two GPUs and one agree on greedy tokens."""
    return make_model("Llama", hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=6).cuda()


def of_gpus(model: Any) -> list[list[list[int]]]:
    """Tokens of decodes and prefills, drawn on the device and on the host, twice, with a sleep between."""
    prompts = make_prompts([5, 23, 70, 11, 40, 33, 8, 90])
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, n=3, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=20, ignore_eos=True),
    ]
    found = []
    for kind in kinds * 2:
        outputs = model.generate_many(prompts, kind)
        found.append([one.token_ids for output in outputs for one in output.outputs])
        model.engine.sleep()
    assert found[:3] == found[3:]
    return found[:3]


def gpus(_: TensorParallel, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, place in (("stages", join(1, stages=2)), ("ranks", join(2))):
        model = hf_paged.wrap(shard(gpu_model(), place), num_pages=400)
        found[name] = of_gpus(model)
        assert model.engine.executor._graphs._captured, "steps were captured"
        hf_paged.unwrap(model)
    return found


JOBS: dict[str, Callable[..., Any]] = {
    "gpus": gpus,
    "staged_families": staged_families,
    "families": families,
    "one_family": one_family,
    "compiled": compiled,
    "every_feature": every_feature,
    "faults": faults,
    "checkpoints": checkpoints,
    "spread": spread,
}


def main(job: str, out: str, *args: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    from expert_jobs import JOBS as EXPERT_JOBS  # which take from here
    from lora_jobs import JOBS as LORA_JOBS

    result = (JOBS | EXPERT_JOBS | LORA_JOBS)[job](join(size, "cpu", timeout_s=60), Path(out), *args)
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
