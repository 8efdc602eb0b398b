"""The engine on a GPU, with the same meaning as on the CPU. Skipped, visibly, where there is none."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_paged

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


def build(family: str, dtype: torch.dtype):
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=24))
    return model.to("cuda", dtype).eval()


def prompts(count: int = 6) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = [1, 15, 16, 17, 64, 130, 33, 90][:count]
    return [torch.randint(3, 256, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"num_pages": 16, "max_num_seqs": 4, "max_num_batched_tokens": 32}])
def test_greedy_equals_stock_in_float32(family, options):
    """Also with chunked prefill and preemption in a small pool."""
    model = build(family, torch.float32)
    expected = [
        model.generate(torch.tensor([p], device="cuda"), max_new_tokens=40, do_sample=False, eos_token_id=-1,
                       pad_token_id=0)[0, len(p):].tolist()
        for p in prompts()
    ]  # fmt: skip
    hf_paged.wrap(model, page_size=16, **options)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for _ in range(2):  # the second time from the prefix cache
        found = [output.outputs[0].token_ids for output in model.generate_many(prompts(), greedy)]
        assert found == expected
    assert model.engine.scheduler.num_active_pages == 0


def test_bfloat16_logprobs_agree_with_the_models_own_forward():
    """Within 0.05 nats on average of the model's own bfloat16 forward over the finished sequences, and 0.5 at most."""
    differences = []
    model = hf_paged.wrap(build("llama", torch.bfloat16))
    sampling = hf_paged.SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=24, logprobs=0, ignore_eos=True)
    for output in model.generate_many(prompts(4), sampling):
        for completion in output.outputs:
            ids = torch.tensor([output.prompt_token_ids + completion.token_ids], device="cuda")
            with torch.no_grad():
                log_probs = torch.log_softmax(model(ids).logits[0].float(), -1)
            start = len(output.prompt_token_ids)
            for place, token in enumerate(completion.token_ids):
                own = log_probs[start + place - 1, token].item()
                differences.append(abs(completion.logprobs[place][token].logprob - own))
    assert sum(differences) / len(differences) < 0.05
    assert max(differences) < 0.5


def test_seeded_samples_are_the_same_alone_and_in_a_crowd():
    model = hf_paged.wrap(build("llama", torch.float32))
    sampling = hf_paged.SamplingParams(temperature=0.8, top_p=0.9, seed=7, n=4, max_tokens=16, ignore_eos=True)
    crowd = model.generate_many(prompts(), sampling)
    alone = [model.generate_many([p], sampling)[0] for p in prompts()]
    for one, other in zip(crowd, alone, strict=True):
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]


def test_penalties_and_processors_run_on_the_device():
    model = hf_paged.wrap(build("llama", torch.float32))
    banned = model.generate_many([[5, 6, 7]], hf_paged.SamplingParams(temperature=0.0, max_tokens=1))[0].outputs[0]
    sampling = hf_paged.SamplingParams(
        temperature=0.7,
        top_k=20,
        min_p=0.01,
        seed=1,
        max_tokens=12,
        min_tokens=12,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={banned.token_ids[0]: -100.0},
        logits_processors=[lambda generated, logits: logits - 0.0],
        logprobs=3,
        prompt_logprobs=2,
    )
    output = model.generate_many([[5, 6, 7]], sampling)[0]
    assert output.error is None
    assert len(output.outputs[0].token_ids) == 12
    assert banned.token_ids[0] not in output.outputs[0].token_ids
    assert len(output.prompt_logprobs) == 3


def test_weights_that_change_on_the_device_empty_the_prefix_cache():
    model = hf_paged.wrap(build("llama", torch.float32), page_size=16)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    before = model.generate_many(prompts()[4:5], greedy)[0]
    model.lm_head.weight.data.mul_(-1)
    after = model.generate_many(prompts()[4:5], greedy)[0]
    assert after.num_cached_tokens == 0
    assert after.outputs[0].token_ids != before.outputs[0].token_ids


def test_training_goes_on_after_generation():
    model = hf_paged.wrap(build("llama", torch.bfloat16)).train()
    model.generate_many(prompts(2), hf_paged.SamplingParams(max_tokens=4))
    ids = torch.tensor([prompts()[4]], device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.training
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_pool_is_sized_from_free_memory():
    model = hf_paged.wrap(build("llama", torch.bfloat16), gpu_memory_utilization=0.5, max_num_seqs=4)
    assert model.engine.scheduler.num_pages == 4 * 1024 // 16  # all that can be of use fits
