"""Linear layers with a LoRA adapter in one autograd function, for training on a CPU.

PEFT computes them as a chain of operations: base layer, copy, two small products, scaling, sum; and
bitsandbytes unpacks the 4-bit matrix for every forward and every backward pass. Here the small
products are added to the large one's result where it lies, the backward pass does likewise, and a
matrix that fits stays unpacked. Same sums in another order: tests/test_lora_linear.py compares
results and gradients with PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch

# Most bytes of unpacked 4-bit matrices that are kept: enough for a model like SmolLM2-135M in
# float32 (0.42 GB); Phi-2 would take 10 GB, so its matrices are unpacked whenever they are needed.
KEPT_BYTES = 500_000_000


class BaseWeight:
    """The frozen matrix of a linear layer, shape (out, in), whatever it is stored as."""

    def __init__(self, layer: torch.nn.Linear):
        self.layer, self.kept = layer, None
        self.state = getattr(layer.weight, "quant_state", None)
        self.dtype = layer.weight.dtype if self.state is None else layer.compute_dtype

    @property
    def bytes_to_keep(self) -> int:
        """What the unpacked matrix would take besides the stored one."""
        return 0 if self.state is None else self.state.shape.numel() * self.dtype.itemsize

    def dense(self) -> torch.Tensor:
        """The matrix in the dtype that it is multiplied in."""
        if self.state is None:
            return self.layer.weight
        if self.kept is not None:
            return self.kept
        import bitsandbytes

        weight = self.layer.weight.view(-1, 1)
        return bitsandbytes.functional.dequantize_4bit(weight, self.state).to(self.dtype)


class LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T, with gradients for x, A and B.

    x: (..., in); a: (rank, in); b: (out, rank); base: the frozen W and bias. Keeps x and x A^T
    (rank wide) for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: BaseWeight,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            middle = rows @ a.to(x.dtype).T
            result = torch.nn.functional.linear(rows, base.dense(), base.layer.bias)
            result.addmm_(middle, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, middle, a, b)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        rows, middle, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_x = None
        with torch.autocast(rows.device.type, enabled=False):
            of_middle = gradient @ b.to(rows.dtype)
            if ctx.needs_input_grad[0]:
                of_x = gradient @ ctx.base.dense()
                of_x = of_x.addmm_(of_middle, a.to(rows.dtype), alpha=ctx.scaling).view(ctx.shape)
            of_a = (of_middle.T @ rows).to(a.dtype).mul_(ctx.scaling)
            of_b = (gradient.T @ middle).to(b.dtype).mul_(ctx.scaling)
        return of_x, of_a, of_b, None, None


def _fuse(layer: Any, base: BaseWeight) -> None:
    """Let a PEFT layer compute with `LoraLinear` where that is what it would compute itself."""
    original = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        plain = len(names) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
        if not plain or x.dtype != base.dtype:
            return original(x, *args, **kwargs)
        [name] = names
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, torch.nn.Identity) and dropout.training:
            return original(x)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return LoraLinear.apply(x, a, b, base, layer.scaling[name])

    layer.forward = forward


def fuse_lora(model: torch.nn.Module, kept_bytes: int = KEPT_BYTES) -> int:
    """Compute a model's LoRA layers with `LoraLinear`, on a CPU only; returns how many.

    4-bit matrices stay unpacked if all of them together take at most `kept_bytes`.
    """
    from peft.tuners.lora import Linear, LoraLayer

    kinds: tuple[type, ...] = (Linear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds += (Linear4bit,)
    except ImportError:
        pass
    layers = [
        (module, BaseWeight(module.get_base_layer()))
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and type(module) in kinds
        and not module.lora_variant
        and module.get_base_layer().weight.device.type == "cpu"
    ]
    keep = sum(base.bytes_to_keep for _, base in layers) <= kept_bytes
    for module, base in layers:
        base.kept = base.dense() if keep and base.state is not None else None
        _fuse(module, base)
    return len(layers)
