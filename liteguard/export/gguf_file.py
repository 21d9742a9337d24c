"""A merged model as GGUF, for llama.cpp and Ollama: `compress_model.py --also gguf`.

8-bit weights (Q8_0: a scale for each 32), the tokenizer, stop token and chat template in one file.
The `gguf` package knows names and formats; what is here is what each family keeps elsewhere or in
another order. A family or tokenizer that is not known is refused by name: llama.cpp would compute
something, and nobody would see that it is something else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, machine, models, shown, writing
from liteguard.config import Config
from liteguard.errors import UserError
from liteguard.export import merge, outputs
from liteguard.progress import ticking
from liteguard.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np

# Transformers' class -> llama.cpp's architecture.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "PhiForCausalLM": "phi2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What stands before byte-level BPE -> llama.cpp's name of it (llama-vocab.cpp).
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
_QUERY_OR_KEY = re.compile(r"\.self_attn\.([qk])_proj\.(?:weight|bias)$")


def why_not(architecture: dict[str, Any], tokenizer: dict[str, Any]) -> str | None:
    """Why no GGUF can be written of a model; None where one can.

    Args:
        architecture: the content of config.json.
        tokenizer: the content of tokenizer.json.
    """
    [name] = architecture.get("architectures") or ["a model without a class"]
    if name not in FAMILIES:
        return f"{name} is none of {', '.join(FAMILIES)}"
    # Transformers wrote rope_scaling until version 5.
    scaling = architecture.get("rope_parameters") or architecture.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        return f"its positions are scaled ({kind}), which is not written yet"
    if tokenizer["model"]["type"] != "BPE" or _splits(tokenizer) is None:
        return "llama.cpp's name for what its tokenizer splits text by is not known"
    return None


def _splits(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for what splits text before BPE; None where it is not known."""
    before = tokenizer.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return _SPLITS.get(parts[0]["pattern"].get("Regex", ""))
    return None


def beside(
    output: Path, config: Config, base: str, revision: str | None, checkpoint: Path
) -> dict[str, Any]:
    """Merge a checkpoint and write a GGUF with a record, NAME.gguf.json, and say so.

    Args:
        output: the `.gguf` file; one that was made of the same is kept.
        config: prompt, licence, whether the base's own code may run.
        base: directory of the base model.
        revision: its hub commit, or None.
        checkpoint: the final stage.

    Returns the record: ``inputs``, ``sha256``, ``bytes``, ``tensors``.
    """
    adapter = checkpoints.read_stage(checkpoint, "safety").adapter
    identity = models.base_identity(base, revision)
    inputs = {"adapter": adapter, "base": identity, "prompt": config.prompt.model_dump()}
    inputs = json.loads(json.dumps(inputs))
    made = checkpoints.read_dict(_record(output)) or {}
    same = made.get("inputs") == inputs and output.is_file()
    if same and made.get("sha256") == checkpoints.sha256_file(output):
        print(f"{output} was made from the same model: kept")
        outputs.claim(output)
        if (left := checkpoints.work_directory(output)).is_dir():  # a kill while it was deleted
            checkpoints.drop_work(left)
        return made
    # The merged model, and 8 of its 16 bits again.
    stored = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    machine.check_disk(output.parent, 1.6 * stored / 1e9)
    work = outputs.start_work(output, inputs)
    merged, file = work / "merged", work / output.name
    trusted = config.model.trust_remote_code
    parts = base, checkpoint, merged, config.prompt, revision, trusted
    writing.remove(merged)
    licence = config.model.licence
    with ticking("GGUF"):
        machine.in_child("merge for GGUF", merge.merge_adapter, *parts)
        found = machine.in_child("GGUF", write, merged, config.prompt, file, licence)
    made = {"inputs": inputs, "sha256": checkpoints.sha256_file(file), **found}
    # The record first: by it a later run knows whose file stands there.
    writing.write_json(_record(output), made)
    writing.put(file, output)
    checkpoints.drop_work(work)
    print(f"wrote {output} ({shown.size(made['bytes'])}), 8 bits, not measured here")
    return made


def _record(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def check(output: Path, architecture: Any, tokenizer: Any) -> None:
    """Raise UserError, before the work, where no GGUF can be written (`why_not`), or as
    `check_place` does.

    `architecture` and `tokenizer` are Transformers': a configuration, a fast tokenizer.
    """
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())
    if why := why_not(architecture.to_dict(), pieces):
        raise UserError(f"{output}: no GGUF can be written of this model: {why}")
    check_place(output)


def check_place(output: Path) -> None:
    """Raise UserError where another's file stands in a GGUF's way: it is never replaced."""
    checkpoints.check_work(output)
    taken = [path for path in (output, _record(output)) if path.exists() or path.is_symlink()]
    if any(not path.is_file() or path.is_symlink() or writing.is_mount(path) for path in taken):
        raise UserError(f"{output} or its record is no plain file: a GGUF cannot take its place")
    if taken and "tensors" not in (checkpoints.read_dict(_record(output)) or {}):
        raise UserError(
            f"{taken[0]} exists and was not written by LiteGuard. Move it away, or choose another "
            "--output."
        )


