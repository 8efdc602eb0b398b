"""Scales of KV heads around a backend that knows of none: queries, keys, values and outputs are multiplied instead."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import make_case, make_shape

from hf_paged.attention.backend import AttentionBackend, LayerSpec
from hf_paged.attention.torch_backend import TorchBackend
from hf_paged.kernels import reference
from hf_paged.model.runner import _Layer, _Step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
KEYS, VALUES = (2.0**-12, 8.0), (64.0, 2.0**-9)
"""Of two KV heads."""


def triton_backend() -> AttentionBackend:
    pytest.importorskip("triton")
    from hf_paged.attention.triton_backend import TritonBackend

    return TritonBackend(DEVICE)


@pytest.mark.parametrize("make_backend", [lambda: TorchBackend(DEVICE), triton_backend], ids=["torch", "triton"])
@pytest.mark.parametrize("heads", [((), ()), (KEYS, ()), ((), VALUES), (KEYS, VALUES)])
def test_a_layer_attends_to_what_is_stored_times_its_heads_scales(make_backend: object, heads: tuple) -> None:
    backend: AttentionBackend = make_backend()  # type: ignore[operator]
    spec = LayerSpec(
        index=0, num_heads=6, num_kv_heads=2, key_dim=16, value_dim=16, scaling=0.25, window=9,
        key_scale=0.5, value_scale=2.0, key_head_scales=heads[0], value_head_scales=heads[1],
    )  # fmt: skip
    shape = make_shape(4, [(13, 0, 0), (6, 0, 1), (9, 0, 0)], [(5, 6, 0, 1), (0, 7, 0, 0)], "scattered", seed=2)
    case = make_case(shape, [spec], layout=backend.layout, dtype=torch.float32, seed=3, strangers=100.0)
    one = case.layers[0]
    columns = [torch.tensor(h or (1.0, 1.0), device=DEVICE)[:, None] for h in heads]
    factors = [column * scale for column, scale in zip(columns, (0.5, 2.0), strict=True)]
    # Rows that FP8 holds exactly, so that it does not matter who rounds them; a query that suits such keys.
    rows = [x.to(FP8).float().to(DEVICE) * f for x, f in zip((one.key, one.value), factors, strict=True)]
    pools = [(pool / 100).to(FP8).to(DEVICE) for pool in (one.key_pool, one.value_pool)]
    query = one.query.to(DEVICE) / factors[0].repeat_interleave(3, 0)
    step = _Step()
    step.attend = functools.partial(backend.run, backend.plan(case.batch, [spec]))
    out = _Layer(step, spec, *pools).run(query, *rows, None)
    real = []
    for pool, factor in zip(pools, factors, strict=True):
        real.append(pool.float() * (factor if backend.layout == "NHD" else factor[:, None]))
    expected = reference.paged_attention(
        query, *real, case.sequences, layout=backend.layout, scaling=spec.scaling, window=spec.window
    )
    size = factors[1].repeat_interleave(3, 0)
    torch.testing.assert_close(out / size, expected / size, rtol=1e-4, atol=1e-4)
