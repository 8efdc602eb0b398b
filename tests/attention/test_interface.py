"""The attention function as transformers calls it: with a batch riding along, and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_paged.attention.interface import (
    NAME,
    PROBE,
    attention_configs,
    packed_mask,
    paged_attention,
    probe_mask,
    use_paged_attention,
)
from hf_paged.kernels import reference

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large, so that attention is far from uniform and a lost mask is seen
}


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gemma2(sliding_window: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {
        "head_dim": 8,
        "sliding_window": sliding_window,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    }
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **options))


MODELS = [pytest.param(llama, "sdpa", id="llama"), pytest.param(gemma2, "eager", id="gemma2")]
"""How to make it, and the stock attention that computes all of it."""


def padded_batch(left: bool) -> tuple[Tensor, Tensor]:
    """ids, mask `[3, 9]` with 0, 3 and 5 places of padding on one side."""
    torch.manual_seed(1)
    mask = torch.arange(9)[None] >= torch.tensor([0, 3, 5])[:, None]
    mask = mask if left else mask.flip(1)
    return torch.randint(SIZES["vocab_size"], (3, 9)), mask.long()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(("make", "stock"), MODELS)
def test_training_forward_without_a_batch(make: Any, stock: str, left: bool) -> None:
    """Logits and gradients of a padded forward on our name are those of the stock attention."""
    model = make().train()
    ids, mask = padded_batch(left)
    # No loss on what padding predicts: a row that sees nothing means nothing.
    labels = ids.masked_fill(mask * mask.roll(1, 1) == 0, -100)
    results = {}
    for name in (stock, NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[name] = output.logits[mask.bool()], gradients
    torch.testing.assert_close(results[NAME][0], results[stock][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[NAME][1], results[stock][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("make", "stock"), MODELS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_forward_without_padding_and_with_a_cache(make: Any, stock: str, with_mask: bool) -> None:
    """No mask, or one of ones: transformers may leave the mask out; then a second forward continues from a cache."""
    model = make().eval()
    torch.manual_seed(2)
    ids = torch.randint(SIZES["vocab_size"], (2, 9))
    logits = {}
    for name in (stock, NAME):
        model.set_attn_implementation(name)
        options = [{"attention_mask": torch.ones(2, length).long()} if with_mask else {} for length in (6, 9)]
        with torch.no_grad():
            first = model(ids[:, :6], use_cache=True, **options[0])
            second = model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True, **options[1])
        logits[name] = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits[NAME], logits[stock], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "stock"), MODELS)
def test_padding_is_not_seen(make: Any, stock: str) -> None:
    """Other tokens under the padding change nothing."""
    model = make().eval()
    model.set_attn_implementation(NAME)
    ids, mask = padded_batch(left=True)
    other = torch.where(mask == 1, ids, (ids + 7) % SIZES["vocab_size"])
    with torch.no_grad():
        one, two = (model(input_ids=x, attention_mask=mask).logits[mask.bool()] for x in (ids, other))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(1, 6),
    context=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    softcap=st.sampled_from([None, 1.5, 20.0]),
    sinks=st.booleans(),
    given_mask=st.sampled_from(["none", "bool", "float"]),
    seed=st.integers(0, 1000),
)
def test_soft_caps_and_sinks_without_a_batch(
    queries: int,
    context: int,
    kv_heads: int,
    groups: int,
    softcap: float | None,
    sinks: bool,
    given_mask: str,
    seed: int,
) -> None:
    """What torch's own attention does not know is the reference's, whichever form the mask has."""
    generator = torch.Generator().manual_seed(seed)
    heads, total = kv_heads * groups, context + queries
    query = torch.randn(1, heads, queries, 8, generator=generator)
    key = torch.randn(1, kv_heads, total, 8, generator=generator)
    value = torch.randn(1, kv_heads, total, 6, generator=generator)
    aux = torch.randn(heads, generator=generator) if sinks else None
    seen = torch.ones(queries, total, dtype=torch.bool).tril(context)[None, None]
    if softcap is None and not sinks and given_mask == "none" and queries > 1 and context:
        given_mask = "bool"  # torch's own attention is told it is causal only when keys and queries begin together
    mask = {
        "none": None,
        "bool": seen,
        "float": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
    }[given_mask]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    out, weights = paged_attention(
        module.eval(), query, key, value, mask, scaling=0.4, softcap=softcap, **({"s_aux": aux} if sinks else {})
    )
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    expected = reference.attention(*rows, query_start=context, scaling=0.4, softcap=softcap, sinks=aux)
    assert weights is None
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


class Recorder:
    """Stands in for a batch: notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor, Tensor, float, dict[str, Any]]] = []

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        self.calls.append((module, query, key, value, scaling, options))
        return torch.cat([query, query], -1)[..., : value.shape[-1]]


