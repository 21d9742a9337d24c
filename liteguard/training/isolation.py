"""Whether packed rows may be trained on: the model at hand gives them what it gives each alone.

Attention differs from layer to layer and from model to model (sliding windows, chunks, states that
are carried along). What packing does not know of would train in silence on other numbers, so the
loaded model is asked, over more tokens than its windows, before and after it is packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from liteguard import distributed
from liteguard.errors import WorkError
from liteguard.training import packing

if TYPE_CHECKING:
    import torch

# Tokens of a row where no window asks for more.
CHECK_TOKENS = 48
# Layers that look at nothing but the tokens that attention within a segment lets them see.
_KNOWN_LAYERS = ("full_attention", "sliding_attention")
# What configurations call the reach of a layer that does not see everything before it.
_REACH = ("sliding_window", "attention_chunk_size")


class PackingRefused(WorkError):
    """Packed rows would not be trained as they are alone; padded ones are."""


def refusal(architecture: Any) -> str | None:
    """Why a transformers config's model is never packed, or None where the model will be asked."""
    kinds = getattr(architecture.get_text_config(), "layer_types", None) or ()
    if other := sorted({*kinds}.difference(_KNOWN_LAYERS)):
        return (
            f"the {architecture.model_type!r} architecture has layers of kind {', '.join(other)}, "
            "which see their neighbours in a micro-batch without padding"
        )
    return None


def reach(architecture: Any) -> int:
    """Tokens that the layers with the longest limited view see; 0 where all see everything."""
    text = architecture.get_text_config()
    found = [getattr(text, name, None) for name in _REACH]
    return max([value for value in found if isinstance(value, int)], default=0)


def pack(model: Any, architecture: Any, longest: int) -> None:
    """Let an adapted model run on packed rows, after asking whether it may.

    architecture: the base's transformers config; longest: tokens of the longest row that the stage
    may see. Raises PackingRefused.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows, beyond = check_rows(architecture, longest)
    rows = rows.to(next(model.parameters()).device)
    # The main process answers for all: they must not go different ways, and under FSDP the others
    # may not have the weights yet.
    alone = last_row(model, rows[2:]) if distributed.is_main() else None
    if base.config._attn_implementation == "sdpa":
        packing.use_segment_attention(base)
    packing.pack_forward(base)
    distributed.on_main(check_isolation, model, rows, alone, beyond)


def check_rows(architecture: Any, longest: int) -> tuple[torch.Tensor, int]:
    """(three rows of random ids, the position from which a limited view shows in them).

    int64, shape (3, tokens): twice the model's window where rows of the stage get so long, so that
    half of the tokens cannot see the first one. Without such a window the position is 0.
    """
    import torch

    window = reach(architecture)
    wanted, beyond = (2 * window, window) if 0 < window < longest else (CHECK_TOKENS, 0)
    length = max(2, min(max(wanted, CHECK_TOKENS), longest))
    generator = torch.Generator().manual_seed(0)
    vocabulary = architecture.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (3, length), generator=generator), beyond


def last_row(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the last of `rows` (one micro-batch), float32, shape (tokens - 1,)."""
    import torch

    # The trainer runs under autocast when the base is stored in 16 bit.
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=half):
        mask = torch.ones_like(rows)
        outputs = model(input_ids=rows, attention_mask=mask, labels=rows, fused_lm_head=True)
    model.train(training)
    return outputs.log_probs[-1].float()


def check_isolation(model: Any, rows: torch.Tensor, alone: torch.Tensor, beyond: int = 0) -> None:
    """Raise PackingRefused when a row's results depend on what it is packed with, or are not those
    that the unpacked model gives it alone.

    The last row after the first and after the second one: identical kernels on identical shapes,
    so the results must be equal but for the last bit. Against `alone` (`last_row` before packing)
    other kernels may run, which in 16 bit differ by hundredths.
    """
    import torch

    first, second = last_row(model, rows[[0, 2]]), last_row(model, rows[[1, 2]])
    mixed = (first - second).abs().max().item()
    apart = (first - alone).abs()
    mean = max(apart.mean().item(), apart[beyond:].mean().item())
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    allowed = 0.01 if all(dtype == torch.float32 for dtype in floats) else 0.1
    if mixed > 1e-3 or not mean <= allowed:
        raise PackingRefused(
            f"packing is refused: with {model.config._attn_implementation!r} attention an "
            "example's log-probabilities depend on its neighbour in the micro-batch (by "
            f"{mixed:.3g} nats), or are not those of the example alone ({mean:.3g} on average, "
            f"{apart.max().item():.3g} at most, over {rows.shape[1]} tokens). Set model.attention "
            "to sdpa, or packing to false for this stage."
        )
