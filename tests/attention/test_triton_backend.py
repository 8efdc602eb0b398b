"""TritonBackend against the reference, over random steps: on the GPU, or in Triton's interpreter (with tiny shapes)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, LayerCase, as_verification, cases, check, make_batch, make_case, make_shape, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hf_paged.attention.backend import CapturedDecode, DecodeBuffers, LayerSpec
from hf_paged.attention.triton_backend import TritonBackend
from hf_paged.kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
BFLOAT16 = {"rtol": 0.05, "atol": 0.05}
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")

small = shapes(page_sizes=(1, 4, 16), max_decodes=4, max_spans=2)


def layer(**changes: object) -> LayerSpec:
    base = {"index": 0, "num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "scaling": 8**-0.5}
    return LayerSpec(**(base | changes))  # type: ignore[arg-type]


# ---- plan and run ----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(case=cases(layout="NHD", shape=small))
def test_float32(case: Case) -> None:
    check(TritonBackend(DEVICE), case, DEVICE, **FLOAT32)


@pytest.mark.cuda
@needs_cuda
@settings(max_examples=25, deadline=None)
@given(case=cases(layout="NHD", dtype=torch.bfloat16, head_dims=((64, 64), (80, 80), (128, 64))))
def test_bfloat16(case: Case) -> None:
    check(TritonBackend(DEVICE), case, DEVICE, **BFLOAT16)


def test_layers_with_different_groups_and_windows() -> None:
    """A plan holds a set of tiles for each group size."""
    shape = make_shape(4, [(30, 0, 0), (29, 0, 5)], [(9, 30, 0, 2), (0, 25, 0, 0)], "scattered", seed=0)
    specs = [layer(), layer(index=1, num_heads=6, window=7), layer(index=2, num_kv_heads=4, softcap=3.0, sinks=True)]
    case = make_case(shape, specs, layout="NHD", dtype=torch.float32, seed=3, strangers=float("nan"))
    check(TritonBackend(DEVICE), case, DEVICE, **FLOAT32)


def test_pools_of_float8() -> None:
    """Rows are divided by the layer's scales as they are written, and multiplied by them as they are read."""
    shape = make_shape(4, [(30, 0, 0), (29, 0, 5)], [(9, 6, 0, 2)], "scattered", seed=0)
    spec = layer(key_scale=0.25, value_scale=2.0)
    case = make_case(shape, [spec], layout="NHD", dtype=torch.float32, seed=3, strangers=1e4)
    one = case.layers[0]
    # Numbers that float8 holds exactly, so that it does not matter who rounds them.
    scales = one.spec.key_scale, one.spec.value_scale
    new = [(x.to(FP8).float() * scale).to(DEVICE) for x, scale in zip((one.key, one.value), scales, strict=True)]
    pools = [(pool / 100).to(FP8).to(DEVICE) for pool in (one.key_pool, one.value_pool)]
    backend = TritonBackend(DEVICE)
    plan = backend.plan(case.batch, [spec])
    out = backend.run(plan, spec, one.query.to(DEVICE), *new, *pools, None)
    real = []
    for pool, rows, scale in zip(pools, new, scales, strict=True):
        written = pool.float()[case.batch.write_pages, case.batch.write_offsets] * scale
        assert torch.equal(written, rows)
        real.append(pool.float() * scale)
    expected = reference.paged_attention(
        one.query.to(DEVICE), *real, case.sequences, layout="NHD", scaling=spec.scaling
    )
    torch.testing.assert_close(out, expected, **FLOAT32)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("context", [0, 3, 30])
def test_decode_rows_of_one_sequence(context: int, window: int | None) -> None:
    """They see what the others of them write in the same step, up to their own place."""
    shape = make_shape(4, [], [(context, 6, 0, 0)], "scattered", seed=1)
    spec = layer(window=window)
    case = make_case(shape, [spec], layout="NHD", dtype=torch.float32, seed=3, strangers=float("nan"))
    check(TritonBackend(DEVICE), as_verification(case), DEVICE, **FLOAT32)


