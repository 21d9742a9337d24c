"""GGUF of a merged model: the same function, tokens and stop token, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from liteguard.errors import UserError
from liteguard.export import gguf_file
from liteguard.prompts import Prompt

PROMPT = Prompt(end_token="<end>", document_end_token="<end>", pad_token="<pad>")
ROWS = 320
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def pieces(split: str) -> dict:
    """A byte-level BPE tokenizer with two special tokens and one that is none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = {
        "gpt-2": ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        ),
        "other": pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False)]
        ),
    }[split]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<end>", "<pad>"]
    )
    core.train_from_iterator(["the heart and the liver " * 20], trainer)
    core.add_tokens(["Patient:"])
    return json.loads(core.to_str())


def model(folder: Path, family: str, split: str = "gpt-2", **more) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    made.half().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(pieces(split)))
    return folder


def fields(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(str(file)).fields.items()}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_computes_the_same(family, tied, tmp_path):
    """Read back by Transformers, which has its own reader: the logits of 8-bit weights."""
    # The reader takes 128, as the published ones have, for granted.
    more = {"head_dim": 128} if family == "Qwen3" else {}
    merged = model(tmp_path / "merged", family, tie_word_embeddings=tied, **more)
    file = tmp_path / "x.gguf"
    exact = transformers.AutoModelForCausalLM.from_pretrained(merged).float()
    ids = torch.randint(ROWS, (2, 24), generator=torch.Generator().manual_seed(1))
    for matrices, most in (("F16", 1e-9), ("Q8_0", 5e-3)):
        facts = gguf_file.write(merged, PROMPT, file, "Apache-2.0", matrices)
        assert facts["bytes"] == file.stat().st_size
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
        with torch.no_grad():
            wanted, found = exact(ids).logits, again(ids).logits
        error = ((wanted - found).square().mean() / wanted.square().mean()).item()
        assert error < most, (matrices, error)


def test_phi_keeps_its_tensors_under_llama_cpps_names(tmp_path):
    merged = model(tmp_path / "merged", "Phi", partial_rotary_factor=0.5)
    file = tmp_path / "x.gguf"
    gguf_file.write(merged, PROMPT, file)
    reader = gguf.GGUFReader(str(file))
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    exact = transformers.AutoModelForCausalLM.from_pretrained(merged).float().state_dict()
    assert len(stored) == len(exact)
    layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
        "attn_norm": "input_layernorm",
    }
    names = {f"blk.1.{own}": f"model.layers.1.{theirs}" for own, theirs in layer.items()}
    names |= {"output": "lm_head", "output_norm": "model.final_layernorm"}
    for own, theirs in names.items():
        for part in ("weight", "bias"):
            wanted = exact[f"{theirs}.{part}"].numpy()
            error = np.abs(stored[f"{own}.{part}"] - wanted).max()
            assert error <= np.abs(wanted).max() / 127, (own, part)
    found = fields(file)
    assert found["general.architecture"] == "phi2" and found["phi2.rope.dimension_count"] == 8
    assert found["phi2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)


def test_tokens_stop_and_template_are_the_models(tmp_path):
    merged = model(tmp_path / "merged", "Llama", "smollm")
    file = tmp_path / "x.gguf"
    gguf_file.write(merged, PROMPT, file, "Apache-2.0")
    found, own = fields(file), pieces("smollm")
    names, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == ROWS, "a row without a token has a name as well"
    for text, index in own["model"]["vocab"].items():
        assert names[index] == text
    kinds = gguf.TokenType
    at = {token["content"]: token["id"] for token in own["added_tokens"]}
    assert types[at["<end>"]] == kinds.CONTROL and types[at["Patient:"]] == kinds.USER_DEFINED
    assert types[-1] == kinds.UNUSED and types[100] == kinds.NORMAL
    assert found["tokenizer.ggml.eos_token_id"] == at["<end>"]
    assert found["tokenizer.ggml.pre"] == "smollm" and not found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.chat_template"] == PROMPT.chat_template()
    assert found["general.license"] == "Apache-2.0"


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    llama = model(tmp_path / "llama", "Llama", "other")
    with pytest.raises(UserError, match="splits text by is not known"):
        gguf_file.write(llama, PROMPT, tmp_path / "x.gguf")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    longer = model(tmp_path / "longer", "Llama", rope_scaling=scaled)
    with pytest.raises(UserError, match="positions are scaled"):
        gguf_file.write(longer, PROMPT, tmp_path / "x.gguf")
    other = {"architectures": ["OlmoForCausalLM"]}
    assert "OlmoForCausalLM is none of" in gguf_file.why_not(other, pieces("gpt-2"))
    assert not (tmp_path / "x.gguf").exists()
