"""Precision, LoRA targets, NF4, the reference of DPO."""

from __future__ import annotations

import pytest
from conftest import ROOT

from liteguard import models
from liteguard.config import build, read_yaml
from liteguard.errors import UserError


def config(tiny_phi, **over):
    values = {"model": {"path": str(tiny_phi)}, **over}
    return build([("phi-2", read_yaml(ROOT / "configs/phi-2.yaml")), ("test", values)])


def test_all_means_the_layers_of_the_loaded_model(tiny_phi):
    import torch

    c = config(tiny_phi)
    base = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=False)
    targets = models.lora_targets(base, "all")
    assert targets == {"q_proj": 2, "k_proj": 2, "v_proj": 2, "dense": 2, "fc1": 2, "fc2": 2}
    assert "lm_head" not in targets


def test_llama_names_on_phi_are_an_error(tiny_phi):
    import torch

    c = config(tiny_phi)
    base = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=False)
    with pytest.raises(UserError, match="o_proj, gate_proj") as caught:
        models.lora_targets(base, ["q_proj", "o_proj", "gate_proj"])
    assert "dense (2)" in str(caught.value)


def test_llama_family_targets():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    )
    assert isinstance(model, torch.nn.Module)
    assert models.lora_targets(model, "all") == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 3
    )


def test_the_base_is_nf4_and_frozen_and_only_lora_trains(tiny_phi):
    import bitsandbytes
    import torch

    c = config(tiny_phi, domain={"lora_rank": 4})
    base = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=True)
    quantized = [m for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 12
    assert all(m.weight.quant_state.quant_type == "nf4" for m in quantized)
    assert all(m.weight.quant_state.nested for m in quantized), "double quantisation is off"
    adapted = models.add_adapter(base, c)
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    # Per layer: q, k, v, dense are 64 x 64; fc1 64 -> 128; fc2 128 -> 64; rank 4 on both sides.
    by_hand = 2 * 4 * (4 * (64 + 64) + (64 + 128) + (128 + 64))
    assert sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad) == by_hand
    assert all("lora_" in name for name in trainable)


def test_an_evaluation_leaves_nf4_gradients_as_they_were(tiny_phi):
    import torch

    c = config(tiny_phi, domain={"lora_rank": 4})
    base = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=True)
    # On CPUs with AVX512-BF16 units this is what changed them; elsewhere only the flag can tell.
    flags = [getattr(m, "support_avx512bf16_for_cpu", False) for m in base.modules()]
    assert not any(flags)
    model = models.add_adapter(base, c)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(5, 500, (1, 32), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(ids)
    for found, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_fresh_adapter_follows_the_seed(tiny_phi):
    import torch

    def first_matrix(seed):
        c = config(tiny_phi, domain={"lora_rank": 4, "seed": seed})
        base = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=False)
        adapted = models.add_adapter(base, c)
        return next(p for n, p in adapted.named_parameters() if "lora_A" in n)

    assert first_matrix(0).equal(first_matrix(0))
    assert not first_matrix(0).equal(first_matrix(1))


def test_the_fused_gelu_is_phis_own(tiny_phi):
    import torch
    from transformers import AutoModelForCausalLM

    c = config(tiny_phi)
    plain = AutoModelForCausalLM.from_pretrained(tiny_phi, dtype=torch.float32)
    ours = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=False)
    assert plain.config.hidden_act == "gelu_new" and ours.config.hidden_act == "gelu_pytorch_tanh"
    assert type(ours.model.layers[0].mlp.activation_fn) is not type(
        plain.model.layers[0].mlp.activation_fn
    )
    ids = torch.randint(5, 500, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_precision_follows_the_hardware(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert models.choose_dtype("auto", "llama")[0] == torch.float32
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert models.choose_dtype("auto", "llama")[0] == torch.bfloat16
    with pytest.raises(UserError, match="float16"):
        models.choose_dtype("float16", "llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert models.choose_dtype("auto", "llama")[0] == torch.float16
    assert models.choose_dtype("auto", "phi")[0] == torch.float32, "Phi overflows float16"
    with pytest.raises(UserError, match="phi"):
        models.choose_dtype("float16", "phi")


def test_a_reference_that_is_not_the_parent_is_found(tiny_phi, tmp_path):
    import torch

    from liteguard.errors import WorkError
    from liteguard.training import reference
    from liteguard.training.stage import Stage

    c = config(
        tiny_phi, model={"path": str(tiny_phi), "quantization": "none"}, domain={"lora_rank": 4}
    )
    base = models.load_base(c, str(tiny_phi), None, torch.float32, quantize=True)
    model = models.add_adapter(base, c)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    model.add_adapter("ref", model.peft_config["default"])
    stage = Stage(
        name="safety",
        config=c,
        output=tmp_path,
        data_dir=tmp_path,
        parent=tmp_path,
        base_directory="",
        base_revision=None,
        architecture=base.config,
        inputs={"parent": "0" * 64},
        rows={},
    )
    # A fresh "ref" adapter equals the raw base model: the classic silent mistake.
    with pytest.raises(WorkError, match="not the policy"):
        reference.check_reference(model, stage)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    reference.check_reference(model, stage)
    # The reference must not train.
    next(p for n, p in parameters.items() if ".ref." in n).requires_grad_(True)
    with pytest.raises(WorkError, match="not frozen"):
        reference.check_reference(model, stage)