def test_a_batch_gets_rows_and_options() -> None:
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 12)
    batch, module = Recorder(), nn.Module()
    options = {"sliding_window": 3, "softcap": 2.0}
    mask = packed_mask(query.device)
    out, weights = paged_attention(module, query, key, value, mask, paged=batch, **options)
    (call,) = batch.calls
    assert call[0] is module
    for got, whole in zip(call[1:4], (query, key, value), strict=True):
        assert torch.equal(got, whole[0].transpose(0, 1))
    assert call[4] == 8**-0.5
    assert {name: call[5][name] for name in options} == options
    assert call[5]["attention_mask"] is mask
    assert weights is None
    assert torch.equal(out, torch.cat([query, query], -1)[..., :12].transpose(1, 2))


@pytest.mark.parametrize(("make", "stock"), MODELS)
def test_a_batch_reaches_every_layer(make: Any, stock: str) -> None:
    model, batch = make().eval(), Recorder()
    ids, positions = torch.randint(SIZES["vocab_size"], (1, 5)), torch.tensor([[3, 0, 1, 2, 9]])
    with torch.no_grad(), use_paged_attention(attention_configs(model)):
        model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=packed_mask(ids.device),
            use_cache=False,
            paged=batch,
        )
    assert len({id(call[0]) for call in batch.calls}) == len(batch.calls) == SIZES["num_hidden_layers"]
    assert all(call[1].shape == (5, 4, 8) for call in batch.calls)


@pytest.mark.parametrize("window", [1, 4, 4096])
def test_probe_tells_each_layers_window(window: int) -> None:
    """Gemma 2's layers see a window and everything by turns, and so says the mask that transformers makes for each."""
    model, batch = gemma2(sliding_window=window).eval(), Recorder()
    with torch.no_grad(), use_paged_attention(attention_configs(model), PROBE):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, paged=batch)
    masks = [call[5]["attention_mask"] for call in batch.calls]
    assert [mask.problem for mask in masks] == [None] * 3
    kinds = model.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    assert [mask.window for mask in masks] == [window if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize(
    ("sees", "window", "problem"),
    [
        (lambda b, h, row, column: column <= row, None, None),
        (lambda b, h, row, column: (column <= row) & (column > row - 7), 7, None),
        (lambda b, h, row, column: column >= 0, None, "causal"),
        (lambda b, h, row, column: column < row, None, "causal"),
        (lambda b, h, row, column: (column <= row) & (column // 64 == row // 64), None, "sliding window"),
    ],
)
def test_probe_knows_what_is_no_window(sees: Any, window: int | None, problem: str | None) -> None:
    mask = probe_mask(mask_function=sees)
    if problem is None:
        assert (mask.window, mask.problem) == (window, None)
    else:
        assert problem in mask.problem


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("error", [None, RuntimeError, Stop])
def test_names_are_put_back(error: type[BaseException] | None) -> None:
    """Each config's own name, whatever happens inside, and also when one use lies inside another."""
    names = ["eager", "sdpa", None]
    configs = [LlamaConfig(**SIZES) for _ in names]
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation_internal = name
    try:
        with use_paged_attention(configs):
            assert [config._attn_implementation for config in configs] == [NAME] * 3
            with use_paged_attention(configs[:1]):
                pass
            assert configs[0]._attn_implementation == NAME
            if error is not None:
                raise error
    except (RuntimeError, Stop) as raised:
        assert type(raised) is error
    else:
        assert error is None
    assert [config._attn_implementation_internal for config in configs] == names


def test_exception_in_a_forward_puts_the_name_back() -> None:
    model = llama().eval()
    before = [config._attn_implementation for config in attention_configs(model)]

    class Failing(Recorder):
        def attend(self, *args: Any) -> Tensor:
            raise RuntimeError("kernel failed")

    ids = torch.zeros(1, 2, dtype=torch.long)
    with (
        pytest.raises(RuntimeError, match="kernel failed"),
        torch.no_grad(),
        use_paged_attention(attention_configs(model)),
    ):
        model(input_ids=ids, attention_mask=packed_mask(ids.device), use_cache=False, paged=Failing())
    assert [config._attn_implementation for config in attention_configs(model)] == before == ["sdpa"]


def test_attention_configs_are_distinct_and_live() -> None:
    """Every config that a layer reads, once: the layers of a plain model share the model's own."""
    model = gemma2()
    (config,) = attention_configs(model)
    assert config is model.config
    assert all(layer.self_attn.config is config for layer in model.model.layers)


def test_name_is_registered_with_transformers() -> None:
    assert AttentionInterface()[NAME] is paged_attention
