"""Chooses the weights of a merged model by what they do to real inputs, layer by layer.

Each layer sees what the layers before it give on training rows once they are rounded, activations
rounded to 8 bits where the device does so. Within a layer, matrices with the same input are rounded
together, and those behind them see the result. One layer is in float32 at a time, and one Hessian.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, machine, merged, writing
from liteguard.config import Config
from liteguard.errors import UserError, WorkError
from liteguard.export import chosen, gptq, layerwise, quantization
from liteguard.export.layerwise import Batch
from liteguard.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear, Module

# In a folder of layers that were chosen without training rows.
WITHOUT = "without_rows"
WITHOUT_ROWS = (
    "Weights are rounded without them (scales of least squared error), which loses more. "
    "Put the prepared data back and pass --overwrite, or pass --set compress.calibrate=false"
)


def folder(work: Path, recipe: str, config: Config) -> Path | None:
    """Where a recipe's calibrated weights are kept; None where none are to be calibrated."""
    kind, asked = quantization.chosen_format(recipe), config.compress.calibrate
    wanted = kind and (asked == "all" or (asked and kind.bits == 4))
    return work / f"calibrated_{recipe}" if wanted else None


def of_checkpoint(
    config: Config, checkpoint: Path, merged_dir: Path, recipe: str, output: Path
) -> dict[str, Any]:
    """`calibrate` on the rows that a checkpoint was trained on, in a process of its own."""
    data_dir = Path(checkpoints.read_stage(checkpoint, "safety").data_dir)
    rows = layerwise.training_rows(config, data_dir, merged_dir, WITHOUT_ROWS)
    return machine.in_child("calibrate", calibrate, merged_dir, rows, recipe, output)


def rounded_inputs(x: Tensor) -> Tensor:
    """Activations as XNNPACK rounds them before an 8-bit or 4-bit layer: a range for each token."""
    top = x.amax(-1, keepdim=True).clamp_min(0)
    bottom = x.amin(-1, keepdim=True).clamp_max(0)
    scale = ((top - bottom) / 255).clamp_min(1e-30)
    zero = (-128 - bottom / scale).round().clamp(-128, 127)
    return ((x / scale).round().add(zero).clamp(-128, 127) - zero) * scale


def _hessian(layer: Module, linear: Linear, batches: list[Batch], rounded: bool) -> Tensor:
    """Sum of x x^T over all tokens' inputs of a linear layer; `rounded`: as on the device."""
    import torch

    total = torch.zeros(linear.in_features, linear.in_features)
    for batch in batches:
        given = layerwise.until(partial(layerwise.forward, layer, batch), linear)[0]
        x = rounded_inputs(given[batch.real]) if rounded else given[batch.real]
        total.addmm_(x.t(), x)
    return total


