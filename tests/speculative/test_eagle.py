"""EAGLE-3 heads: drafts are what the head says of the target's hidden states, and change no token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import VOCAB, make_model, make_prompts
from speculative.drafters import Alternating, Always
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

import hf_paged
from hf_paged.speculative.eagle import Eagle3Head, load_head

LAYERS = 6


@pytest.fixture(scope="module")
def target() -> Any:
    return make_model("Llama", num_hidden_layers=LAYERS)


def make_head(seed: int = 0, *, own_embedding: bool = False, **changes: Any) -> Eagle3Head:
    """A random head for `make_model`'s sizes, that drafts every second token of the vocabulary."""
    values = {
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB // 2,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(seed)
    head = Eagle3Head(LlamaConfig(**(values | changes)), own_embedding=own_embedding)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        if head.draft_vocab_size < head.config.vocab_size:
            head.draft_tokens(torch.arange(0, 2 * head.draft_vocab_size, 2))
    return head.eval()


def drafting(model: Any, head: Any, pace: Any = None, **options: Any) -> Any:
    """The model wrapped so that the head drafts in every step, whatever comes of it."""
    config = {"method": "eagle3", "model": head, "num_speculative_tokens": 4}
    hf_paged.wrap(model, speculative_config=config, **options)
    model.engine.speculator.pace = pace or Always()
    return model


def tokens_of(outputs: list[hf_paged.RequestOutput]) -> list[list[list[int]]]:
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


# ---- no token changes ----------------------------------------------------------------------------------------------

SAMPLINGS = {
    "greedy": hf_paged.SamplingParams(temperature=0.0, max_tokens=20),
    "top-p": hf_paged.SamplingParams(temperature=0.9, top_p=0.8, max_tokens=20, seed=5),
    "penalties": hf_paged.SamplingParams(
        temperature=0.7, top_k=20, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=20, seed=5, logprobs=2
    ),
    "samples": hf_paged.SamplingParams(n=4, temperature=1.0, max_tokens=20, seed=5),
}
ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {"num_pages": 200, "page_size": 8},
    "preempting": {"num_pages": 20, "page_size": 4, "max_num_seqs": 6},
    "chunked": {"num_pages": 200, "page_size": 8, "max_num_batched_tokens": 9, "max_num_seqs": 9},
    "looking ahead": {"num_pages": 200, "page_size": 8, "async_scheduling": True},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_are_what_they_are_without(target: Any, engine: str, sampling: str) -> None:
    model, options = copy.deepcopy(target), ENGINES[engine]
    prompts = make_prompts([3, 17, 32, 1, 9])
    expected = tokens_of(hf_paged.wrap(model, **options).generate_many(prompts, SAMPLINGS[sampling]))
    drafting(model, make_head(), Alternating() if engine == "looking ahead" else None, **options)
    for _ in range(2):  # the second time over cached prefixes
        assert tokens_of(model.generate_many(prompts, SAMPLINGS[sampling])) == expected
    found = model.engine
    assert found.speculator.stats["eagle3"].num_drafts > 20
    assert found.scheduler.num_active_pages == 0 and not found.executor.drafter._rows
    assert found.scheduler.stats.num_preemptions > 0 or engine != "preempting"


def test_scores_and_failures_leave_nothing(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(target)
    prompts, greedy = make_prompts([12, 5]), SAMPLINGS["greedy"]
    expected = tokens_of(hf_paged.wrap(model, num_pages=64).generate_many(prompts, greedy))
    scores = model.score(prompts, [[3, 4, 5], [6]])
    drafter = drafting(model, make_head(), num_pages=64).engine.executor.drafter
    for found, known in zip(model.score(prompts, [[3, 4, 5], [6]]), scores, strict=True):
        torch.testing.assert_close(found, known)
    after, calls = drafter.after, 0

    def failing(batch: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        after(batch)

    monkeypatch.setattr(drafter, "after", failing)
    with pytest.raises(KeyboardInterrupt):
        model.generate_many(prompts, greedy)
    assert not drafter._rows and model.engine.scheduler.num_active_pages == 0
    assert tokens_of(model.generate_many(prompts, greedy)) == expected


def test_the_model_is_left_as_it_was(target: Any) -> None:
    model = copy.deepcopy(target)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    drafting(model, make_head(), num_pages=64).generate_many(make_prompts([5]), SAMPLINGS["greedy"])
    for name, module in model.named_modules():
        assert set(module.__dict__) - before[name] <= {"_hf_paged"}
    hf_paged.unwrap(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("how", ["autocast", "bfloat16", pytest.param("compiled", marks=pytest.mark.slow)])
def test_other_ways_to_compute(target: Any, how: str) -> None:
    """The head keeps its own precision, and compiled layers tell what they return as others do."""
    model = copy.deepcopy(target).to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    prompts, sampling = make_prompts([12, 5]), SAMPLINGS["top-p"]
    options = {"num_pages": 64, "compile": "layers" if how == "compiled" else "off"}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected = tokens_of(hf_paged.wrap(model, **options).generate_many(prompts, sampling))
        found = tokens_of(drafting(model, make_head(), **options).generate_many(prompts, sampling))
        engine = model.engine
    # In bfloat16 rows of a larger batch may round to another token; where they do, the rest differs too.
    same = sum(a == b for (x,), (y,) in zip(found, expected, strict=True) for a, b in zip(x, y, strict=False))
    assert same == 40 if how == "compiled" else same > 4
    assert engine.speculator.stats["eagle3"].num_drafts > 4
    assert (engine.executor._runner.compiled is not None) == (how == "compiled")


def test_sleep(target: Any) -> None:
    model = drafting(copy.deepcopy(target), make_head(), num_pages=64)
    prompts = make_prompts([12, 5])
    expected = tokens_of(model.generate_many(prompts, SAMPLINGS["greedy"]))
    model.engine.sleep()
    assert tokens_of(model.generate_many(prompts, SAMPLINGS["greedy"])) == expected
    assert model.engine.scheduler.num_active_pages == 0


# ---- drafts are the head's -----------------------------------------------------------------------------------------


def reference_draft(model: Any, head: Eagle3Head, tokens: list[int], count: int) -> list[int]:
    """Greedy, with every pair computed anew and attention as it is in books."""
    known: dict[str, list[Tensor]] = {"keys": [], "values": []}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        known["keys"].append(key)
        known["values"].append(value)
        keys, values = (torch.cat(known[name]).transpose(0, 1) for name in ("keys", "values"))
        later = len(keys[0]) - len(query)
        mask = torch.ones(len(query), len(keys[0])).tril(later).bool()
        out = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    embedding = (head.embed_tokens or model.get_input_embeddings()).weight
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        layers = [states[i + 1][0, :-1] for i in head.aux_layers(model.config.num_hidden_layers)]
        hidden = head.fuse(torch.cat(layers, dim=-1))
        positions = torch.arange(len(tokens) - 1)
        hidden = head(functional.embedding(torch.tensor(tokens[1:]), embedding), hidden, positions, attend)[-1:]
        draft: list[int] = []
        while True:
            draft.append(int(head.target_logits(hidden).argmax()))
            if len(draft) == count:
                return draft
            embedded = functional.embedding(torch.tensor(draft[-1:]), embedding)
            hidden = head(embedded, hidden, torch.tensor([len(tokens) + len(draft) - 2]), attend)


@pytest.mark.parametrize("budget", [64, 10])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "norm_before_residual": True}),
        ("Gemma2", {"target_hidden_size": 64, "hidden_size": 32, "head_dim": 16}),
    ],
)
def test_drafts_are_what_the_head_says(
    family: str, options: dict[str, Any], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family, num_hidden_layers=LAYERS)
    head = make_head(own_embedding="target_hidden_size" in options, **options)
    stock = copy.deepcopy(model)
    drafting(model, head, num_pages=64, page_size=4, max_num_batched_tokens=budget, max_num_seqs=4)
    drafter, seen = model.engine.executor.drafter, []
    draft = drafter.draft

    def watched(drafts: Any, *args: Any) -> Any:
        found = draft(drafts, *args)
        seen.extend((list(sequence.tokens), list(tokens)) for sequence, tokens in drafts.items())
        return found

    monkeypatch.setattr(drafter, "draft", watched)
    model.generate_many(make_prompts([3, 17, 30]), SAMPLINGS["greedy"].clone(max_tokens=9))
    assert len(seen) > 12 and len({tuple(tokens) for _, tokens in seen}) > 6
    for tokens, found in seen:
        assert found == reference_draft(stock, head, tokens, len(found))


