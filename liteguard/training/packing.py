"""Micro-batches without padding, in which no example sees another.

An optimizer step trains on the same examples as with padded rows, spread over micro-batches
(micro_batch.py). The model runs on their tokens only: `pack_forward` takes the padding out of every
batch that a trainer hands over, keeps positions and attention within each example, and puts the
results back where the trainer expects them. Loss and gradients are those of padded rows;
tests/test_packing.py compares them, and isolation.py looks at the model at hand before anything is
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from liteguard.training.tokens import TokenRows

if TYPE_CHECKING:
    import numpy as np
    import torch

SEGMENTS = "liteguard_segments"  # name of the attention below in transformers' registry
# On a CPU a micro-batch is filled up to a multiple of so many tokens. The C library looks for free
# memory among pieces of every size that was ever asked for; with a new length each time that takes
# longer and longer, with few lengths it does not (benchmarks/bench_allocator.py).
CPU_LENGTHS = 32
# Per-token results of TRL's forward that are handed back in the shape of the padded batch.
_PER_TOKEN = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")


class Lesson(NamedTuple):
    """What the base model expects at the targets of the soft training rows (teacher.py).

    starts: number of a row -> its first line in `expected`, which has a line for each of its
    targets in order: float16, shape (targets, hidden size + 1).
    """

    starts: dict[int, int]
    expected: np.ndarray

    def of(
        self, places: list[tuple[str, int]], labels: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What a batch of rows, (part, number) each, is given for its soft targets."""
        import numpy as np
        import torch
        from torch.nn.utils.rnn import pad_sequence

        soft, lines = [], []
        for (part, number), own in zip(places, labels, strict=True):
            taught = part == "train" and number in self.starts
            soft.append((own != -100) & taught)
            soft[-1][0] = False  # which nothing predicts
            if taught:
                first = self.starts[number]
                lines.append(self.expected[first : first + int(soft[-1].sum())])
        if not lines:
            return {}
        return {
            "soft": pad_sequence(soft, batch_first=True, padding_value=False),
            "expected": torch.from_numpy(np.concatenate(lines)),
        }


class Collator:
    """Makes the padded batch that trainers expect out of row numbers.

    An item is {"part": name of a TokenRows, "rows": row numbers}, with "weights" of the rows if
    `weigh_rows` shall weigh them. Returns `input_ids`, `attention_mask` and `labels`, int64, shape
    (rows, longest row), and `row_weights`, float32, shape (rows,), where there are any. Once
    `lesson` is set, the targets of soft training rows are what it says: `soft`, bool, shape of
    `labels`, marks them, `expected` has a line for each (`TargetScores`).
    """

    def __init__(self, parts: dict[str, TokenRows], pad_id: int):
        self.parts, self.pad_id = parts, pad_id
        self.lesson: Lesson | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        places = [(item["part"], index) for item in items for index in item["rows"]]
        rows = [self.parts[part].row(index) for part, index in places]
        ids, labels = ([torch.from_numpy(pair[column]) for pair in rows] for column in range(2))
        weights = {}
        if "weights" in items[0]:
            weights["row_weights"] = torch.tensor([w for item in items for w in item["weights"]])
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            **weights,
            **(self.lesson.of(places, labels) if self.lesson else {}),
        }


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one flattened sequence, by PyTorch's own kernels.

    query: (1, heads, tokens, head size); key and value may have fewer heads. Without
    `segment_lengths` (a padded batch, generation) it is transformers' `sdpa`. Nothing of another
    segment is ever multiplied, so there is neither a mask of tokens x tokens nor work for it. A
    layer with a `sliding_window` sees no further back than that; only segments that are longer
    need a mask of their own length.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segment_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # split, not slices: the gradient of each slice would be a tensor of the whole length.
    parts = [tensor.split(list(segment_lengths), dim=2) for tensor in (query, key, value)]
    window, attended = kwargs.get("sliding_window"), []
    for q, k, v in zip(*parts, strict=True):
        groups, rule = q.shape[1] // k.shape[1], {}
        if window and q.shape[2] > window:
            # A mask and grouped heads together would run in PyTorch's slowest kernel.
            k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
            rule = {"attn_mask": window_mask(q.shape[2], window, q.device)}
        else:
            rule = {"is_causal": True, "enable_gqa": groups > 1}
        attended.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, **rule
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Whether row attends to column: to itself and to the `window` - 1 tokens before it.

    bool, shape (length, length). Source: `sliding_window_overlay` of transformers' masking_utils.
    """
    import torch

    place = torch.arange(length, device=device)
    back = place[:, None] - place
    return (back >= 0) & (back < window)


def use_segment_attention(model: Any) -> None:
    """Let a transformers model that runs `sdpa` attend with `segment_attention`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
    model.set_attn_implementation(SEGMENTS)


