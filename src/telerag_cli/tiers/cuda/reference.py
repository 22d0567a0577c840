"""The scoring kernel's contract and its plain form in torch: the reference, and what runs where there is no Triton.

Rounding. A sum of D products in float32 is off by at most ``D u / (1 - D u)`` times the sum of their magnitudes,
whatever the order of summation, with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
Both this sum and Faiss's are, so their difference is at most twice that; `RELATIVE` has some to spare for the last
steps. All terms of a squared distance are positive, so there the magnitudes are the sum itself. An ``int8`` code is
decoded as Faiss's ``SQ8`` does, ``low + (code + 0.5) / 255 * step``, each decoding off by a few u of ``|low| +
|step|``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from telerag_cli.arrays import IntArray

U = 2.0**-24
SPARE = 8


@dataclass(frozen=True)
class Launch:
    """Everything that one launch reads and writes, on one device; P pairs of a query and a list."""

    vectors: torch.Tensor
    """The arena as float32, float16 or uint8 numbers."""
    queries: torch.Tensor
    """float32 (n, dimension)."""
    low: torch.Tensor
    step: torch.Tensor
    """For uint8: float32 (dimension,) each. Else anything."""
    pairs: torch.Tensor
    """int64 (4, P): of each pair the query's row; the number in the arena at which the list begins, a multiple of
    1,024; the vectors in the list; and the column of the query's bounds at which the list's begin."""
    bounds: torch.Tensor
    """Written: float32 (n, width), larger is better; what no list covers is left."""
    absolute: torch.Tensor
    """float32 (n,): what decoding adds to the error."""
    l2: bool
    host_sizes: IntArray
    """The sizes once more, where the device need not be asked for them."""

    @property
    def relative(self) -> float:
        """Rounding of the sum, as a share of its terms' magnitudes."""
        return 2 * (self.queries.shape[1] + SPARE) * U

    def tiles(self, rows: int) -> int:
        """Tiles of so many rows."""
        return int((-(-self.host_sizes // rows)).sum())


def decoding_error(queries: torch.Tensor, low: torch.Tensor, step: torch.Tensor, *, l2: bool) -> torch.Tensor:
    """`Launch.absolute` of ``int8``, float32 (n,), for `queries`, `low` and `step` as in `Launch`.

    A bound: for IP on the error of the score, for L2 on that of the difference's length.
    """
    each = 2 * SPARE * U * (low.abs() + step.abs())
    if l2:
        length: torch.Tensor = torch.linalg.vector_norm(each)
        return length.expand(len(queries)).contiguous()
    error: torch.Tensor = (queries.abs() * each).sum(dim=1)
    return error


def launch(work: Launch) -> None:
    """Write each pair's bounds: no worse than the score that Faiss computes, and worse by little if at all.

    For inner product a bound is at least the score; for L2 it is at least the negated distance.
    """
    dimension = work.queries.shape[1]
    for query, first, size, column in work.pairs.t().tolist():
        held = work.vectors[first : first + size * dimension].view(size, dimension).float()
        if work.vectors.dtype == torch.uint8:
            held = work.low + (held + 0.5) / 255.0 * work.step
        asked, extra = work.queries[query], work.absolute[query]
        if work.l2:
            score = (asked - held).square().sum(dim=1)
            bound = -(score - work.relative * score - score.sqrt() * 2 * extra - extra * extra)
        else:
            product = asked * held
            bound = product.sum(dim=1) + work.relative * product.abs().sum(dim=1) + extra
        work.bounds[query, column : column + size] = bound
