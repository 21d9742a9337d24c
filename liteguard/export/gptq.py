"""Rounds a weight matrix so that its outputs on real inputs change least: GPTQ with fitted scales.

GPTQ (Frantar et al., arXiv:2210.17323) rounds one column after the other and moves each column's
error to the columns that are still open, as the inputs' second moments X^T X (the "Hessian") say.
Two things differ from the paper:

- a block's scale is chosen when its turn comes, by the error that GPTQ would make with it, instead
  of by its largest weight. On a small model this gains more than GPTQ itself;
- blocks take their turn from the strongest inputs to the weakest, and columns within a block too.
  A block stays a block, so the device's layout does not change.

Without inputs (a Hessian of None) what is left is the scale of least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Added to the Hessian's diagonal, as a share of its mean (the paper's value).
DAMPING = 0.01
# Scales to try, as shares of that which the largest weight asks for.
_SHARES = [0.45 + 0.03 * step for step in range(21)]
# Smallest scale: the smallest normal float16. A block of zeros would get 0, divide by it, and be
# refused by XNNPACK ("unsupported scale value (0.000000)").
SMALLEST = 2.0**-14
# The same for a scale of a whole row, a float32: far above its smallest normal number.
SMALLEST_OF_ROW = 1e-30
# Columns that are rounded before what they leave is added to all that follow.
_STEP = 128


@dataclass(frozen=True)
class Format:
    """How the device keeps a matrix: bits of a weight, and how many inputs share a scale.

    A block of 0 is a scale for each output, the layout of 8-bit weights.
    """

    bits: int
    block: int

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer, as ai-edge-quantizer clips."""
        top = 2 ** (self.bits - 1) - 1
        return -top - (self.block > 0), top

    def storable(self, scale: Tensor) -> Tensor:
        """Scales as a TFLite file keeps them: of blocks as float16, of outputs as float32."""
        return storable(scale) if self.block else scale.clamp_min(SMALLEST_OF_ROW)


def storable(scale: Tensor) -> Tensor:
    """Scales as a TFLite file keeps those of blocks: float16 with the 8 bits of a bfloat16."""
    import torch

    return scale.to(torch.bfloat16).to(torch.float16).to(torch.float32).clamp_min(SMALLEST)


def dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights (outputs x inputs) that the device computes with."""
    rows, columns = integers.shape
    blocks = integers.float().view(rows, scales.shape[1], columns // scales.shape[1])
    return (blocks * scales.unsqueeze(2)).view(rows, columns)


def fit_scales(block: Tensor, importance: Tensor, kind: Format) -> Tensor:
    """The storable scale of least weighted squared error for each column of `block`.

    Args:
        block: one block's weights, inputs x outputs.
        importance: what a squared error of each input counts.

    Returns one scale an output.
    """
    import torch

    low, high = kind.range
    whole = block.abs().amax(0) / high
    best = torch.full_like(whole, torch.inf)
    found = kind.storable(whole)
    for share in _SHARES:
        scale = kind.storable(whole * share)
        error = block - (block / scale).round_().clamp_(low, high).mul_(scale)
        lost = importance @ error.square_()
        better = lost < best
        best = torch.where(better, lost, best)
        found = torch.where(better, scale, found)
    return found


def _order(diagonal: Tensor, size: int) -> Tensor:
    """Inputs, block by block: strong blocks first, and strong inputs first within a block."""
    blocks = diagonal.view(-1, size)
    turns = blocks.mean(1).argsort(descending=True, stable=True)
    inside = blocks.argsort(dim=1, descending=True, stable=True)[turns]
    return (inside + turns.unsqueeze(1) * size).flatten()


def _inverse_root(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1.

    By the Cholesky factor from the other end, H = M M^T with M upper triangular: then U = M^-1,
    which takes half the work of inverting H and factoring the inverse. `hessian` is overwritten.
    """
    import torch
    from scipy.linalg import lapack

    diagonal = hessian.diagonal()
    damping = DAMPING * diagonal.mean().clamp_min(1e-12)
    while True:
        # Few rows leave a Hessian without full rank; float32 then needs more now and then.
        diagonal += damping
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            break
        damping = damping * 10
    upper = lower.flip(0, 1).contiguous()
    del lower
    # LAPACK keeps matrices by columns: an upper one by rows is a lower one to it.
    inverse, failed = lapack.strtri(upper.numpy().T, lower=1, overwrite_c=1)
    assert not failed  # the diagonal of a Cholesky factor is positive
    return torch.from_numpy(inverse.T)


def quantize(weight: Tensor, hessian: Tensor | None, kind: Format) -> tuple[Tensor, Tensor]:
    """Choose integers and scales for a matrix.

    Args:
        weight: float32, outputs x inputs; inputs are a multiple of the format's block (any for 0).
        hessian: sum of x x^T over the inputs x, inputs x inputs, overwritten; None: not known.
        kind: the device's format.

    Returns (int8 integers, outputs x inputs; storable float32 scales, outputs x blocks).
    """
    import torch

    outputs, inputs = weight.shape
    size = kind.block or inputs
    low, high = kind.range
    if hessian is None:
        order, root = torch.arange(inputs), None
    else:
        # An input that never came may be rounded as it likes.
        hessian.diagonal().copy_(hessian.diagonal().clamp_min(1e-12))
        order = _order(hessian.diagonal(), size)
        root = _inverse_root(hessian[order][:, order])
    rest = weight.t()[order].contiguous()
    integers = torch.empty(inputs, outputs, dtype=torch.int8)
    scales = torch.empty(inputs // size, outputs)
    scale = scales[0]
    for start, end in _steps(inputs, size):
        block = rest[start:end]
        inner = torch.eye(end - start) if root is None else root[start:end, start:end]
        if start % size == 0:
            of_scale = slice(start, start + size)
            weak = torch.ones(size) if root is None else root.diagonal()[of_scale].pow(-2)
            scale = fit_scales(rest[of_scale], weak, kind)
            scales[order[start] // size] = scale
        errors = torch.empty_like(block)
        for place in range(end - start):
            rounded = (block[place] / scale).round_().clamp_(low, high)
            integers[order[start + place]] = rounded.to(torch.int8)
            errors[place] = (block[place] - rounded * scale) / inner[place, place]
            if root is not None:
                block[place + 1 :].addr_(inner[place, place + 1 :], errors[place], alpha=-1)
        if root is not None and end < inputs:
            rest[end:].addmm_(root[start:end, end:].t(), errors, alpha=-1)
    return integers.t().contiguous(), scales.t().contiguous()


def _steps(inputs: int, size: int) -> list[tuple[int, int]]:
    """(first, end) of the columns to round in one go: a block, or a part of a longer one."""
    ends = [
        min(start + _STEP, block + size)
        for block in range(0, inputs, size)
        for start in range(block, block + size, _STEP)
    ]
    return list(zip([0, *ends], ends, strict=False))