def _choose(
    layer: Module,
    names: list[str],
    batches: list[Batch],
    kind: gptq.Format,
    rounded: set[Module],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Round the named matrices of a layer in place; digest -> (integers, scales)."""
    import torch

    found: dict[str, tuple[Tensor, Tensor]] = {}
    for group in (
        layerwise.groups(layer, names, batches[0]) if batches else [[name] for name in names]
    ):
        linears = [layer.get_submodule(name) for name in group]
        hessian = _hessian(layer, linears[0], batches, linears[0] in rounded) if batches else None
        together = torch.cat([linear.weight for linear in linears])
        integers, scales = gptq.quantize(together, hessian, kind)
        sizes = [len(linear.weight) for linear in linears]
        parts = zip(linears, integers.split(sizes), scales.split(sizes), strict=True)
        for linear, whole, factor in parts:
            # Contiguous parts of their own: a file keeps no views.
            found[chosen.digest(linear.weight.numpy())] = whole.clone(), factor.clone()
            linear.weight.data = gptq.dequantized(whole, factor)
    return found


def calibrate(
    merged_dir: Path, rows: list[list[int]] | None, recipe: str, output: Path
) -> dict[str, Any]:
    """Choose a recipe's weights and keep them in a folder, a file a layer.

    A layer that an earlier run finished is read instead of chosen again.

    Args:
        merged_dir: the merged model, 16-bit safetensors.
        rows: `layerwise.training_rows`; None chooses scales of least squared error.
        recipe: one that has a `quantization.chosen_format`.
        output: the folder, made where it is missing; of this model, recipe and rows only.

    Returns ``method``, ``rows``, ``tokens``, ``layers``, ``matrices``, ``seconds``,
    ``peak_memory_bytes``. Raises UserError where a layer's inputs are not whole blocks.
    """
    import torch

    started = time.monotonic()
    without = output / WITHOUT
    if rows and without.exists():
        writing.remove(output)  # an earlier run found none
    output.mkdir(parents=True, exist_ok=True)
    if not rows:
        writing.write_text(without, "")
    model = merged.load_stored(merged_dir).eval().requires_grad_(False)
    architecture = model.config.get_text_config().to_dict()
    kind = quantization.chosen_format(recipe)
    assert kind  # `folder` gives none to the others
    layers = layerwise.decoder_layers(model)
    matrices = 0
    with torch.inference_mode():
        batches: list[Batch] = []
        if rows:
            model.get_input_embeddings().float()
            batches = list(layerwise.batches(model, rows))
        remaining = list(layers)
        del model, layers  # embedding and output layer are not needed any more
        progress = Progress("calibrating", len(remaining), unit="layers")
        for place in range(len(remaining)):
            layer, remaining[place] = remaining[place].float(), None
            names, rounded = _to_choose(layer, recipe, architecture)
            matrices += len(names)
            _check_blocks(layer, names, kind, recipe)
            for linear in rounded:
                linear.register_forward_pre_hook(lambda _, given: rounded_inputs(given[0]))
            file = output / f"{place:04}.safetensors"
            if file.exists():
                _apply(layer, names, chosen.Chosen([file]))
            else:
                chosen.save(file, _choose(layer, names, batches, kind, rounded), kind)
            for batch in batches:
                batch.hidden = layerwise.forward(layer, batch)
                if not batch.hidden[batch.real].isfinite().all():
                    raise WorkError(f"layer {place + 1} gives no finite numbers once it is rounded")
            del layer
            progress.add()
        progress.close()
    return {
        "method": "gptq" if rows else "least_squares",
        "rows": len(rows or ()),
        "tokens": sum(map(len, rows or ())),
        "layers": len(remaining),
        "matrices": matrices,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": int(machine.peak_rss_gb() * 1e9),
    }


def _to_choose(
    layer: Module, recipe: str, architecture: dict[str, Any]
) -> tuple[list[str], set[Module]]:
    """(names of the matrices that a recipe chooses, linear layers whose inputs are rounded)."""
    import torch

    names, rounded = [], set()
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            shape = module.weight.shape
            kind = quantization.chosen_format(recipe)
            if kind and quantization.bits(recipe, shape, architecture) == kind.bits:
                names.append(name)
            if quantization.rounds_inputs(recipe, shape, architecture):
                rounded.add(module)
    return names, rounded


def _check_blocks(layer: Module, names: list[str], kind: gptq.Format, recipe: str) -> None:
    for name in names:
        inputs = layer.get_submodule(name).in_features
        if kind.block and inputs % kind.block:
            raise UserError(
                f"{name} has {inputs} inputs; {recipe} keeps weights in blocks of {kind.block}: "
                "this model fits no such recipe. Use an 8-bit one (compress.quantize)"
            )


def _apply(layer: Module, names: list[str], kept: chosen.Chosen) -> None:
    """Give a layer the weights that an earlier run chose for it."""
    import torch

    for name in names:
        weight = layer.get_submodule(name).weight
        integers, scales = map(torch.from_numpy, kept.get(chosen.digest(weight.numpy())))
        weight.data = gptq.dequantized(integers, scales)
