"""LoRA adapter + base model -> one 16-bit model, on the CPU.

How the sum is made: merged.py. Here it is saved with what the device needs to know.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import merged, model_files, writing
from liteguard.errors import UserError, WorkError
from liteguard.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> dict[str, int]:
    """Token -> id for the prompt's stop, pad and (where it has one) BOS token.

    Raises:
        UserError: one of them is not a single token of the tokenizer.
    """
    ids, missing = {}, []
    vocabulary = tokenizer.get_vocab()
    for token in filter(None, [*prompt.stop_tokens, prompt.pad_token, prompt.bos_token]):
        spelled = tokenizer.encode(token, add_special_tokens=False)
        if token not in vocabulary or spelled != [vocabulary[token]]:
            missing.append(f"{token!r} (becomes {len(spelled)} tokens)")
        else:
            ids[token] = vocabulary[token]
    if missing:
        existing = [token for token in tokenizer.get_added_vocab()][:12]
        raise UserError(
            f"the prompt's special tokens must be single tokens of the tokenizer; not so: "
            f"{', '.join(missing)}. Special tokens it has: {', '.join(existing) or 'none'}"
        )
    return ids


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and (
        (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
    )


def merge_adapter(
    base_dir: Path | str,
    adapter_dir: Path | None,
    output_dir: Path,
    prompt: Prompt,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base and save the result as 16-bit safetensors with a tokenizer.

    Args:
        base_dir: directory with safetensors, or a hub id.
        adapter_dir: PEFT adapter; None saves the base itself with the prompt's special tokens.
        output_dir: written beside itself first; appears complete or not at all.
        prompt: gives stop tokens (`generation_config.eos_token_id`), pad token, chat template.
        revision: commit, tag or branch of a hub id: the one that the adapter was trained on.
        trust_remote_code: as `model.trust_remote_code`.

    Returns:
        ``dtype``, ``parameters``, ``changed_tensors``, ``largest_weight``, ``largest_delta``
        (Frobenius norm of a layer's change over that of its weight), ``eos_token_id``,
        ``pad_token_id``.

    Raises:
        UserError: not a base or adapter directory, special tokens missing, output exists.
        WorkError: the adapter changes nothing, or the merged weights are not finite.

    Memory: the model as it is stored, plus one layer in float32.
    """
    import transformers

    output_dir = Path(output_dir)
    adapter_dir = Path(adapter_dir) if adapter_dir is not None else None
    if adapter_dir is not None:
        model_files.check_adapter(adapter_dir)
        model_files.check_tokenizer(adapter_dir, trust_remote_code)
    if isinstance(base_dir, Path) and not (base_dir / "config.json").is_file():
        raise UserError(f"no config.json in {base_dir}: not a model directory")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} exists already; choose another directory or remove it")

    base = {"revision": revision, "trust_remote_code": trust_remote_code}
    own = _has_tokenizer(adapter_dir)
    home, options = (adapter_dir, {"trust_remote_code": False}) if own else (base_dir, base)
    with model_files.reading(str(home), "holds no tokenizer that can be used"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(home), **options)
    ids = special_token_ids(tokenizer, prompt)
    config = transformers.AutoConfig.from_pretrained(str(base_dir), **base)
    model = merged.load_stored(base_dir, **base)
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {highest} and the embedding only {rows} rows: the "
            "tokenizer is not this model's, or a token was added without resizing"
        )
    made = merged.Merge()
    if adapter_dir is not None:
        made = merged.merge_adapter(model, adapter_dir)
        if not made.changed:
            raise WorkError(
                f"merging {adapter_dir} changed no weight: the adapter is untrained (its B "
                "matrices are zero) or was not loaded"
            )
    largest = merged.largest_weight(model)
    dtype = merged.stored_type(getattr(config, "dtype", None), largest)
    merged.round_to(model, dtype)
    model.config.dtype = dtype

    stops = [ids[token] for token in prompt.stop_tokens]
    pad = ids[prompt.pad_token]
    # Sampling defaults of the base (temperature and so on) are not this model's.
    model.generation_config = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=pad)
    model.config.eos_token_id, model.config.pad_token_id = stops[0], pad
    tokenizer.eos_token, tokenizer.pad_token = prompt.end_token, prompt.pad_token
    tokenizer.chat_template = prompt.chat_template()

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with writing.replacing(output_dir) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(value.numel() for value in model.parameters()),
        "changed_tensors": made.changed,
        "largest_weight": largest,
        "largest_delta": made.largest_delta,
        "eos_token_id": stops,
        "pad_token_id": pad,
    }
