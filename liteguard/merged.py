"""The model that ships, in Transformers: adapter merged in float32, rounded once, little memory.

A stage trains beside an NF4 copy of its base, but the adapter is merged into the original weights:
merging into 4-bit weights and rounding again loses most of a small delta, and so does merging in
bfloat16. Here each layer's sum is made in float32 and rounded once, one layer at a time, so the
whole never takes more than its 16-bit weights and one layer.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import models
from liteguard.errors import WorkError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from liteguard.config import Config

# Up to this size (bytes of float32) a model that is measured on a CPU is kept in float32, in
# oneDNN's layout: faster, and small. Larger ones keep their 16-bit weights.
FLOAT32_BYTES = 2_500_000_000
# Values of a 16-bit weight that are turned into float32 at a time: 5 MB stay in the cache of a
# processor, and a token takes two thirds of what it took with 21 MB (docs/experiments.md).
BLOCK_VALUES = 1_310_720


@dataclass
class Merge:
    """What merging changed."""

    changed: int = 0  # tensors
    largest_delta: float = 0.0  # Frobenius norm of a layer's change over that of its weight


def merge_adapter(model: PreTrainedModel, adapter: Path, dtype: torch.dtype | None = None) -> Merge:
    """Merge a LoRA adapter into a model in place: float32 sums, each rounded once to `dtype`.

    `dtype` defaults to each layer's own type. Raises UserError when the adapter does not fit the
    model, WorkError when it is broken or would leave the range of float16.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    adapted = models.open_adapter(model, adapter)
    found = Merge()
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if not (isinstance(module, LoraLayer) and module.lora_A):
                continue
            layer = module.get_base_layer()
            before = layer.weight.data
            # A copy: the weights of a base that is stored in float32 are not changed in place.
            summed = before.to(torch.float32, copy=True)
            for active in module.active_adapters:
                delta = module.get_delta_weight(active).float()
                if not delta.isfinite().all():
                    raise WorkError(f"the adapter {adapter} is broken: {name} is not finite")
                share = (delta.norm() / summed.norm().clamp_min(1e-12)).item()
                found.largest_delta = max(found.largest_delta, share)
                summed += delta
            stored = dtype or before.dtype
            check_range(summed.abs().max().item(), stored)
            layer.weight.data = summed.to(stored)
            found.changed += not torch.equal(layer.weight.data, before.to(stored))
        adapted.unload()
    return found


def check_range(largest: float, dtype: torch.dtype) -> None:
    """Raise WorkError when float16 cannot hold a weight of this magnitude."""
    import torch

    if dtype == torch.float16 and largest > torch.finfo(dtype).max:
        raise WorkError(
            f"the merged weights reach {largest:.3g}, more than float16 can hold (65504): the "
            "adapter has diverged. Train it again with a lower learning rate"
        )


def largest_weight(model: PreTrainedModel) -> float:
    """Largest magnitude of all parameters. Raises WorkError when one is not finite."""
    largest = 0.0
    for name, value in model.named_parameters():
        top = value.abs().max().item()
        if not math.isfinite(top):
            raise WorkError(f"the merged weights are not finite (first in {name})")
        largest = max(largest, top)
    return largest


def stored_type(declared: torch.dtype | None, largest: float) -> torch.dtype:
    """The 16-bit type to ship in: the base's own, or for a float32 base the one that fits."""
    import torch

    if declared in (torch.float16, torch.bfloat16):
        check_range(largest, declared)
        return declared
    return torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16


def round_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's weights, one after the other."""
    for value in model.parameters():
        value.data = value.data.to(dtype)