def test_plan_leaves_the_batch_alone() -> None:
    """The block table is a view of the engine's own."""
    shape = make_shape(2, [(7, 0, 0), (6, 0, 2)], [(3, 4, 0, 1)], "scattered", seed=4)
    batch, same = make_batch(shape, seed=5), make_batch(shape, seed=5)
    TritonBackend(DEVICE).plan(batch, [layer(window=3), layer(index=1)])
    for name in ("decode_lengths", "decode_pages", "write_pages", "write_offsets"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(same, name))
    for span, other in zip(batch.spans, same.spans, strict=True):
        np.testing.assert_array_equal(span.pages, other.pages)


@pytest.mark.cuda
@needs_cuda
def test_run_does_not_wait_for_the_device() -> None:
    shape = make_shape(16, [(100, 0, 0), (29, 0, 1)], [(9, 60, 0, 0)], "scattered", seed=4)
    specs = [layer(num_heads=8, key_dim=64, value_dim=64, scaling=0.125)]
    case = make_case(shape, specs, layout="NHD", dtype=torch.bfloat16, seed=3, strangers=1e4)
    check(TritonBackend(DEVICE), case, DEVICE, **BFLOAT16)  # compiles
    one, backend = case.layers[0], TritonBackend(DEVICE)
    tensors = [x.to(DEVICE) for x in (one.query, one.key, one.value, one.key_pool, one.value_pool)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.run(backend.plan(case.batch, specs), specs[0], *tensors, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- capture_decode --------------------------------------------------------------------------------------------

PADDING = 2


@st.composite
def pairs_of_decodes(draw) -> tuple[Case, Case]:
    """Two steps with equally many decodes of the same layers, and nothing else."""
    size, count = draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 4))
    decode = st.tuples(st.integers(0, 5 * size + 5), st.integers(0, 7), st.integers(0, 3))
    pair = [draw(st.lists(decode, min_size=count, max_size=count)) for _ in range(2)]
    first = draw(cases(layout="NHD", shape=st.just(make_shape(size, pair[0], [], "shuffled", seed=1))))
    shape = make_shape(size, pair[1], [], "scattered", seed=draw(st.integers(0, 99)))
    specs = [layer.spec for layer in first.layers]
    second = make_case(shape, specs, layout="NHD", dtype=torch.float32, seed=7, strangers=float("nan"))
    return first, second


def make_buffers(pair: tuple[Case, Case], rows: int) -> DecodeBuffers:
    """Buffers for either step."""
    columns = max(case.batch.decode_pages.shape[1] for case in pair)

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*sizes, dtype=dtype, device=DEVICE)

    return DecodeBuffers(
        page_size=pair[0].batch.page_size,
        slots=empty(rows),
        lengths=empty(rows),
        write_rows=empty(rows, dtype=torch.int64),
        block_table=empty(rows + 3, columns),
        page_indptr=empty(rows + 1),
        page_indices=empty(rows * columns),
        last_page_lengths=empty(rows),
    )


def fill(buffers: DecodeBuffers, case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes a step over the buffers' contents; gives what `CapturedDecode.plan` is told."""
    batch, rows = case.batch, len(buffers.slots)
    count, size = batch.num_decodes, batch.page_size
    slots = np.random.default_rng(seed).permutation(len(buffers.block_table))[:rows]
    table = torch.zeros_like(buffers.block_table, device="cpu")
    table[slots[:count], : batch.decode_pages.shape[1]] = torch.from_numpy(batch.decode_pages)
    lengths = np.concatenate([batch.decode_lengths, np.ones(rows - count, dtype=np.int64)])
    places = np.concatenate([batch.write_pages * size + batch.write_offsets, np.full(rows - count, -1)])
    pages = -(-lengths // size)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    last = (lengths - (pages - 1) * size).astype(np.int32)
    indices = torch.cat([table[slot, :number] for slot, number in zip(slots, pages, strict=True)])
    for buffer, content in (
        (buffers.slots, torch.from_numpy(slots)),
        (buffers.lengths, torch.from_numpy(lengths)),
        (buffers.write_rows, torch.from_numpy(places)),
        (buffers.block_table, table),
        (buffers.page_indptr, torch.from_numpy(indptr)),
        (buffers.page_indices[: len(indices)], indices),
        (buffers.last_page_lengths, torch.from_numpy(last)),
    ):
        buffer.copy_(content)
    return indptr, last


def inputs_of(one: LayerCase, rows: int, num_pages: int) -> list[Tensor]:
    """Query, key, value with rows of padding, and the pools with pages to spare."""
    padded = [torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), 3.0)]) for x in (one.query, one.key, one.value)]
    pools = [
        torch.cat([x, x.new_full((num_pages - len(x), *x.shape[1:]), float("nan"))])
        for x in (one.key_pool, one.value_pool)
    ]
    return [x.to(DEVICE) for x in padded + pools]


