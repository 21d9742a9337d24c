"""Where a setting comes from (YAML, earlier stage, flags), and what a wrong one should be."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from liteguard import shown, yaml_text
from liteguard.config.config import FROM_BASE, Config
from liteguard.config.data import SourceSection
from liteguard.config.measuring import SetSection
from liteguard.config.training import REFUSED_KEYS
from liteguard.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
# What other tools call our keys.
OTHER_NAMES = {
    "learning_rate": ("lr",),
    "max_steps": ("epochs", "num_epochs", "num_train_epochs", "steps"),
    "batch_size": ("bs", "micro_batch_size", "per_device_train_batch_size"),
    "gradient_accumulation": ("ga", "grad_accum", "gradient_accumulation_steps"),
    "max_length": ("seq_len", "seq_length", "max_seq_len", "max_seq_length", "sequence_len")
    + ("cutoff_len", "block_size"),
    "lr_scheduler": ("scheduler", "lr_scheduler_type"),
    "warmup_steps": ("warmup",),
    "weight_decay": ("wd",),
    "max_grad_norm": ("grad_clip", "gradient_clipping"),
    "optimizer": ("optim",),
    "early_stopping_patience": ("patience",),
    "lora_rank": ("r", "rank", "lora_r"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "lora_targets": ("target_modules", "lora_target", "lora_target_modules"),
    "kv_cache_length": ("kv_cache_max_len", "cache_length", "max_cache_length"),
    "prefill_lengths": ("prefill_seq_len", "prefill_seq_lens", "prefill_lens"),
    "quantize": ("recipe", "quantization_recipe"),
    "preference_loss": ("loss_type",),
    "beta": ("dpo_beta",),
    "sft_weight": ("rpo_alpha",),
}
# What other tools call our sections.
SECTION_NAMES = {
    **dict.fromkeys(("stage1", "pretrain", "pretraining", "cpt"), ("domain",)),
    **dict.fromkeys(("stage2", "sft", "instruct"), ("instruction",)),
    **dict.fromkeys(("stage3", "dpo", "preference"), ("safety",)),
    **dict.fromkeys(("train", "training", "trainer"), ("domain", "instruction", "safety")),
    **dict.fromkeys(("export", "convert"), ("compress",)),
}

# Keys joined by dots: no section lies deeper.
_SETTING = re.compile(r"[A-Za-z0-9_-]{1,60}(\.[A-Za-z0-9_-]{1,60}){0,5}")
# Settings whose keys are the user's own: columns and kinds of rows.
OF_THE_USER = ("columns", "kinds", "kind_weights")
MOST_PROBLEMS = 12  # that a message names
# What of a record's configuration is no description of what was made, but of its maker's machine,
# files and services, or a permission: it is taken from the user's own YAML and flags only.
OWN = (
    *("data.cache_dir", "evaluate.llm_judge", "evaluate.sets"),
    *("model.trust_remote_code", "compress.python"),
    *("domain.report_to", "instruction.report_to", "safety.report_to"),
)


def available_configs() -> dict[str, Path]:
    """model_type -> YAML path for every shipped configuration."""
    found = {}
    for path in sorted(CONFIG_DIR.glob("*.yaml")):
        found[path.stem] = path
        own = _read_file(path)
        # A variant such as phi-2_8gb extends another file, which owns the model_type.
        if "model_type" in own and "extends" not in own:
            found.setdefault(own["model_type"], path)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file with its `extends:` chain merged in (relative to the file)."""
    chain: list[Path] = []

    def load(file: Path) -> dict[str, Any]:
        if file.resolve() in chain:
            raise UserError(f"{file}: 'extends' runs in a circle: {[p.name for p in chain]}")
        chain.append(file.resolve())
        values = _read_file(file)
        parent = values.pop("extends", None)
        if parent is not None and not isinstance(parent, str):
            raise UserError(
                f"{file}: extends must be the name of another YAML file, not {shown.brief(parent)}."
            )
        return deep_merge(load(file.parent / parent), values) if parent else values

    return load(Path(path))