def write(
    merged: Path,
    prompt: Prompt,
    output: Path,
    licence: str | None = None,
    matrices: str = "Q8_0",
) -> dict[str, Any]:
    """Write a merged model; returns ``bytes`` and ``tensors``. One tensor is in memory at a time.

    `matrices` is the format of matrices, Q8_0 or F16; all else is float32. Raises UserError where
    `why_not` says why.
    """
    import gguf
    import numpy as np

    architecture = json.loads((merged / "config.json").read_text())
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    if why := why_not(architecture, tokenizer):
        raise UserError(f"no GGUF can be written of this model: {why}")
    [name] = architecture["architectures"]
    writer = gguf.GGUFWriter(str(output), FAMILIES[name])
    _metadata(writer, architecture, licence)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrices}"])
    _vocabulary(writer, tokenizer, prompt, architecture["vocab_size"])
    kinds = []
    for own, data in _tensors(merged, architecture):
        kinds.append(kind := _kind(data, matrices))
        # Told by their numbers' type; Q8_0, which none has, by its bytes.
        plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        shape = data.shape if plain else gguf.quants.quant_shape_to_byte_shape(data.shape, kind)
        stored = np.dtype(plain or np.uint8)
        size = math.prod(shape) * stored.itemsize
        writer.add_tensor_info(own, shape, stored, size, None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, (_, data) in zip(kinds, _tensors(merged, architecture), strict=True):
        writer.write_tensor_data(gguf.quants.quantize(data, kind))
    writer.close()
    return {"bytes": output.stat().st_size, "tensors": len(kinds)}


def _kind(data: np.ndarray, matrices: str) -> Any:
    """A tensor's format: float32 for vectors and for rows that are no whole blocks."""
    import gguf

    kind = gguf.GGMLQuantizationType[matrices]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    whole = data.ndim == 2 and data.shape[1] % block == 0
    return kind if whole else gguf.GGMLQuantizationType.F32


def _metadata(writer: Any, architecture: dict[str, Any], licence: str | None) -> None:
    """Sizes and constants, under llama.cpp's keys."""
    import gguf

    heads = architecture["num_attention_heads"]
    head = architecture.get("head_dim") or architecture["hidden_size"] // heads
    rope = architecture.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or architecture.get("partial_rotary_factor") or 1
    base = rope.get("rope_theta") or architecture.get("rope_theta") or 10000.0
    writer.add_name("LiteGuard")
    if licence:
        writer.add_license(licence)
    writer.add_block_count(architecture["num_hidden_layers"])
    writer.add_context_length(architecture["max_position_embeddings"])
    writer.add_embedding_length(architecture["hidden_size"])
    writer.add_feed_forward_length(architecture["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(architecture.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(architecture["vocab_size"])
    writer.add_rope_dimension_count(int(share * head))
    writer.add_rope_freq_base(base)
    if "layer_norm_eps" in architecture:
        writer.add_layer_norm_eps(architecture["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(architecture["rms_norm_eps"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: Any, tokenizer: dict[str, Any], prompt: Prompt, rows: int) -> None:
    """Tokens, merges, special ids and the chat template; rows without a token are unused ones."""
    import gguf

    kinds = gguf.TokenType
    names = [f"[PAD{index}]" for index in range(rows)]
    types = [int(kinds.UNUSED)] * rows
    for text, index in tokenizer["model"]["vocab"].items():
        names[index], types[index] = text, int(kinds.NORMAL)
    ids = {}
    for token in tokenizer["added_tokens"]:
        ids[token["content"]] = index = token["id"]
        names[index] = token["content"]
        types[index] = int(kinds.CONTROL if token["special"] else kinds.USER_DEFINED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splits(tokenizer))
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ids |= {name: index for index, name in enumerate(names) if name not in ids}
    writer.add_eos_token_id(ids[prompt.end_token])
    if prompt.bos_token:
        writer.add_bos_token_id(ids[prompt.bos_token])
    if prompt.pad_token:
        writer.add_pad_token_id(ids[prompt.pad_token])
    writer.add_add_bos_token(bool(prompt.bos_token))
    writer.add_chat_template(prompt.chat_template())


def _tensors(merged: Path, architecture: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, float32 content) of every tensor, one at a time."""
    import gguf
    from safetensors import safe_open

    [name] = architecture["architectures"]
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    own = gguf.get_tensor_name_map(known[FAMILIES[name]], architecture["num_hidden_layers"])
    heads = architecture["num_attention_heads"]
    of = {"q": heads, "k": architecture.get("num_key_value_heads") or heads}
    tied = architecture.get("tie_word_embeddings", False)
    for file in sorted(merged.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                if tied and key == "lm_head.weight":
                    continue
                to = own.get_name(key, try_suffixes=(".weight", ".bias"))
                if to is None:
                    raise UserError(f"{file.name}: llama.cpp has no place for {key}")
                data = tensors.get_tensor(key).float().numpy()
                if FAMILIES[name] == "llama" and (found := _QUERY_OR_KEY.search(key)):
                    data = _neighbours(data, of[found[1]])
                yield to, data


def _neighbours(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key as llama.cpp's "llama" rotates them: neighbouring values together.

    Transformers rotates the two halves of a head.
    """
    split = data.reshape(heads, 2, -1, *data.shape[1:])
    return split.swapaxes(1, 2).reshape(data.shape)
