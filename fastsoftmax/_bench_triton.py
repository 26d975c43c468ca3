"""A fused softmax in Triton, as one would write it by hand: a program holds a row. It is a peer in the benchmark."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(x: Any, y: Any, n_cols: Any, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * n_cols
    columns = tl.arange(0, BLOCK)
    inside = columns < n_cols
    values = tl.load(x + row + columns, mask=inside, other=-float("inf")).to(tl.float32)
    terms = tl.exp(values - tl.max(values, axis=0))
    tl.store(y + row + columns, (terms / tl.sum(terms, axis=0)).to(y.dtype.element_ty), mask=inside)


def row_softmax(x: Any, out: Any) -> None:
    """Compute the softmax of the rows of a contiguous Torch array, of up to 65,536 elements each."""
    n_cols = x.shape[-1]
    if n_cols > 65_536:
        raise ValueError("a row does not fit in the registers of a program")
    block = triton.next_power_of_2(n_cols)
    n_warps = min(max(block // 1024, 4), 32)
    _kernel[(x.numel() // n_cols,)](x, out, n_cols, BLOCK=block, num_warps=n_warps)