def check_captured(
    pair: tuple[Case, Case],
    make_step: Callable[[Callable[[], Tensor]], Callable[[], Tensor]],
    *,
    rtol: float,
    atol: float,
) -> None:
    """Captures over the first step's contents, then runs each step in the same buffers, the first one twice."""
    rows = pair[0].batch.num_decodes + PADDING
    buffers, specs = make_buffers(pair, rows), [one.spec for one in pair[0].layers]
    captured: CapturedDecode = TritonBackend(DEVICE).capture_decode(buffers, specs)
    num_pages = max(len(case.layers[0].key_pool) for case in pair)
    for number, spec in enumerate(specs):
        fill(buffers, pair[0], seed=0)
        tensors = inputs_of(pair[0].layers[number], rows, num_pages)
        sinks = pair[0].layers[number].sinks
        sinks = None if sinks is None else sinks.to(DEVICE, copy=True)
        step = make_step(lambda spec=spec, tensors=tensors, sinks=sinks: captured.run(spec, *tensors, sinks))
        for seed, case in enumerate((*pair, pair[0])):
            one, count = case.layers[number], case.batch.num_decodes
            captured.plan(*fill(buffers, case, seed))
            for tensor, content in zip(tensors, inputs_of(one, rows, num_pages), strict=True):
                tensor.copy_(content)
            if sinks is not None and one.sinks is not None:
                sinks.copy_(one.sinks)
            out = step()
            assert out.shape == (rows, spec.num_heads, spec.value_dim) and out.dtype == one.query.dtype
            torch.testing.assert_close(out[:count].float().cpu(), one.expected, rtol=rtol, atol=atol)
            for pool, after in zip(tensors[3:], (one.key_pool_after, one.value_pool_after), strict=True):
                torch.testing.assert_close(pool[: len(after)].cpu(), after, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=15, deadline=None)
@given(pair=pairs_of_decodes())
def test_captured_decode(pair: tuple[Case, Case]) -> None:
    check_captured(pair, lambda step: step, **FLOAT32)


def test_decodes_append_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured or not, a step of nothing but decodes has no launch for it."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("append_kv was called")

    monkeypatch.setattr("hf_paged.attention.triton_backend.append_kv", fail)
    shape = make_shape(4, [(9, 0, 0), (0, 0, 1), (7, 0, 0)], [], "scattered", seed=1)
    case = make_case(shape, [layer()], layout="NHD", dtype=torch.float32, seed=2, strangers=float("nan"))
    check(TritonBackend(DEVICE), case, DEVICE, **FLOAT32)
    check_captured((case, case), lambda step: step, **FLOAT32)


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph."""
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.cuda
@needs_cuda
@settings(max_examples=10, deadline=None)
@given(pair=pairs_of_decodes())
def test_captured_decode_in_a_graph(pair: tuple[Case, Case]) -> None:
    check_captured(pair, record, **FLOAT32)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("window", [None, 100])
def test_captured_decode_in_a_graph_in_bfloat16(window: int | None) -> None:
    """Captured over short sequences, replayed over long ones."""
    spec = layer(num_heads=8, key_dim=128, value_dim=128, scaling=128**-0.5, window=window)
    short, long = (
        make_case(
            make_shape(16, [(context, 0, 0) for context in contexts], [], "scattered", seed=1),
            [replace(spec)], layout="NHD", dtype=torch.bfloat16, seed=2, strangers=float("nan"),
        )
        for contexts in ((0, 5, 17, 3), (1500, 0, 640, 63))
    )  # fmt: skip
    check_captured((short, long), record, **BFLOAT16)
