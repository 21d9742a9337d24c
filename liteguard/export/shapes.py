"""What litert-torch can write of a model's shape, by name: nothing is converted for the answer.

A token looks back no further than the KV cache. A window at least as long as the cache (Phi-3-mini:
2,047 tokens) therefore changes nothing there, and the converter, which has no mask for a window in
all layers, may read a configuration without it. Training and evaluation keep the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liteguard import writing

# Layers that a converted model's cache of keys and values can stand for.
_LAYERS = ("full_attention", "sliding_attention")
# Families whose models were converted and proven (benchmarks/support_table.py).
_CONVERTED = ("gemma3_text", "llama", "mistral", "phi", "qwen2", "qwen3")
# Their attention has a share that goes to no token.
_SINKS = ("gpt_oss",)
# The converter has a mask for this family's window.
_MASKED = ("mistral",)


def wrong(architecture: Any, converter: str, room: int) -> str:
    """Why litert-torch cannot convert a transformers config's model, or an empty string.

    `room`: tokens of the KV cache, further than which no token looks back.
    """
    text = architecture.get_text_config()
    kind = architecture.model_type
    if text is not architecture:
        return (
            f"the {kind!r} architecture holds a text model among others (for images or sound); "
            "take a base model that is text only"
        )
    if getattr(text, "num_key_value_heads", None) is None:
        return (
            f"the {kind!r} architecture has no num_key_value_heads, which the converter reads "
            "(GPT-2 and Pythia families)"
        )
    if other := sorted({*(getattr(text, "layer_types", None) or ())}.difference(_LAYERS)):
        return (
            f"the {kind!r} architecture has layers of kind {', '.join(other)}, and neither the "
            "proof nor the runtime's cache knows them"
        )
    if kind in _SINKS or getattr(text, "kv_lora_rank", None):
        what = "attention sinks" if kind in _SINKS else "latent attention (kv_lora_rank)"
        return f"the {kind!r} architecture has {what}, which the converter's attention has not"
    return _wrong_window(text, room) or _wrong_positions(text, converter)


def _wrong_window(text: Any, room: int) -> str:
    names = "model_type", "layer_types", "sliding_window"
    window = _window_everywhere({name: getattr(text, name, None) for name in names})
    if not 0 < window < room:
        return ""
    return (
        f"the {text.model_type!r} architecture looks back {window:,} tokens in all of its layers, "
        f"for which the converter has no mask; a cache of at most {window:,} tokens never reaches "
        f"that far back (compress.kv_cache_length is {room:,})"
    )


def _wrong_positions(text: Any, converter: str) -> str:
    kind = _long_positions(text)
    if converter != "v2" or not kind:
        return ""
    return (
        f"its positions are of kind {kind}, which converter v2 cannot write (of v1, --set "
        "compress.converter=v1, it is not known)"
    )


def _long_positions(text: Any) -> str:
    """The kind of rotary frequencies that depend on a text's length, or an empty string."""
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    found = {part.get("rope_type") for part in parts}
    return next((kind for kind in ("dynamic", "longrope") if kind in found), "")


def not_known(architecture: Any) -> str:
    """Why nobody knows whether a model is converted rightly, or an empty string: a shape that
    `wrong` has nothing against may still be one that the converter gets wrong."""
    text = architecture.get_text_config()
    if positions := _long_positions(text):
        return f"models with {positions} positions were"
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    if any((getattr(text, name, None) or 0) > 1 for name in names):
        return "models with experts were"
    kind = architecture.model_type
    return "" if kind in _CONVERTED else f"the {kind!r} architecture was"


def _window_everywhere(settings: Mapping[str, Any]) -> int:
    """Tokens that all layers of a config.json look back, where the converter has no mask for it; 0
    without such a window."""
    if settings.get("model_type") in _MASKED or settings.get("layer_types"):
        return 0
    return settings.get("sliding_window") or 0


def without_unreachable(model_dir: Path, folder: Path, room: int) -> Path:
    """A model's directory for the converter: `model_dir`, or, where its window is not reached
    within `room` tokens, a new `folder` of links with a config.json that has none."""
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if not room <= _window_everywhere(settings):
        return model_dir
    folder.mkdir()
    for path in model_dir.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    writing.write_json(folder / "config.json", {**settings, "sliding_window": None})
    return folder