def successor_target() -> Any:
    """A model whose tokens each have one successor, found by its embedding alone."""
    model = make_model("Llama", vocab_size=48, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    successor = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(48, 64))
        model.lm_head.weight.zero_()
        model.lm_head.weight[successor, torch.arange(48)] = 1.0
    return model, successor


def successor_head(successor: Tensor) -> Eagle3Head:
    """Finds the token in the first of its hidden states, and goes on from one to the next in its MLP."""
    count = len(successor)
    head = make_head(vocab_size=count, draft_vocab_size=count, intermediate_size=64)
    step = torch.eye(64)
    step[:count, :count] = 0
    step[successor, torch.arange(count)] = 1.0
    width = 64**0.5
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        head.fc.weight[:, :64] = step
        head.midlayer.mlp.gate_proj.weight.copy_(torch.eye(64))
        head.midlayer.mlp.up_proj.weight.copy_(torch.eye(64))
        scale = width * functional.silu(torch.tensor(width))
        head.midlayer.mlp.down_proj.weight.copy_((step - torch.eye(64)) / scale)
        head.lm_head.weight.copy_(torch.eye(count, 64))
    return head


def test_a_head_that_knows_is_accepted() -> None:
    model, successor = successor_target()
    drafting(model, successor_head(successor), num_pages=64, page_size=4)
    sampling = hf_paged.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    (output,) = model.generate_many([[7, 3]], sampling)
    stats = model.engine.speculator.stats["eagle3"]
    assert output.outputs[0].token_ids[0] == successor[3]
    assert stats.num_drafts == 3 and stats.num_accepted_tokens == stats.num_draft_tokens == 12


