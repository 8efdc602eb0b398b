"""What a decode step needs to know, worked out on the device from what the host uploads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prepare_decode(
    token_ids,
    sources,
    previous,
    slots,
    lengths,
    page_indptr,
    block_table,
    table_stride,
    input_ids,
    positions,
    write_rows,
    page_indices,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    source = tl.load(sources + row)
    token = tl.load(token_ids + row).to(tl.int64)
    sampled = tl.load(previous + tl.maximum(source, 0), mask=source >= 0, other=0)
    # -1 stands for a token that could not be sampled; its sequence ends when the host sees that.
    tl.store(input_ids + row, tl.maximum(tl.where(source >= 0, sampled, token), 0))

    position = tl.load(lengths + row) - 1
    tl.store(positions + row, position.to(tl.int64))
    pages = block_table + tl.load(slots + row).to(tl.int64) * table_stride
    page = tl.load(pages + position // PAGE_SIZE).to(tl.int64)
    tl.store(write_rows + row, tl.where(source == -2, -1, page * PAGE_SIZE + position % PAGE_SIZE))

    begin = tl.load(page_indptr + row)
    count = tl.load(page_indptr + row + 1) - begin
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(page_indices + begin + index, tl.load(pages + index, mask=index < count), mask=index < count)


def prepare_decode(
    token_ids: Tensor,
    sources: Tensor,
    previous: Tensor,
    slots: Tensor,
    lengths: Tensor,
    page_indptr: Tensor,
    block_table: Tensor,
    page_size: int,
    *,
    input_ids: Tensor,
    positions: Tensor,
    write_rows: Tensor,
    page_indices: Tensor,
) -> None:
    """Fills a decode step's inputs for N rows. The grid depends on N alone, so it can be captured.

    Args:
        token_ids: int32 `[N]`, the tokens that the host knows.
        sources: int32 `[N]`: the place in `previous` of the row's token; -1: it is in `token_ids`; -2: the row is
            padding.
        previous: int64 `[S]`, tokens sampled by the step before.
        slots: int32 `[N]`, rows of `block_table`.
        lengths: int32 `[N]`, tokens with this step's included.
        page_indptr: int32 `[N + 1]`, where each row's pages go in `page_indices`.
        block_table: int32 `[slots, pages]`.
        input_ids, positions, write_rows: int64 `[N]`, results; a write row is `page * page_size + offset`, -1 for
            padding.
        page_indices: int32, result: the rows' pages laid end to end.
    """
    _prepare_decode[(len(slots),)](
        token_ids,
        sources,
        previous,
        slots,
        lengths,
        page_indptr,
        block_table,
        block_table.stride(0),
        input_ids,
        positions,
        write_rows,
        page_indices,
        PAGE_SIZE=page_size,
        BLOCK=128,
        num_warps=4,
    )


@triton.jit
def _write_table(writes, count, block_table, table_stride, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < tl.load(count)
    slot = tl.load(writes + index * 3, mask=valid).to(tl.int64)
    place = tl.load(writes + index * 3 + 1, mask=valid)
    tl.store(block_table + slot * table_stride + place, tl.load(writes + index * 3 + 2, mask=valid), mask=valid)


def write_block_table(writes: Tensor, count: Tensor, block_table: Tensor) -> None:
    """Enters pages into the table. The grid depends on the room for them alone, so it can be captured.

    Args:
        writes: int32 `[3 * W]`: (slot, place in the row, page) each; if several are for one place they must agree.
        count: int32 `[1]`, how many of the W there are.
        block_table: int32 `[slots, pages]`.
    """
    block = 256
    _write_table[(triton.cdiv(len(writes) // 3, block),)](
        writes, count, block_table, block_table.stride(0), BLOCK=block, num_warps=4
    )
