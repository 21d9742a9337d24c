"""Moves outliers of activations into the weights behind them, before an 8-bit conversion.

On the device the inputs of a linear layer are rounded to 8 bits, each token over its own range: one
large channel leaves few steps for all others. Where a norm feeds linear layers, its channel j can
be divided by s_j and column j of their weights multiplied by it: the same function, with both sides
easier to round (SmoothQuant, arXiv:2211.10438; s_j = max |x_j|^a / max |W_j|^(1 - a)). Here s_j is
the nearest power of two, so that every product is what it was, to the last bit, in 16 bits too: the
model that ships is the merged one. A layer whose outputs are not equal bit for bit is left alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, machine, merged, writing
from liteguard.config import Config
from liteguard.errors import WorkError
from liteguard.export import layerwise, quantization
from liteguard.export.layerwise import Batch
from liteguard.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

WITHOUT_ROWS = (
    "Outliers of activations stay where they are. "
    "Put the prepared data back and pass --overwrite, or leave compress.smooth out"
)
# Tokens to measure on: a channel's largest input is known after few.
TOKENS = 1024
# The share `a` of an outlier that moves: 0.5 to 1 were tried (docs/experiments.md).
ALPHA = 0.75
# The share of channels, those with the smallest inputs, that stay as they are: others are scaled
# from there, and one channel without any input would push all of them out of float16's range.
_UNSCALED = 0.05
# An input that is always near zero tells nothing of its scale.
_LEAST = 1e-5


def wanted(config: Config, recipes: Sequence[str]) -> bool:
    """Whether a merged model is smoothed; says it where it was asked for and is not.

    4-bit recipes have their own way (`calibration`), and all recipes are made of one model.
    """
    four_bits = [recipe for recipe in recipes if recipe in quantization.BLOCKS]
    if config.compress.smooth and four_bits:
        print(
            f"  compress.smooth is left out, for all recipes: {', '.join(four_bits)} has weights "
            "of 4 bits"
        )
    return config.compress.smooth and not four_bits


def of_checkpoint(
    config: Config, checkpoint: Path, merged_dir: Path, output: Path
) -> dict[str, Any]:
    """`smooth` by the rows that a checkpoint was trained on, in a process of its own."""
    data_dir = Path(checkpoints.read_stage(checkpoint, "safety").data_dir)
    rows = layerwise.training_rows(config, data_dir, merged_dir, WITHOUT_ROWS)
    if not rows:
        return {"rows": 0, "layers": 0}
    return machine.in_child("smooth", smooth, merged_dir, rows, output)


def smooth(merged_dir: Path, rows: list[list[int]], output: Path) -> dict[str, Any]:
    """Write a merged model with its outliers moved; the same function, bit for bit.

    Args:
        merged_dir: the merged model, 16-bit safetensors.
        rows: `layerwise.training_rows`; the first `TOKENS` of them are measured on.
        output: a directory for the model, its tokenizer and settings; not made where no layer
            can be smoothed.

    Returns ``rows``, ``tokens``, ``layers`` (how many were smoothed), ``largest`` (factor),
    ``seconds``; ``error`` where the model cannot be walked layer by layer. Memory:
    the 16-bit model and one layer in float32.
    """
    started = time.monotonic()
    some, tokens = [], 0
    for row in rows:
        if tokens < TOKENS:
            some.append(row)
            tokens += len(row)
    facts: dict[str, Any] = {"rows": len(some), "tokens": tokens, "layers": 0}
    model = merged.load_stored(merged_dir).eval().requires_grad_(False)
    try:
        factors = _factors(model, some)
    except (AttributeError, KeyError, TypeError, ValueError, WorkError) as error:
        # Of a kind that cannot be walked layer by layer; the merged model itself is converted.
        print(f"  outliers of activations stay where they are: {type(error).__name__}: {error}")
        return facts | {"error": str(error)}
    if done := [factor for factor in factors if factor]:
        with writing.replacing(output) as temporary:
            model.save_pretrained(temporary, safe_serialization=True)
            for file in merged_dir.iterdir():  # the tokenizer and what belongs to it
                if ".safetensors" not in file.name and not (temporary / file.name).exists():
                    shutil.copy2(file, temporary / file.name)
    facts |= {"layers": len(done), "largest": max(done, default=1.0)}
    moved = f"{len(done)} of {len(factors)} layers, by factors of up to {facts['largest']:.0f}"
    print(f"  outliers of activations moved in {moved}")
    return facts | {"seconds": round(time.monotonic() - started, 1)}


def _factors(model: Any, rows: list[list[int]]) -> list[float | None]:
    """Smooth a 16-bit model's layers in place; what `_smooth_layer` gives for each."""
    import torch

    stored = model.config.dtype
    with torch.inference_mode():
        embedding = model.get_input_embeddings().float()
        layers = layerwise.decoder_layers(model)
        batches = list(layerwise.batches(model, rows))
        embedding.to(stored)
        progress = Progress("smoothing", len(layers), unit="layers")
        found = []
        for layer in layers:
            layer.float()
            found.append(_smooth_layer(layer, batches, stored))
            layer.to(stored)
            progress.add()
        progress.close()
    return found