# ---- checkpoints and configuration ---------------------------------------------------------------------------------


def write_checkpoint(folder: Path, head: Eagle3Head, *, rename: Any = lambda name: name, drop: str = "") -> Path:
    """As published in pytorch_model.bin."""
    head.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    tensors = {rename(name): tensor for name, tensor in head.state_dict().items() if name != drop}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("own_embedding", [False, True])
def test_checkpoints_round_trip(tmp_path: Path, own_embedding: bool) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1234.0}
    head = make_head(own_embedding=own_embedding, rope_parameters=rope, attention_bias=True)
    head.save_pretrained(tmp_path / "safetensors")
    write_checkpoint(tmp_path / "bin", head)
    write_checkpoint(tmp_path / "counted", head, rename=lambda name: name.replace("midlayer.", "layers.0."))
    names = {"d2t", "t2d", "fc.weight", "norm.weight", "lm_head.weight", "midlayer.hidden_norm.weight"}
    assert names <= head.state_dict().keys()
    for kind in ("safetensors", "bin", "counted"):
        found = load_head(tmp_path / kind, torch.float32)
        assert found.config.rope_parameters == head.config.rope_parameters == rope
        torch.testing.assert_close(found._rotary.inv_freq, head._rotary.inv_freq)
        assert (found.embed_tokens is not None) == own_embedding
        for (name, tensor), (_, expected) in zip(found.state_dict().items(), head.state_dict().items(), strict=True):
            torch.testing.assert_close(tensor, expected, msg=name)
    assert load_head(tmp_path / "bin", torch.bfloat16)._rotary.inv_freq.dtype == torch.float32