def load_stored(directory: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model on the CPU in the type in which it is stored."""
    return models.load_weights(directory, dtype="auto", **options)


def load_merged(config: Config, adapter: Path | None) -> tuple[Any, Any]:
    """(the base model with an adapter merged in, ready for measuring; tokenizer).

    On a CPU: float32 arithmetic on the weights that are deployed (`for_measuring`), so those of a
    base that is stored in float32 are rounded to 16 bit as for the bundle. On a GPU: the compute
    type of `models.choose_dtype`, rounded once from the float32 sums.
    """
    import torch

    directory, revision, loaded = models.model_config(config)
    trusted = config.model.trust_remote_code
    model = load_stored(
        directory,
        revision=revision,
        attn_implementation=config.model.attention,
        trust_remote_code=trusted,
    )
    source = (str(adapter), None) if adapter else (directory, revision)
    tokenizer = models.load_tokenizer(
        source[0], config.prompt, loaded.get_text_config().vocab_size, source[1], trusted
    )
    dtype = None
    if torch.cuda.is_available():
        dtype, _ = models.choose_dtype("auto", loaded.model_type)
    elif any(value.dtype.itemsize > 2 for value in model.parameters()):
        dtype = stored_type(getattr(loaded, "dtype", None), largest_weight(model))
    if adapter:
        merge_adapter(model, adapter, dtype)
    if dtype is not None:
        round_to(model, dtype)
    if torch.cuda.is_available():
        model.to("cuda", dtype)
    return for_measuring(model), tokenizer


def for_measuring(model: PreTrainedModel) -> PreTrainedModel:
    """Make a frozen model compute in float32 on a CPU, with as little memory as its size asks for.

    Small ones become float32 (`models.pack_linear_layers`); larger ones keep 16-bit weights, of
    which a block at a time becomes float32. Both give the same numbers up to the order of sums.
    """
    model.eval().requires_grad_(False)
    models.fuse_gelu(model)
    if model.device.type == "cpu":
        if keeps_16_bit(sum(value.numel() for value in model.parameters())):
            keep_16_bit(model)
        else:
            model.float()
            models.pack_linear_layers(model)
    return model


def keeps_16_bit(parameters: int) -> bool:
    """Whether `for_measuring` leaves a model of that size in 16 bit on a CPU."""
    return 4 * parameters > FLOAT32_BYTES


def measuring_memory(parameters: int, cache_bytes: int, logits_bytes: int) -> int:
    """Bytes of host memory that measuring a merged model on a CPU takes, loading included.

    Python and its libraries (0.6 GB), the weights (16 bit and a block of float32, or float32 and
    one layer more), keys and values, and logits with their softmax.
    """
    weights = 2 * parameters + 0.5e9 if keeps_16_bit(parameters) else 4.4 * parameters
    return int(0.6e9 + weights + cache_bytes + 2 * logits_bytes)


def keep_16_bit(model: PreTrainedModel) -> int:
    """Let a model with 16-bit weights compute in float32 without a float32 copy; returns how many
    linear layers do so.

    A CPU without bf16 units multiplies 16-bit matrices hundreds of times slower than float32 ones.
    Each linear layer turns a block of its rows into float32, multiplies, and takes the next.
    """
    import torch

    space = threading.local()  # a buffer for each thread: layers of one thread run in turn

    def block(weight: torch.Tensor) -> torch.Tensor:
        buffer = getattr(space, "buffer", None)
        if buffer is None or buffer.numel() < weight.numel():
            buffer = space.buffer = torch.empty(weight.numel(), dtype=torch.float32)
        return buffer[: weight.numel()].view(weight.shape).copy_(weight)

    class Stored(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, self.in_features)
            result = rows.new_empty(len(rows), self.out_features)
            size = max(1, BLOCK_VALUES // self.in_features)
            for start in range(0, self.out_features, size):
                weight = block(self.weight[start : start + size])
                torch.mm(rows, weight.t(), out=result[:, start : start + size])
            if self.bias is not None:
                result += self.bias
            return result.view(*x.shape[:-1], self.out_features)

    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and child.weight.dtype.itemsize == 2
    ]
    for parent, name, child in found:
        setattr(parent, name, Stored(child))
    embedding = model.get_input_embeddings()
    large = {id(embedding.weight), *(id(child.weight) for _, _, child in found)}
    for value in (*model.parameters(), *model.buffers()):
        if id(value) not in large and value.is_floating_point():
            value.data = value.data.float()
    embedding.register_forward_hook(lambda module, given, result: result.float())
    return len(found)
