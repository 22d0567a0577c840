"""The scoring kernel: one launch over all (query, list) pairs, a program for each tile of a list's vectors.

It writes a *bound* for each vector: its score, made better by as much as rounding can have made it worse (`reference`
says by how much and why). What is best by its bound is scored again by Faiss, so that rounding decides nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from telerag_cli.tiers.cuda.reference import Launch

ROWS = 32
"""Vectors of a tile: with two sums for each number of it, as many as the registers hold."""
COLUMNS = 128
"""Numbers of each that are read at a time."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Of the compiler. A fused product and sum rounds once instead of twice, which the bound covers."""


# Numbers that change from search to search must not make Triton compile again.
@triton.jit(do_not_specialize=["count", "width", "relative"])
def _score(
    vectors,
    queries,
    low,
    step,
    pairs,
    count,
    first_tile_of,
    pair_of_tile,
    bounds,
    width,
    relative,
    absolute,
    DIMENSION: tl.constexpr,
    INT8: tl.constexpr,
    L2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    pair = tl.load(pair_of_tile + tile)
    query = tl.load(pairs + pair)
    size = tl.load(pairs + 2 * count + pair)
    # Slots begin at multiples of 4 KiB: with 1,024 numbers at least, loads of 16 bytes are aligned.
    first = tl.multiple_of(tl.load(pairs + count + pair), 1024)
    rows = (tile - tl.load(first_tile_of + pair)) * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    scores = tl.zeros((ROWS, COLUMNS), tl.float32)
    sizes = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DIMENSION, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        known = columns < DIMENSION
        asked = tl.load(queries + query * DIMENSION + columns, mask=known, other=0.0)
        places = first + rows[:, None] * DIMENSION + columns[None, :]
        held = tl.load(vectors + places, mask=inside[:, None] & known[None, :], other=0).to(tl.float32)
        if INT8:
            lows = tl.load(low + columns, mask=known, other=0.0)
            steps = tl.load(step + columns, mask=known, other=0.0)
            held = lows[None, :] + (held + 0.5) / 255.0 * steps[None, :]
        if L2:
            apart = asked[None, :] - held
            scores += apart * apart
        else:
            product = asked[None, :] * held
            scores += product
            sizes += tl.abs(product)
    score = tl.sum(scores, axis=1)
    extra = tl.load(absolute + query)
    if L2:
        bound = -(score - relative * score - tl.sqrt(score) * 2.0 * extra - extra * extra)
    else:
        bound = score + relative * tl.sum(sizes, axis=1) + extra
    tl.store(bounds + query * width + tl.load(pairs + 3 * count + pair) + rows, bound, mask=inside)


def launch(work: Launch) -> None:
    """See `reference.launch`."""
    tiles = -(-work.pairs[2] // ROWS)
    ends = torch.cumsum(tiles, 0)
    pair_of_tile = torch.repeat_interleave(tiles, output_size=work.tiles(ROWS))
    _score[(len(pair_of_tile),)](
        work.vectors,
        work.queries,
        work.low,
        work.step,
        work.pairs,
        work.pairs.shape[1],
        ends - tiles,
        pair_of_tile,
        work.bounds,
        work.bounds.stride(0),
        work.relative,
        work.absolute,
        DIMENSION=work.queries.shape[1],
        INT8=work.vectors.dtype == torch.uint8,
        L2=work.l2,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        **OPTIONS,
    )
