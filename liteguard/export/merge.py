"""LoRA adapter + base model -> one 16-bit model, on the CPU.

How the sum is made: merged.py. Here it is saved with what the device needs to know.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import merged
from liteguard.errors import UserError, WorkError
from liteguard.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logit offset of a silenced token; exact in both 16-bit types, far below any trained logit.
SILENT_BIAS = -10000.0
SILENT_SCALE = 0.01
# For tokens that prompts may hold. The first layer normalises what it reads, so a tenth of an
# embedding still says which token it was, and a tenth of a logit does not win.
READ_ONLY_SCALE = 0.1


def special_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> dict[str, int]:
    """Token -> id for the prompt's stop and pad tokens.

    Raises:
        UserError: one of them is not a single token of the tokenizer.
    """
    ids, missing = {}, []
    vocabulary = tokenizer.get_vocab()
    for token in [*prompt.stop_tokens, prompt.pad_token]:
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


def _target_type(declared: torch.dtype | None, largest: float) -> torch.dtype:
    """The 16-bit type to save in: the base's own, or for a float32 base the one that fits."""
    import torch

    if declared in (torch.float16, torch.bfloat16):
        merged.check_range(largest, declared)
        return declared
    return torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16


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
    if adapter_dir is not None and not (adapter_dir / "adapter_config.json").is_file():
        raise UserError(f"no adapter_config.json in {adapter_dir}: not a LoRA checkpoint")
    if isinstance(base_dir, Path) and not (base_dir / "config.json").is_file():
        raise UserError(f"no config.json in {base_dir}: not a model directory")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} exists already; choose another directory or remove it")

    base = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(str(adapter_dir))
        if _has_tokenizer(adapter_dir)
        else transformers.AutoTokenizer.from_pretrained(str(base_dir), **base)
    )
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
    largest = merged.largest_weight(model)
    dtype = _target_type(getattr(config, "dtype", None), largest)
    for value in model.parameters():
        value.data = value.data.to(dtype)
    model.config.dtype = dtype

    stops = [ids[token] for token in prompt.stop_tokens]
    pad = ids[prompt.pad_token]
    # Sampling defaults of the base (temperature and so on) are not this model's.
    model.generation_config = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=pad)
    model.config.eos_token_id, model.config.pad_token_id = stops[0], pad
    tokenizer.eos_token, tokenizer.pad_token = prompt.end_token, prompt.pad_token
    tokenizer.chat_template = prompt.chat_template()

    temporary = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    if output_dir.exists():
        output_dir.rmdir()
    os.replace(temporary, output_dir)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(value.numel() for value in model.parameters()),
        "changed_tensors": made.changed,
        "largest_weight": largest,
        "largest_delta": made.largest_delta,
        "eos_token_id": stops,
        "pad_token_id": pad,
    }


def silence_tokens(
    model_dir: Path, ids: Sequence[int], read_only: Sequence[int] = ()
) -> dict[str, Any]:
    """Make a saved model unable to write the tokens `ids`, in place and in its own type.

    For tokens that the device's tokenizer cannot show (`TokenizerReport.silenced`): none of them
    is ever in a prompt, so only the output changes. `read_only` are those that a prompt may hold
    (`TokenizerReport.single_bytes`). An output layer with a bias gets a very negative one. Without
    a bias, the tokens' rows are made a hundred times smaller (read-only ones ten times), so that
    their logits stay near zero, below the winner's; with tied weights this changes their input
    embeddings too, so the result is for export only. (Rows turned against the mean hidden state
    look stronger and are not: SmolLM2's states change sign after some words, and all silenced
    tokens win at once.) The second way is for greedy decoding: a sampler can still draw them.

    Returns:
        ``silenced`` (count), ``method`` ("bias", "rows" or "none"), and for "rows"
        ``smallest_margin`` (winner's logit less the highest silenced one, over a few sentences).

    Raises:
        WorkError: a silenced token would still win somewhere in these sentences (nothing saved).
    """
    import torch
    import transformers

    model_dir = Path(model_dir)
    if not ids and not read_only:
        return {"silenced": 0, "method": "none"}
    declared = json.loads((model_dir / "config.json").read_text()).get("dtype")
    dtype = getattr(torch, declared or "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=dtype)
    head = model.get_output_embeddings()
    hidden = torch.tensor(sorted(ids), dtype=torch.long)
    read = torch.tensor(sorted(read_only), dtype=torch.long)
    chosen = torch.cat([hidden, read])
    result: dict[str, Any] = {"silenced": len(chosen)}
    with torch.no_grad():
        if head.bias is not None:
            head.bias[chosen] = SILENT_BIAS
            result["method"] = "bias"
        else:
            # Small and not zero: the quantiser divides by the largest weight of a row.
            head.weight[hidden] = head.weight[hidden] * SILENT_SCALE
            head.weight[read] = head.weight[read] * READ_ONLY_SCALE
            margin = _smallest_margin(model, model_dir, chosen)
            model.to(dtype)
            result |= {"method": "rows", "smallest_margin": margin}
            if margin <= 0:
                raise WorkError(
                    f"tokens that the device cannot show could not be silenced in {model_dir}: "
                    f"one of them wins by {-margin:.1f} in a test sentence"
                )
    model.save_pretrained(model_dir, safe_serialization=True)
    return result


def _smallest_margin(model: PreTrainedModel, model_dir: Path, chosen: torch.Tensor) -> float:
    """Least of (winner's logit - highest logit of `chosen`) over a few sentences, in float32."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model_dir))
    sentences = [
        "Iron deficiency causes tiredness, pale skin and shortness of breath; see a doctor.",
        "Instruct: What is asthma?\nOutput: Asthma is a disease of the airways in the lungs.",
        "1. Take 500 mg twice a day.\n2. Do not exceed 4 g in 24 hours (\u2265 60 kg).\n",
        "I cannot help with that. If you are in danger, call your local emergency number now.",
        "There are guidelines to follow. In pregnancy, the American College recommends rest.",
    ]
    model.float()  # 16-bit matrix products are slow or missing on CPUs; these are few tokens
    smallest = math.inf
    for sentence in sentences:
        ids = tokenizer.encode(sentence, add_special_tokens=False, return_tensors="pt")
        logits = model(input_ids=ids).logits[0]
        silenced = logits[:, chosen].max(1).values
        logits[:, chosen] = -math.inf
        smallest = min(smallest, (logits.max(1).values - silenced).min().item())
    return smallest
