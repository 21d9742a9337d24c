"""Training rows on their way through a merged model, one layer at a time.

What chooses weights by what they do to real inputs sees these: one layer is in float32 at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard.config import Config
from liteguard.errors import UserError, WorkError
from liteguard.rows import load_split

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# A row is cut here: a longer one would take the place of many others.
LONGEST_ROW = 256
# Tokens of a batch, padding counted.
BATCH = 1024


def training_rows(
    config: Config, data_dir: Path, merged_dir: Path, without: str
) -> list[list[int]] | None:
    """Token ids of training rows, the three stages taking turns, as many as the settings ask for.

    None where there are no prepared rows, and two lines: why, and `without`, what follows from it.
    """
    from tokenizers import Tokenizer

    prompt = config.prompt
    parts: dict[str, Callable[[dict[str, Any]], str]] = {
        "domain": lambda row: prompt.render_document(row["text"]),
        "instruction": lambda row: prompt.render_row(row) + prompt.render_answer(row["completion"]),
        "preference": lambda row: prompt.render_row(row) + prompt.render_answer(row["chosen"]),
    }
    try:
        found = {part: load_split(data_dir, part, "train") for part in parts}
    except UserError as error:
        print(f"  no training rows to calibrate on: {error}\n  {without}")
        return None
    tokenizer = Tokenizer.from_file(str(merged_dir / "tokenizer.json"))
    for rows in found.values():
        random.Random(0).shuffle(rows)
    chosen_rows: list[list[int]] = []
    left = config.compress.calibration_tokens
    for turn in range(max(map(len, found.values()))):
        for part, rows in found.items():
            if turn >= len(rows):
                continue
            text = parts[part](rows[turn])
            ids = tokenizer.encode(text, add_special_tokens=False).ids[: min(LONGEST_ROW, left)]
            if len(ids) > 1:
                chosen_rows.append(ids)
            left -= len(ids)
            if left <= 0:
                return chosen_rows
    return chosen_rows


@dataclass
class Batch:
    """Rows of about the same length, on their way through the layers."""

    hidden: Tensor  # rows x tokens x width
    named: dict[Module, dict[str, Any]]  # what each layer is given beside the hidden states
    real: Tensor  # rows x tokens: False for padding, which is at the end and seen by no token


class _Reached(Exception):
    """A forward pass came to where it should end."""

    def __init__(self, *given: Any) -> None:
        self.given = given


def until(function: Callable[[], Any], module: Module) -> tuple[Any, ...]:
    """What `module` is called with when `function` runs: (its first argument, the named ones)."""

    def end(_: Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Reached(positional[0], named)

    handle = module.register_forward_pre_hook(end, prepend=True, with_kwargs=True)
    try:
        function()
    except _Reached as reached:
        return reached.given
    finally:
        handle.remove()
    raise WorkError(f"{type(module).__name__} is not part of the model's forward pass")


def batches(model: Any, rows: list[list[int]]) -> Iterator[Batch]:
    """The inputs of the first layer, and what else each layer is given."""
    import torch

    layers = decoder_layers(model)
    ordered, start = sorted(rows, key=len), 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and len(ordered[end]) * (end + 1 - start) <= BATCH:
            end += 1
        some, start = ordered[start:end], end
        ids = torch.zeros(len(some), len(some[-1]), dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for place, row in enumerate(some):
            ids[place, : len(row)] = torch.tensor(row)
            real[place, : len(row)] = True
        yield Batch(*_first_inputs(partial(model, input_ids=ids, use_cache=False), layers), real)


def _first_inputs(
    function: Callable[[], Any], layers: Any
) -> tuple[Tensor, dict[Module, dict[str, Any]]]:
    """(the first layer's hidden states, layer -> its named arguments) when `function` runs.

    Layers that look back a short way only are given other positions and masks than the rest (Gemma
    3). No layer computes: the arguments do not depend on hidden states.
    """
    named: dict[Module, dict[str, Any]] = {}
    first: list[Tensor] = []

    def take(layer: Module) -> Callable[..., Any]:
        def forward(hidden: Tensor, *_: Any, **arguments: Any) -> Any:
            first.append(hidden)
            named[layer] = arguments
            if layer is layers[-1]:
                raise _Reached
            return first[0]

        return forward

    try:
        for layer in layers:
            layer.forward = take(layer)
        function()
    except _Reached:
        return first[0], named
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    raise WorkError(f"{type(layers[-1]).__name__} is not part of the model's forward pass")


def forward(layer: Module, batch: Batch) -> Tensor:
    output = layer(batch.hidden, **batch.named[layer])
    return output[0] if isinstance(output, tuple) else output


def groups(layer: Module, names: list[str], batch: Batch) -> list[list[str]]:
    """Names of linear layers in the order of their turns, those with one input together."""
    inputs: dict[str, Any] = {}
    handles = []
    for name in names:

        def keep(_: Module, positional: tuple[Any, ...], name: str = name) -> None:
            inputs[name] = positional[0]

        handles.append(layer.get_submodule(name).register_forward_pre_hook(keep, prepend=True))
    forward(layer, batch)
    for handle in handles:
        handle.remove()
    groups: dict[int, list[str]] = {}
    for name, value in inputs.items():
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def decoder_layers(model: Any) -> Any:
    """The list of a model's decoder layers."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise WorkError(f"{type(model).__name__} has no list of {count} layers to calibrate")
