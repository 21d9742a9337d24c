"""The vocabulary head in tiles: log-probabilities of targets without a matrix of all logits."""

from __future__ import annotations

from typing import Any

import torch

# Entries of the vocabulary at a time: a tile's logits, and the part of the head that they come
# from, are still in the processor's cache when they are used again (docs/experiments.md).
TILE = 2048
# Positions at a time whose distribution is written out in full: 100 MB for a vocabulary of 50,000.
TAUGHT = 256

# Attributes by which a model's head does more than one linear layer; TRL knows how, we do not.
_SPECIAL_HEADS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)


def is_special(architecture: Any) -> bool:
    """Whether a transformers config's head is more than one linear layer."""
    text = architecture.get_text_config()
    return any(getattr(text, name, None) for name in _SPECIAL_HEADS)


class TargetScores(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] for each row, and what trainers log beside it.

    For a frozen head: the only gradient is that of `hidden`, weight[target] - softmax @ weight,
    which needs the softmax of its own row only. It is computed while the logits are at hand, tile
    by tile of the vocabulary: sums over exp(logit - largest so far) are scaled down when a larger
    logit turns up (Milakov and Gimelshein 2018, arXiv:1805.02867). So the backward pass is a
    product with the incoming gradient, and nothing of the size of the vocabulary ever exists.

    A target may be a distribution p instead of a token. Its score, the sum of p x log softmax, is
    hidden @ (p @ weight) + p @ bias less the logarithm of the sum of exp(logit), and p @ weight
    takes the place of weight[target] in the gradient: what `expected_rows` says of p is all that is
    needed.

    hidden: (rows, hidden size); weight: (vocabulary, hidden size); bias: (vocabulary,) or None;
    targets: (rows,); soft: bool (rows,), which rows' targets are distributions, or None; expected:
    (soft rows, hidden size + 1), `expected_rows` of them. Returns float32 (rows,) log-probability,
    entropy, mean logit, and bool (rows,) whether the token of `targets` has the largest logit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        soft: torch.Tensor | None = None,
        expected: torch.Tensor | None = None,
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
        log_total, is_top = top + total.log(), picked >= top
        wanted = weight[targets] if differentiable else None
        if soft is not None and expected is not None:
            means, constant = expected.float().split([hidden.shape[1], 1], dim=-1)
            picked[soft] = (given[soft].float() * means).sum(-1, keepdim=True) + constant
            if wanted is not None:
                wanted = wanted.float()
                wanted[soft] = means
        entropy = log_total - weighted / total
        found = (picked - log_total, entropy, logit_sum / len(weight), is_top)
        results = tuple(column[:, 0] for column in found)
        if wanted is not None:
            ctx.save_for_backward((wanted - pulled / total).to(hidden.dtype))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
        (direction,) = ctx.saved_tensors
        found = (gradient[:, None] * direction).to(direction.dtype)
        return found, None, None, None, None, None


def expected_rows(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The mean row of a head, and of its bias, under the distribution that hidden states give.

    hidden: (rows, hidden size), weight and bias as in `TargetScores`. Returns float32, shape
    (rows, hidden size + 1): p @ weight and p @ bias, with p = softmax(hidden @ weight.T + bias).
    """
    found = hidden.new_zeros((len(hidden), hidden.shape[1] + 1), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), TAUGHT):
            own = slice(start, start + TAUGHT)
            logits = torch.nn.functional.linear(hidden[own].to(weight.dtype), weight, bias)
            chances = logits.float().softmax(-1)
            found[own, :-1] = (chances.to(weight.dtype) @ weight).float()
            if bias is not None:
                found[own, -1] = chances @ bias.float()
    return found