def pack_forward(model: Any) -> None:
    """Take the padding out of every batch that `model.forward(..., fused_lm_head=True)` gets.

    `model` is a causal language model with TRL's fused head (or ours) already in place; its results
    come back in the shape of the padded batch, zero where there was padding.
    """
    import torch

    inner = model.forward
    segments = model.config._attn_implementation == SEGMENTS

    def forward(
        *args: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        soft: Any = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or args or attention_mask is None or attention_mask.ndim != 2:
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            named = {"attention_mask": attention_mask, "labels": labels, "soft": soft}
            for name, given in named.items():
                if given is not None:
                    kwargs[name] = given
            return inner(*args, input_ids=input_ids, **kwargs)
        keep = attention_mask.bool()
        positions = (keep.long().cumsum(1) - 1)[keep]
        first = positions == 0
        lengths = keep.sum(1).tolist()
        filled = 0
        if segments:
            if input_ids.device.type == "cpu":
                filled = -len(positions) % CPU_LENGTHS
            # A mask of four dimensions is passed through as it is; segment_attention needs none.
            kwargs["segment_lengths"] = [*lengths, filled] if filled else lengths
            kwargs["attention_mask"] = input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)

        def fill(values: torch.Tensor, value: int) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, filled), value=value)[None]

        outputs = inner(
            # The filling is a segment of its own, and nothing is learned from it.
            input_ids=fill(input_ids[keep], 0),
            position_ids=fill(positions, 0),
            # Nothing predicts the first token of an example, least of all the end of another one.
            labels=fill(labels[keep].masked_fill(first, -100), -100),
            **({} if soft is None else {"soft": fill(soft[keep], 0)}),
            fused_lm_head=True,
            **kwargs,
        )
        has_target = keep[:, 1:] & keep[:, :-1]
        inside = ~first[1:]

        def unpack(values: torch.Tensor) -> torch.Tensor:
            own = values[0][: len(inside)][inside]
            return values.new_zeros(has_target.shape).masked_scatter(has_target, own)

        for name in _PER_TOKEN:
            values = getattr(outputs, name, None)
            if values is not None:
                setattr(outputs, name, unpack(values))
        outputs.label_mask = unpack(outputs.label_mask)
        return outputs

    model.forward = forward


def weigh_rows(model: Any) -> None:
    """Multiply the log-probabilities of each row with the batch's `row_weights`, if it has any."""
    inner = model.forward

    def forward(*args: Any, row_weights: torch.Tensor | None = None, **kwargs: Any) -> Any:
        outputs = inner(*args, **kwargs)
        if row_weights is not None:
            outputs.log_probs = outputs.log_probs * row_weights[:, None]
        return outputs

    model.forward = forward


def add_noise(model: Any, alpha: float) -> None:
    """Add noise to the embeddings of training rows, of each row as if it were alone: NEFTune.

    Uniform between plus and minus alpha / sqrt(tokens of the row x hidden size) (Jain et al. 2023,
    arXiv:2310.05914, algorithm 1). transformers takes the length of the batch, padding included,
    and of a packed batch that is the sum of all rows: noise that shrinks with the batch.
    """
    import torch

    inner = model.forward
    scales: list[torch.Tensor] = []  # of the batch at hand, by row and place
    embedding = model.get_input_embeddings()

    def disturb(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not scales:
            return None
        scale = scales[-1]
        if output.shape[:2] != scale.shape:  # `pack_forward` has taken the padding out
            scale = scale[scale > 0]
            scale = torch.nn.functional.pad(scale, (0, output.shape[1] - len(scale)))[None]
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise.mul_(scale[..., None].to(output.dtype))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get("fused_lm_head") and model.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        mask = kwargs["attention_mask"]
        values = mask.sum(1, keepdim=True) * embedding.embedding_dim
        scales.append(alpha * mask / values.sqrt())
        try:
            return inner(*args, **kwargs)
        finally:
            scales.pop()

    embedding.register_forward_hook(disturb)
    model.forward = forward


def watch_losses(model: Any, on_bad_batch: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Call `on_bad_batch` with a training batch as soon as one of its log-probabilities is not
    finite, before anything is learned from it."""
    import torch

    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = inner(*args, **kwargs)
        scored = kwargs.get("fused_lm_head") and torch.is_grad_enabled()
        if scored and not outputs.log_probs.sum().isfinite():
            names = ("input_ids", "attention_mask", "labels")
            on_bad_batch({name: kwargs[name] for name in names if kwargs.get(name) is not None})
        return outputs

    model.forward = forward