def test_bad_checkpoints(tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, folder: Any) -> None:
        with pytest.raises(error, match=match):
            load_head(folder, torch.float32)

    head = make_head()
    refused(TypeError, "by its path or as an Eagle3Head, got int", 3)
    refused(FileNotFoundError, "neither a folder nor a repository", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, "neither .*safetensors nor pytorch_model.bin", tmp_path / "empty")
    folder = write_checkpoint(tmp_path / "missing", head, drop="midlayer.mlp.up_proj.weight")
    refused(ValueError, "pytorch_model.bin: the tensor midlayer.mlp.up_proj.weight .* is missing", folder)
    folder = write_checkpoint(tmp_path / "more", head, rename=lambda n: n.replace("norm.weight", "q_norm.weight"))
    refused(ValueError, "is missing", folder)
    folder = write_checkpoint(tmp_path / "shape", head)
    make_head(intermediate_size=88).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    refused(ValueError, r"mlp.gate_proj.weight must have the shape \[88, 64\] .* has \[80, 64\]", folder)
    folder = write_checkpoint(tmp_path / "d2t", head)
    tensors = torch.load(folder / "pytorch_model.bin") | {"d2t": torch.full((VOCAB // 2,), VOCAB)}
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(ValueError, "d2t leads out of the vocabulary", folder)
    torch.save(make_model("Llama").state_dict(), folder / "pytorch_model.bin")
    refused(ValueError, "does not hold an EAGLE-3 head", folder)


def test_what_the_tensors_of_a_checkpoint_must_be(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, make_head())
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save(tensors | {"midlayer.self_attn.q_norm.weight": torch.ones(16)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"q_norm\.weight has no place"):
        load_head(folder, torch.float32)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 32}, "target of hidden size 32, and LlamaForCausalLM has 64"),
        ({"vocab_size": 80, "draft_vocab_size": 40}, "vocabulary of 80 tokens, and LlamaForCausalLM has 160"),
        ({"target_hidden_size": 64, "hidden_size": 32, "head_dim": 16}, "cannot share the target's"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "reads layers .*9.* the target has 6"),
    ],
)
def test_heads_of_other_targets(target: Any, changes: dict[str, Any], match: str) -> None:
    model = copy.deepcopy(target)
    hf_paged.wrap(model, speculative_config={"method": "eagle3", "model": make_head(**changes)}, num_pages=8)
    with pytest.raises(ValueError, match=match):
        model.engine  # noqa: B018
    hf_paged.wrap(model, speculative_config=None).generate_many(make_prompts([4]), SAMPLINGS["greedy"])


def test_which_layers_are_read() -> None:
    assert make_head().aux_layers(32) == [1, 15, 28]
    named = "eagle_aux_hidden_state_layer_ids"
    assert make_head(**{named: [2, 18, 33]}).aux_layers(36) == [1, 17, 32]
    assert make_head(eagle_config={named: [1, 17, 32]}).aux_layers(36) == [1, 17, 32]
    with pytest.raises(ValueError, match=r"of its own choice .* the target has 3"):
        make_head().aux_layers(3)


def test_configuration(target: Any, tmp_path: Path) -> None:
    head = make_head()
    head.save_pretrained(tmp_path)
    model = drafting(copy.deepcopy(target), str(tmp_path), num_pages=64)
    model.generate_many(make_prompts([4]), SAMPLINGS["greedy"])
    assert model.engine.speculator.stats["eagle3"].num_drafts > 4
    with pytest.raises(ValueError, match='"eagle3" needs model='):
        hf_paged.wrap(model, speculative_config={"method": "eagle3"})