def _read_file(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is a directory, a pipe or a device, not a YAML file.")
        if file.stat().st_size > yaml_text.LONGEST:
            raise UserError(f"{file} has more than {yaml_text.LONGEST:,} bytes: no configuration.")
        values = yaml_text.load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(
            f"No configuration file {file}.\nShipped ones: "
            f"{', '.join(p.name for p in sorted(CONFIG_DIR.glob('*.yaml')))}"
        ) from None
    except (yaml_text.BadYaml, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not a readable YAML file: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{file} must hold sections (model:, prompt:, ...), not a {type(values).__name__}."
        )
    return _spelled(values)


def _spelled(value: Any) -> Any:
    """`license`, the field's usual spelling, as our key `licence`. Raises UserError for both."""
    if isinstance(value, dict):
        if {"license", "licence"} <= {*value}:
            raise UserError(
                f"license ({shown.brief(value['license'])}) and licence "
                f"({shown.brief(value['licence'])}) are one key in two spellings: give one of them."
            )
        return {
            "licence" if k == "license" else k: v if k in OF_THE_USER else _spelled(v)
            for k, v in value.items()
        }
    return [_spelled(entry) for entry in value] if isinstance(value, list) else value


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top; mappings merge, everything else is replaced.

    Keys of a prompt above `prompt: from_base` stay beside it: they change the base's own.
    An empty mapping of the user's own keys (`OF_THE_USER`) replaces one, too.
    """
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = merged.get(key)
        if key == "prompt" and isinstance(value, Mapping) and old == FROM_BASE:
            merged[key] = {FROM_BASE: True, **copy.deepcopy(value)}
        elif key == "prompt" and isinstance(value, Mapping) and value.get(FROM_BASE):
            merged[key] = copy.deepcopy(value)  # what lies below is not the base's
        elif isinstance(value, Mapping) and not value and key in OF_THE_USER:
            merged[key] = {}
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = deep_merge(old, value)
        elif isinstance(value, Mapping) and isinstance(old, list) and _are_indices(value, old):
            # --set data.domain.0.path=FILE changes one entry of a list.
            merged[key] = [
                _replaced(entry, value[str(i)]) if str(i) in value else entry
                for i, entry in enumerate(old)
            ]
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _replaced(old: Any, new: Any) -> Any:
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    return deep_merge(old, new) if both else copy.deepcopy(new)


def _are_indices(value: Mapping[str, Any], entries: list[Any]) -> bool:
    return set(value) <= {str(index) for index in range(len(entries))}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {'section.key': value}; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def parse_setting(setting: str) -> tuple[str, dict[str, Any]]:
    """'section.key=value' -> ('section.key', nested mapping); the value is read as YAML."""
    name, equals, text = setting.partition("=")
    name = name.strip()
    if not equals or not _SETTING.fullmatch(name):
        raise UserError(
            f"--set {shown.brief(setting)}: write --set section.key=value, e.g. "
            "--set domain.max_steps=50, or data.domain.0.path=FILE for an entry of a list"
        )
    try:
        value = yaml_text.load(text)
    except yaml_text.BadYaml as error:
        raise UserError(f"--set {name}: its value cannot be read: {error}.") from None
    nested: Any = value
    for key in reversed(name.split(".")):
        nested = {key: nested}
    return name, _spelled(nested)


def valid_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every 'section.key' that a YAML may hold."""
    names = []
    for key, field in model.model_fields.items():
        names.append(f"{prefix}{key}")
        if section := _section(field.annotation):
            names += valid_names(section, f"{prefix}{key}.")
    return names


def _section(kind: Any) -> type[BaseModel] | None:
    """The section that a field holds, or may hold; entries of a list are none."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next(
        (own for own in kinds if isinstance(own, type) and issubclass(own, BaseModel)), None
    )


def _nearest(path: tuple[Any, ...]) -> str:
    """A hint naming the valid key closest to an unknown one."""
    key = str(path[-1]).lower().replace("-", "_")
    siblings = _siblings(path)

    def called(name: str) -> bool:
        own = name.rsplit(".", 1)[-1]
        return key == own or key in OTHER_NAMES.get(own, ())

    here = [name for name in siblings if called(name)]
    if len(path) == 1:
        here = here or [*SECTION_NAMES.get(key, ())]
    here = here or [name for name in siblings if key in name.split("_")]
    # A key without its section is more likely than a misspelt one.
    elsewhere = [name for name in valid_names() if called(name)]
    alike = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    near = here[:3] or elsewhere[:3] or alike
    if not near:
        return f"valid here: {', '.join(siblings)}"
    return f"did you mean {' or '.join(repr(name) for name in near)}?"


def _siblings(path: tuple[Any, ...]) -> list[str]:
    """The keys that are valid where an unknown one stands."""
    if len(path) > 2 and path[:2] == ("evaluate", "sets"):
        return [*SetSection.model_fields]
    if len(path) > 2 and path[0] == "data":
        return [*SourceSection.model_fields]
    section = [str(part) for part in path[:-1]]
    return [n.rsplit(".", 1)[-1] for n in valid_names() if n.split(".")[:-1] == section]


def validate(values: Mapping[str, Any], where: str) -> Config:
    """Build a Config or raise one UserError that lists every problem."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        lines = [_line(problem) for problem in problems[:MOST_PROBLEMS]]
        if more := len(problems) - len(lines):
            lines.append(f"  ... and {more} more")
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{count} in the configuration ({where}):\n" + "\n".join(lines)) from None


def _line(problem: Any) -> str:
    """What is wrong with one value. That of a judge is not shown: it may be a key or a password."""
    location = problem["loc"]
    name = ".".join(str(part) for part in location) or "(file)"
    if problem["type"] == "extra_forbidden":
        if why := REFUSED_KEYS.get(str(location[-1])):
            return f"  {name}: not offered: {why}."
        return f"  {name}: unknown key; {_nearest(location)}"
    got = problem.get("input")
    hidden = isinstance(got, Mapping) or "llm_judge" in location or problem["type"] == "secret"
    what = problem["msg"].removeprefix("Value error, ")
    return f"  {name}: {what}" + ("" if hidden else f" (got {shown.brief(got)})")


def of_a_record(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A record's configuration without what is the user's own to say, and which of that it had."""
    kept, left = copy.deepcopy(dict(values)), []
    defaults = Config()
    for name in OWN:
        section, key = name.split(".")
        inside = kept.get(section)
        default = getattr(getattr(defaults, section), key)
        if isinstance(inside, dict) and inside.pop(key, default) != default:
            left.append(name)
    return kept, left


def build(
    layers: list[tuple[str, Mapping[str, Any]]],
) -> Config:
    """Merge named layers, first to last, and remember which layer set each value."""
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, values in layers:
        merged = deep_merge(merged, values)
        for key in flatten(values):
            sources[key] = name
    config = validate(merged, " < ".join(name for name, _ in layers) or "defaults")
    config._sources = sources
    return config


def find_config(
    model_type: str | None = None, model: str | None = None, config: str | None = None
) -> Path:
    """The YAML that the flags name: --config FILE wins, then --model_type, then --model."""
    if config:
        return Path(config)
    shipped = available_configs()
    if model_type:
        if model_type in shipped:
            return shipped[model_type]
        near = difflib.get_close_matches(model_type, shipped, n=1)
        raise UserError(
            f"Unknown --model_type {model_type!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + f"\nAllowed: {', '.join(sorted(shipped))}; or --config FILE with your own YAML."
        )
    if model:
        for path in dict.fromkeys(shipped.values()):
            if read_yaml(path).get("model", {}).get("name", "").lower() == model.lower():
                return path
        known = sorted({read_yaml(p).get("model", {}).get("name", "") for p in shipped.values()})
        raise UserError(
            f"No shipped configuration has the base model {model!r}.\n"
            f"Known: {', '.join(known)}.\n"
            "For another model copy one of configs/*.yaml, change its model and prompt sections, "
            "and pass it with --config FILE."
        )
    raise UserError(
        "Say which model: --model_type NAME, --model ID or --config FILE.\n"
        f"Model types: {', '.join(sorted(shipped))}"
    )
