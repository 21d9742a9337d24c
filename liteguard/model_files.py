"""A folder with a model, taken as somebody else's: weights in safetensors, no code, or a message.

transformers and peft are made to open whatever a folder holds. They fall back to pickled weights,
which can run code when they are opened; ask on the terminal whether to run code that lies beside
the weights; follow an index out of the folder; and end in a dozen classes of errors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liteguard import failures
from liteguard.errors import UserError, first_line

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What stage 1 sets of an adapter's configuration, and what describes its making. The rest has
# PEFT's default: other values load other modules, replace layers, or change the base model.
_ADAPTER_KEYS = {"r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "target_modules"}
_ADAPTER_KEYS |= {"task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision"}
_ADAPTER_KEYS |= {"inference_mode", "fan_in_fan_out"}
TRUST = "--set model.trust_remote_code=true"


def check_base(directory: str | Path, trusted: bool) -> None:
    """Raise UserError for a base model whose files point out of it or need code of their own."""
    directory = Path(directory)
    for path in directory.iterdir():
        if not path.is_file() and not path.is_dir() and path.exists():
            raise UserError(f"{path} is a pipe or a device: a model is made of files.")
    config = _read(directory / CONFIG)
    if (directory / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{directory} holds an {ADAPTER_CONFIG}, which names another model to load in its "
            "place. Name the folder of the base model itself, without an adapter in it."
        )
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = _read(index).get("weight_map")
        names: list[Any] = [*shards.values()] if isinstance(shards, dict) else [shards]
        if wrong := [n for n in names if not isinstance(n, str) or not _is_shard(n)]:
            raise UserError(
                f"{index} names {wrong[0]!r}: its weights must be .safetensors files beside it. "
                "Others are not opened."
            )
        if missing := sorted({n for n in names if not (directory / n).is_file()}):
            raise UserError(
                f"{directory} is incomplete: {', '.join(missing[:5])} of {index.name} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Get the model again."
            )
    if not trusted:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind = config.get("model_type")
        known = isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if "auto_map" in config and not known:
            _refuse_code(directory / CONFIG)
        check_tokenizer(directory, trusted)


def check_tokenizer(directory: str | Path, trusted: bool) -> None:
    """Raise UserError for a tokenizer that needs code of its own and is not trusted."""
    path = Path(directory) / TOKENIZER_CONFIG
    if trusted or not path.exists():
        return
    config = _read(path)
    if "auto_map" in config:
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        name = config.get("tokenizer_class")
        if not isinstance(name, str) or tokenizer_class_from_name(name) is None:
            _refuse_code(path)


def check_adapter(directory: Path) -> None:
    """Raise UserError unless a folder holds a LoRA adapter as stage 1 makes them."""
    if not (directory / ADAPTER_CONFIG).is_file():
        raise UserError(f"no {ADAPTER_CONFIG} in {directory}: not a LoRA checkpoint")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        pickled = "only pickled ones (adapter_model.bin), which can run code when they are opened"
        found = pickled if (directory / "adapter_model.bin").exists() else "no weights"
        raise UserError(f"{directory} has no {ADAPTER_WEIGHTS}: {found}.")
    from peft import LoraConfig

    path = directory / ADAPTER_CONFIG
    config, defaults = _read(path), LoraConfig().to_dict()
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: a LoRA adapter is needed, not {config.get('peft_type')!r}.")
    for name, value in config.items():
        if name not in _ADAPTER_KEYS and value and value != defaults.get(name):
            raise UserError(
                f"{path} sets {name!r}, which no stage of this project does: the adapter is not "
                "what its record says, or was made by another tool."
            )


@contextlib.contextmanager
def reading(path: str | Path, what: str = "cannot be used") -> Iterator[None]:
    """Turn what a library raises for files that it cannot read into one UserError.

    tokenizers raises bare exceptions, safetensors and peft classes of their own. What the machine
    refused stays what it is: memory, threads, a file that may not be opened.
    """
    try:
        yield
    except Exception as error:
        if failures.explain(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{path} {what} ({detail}).\nIts files are damaged, or of another version. Get or make "
            "them again."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a directory, a pipe or a device, not a file.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: it is no JSON ({first_line(error)}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be used: it holds a {type(found).__name__}, no object.")
    return found


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name


def _refuse_code(path: Path) -> None:
    raise UserError(
        f"{path} needs Python code of its own (auto_map), which is not run unless you say so: it "
        f"can do whatever you can. If you trust where it comes from, pass {TRUST}"
    )