def _smooth_layer(layer: Module, batches: list[Batch], stored: Any) -> float | None:
    """Smooth a float32 layer in place and move the batches on; the largest factor.

    None, and the layer as it was, where it has no norm that feeds linear layers only, or where its
    outputs are other ones: a norm that does more than multiply, or a type without room.
    """
    import torch

    found, before = _fed(layer, batches)
    kept = {name: value.clone() for name, value in layer.named_parameters()}
    largest = 1.0
    for norm, linears, most in found:
        columns = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0)
        logs = ALPHA * most.clamp_min(_LEAST).log2()
        logs -= (1 - ALPHA) * columns.clamp_min(_LEAST).log2()
        values = [v for v in (norm.weight, getattr(norm, "bias", None)) if v is not None]
        least = logs.quantile(_UNSCALED)
        scale = _exact(torch.exp2((logs - least).round().clamp_min(0)), values, stored)
        largest = max(largest, scale.max().item())
        for value in values:
            value.data = value.data / scale
        for linear in linears:
            linear.weight.data = linear.weight.data * scale
    whole = all(torch.equal(v, v.to(stored).float()) for v in layer.parameters())
    equal = found and whole and torch.equal(layerwise.forward(layer, batches[0]), before[0])
    for batch, output in zip(batches, before, strict=True):
        batch.hidden = output
    if equal:
        return largest
    for name, value in layer.named_parameters():
        value.data = kept[name]
    return None


def _exact(scale: Tensor, values: list[Tensor], stored: Any) -> Tensor:
    """Powers of two from 1 on, lowered where a value by its factor has digits that are not stored.

    float16 has fewer below 6e-5, so that weights are multiplied and never divided, and a norm's
    small entry is divided as far as it can be.
    """
    import torch

    for value in values:
        while True:
            divided = value / scale
            lost = (divided.to(stored).float() != divided) & (scale > 1)
            if not lost.any():
                break
            scale = torch.where(lost, scale / 2, scale)
    return scale


def _fed(
    layer: Module, batches: list[Batch]
) -> tuple[list[tuple[Module, list[Module], Tensor]], list[Tensor]]:
    """(norm, the linear layers that it feeds, largest input of each channel) of a layer, and the
    layer's outputs for each batch."""
    import torch

    norms: dict[int, Module] = {}
    linears: dict[Module, int] = {}  # linear layer -> id of its input in the first batch
    most: dict[Module, Tensor] = {}
    alive: list[Tensor] = []  # an id stands for a tensor as long as it lives
    real = batches[0].real

    def leaves(module: Module, given: tuple[Any, ...], output: Any) -> None:
        norms[id(output)] = module
        alive.append(output)

    def reaches(module: Module, given: tuple[Any, ...]) -> None:
        if module not in most:
            linears[module] = id(given[0])
            alive.append(given[0])
        channels = given[0][real].abs().amax(0)
        most[module] = torch.maximum(most.get(module, channels), channels)

    handles = []
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(reaches))
        elif isinstance(weight, torch.Tensor) and weight.dim() == 1:
            handles.append(module.register_forward_hook(leaves))
    outputs = []
    for batch in batches:
        real = batch.real
        outputs.append(layerwise.forward(layer, batch))
    for handle in handles:
        handle.remove()
    groups: dict[Module, list[Module]] = {}
    for linear, given in linears.items():
        if given in norms:
            groups.setdefault(norms[given], []).append(linear)
    return [(norm, group, most[group[0]]) for norm, group in groups.items()], outputs
