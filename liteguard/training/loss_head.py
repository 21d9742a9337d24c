"""The vocabulary head in tiles: log-probabilities of targets without a matrix of all logits."""

from __future__ import annotations

from typing import Any

import torch

# Entries of the vocabulary at a time: a tile's logits, and the part of the head that they come
# from, are still in the processor's cache when they are used again (docs/experiments.md).
TILE = 2048


class TargetScores(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] for each row, and what trainers log beside it.

    For a frozen head: the only gradient is that of `hidden`, weight[target] - softmax @ weight,
    which needs the softmax of its own row only. It is computed while the logits are at hand, tile
    by tile of the vocabulary: sums over exp(logit - largest so far) are scaled down when a larger
    logit turns up (Milakov and Gimelshein 2018, arXiv:1805.02867). So the backward pass is a
    product with the incoming gradient, and nothing of the size of the vocabulary ever exists.

    hidden: (rows, hidden size); weight: (vocabulary, hidden size); bias: (vocabulary,) or None;
    targets: (rows,). Returns float32 (rows,) log-probability, entropy, mean logit, and bool (rows,)
    whether the target has the largest logit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        rows, differentiable = len(hidden), ctx.needs_input_grad[0]
        top = hidden.new_full((rows, 1), -torch.inf, dtype=torch.float32)
        total, weighted, logit_sum, picked = (torch.zeros_like(top) for _ in range(4))
        pulled: Any = torch.zeros_like(hidden, dtype=torch.float32) if differentiable else None
        given = hidden.to(weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(weight), TILE):
                tile = slice(start, start + TILE)
                part = weight[tile]
                logits = torch.nn.functional.linear(
                    given, part, None if bias is None else bias[tile]
                ).float()
                inside = (targets >= start) & (targets < start + len(part))
                picked[inside, 0] = logits[inside, targets[inside] - start]
                logit_sum += logits.sum(-1, keepdim=True)
                before, top = top, torch.maximum(top, logits.amax(-1, keepdim=True))
                powers, smaller = (logits - top).exp_(), (before - top).exp_()
                total.mul_(smaller).add_(powers.sum(-1, keepdim=True))
                weighted.mul_(smaller).add_(logits.mul_(powers).sum(-1, keepdim=True))
                if differentiable:
                    pulled.mul_(smaller).add_(powers.to(part.dtype) @ part)
        log_total = top + total.log()
        entropy = log_total - weighted / total
        found = (picked - log_total, entropy, logit_sum / len(weight), picked >= top)
        results = tuple(column[:, 0] for column in found)
        if differentiable:
            ctx.save_for_backward((weight[targets] - pulled / total).to(hidden.dtype))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
        (direction,) = ctx.saved_tensors
        return (gradient[:, None] * direction).to(direction.dtype), None, None, None
