"""LoRA layers in one function: PEFT's results and gradients, and what is left to PEFT."""

from __future__ import annotations

import pytest
from conftest import ROOT

from liteguard import models
from liteguard.config import build, read_yaml
from liteguard.training import lora_linear


def adapted(directory, quantization: str, dtype, dropout: float = 0.0):
    """The tiny Phi (its layers have biases) with an adapter whose both halves are random."""
    import torch

    values = {
        "model": {"path": str(directory)},
        "domain": {"lora_rank": 4, "lora_alpha": 6, "lora_dropout": dropout},
    }
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)])
    base = models.load_base(config, str(directory), None, dtype, quantize=quantization == "nf4")
    model = models.add_adapter(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def run(model, dtype=None):
    """(logits, gradients of the adapter) of a small batch, under autocast for 16 bit."""
    import torch

    ids = torch.arange(5, 41).view(2, 18)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids).logits.float()
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def calls(monkeypatch):
    """A list that grows with every layer that `LoraLinear` computes."""
    made = []
    apply = lora_linear.LoraLinear.apply
    monkeypatch.setattr(
        lora_linear.LoraLinear, "apply", lambda *args: made.append(1) or apply(*args)
    )
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept_bytes", [0, lora_linear.KEPT_BYTES])
@pytest.mark.parametrize(
    ("quantization", "type_", "tolerance"),
    [
        # The same float32 products, summed in another order.
        ("nf4", "float32", 1e-5),
        ("none", "float32", 1e-5),
        # PEFT rounds LoRA's part and the sum to 8 bits each, LoraLinear only the sum.
        ("nf4", "bfloat16", 0.03),
        ("none", "bfloat16", 0.03),
    ],
)
def test_results_and_gradients_are_pefts(
    tiny_phi, quantization, type_, tolerance, kept_bytes, checkpointing, monkeypatch
):
    import torch

    dtype = getattr(torch, type_)
    model = adapted(tiny_phi, quantization, dtype)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    theirs, their_gradients = run(model, dtype)
    assert lora_linear.fuse_lora(model, kept_bytes) == 12
    made = calls(monkeypatch)
    ours, our_gradients = run(model, dtype)
    assert len(made) == 12 * (1 + checkpointing), "a layer was computed by PEFT"
    assert our_gradients.keys() == their_gradients.keys() and len(our_gradients) == 24
    pairs = [(ours, theirs)] + [(our_gradients[n], g) for n, g in their_gradients.items()]
    for mine, plain in pairs:
        assert mine.dtype == plain.dtype == torch.float32
        assert (mine - plain).norm() <= tolerance * plain.norm()


def test_unpacked_matrices_are_kept_only_where_they_fit(tiny_phi):
    import torch

    def kept(model):
        bases = [
            cell.cell_contents
            for module in model.modules()
            for cell in getattr(module.__dict__.get("forward"), "__closure__", None) or ()
            if isinstance(cell.cell_contents, lora_linear.BaseWeight)
        ]
        assert len(bases) == 12
        return [base.kept for base in bases]

    model = adapted(tiny_phi, "nf4", torch.float32)
    needed = 4 * sum(
        m.weight.quant_state.shape.numel() for m in model.modules() if hasattr(m, "quant_state")
    )
    lora_linear.fuse_lora(model, needed - 1)
    assert not any(tensor is not None for tensor in kept(model))
    model = adapted(tiny_phi, "nf4", torch.float32)
    lora_linear.fuse_lora(model, needed)
    assert sum(tensor.nbytes for tensor in kept(model)) == needed
    model = adapted(tiny_phi, "none", torch.float32)
    lora_linear.fuse_lora(model, 0)
    assert not any(tensor is not None for tensor in kept(model)), "a copy of what is there already"


def test_adapters_can_be_changed_switched_off_and_dropped_out(tiny_phi, monkeypatch):
    """What DPO does with its reference, and what `LoraLinear` leaves to PEFT."""
    import torch

    def logits(model):
        with torch.no_grad():
            return model(input_ids=torch.arange(5, 25)[None]).logits

    model = adapted(tiny_phi, "nf4", torch.float32, dropout=0.5)
    model.add_adapter("ref", model.peft_config["default"])  # its B is zero: the base model

    def look(model):
        found = []
        model.eval()
        model.set_adapter("default")
        found.append(logits(model))
        model.set_adapter("ref")
        found.append(logits(model))
        with model.disable_adapter():
            found.append(logits(model))
        return found

    theirs = look(model)
    lora_linear.fuse_lora(model)
    made = calls(monkeypatch)
    for mine, plain in zip(look(model), theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    assert len(made) == 24, "two adapters; none is PEFT's own"
    assert not theirs[0].allclose(theirs[1], atol=1e-2)
    model.set_adapter("default")
    model.train()
    assert not logits(model).equal(logits(model)), "dropout was left out"
    assert len(made) == 24, "and dropout is too"


def test_a_frozen_adapter_gets_no_gradient(tiny_phi):
    import torch

    model = adapted(tiny_phi, "none", torch.float32)
    lora_linear.fuse_lora(model)
    frozen = [p for n, p in model.named_parameters() if "layers.0" in n and "lora_" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    _, gradients = run(model)
    assert len(gradients) == 12 and not any(p.grad is not None for p in frozen)
